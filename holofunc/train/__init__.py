"""Training: state, objective, step, evaluation, loop, hooks."""

from holofunc.train.evaluation import EvalStep, evaluate, make_eval_step
from holofunc.train.hooks import Event, Hook, Replace, Stop, checkpoint, early_stopping, every, log
from holofunc.train.loop import FitResult, fit
from holofunc.train.objective import Aux, Supervised, supervised
from holofunc.train.state import TrainState, create_state
from holofunc.train.step import Gradient, make_train_step

__all__ = [
    "Aux",
    "EvalStep",
    "Event",
    "FitResult",
    "Gradient",
    "Hook",
    "Replace",
    "Stop",
    "Supervised",
    "TrainState",
    "checkpoint",
    "create_state",
    "early_stopping",
    "evaluate",
    "every",
    "fit",
    "log",
    "make_eval_step",
    "make_train_step",
    "supervised",
]
