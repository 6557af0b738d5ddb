"""Optimizers as gradient transformations: pure functions ``(init, update)``, composed by `chain`."""

from holofunc.optim import schedules
from holofunc.optim.adam import *
from holofunc.optim.base import *
from holofunc.optim.combine import *
from holofunc.optim.hyperparams import *
from holofunc.optim.labels import *
from holofunc.optim.optimizers import *
from holofunc.optim.transforms import *
from holofunc.optim.wrappers import *
from holofunc.optim.layerwise import *
from holofunc.optim.rules import *
