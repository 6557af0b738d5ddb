"""The numbers in optimizers: hyperparameters, their ranges and schedules, counters, bias corrections.

A hyperparameter is a Python number (a constant of the compiled code), a 0-d tensor, or a schedule.
"""

import math
from typing import Any

import torch
from torch import Tensor

from holofunc import tree
from holofunc.typing import Params, PyTree, Scalar

ABSENT = ()
"""A part that a state does without, by the options of its rule. None would do too, but `torch.vmap` returns none."""

__all__ = [
    "ABSENT",
    "bias_correction",
    "check_decay",
    "check_nonnegative",
    "copies",
    "is_zero",
    "scalar_dtype",
    "value_at",
    "zero_count",
    "zeros",
]


def check_nonnegative(**values: Any) -> None:
    """Raise unless each value is a number of at least 0, a 0-d tensor, or a schedule of such.

    Raises:
        ValueError, TypeError: naming the argument and what it was.
    """
    for name, value in values.items():
        number = _number(name, value)
        if number is not None and not number >= 0:
            raise ValueError(f"{name} must be at least 0, got {number}")


def check_decay(**values: Any) -> None:
    """Raise unless each value is a number in [0, 1), a 0-d tensor, or a schedule of such."""
    for name, value in values.items():
        number = _number(name, value)
        if number is not None and not 0 <= number < 1:
            raise ValueError(f"{name} must be in [0, 1), got {number}")


def _number(name: str, value: Any) -> float | None:
    """The value that is known now: a number, or a schedule's first. The values of tensors are not looked at."""
    if callable(value):
        value = _scheduled(name, value, torch.zeros((), dtype=torch.int64))
        return None if isinstance(value, Tensor) else value
    if isinstance(value, Tensor):
        if value.ndim:
            raise ValueError(f"{name} must be a number, a 0-d tensor or a schedule, got shape {tuple(value.shape)}")
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, a 0-d tensor or a schedule, got {value!r}")
    return value


def _scheduled(name: str, schedule: Any, count: Tensor) -> Scalar:
    value = schedule(count)
    if isinstance(value, Tensor):
        if value.ndim:
            raise ValueError(f"{name}: a schedule must return a number or a 0-d tensor, got shape {tuple(value.shape)}")
    elif not isinstance(value, (int, float)):
        raise TypeError(f"{name}: a schedule must return a number or a 0-d tensor, got {value!r}")
    return value


def value_at(name: str, value: Any, count: Tensor, like: PyTree) -> Scalar:
    """A hyperparameter at update ``count`` (0-based): itself, or what it returns if it is a schedule.

    Schedules compute in fp64; their values come back in the precision that suits the tensors of ``like``.

    Raises:
        ValueError, TypeError: a schedule that returns something else than a number or a 0-d tensor.
    """
    if not callable(value):
        return value
    now = _scheduled(name, value, count)
    return tree.hoist(now.to(scalar_dtype(like))) if isinstance(now, Tensor) else now


def is_zero(value: Any) -> bool:
    """Whether ``value`` is the Python number 0: a constant that lets a rule leave something out."""
    return isinstance(value, (int, float)) and value == 0


def bias_correction(decay: Scalar, count: Tensor, dtype: torch.dtype) -> Tensor:
    """``1 - decay**count``, as ``-expm1(count * log(decay))``: fp32 loses four digits to cancellation otherwise."""
    log: Scalar
    if isinstance(decay, Tensor):
        log = torch.log(decay)
    else:
        log = math.log(decay) if decay > 0 else -math.inf
    return -torch.expm1(count.to(dtype) * log)


def scalar_dtype(like: PyTree) -> torch.dtype:
    """The dtype for numbers that meet the tensors of ``like``: float64 if one of them is, otherwise float32."""
    tensors = like.vectors if isinstance(like, tree.Arena) else tree.leaves(like)
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def zero_count(params: Params) -> Tensor:
    """A counter at zero: int64, 0-d, beside the parameters."""
    return torch.zeros((), dtype=torch.int64, device=next((x.device for x in tree.leaves(params)), None))


def zeros(params: Params, dtype: torch.dtype | None = None) -> PyTree:
    """Zeros of the shapes of ``params`` in ``dtype``; None is fp32 for half precision, otherwise the leaf's own."""
    return tree.elementwise(lambda p: torch.zeros_like(p, dtype=dtype or tree.wide(p).dtype), params)


def copies(params: Params) -> PyTree:
    """The parameters in memory of their own, in fp32 for half precision."""
    return tree.elementwise(lambda p: tree.wide(p).clone(), params)
