"""Rules that need a tensor as a matrix: Muon, SOAP, Adafactor, AdamP's projections, clipping by output unit.

A tensor of two or more axes is a matrix of shape (first axis, all others): a convolution's rows are its filters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from holofunc import tree
from holofunc.optim.base import GradientTransformation, check_params, need_params, stateless
from holofunc.optim.scalars import check_decay, check_nonnegative, scalar_dtype, zero_count, zeros
from holofunc.optim.transforms import moving_average
from holofunc.typing import Params, PyTree, Scalar
