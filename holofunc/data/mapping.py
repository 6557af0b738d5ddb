"""Batches with a function applied, of the same length and positions."""

from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

import torch

from holofunc.data.prefetching import prefetch
from holofunc.typing import Batch, EpochData, Fingerprinted

__all__ = ["length", "map", "on_device"]

Through = Callable[[Iterator[Batch]], Iterator[Batch]]


def map(fn: Callable[[Batch], Batch], data: Iterable[Batch]) -> Iterable[Batch]:
    """Apply ``fn`` to each batch of ``data``, keeping its length, epochs and positions.

    Example:
        >>> from holofunc import data
        >>> batches = data.Batches(data.digits("test"), 100)
        >>> doubled = data.map(lambda batch: (2 * batch[0], batch[1]), batches)
        >>> len(doubled), len(list(doubled.epoch(1, start=2)))
        (4, 2)
    """
    if not callable(fn):
        raise TypeError(f"fn must be callable, fn(batch), got {fn!r}")
    return through(lambda batches: (fn(batch) for batch in batches), data)


def on_device(data: Iterable[Batch], device: torch.device | str, *, size: int = 2) -> Iterable[Batch]:
    """Batches on a device; the next ones are pinned and moved while one is used, see `prefetch`.

    Args:
        data: batches; tensors in nested tuples, lists and dicts are moved.
        device: the target device.
        size: number of batches to prepare ahead.

    Example:
        >>> from holofunc import data
        >>> batches = data.on_device(data.Batches(data.digits("test"), 100), "cpu")
        >>> len(batches), next(batches.epoch(0, start=3))[0].shape
        (4, torch.Size([55, 1, 8, 8]))
    """
    place = torch.device(device)
    return through(lambda batches: prefetch(batches, size, device=place), data)


def through(change: Through, data: Iterable[Batch]) -> Iterable[Batch]:
    """``change(batches)`` of the batches of an epoch, or of the rest of one."""
    kind = _Epochs if isinstance(data, EpochData) else _Iterable if length(data) is None else _Sized
    return kind(change, data)


def length(data: Iterable[Batch]) -> int | None:
    """The number of batches in an epoch; None if unknown (``len`` of a torch loader may raise).

    Example:
        >>> length([1, 2]), length(iter([1, 2]))
        (2, None)
    """
    try:
        return len(data) if isinstance(data, Sized) else None
    except TypeError:
        return None


class _Iterable:
    def __init__(self, change: Through, data: Any) -> None:
        self.change, self.data = change, data

    def __iter__(self) -> Iterator[Batch]:
        return self.change(iter(self.data))

    def fingerprint(self) -> dict[str, Any]:
        return self.data.fingerprint() if isinstance(self.data, Fingerprinted) else {}


class _Sized(_Iterable):
    def __len__(self) -> int:
        return len(self.data)


class _Epochs(_Sized):
    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        return self.change(self.data.epoch(epoch, start))
