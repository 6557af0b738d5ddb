from holofunc.optim.base import *
from holofunc.optim.transforms import *
from holofunc.optim.optimizers import *
