"""Ranges: what hyperparameters may be, checked where they enter.

A hyperparameter is a Python number (a constant of the compiled code), a 0-d tensor, or a schedule.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from holofunc import tree
from holofunc.typing import Scalar

__all__ = [
    "check_at_least", "check_bound", "check_count", "check_decay", "check_dtype", "check_finite", "check_flags",
    "check_fraction", "check_nonnegative", "check_positive", "first_value", "known", "scheduled",
]  # fmt: skip


def check_nonnegative(schedules: bool = False, /, **values: Any) -> None:
    """Raise unless each value is a finite number of at least 0, a 0-d tensor, or, where ``schedules``, one of such.

    As everywhere below, a tensor is held to the same range as a number where reading it costs nothing (see `known`),
    and so is the first value of a schedule.

    Raises:
        ValueError, TypeError: naming the argument and what it was.
    """
    check_at_least(0, schedules, **values)


def check_at_least(bound: int, schedules: bool = False, /, **values: Any) -> None:
    """As `check_nonnegative`, with another ``bound``."""
    for name, number in _known(schedules, values):
        _require_finite(name, number)
        if number < bound:
            raise ValueError(f"{name} must be at least {bound}, got {number}")


def check_positive(**values: Any) -> None:
    """Raise unless each value is a finite number above 0, or a 0-d tensor."""
    for name, number in _known(False, values):
        _require_finite(name, number)
        if not number > 0:
            raise ValueError(f"{name} must be above 0, got {number}")


def check_bound(**values: Any) -> None:
    """Raise unless each value is a number of at least 0, or a 0-d tensor. Infinity is allowed: it bounds nothing."""
    for name, number in _known(False, values):
        if not number >= 0:
            raise ValueError(f"{name} must be at least 0, got {number}")


def check_decay(schedules: bool = False, /, **values: Any) -> None:
    """Raise unless each value is a number in [0, 1), a 0-d tensor, or, where ``schedules``, a schedule of such."""
    for name, number in _known(schedules, values):
        if not 0 <= number < 1:
            raise ValueError(f"{name} must be in [0, 1), got {number}")


def check_fraction(**values: Any) -> None:
    """Raise unless each value is a number in (0, 1], or a 0-d tensor."""
    for name, number in _known(False, values):
        if not 0 < number <= 1:
            raise ValueError(f"{name} must be in (0, 1], got {number}")


def check_finite(schedules: bool = False, /, **values: Any) -> None:
    """Raise unless each value is a finite number, a 0-d tensor, or, where ``schedules``, a schedule of such."""
    for name, number in _known(schedules, values):
        _require_finite(name, number)


def check_count(at_least: int = 1, /, **values: Any) -> None:
    """Raise unless each value is an int of at least ``at_least``."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if value < at_least:
            raise ValueError(f"{name} must be at least {at_least}, got {value}")


def check_flags(**values: Any) -> None:
    """Raise unless each value is a bool."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be a bool, got {value!r}")


def check_dtype(**values: Any) -> None:
    """Raise unless each value is None or a dtype of real floating tensors."""
    for name, value in values.items():
        if value is not None and not (isinstance(value, torch.dtype) and value.is_floating_point):
            raise TypeError(f"{name} must be a floating dtype, such as torch.bfloat16, got {value!r}")


def _require_finite(name: str, number: float) -> None:
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}")


def _known(schedules: bool, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers that are known now, by name; of a schedule, its first."""
    kinds = "a number, a 0-d tensor or a schedule" if schedules else "a number or a 0-d tensor"
    for name, value in values.items():
        if callable(value) and schedules:
            value = first_value(name, value)
        elif callable(value):
            raise TypeError(f"{name} must be {kinds}, got a function; inject_hyperparams takes a schedule of it")
        if isinstance(value, Tensor):
            if value.ndim:
                raise ValueError(f"{name} must be {kinds}, got shape {tuple(value.shape)}")
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be {kinds}, got {value!r}")
        if (number := known(value)) is not None:
            yield name, number


def known(value: Scalar) -> float | None:
    """A number, or that in a tensor where it can be read at no cost; otherwise None.

    Not read are tensors on other devices than the CPU (the host would wait), and those that stand for many numbers or
    for none yet: in compiled or traced code, within `torch.vmap` and the derivatives of `torch.func`.
    """
    if not isinstance(value, Tensor):
        return value
    if value.device.type != "cpu" or not tree.is_known(value):
        return None
    try:
        return value.item()
    except RuntimeError:  # under a dispatch mode, where values cannot be read
        return None


def first_value(name: str, schedule: Any) -> Scalar:
    """What ``schedule`` returns for the first update."""
    return scheduled(name, schedule, torch.zeros((), dtype=torch.int64))


def scheduled(name: str, schedule: Any, count: Tensor) -> Scalar:
    value = schedule(count)
    if isinstance(value, Tensor):
        if value.ndim:
            raise ValueError(f"{name}: a schedule must return a number or a 0-d tensor, got shape {tuple(value.shape)}")
    elif not isinstance(value, (int, float)):
        raise TypeError(f"{name}: a schedule must return a number or a 0-d tensor, got {value!r}")
    return value
