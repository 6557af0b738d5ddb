"""Loading the next batches while the current one is used."""

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch

from holofunc import tree

__all__ = ["prefetch"]

T = TypeVar("T")


def prefetch(batches: Iterable[T], size: int = 2, *, device: torch.device | str | None = None) -> Iterator[T]:
    """Iterate over ``batches`` in a background thread that stays up to ``size`` batches ahead.

    Batches and their order are unchanged. An exception in ``batches`` is raised here, after the batches before it. The
    thread starts with the first request, and ends with the iteration or when the iterator is closed or deleted.

    Args:
        batches: any iterable, used only by the thread.
        size: number of batches to prepare ahead, at least 1.
        device: if given, tensors are moved there by the thread (through pinned memory for CUDA).

    Returns:
        An iterator over the same batches.

    Raises:
        ValueError: if ``size`` is below 1.

    Example:
        >>> from holofunc import data
        >>> list(data.prefetch(range(4)))
        [0, 1, 2, 3]
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    return _prefetched(batches, size, None if device is None else torch.device(device))


def _prefetched(batches: Iterable[T], size: int, device: torch.device | None) -> Iterator[T]:
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(size)
    closed = threading.Event()

    def produce() -> None:
        iterator: Iterator[T] = iter(())
        try:
            iterator = iter(batches)
            for batch in iterator:
                ready.put(("batch", batch if device is None else _moved(batch, device)))
                if closed.is_set():
                    return
            ready.put(("end", None))
        except BaseException as error:
            ready.put(("error", error))
        finally:
            if hasattr(iterator, "close"):
                iterator.close()

    thread = threading.Thread(target=produce, name="holofunc-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        closed.set()
        while thread.is_alive():  # the thread may be waiting for room
            _drain(ready)
            thread.join(timeout=0.05)


def _drain(ready: queue.Queue[Any]) -> None:
    while True:
        try:
            ready.get_nowait()
        except queue.Empty:
            return


def _moved(batch: T, device: torch.device) -> T:
    def move(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if device.type == "cuda" and leaf.device.type == "cpu":
            return leaf.pin_memory().to(device, non_blocking=True)
        return leaf.to(device)

    return tree.map(move, batch)
