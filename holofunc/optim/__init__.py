"""Optimizers as gradient transformations: pure functions ``(init, update)``, composed by `chain`."""

from holofunc.optim import schedules
from holofunc.optim.adaptive import *
from holofunc.optim.base import *
from holofunc.optim.combine import *
from holofunc.optim.hyperparams import *
from holofunc.optim.labels import *
from holofunc.optim.optimizers import *
from holofunc.optim.transforms import *
from holofunc.optim.wrappers import *
