"""The scalars of rules: hyperparameters at an update, counters, keys, bias corrections."""

import math
from typing import Any

import torch
from torch import Tensor

from holofunc import tree
from holofunc.optim.numerics import scalar_dtype
from holofunc.optim.ranges import scheduled
from holofunc.typing import Key, Params, PyTree, Scalar

__all__ = [
    "bias_correction", "gains", "own_key", "value_at", "zero_count", "zero_scalar",
]  # fmt: skip


def value_at(name: str, value: Any, count: Tensor, like: PyTree) -> Scalar:
    """A hyperparameter at update ``count`` (0-based): itself, or what it returns if it is a schedule.

    Schedules compute in fp64; their values come back in the precision that suits the tensors of ``like``.

    Raises:
        ValueError, TypeError: a schedule that returns something else than a number or a 0-d tensor.
    """
    if not callable(value):
        return value
    now = scheduled(name, value, count)
    return tree.hoist(now.to(scalar_dtype(like))) if isinstance(now, Tensor) else now


def zero_count(params: Params) -> Tensor:
    """A counter at zero: int64, 0-d, beside the parameters."""
    return torch.zeros((), dtype=torch.int64, device=next((x.device for x in tree.leaves(params)), None))


def zero_scalar(params: Params) -> Tensor:
    """A number at zero, 0-d, beside the parameters, in the precision that suits them."""
    return torch.zeros_like(zero_count(params), dtype=scalar_dtype(params))


def own_key(key: Key, params: Params) -> Key:
    """A copy of a key, beside the parameters."""
    return key.to(zero_count(params).device, copy=True)


def bias_correction(decay: Scalar, count: Tensor, dtype: torch.dtype) -> Tensor:
    """``1 - decay**count``, as ``-expm1(count * log(decay))``: fp32 loses four digits to cancellation otherwise."""
    log: Scalar
    if isinstance(decay, Tensor):
        log = torch.log(decay)
    else:
        log = math.log(decay) if decay > 0 else -math.inf
    return -torch.expm1(count.to(dtype) * log)


def gains(b1: Scalar, b2: Scalar, count: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``mu_hat = mu * c1`` and ``sqrt(nu_hat) = sqrt(nu) * c2``: the factors ``(c1, c2)``."""
    c1, c2 = bias_correction(b1, count, dtype), bias_correction(b2, count, dtype)
    return tree.hoist(1 / c1), tree.hoist(c2.rsqrt())
