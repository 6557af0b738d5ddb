"""Durations and cadences in the notation of users: ``100`` steps, ``"2ep"``, ``"10%"``, ``"30s"``, ``"90m"``."""

import math
from collections.abc import Callable, Iterable, Sized
from typing import TYPE_CHECKING, Any

from holofunc.ops.checks import check_counts

if TYPE_CHECKING:
    from holofunc.train.hooks import Event

__all__ = ["cadence", "count", "seconds", "updates"]

UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def cadence(when: int | str | Iterable[int], argument: str = "when") -> Callable[["Event", float], tuple[bool, float]]:
    """``due(event, last) -> (fires, last)`` for a cadence; ``last`` starts at 0 and is plain data."""
    unit, number = _parsed(when, argument)

    def due(event: "Event", last: float) -> tuple[bool, float]:
        if unit == "ep":
            return event.kind == "epoch_end" and (event.epoch + 1) % int(number) == 0, last
        if event.kind != "step":
            return False, last
        if unit == "at":
            return event.step in number, last
        if unit == "s":
            fires = event.elapsed - last >= number
            return fires, event.elapsed if fires else last
        if unit == "%":
            total = event.info.total_steps
            if total is None:
                raise ValueError(f"{argument}={when!r} needs data of known length")
            share = (event.step - event.info.start) * 100 / (total - event.info.start) // number
            return share > last, share
        return event.step % number == 0, last

    return due


def _parsed(when: Any, argument: str) -> tuple[str, Any]:
    wanted = f"{argument} must be a positive number of steps, '2ep', '10%', '30s' or a list of steps, got {when!r}"
    if isinstance(when, str):
        number, unit = _split(when, "ep", "%", *UNITS)
        if not 0 < number < math.inf or (unit in ("ep", "") and number % 1):
            raise ValueError(wanted)
        return ("s", number * UNITS[unit]) if unit in UNITS else (unit, number)
    if isinstance(when, int) and not isinstance(when, bool) and when > 0:
        return "", when
    if isinstance(when, Iterable):
        return "at", frozenset(when)
    raise ValueError(wanted)


def _split(text: str, *units: str) -> tuple[float, str]:
    """Split a text into a number (nan if it is none) and an optional unit."""
    unit = next((unit for unit in units if text.endswith(unit)), "")
    try:
        return float(text.removesuffix(unit)), unit
    except ValueError:
        return math.nan, unit


def seconds(name: str, value: float | str) -> float:
    """A duration in seconds: a number, or ``"30s"``, ``"90m"``, ``"2h"``, ``"1d"``."""
    number, unit = _split("" if isinstance(value, bool) else str(value), *UNITS)
    number *= UNITS.get(unit, 1.0)
    if not 0 < number < math.inf:
        wanted = f"{name} must be a positive number of seconds or a text like '90s', '90m', '2h', '1d'"
        raise ValueError(f"{wanted}, got {value!r}")
    return number


def count(name: str, value: Any, unit: str) -> int:
    """A positive integer, or a text like ``"5"`` or ``"5ep"``."""
    number = value
    if isinstance(value, str):
        text = value.strip().removesuffix(unit).strip()
        number = int(text) if text.isdecimal() else value
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return number


def updates(length: int | str, data: Sized | int, *, epochs: int | None = None, accumulate: int = 1) -> int:
    """A duration in updates of the optimizer, the unit of schedules and of `holofunc.optim.unfreeze`.

    Args:
        length: updates, epochs (``"1ep"``, ``"0.5ep"``), or a fraction of the run (``"10%"``), which needs ``epochs``.
        data: the batches of an epoch, or their number.
        epochs: of the whole run.
        accumulate: micro-batches per update, as in ``multi_steps(tx, every=accumulate)``; an incomplete accumulation at
            the end of an epoch is an update too.

    Example:
        >>> from holofunc import train
        >>> train.updates("1ep", range(10), accumulate=4), train.updates("10%", 50, epochs=4)
        (3, 20)
    """
    batches = data if isinstance(data, int) else len(data)
    check_counts(data=batches, epochs=1 if epochs is None else epochs, accumulate=accumulate)
    per_epoch = -(-batches // accumulate)
    wanted = f"length must be a number of updates, '1ep' or '10%', got {length!r}"
    if isinstance(length, int) and not isinstance(length, bool) and length >= 0:
        return length
    if not isinstance(length, str):
        raise ValueError(wanted)
    number, unit = _split(length, "ep", "%")
    if not 0 <= number < math.inf:
        raise ValueError(wanted)
    if unit == "%":
        if epochs is None:
            raise ValueError(f"length={length!r} needs epochs, the length of the run")
        return round(number / 100 * epochs * per_epoch)
    return round(number * per_epoch) if unit else round(number)
