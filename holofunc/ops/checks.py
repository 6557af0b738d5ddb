"""Checks of arguments, with the same wording everywhere."""

import operator
from typing import Any

__all__ = ["check_counts"]


def check_counts(least: int = 1, /, **counts: Any) -> None:
    """Raise unless each number of things is an integer of at least ``least``.

    Example:
        >>> check_counts(2, bins=2, steps=2.5)
        Traceback (most recent call last):
        ...
        ValueError: steps must be an integer of at least 2, got 2.5
    """
    for name, value in counts.items():
        try:
            fits = not isinstance(value, bool) and operator.index(value) >= least  # of whatever library
        except TypeError:
            fits = False
        if not fits:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
