"""Training: state, objective, step, evaluation, loop, hooks."""

from holofunc.train.objective import Aux, Supervised, supervised
from holofunc.train.state import TrainState, create_state
from holofunc.train.step import Gradient, make_train_step

__all__ = ["Aux", "Gradient", "Supervised", "TrainState", "create_state", "make_train_step", "supervised"]
