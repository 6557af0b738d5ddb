"""Training: state, objective, step, evaluation, loop, hooks."""

from holofunc.train.cadences import updates
from holofunc.train.evaluation import SupervisedEval, evaluate, make_eval_step
from holofunc.train.freezing import Trainable, TrainableRow, trainable, unfreeze
from holofunc.train.hooks import (
    Event,
    Hook,
    Replace,
    Report,
    RunInfo,
    Save,
    Stop,
    checkpoint,
    every,
    log,
)
from holofunc.train.loop import FitResult, fit
from holofunc.train.lr_finder import LRSearch, find_lr, smoothed
from holofunc.train.monitors import early_stopping, plateau
from holofunc.train.normalization import update_bn
from holofunc.train.objective import Aux, Supervised, supervised
from holofunc.train.state import TrainState, create_state
from holofunc.train.step import Gradient, TrainStep, make_train_step, num_samples
from holofunc.train.trackers import mlflow, profile, tensorboard, wandb
from holofunc.typing import EpochData, EvalStep, Objective

__all__ = [
    "Aux",
    "EpochData",
    "EvalStep",
    "Event",
    "FitResult",
    "Gradient",
    "Hook",
    "LRSearch",
    "Objective",
    "Replace",
    "Report",
    "RunInfo",
    "Save",
    "Stop",
    "Supervised",
    "SupervisedEval",
    "TrainState",
    "TrainStep",
    "Trainable",
    "TrainableRow",
    "checkpoint",
    "create_state",
    "early_stopping",
    "evaluate",
    "every",
    "find_lr",
    "fit",
    "log",
    "make_eval_step",
    "make_train_step",
    "mlflow",
    "num_samples",
    "plateau",
    "profile",
    "smoothed",
    "supervised",
    "tensorboard",
    "trainable",
    "unfreeze",
    "update_bn",
    "updates",
    "wandb",
]
