"""Inspecting a dataset before training: image sizes, and reductions over all samples."""

import os
import statistics
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

from tqdm.auto import tqdm

__all__ = ["ImageSizes", "find_image_size", "parallel"]


class ImageSizes(NamedTuple):
    """The sizes of the images of a dataset, in pixels.

    Attributes:
        heights: one per image.
        widths: one per image.
        height: their median.
        width: their median.
        side: the side of a square with the median area.
    """

    heights: list[int]
    widths: list[int]
    height: int
    width: int
    side: int


def find_image_size(dataset: Any, *, num_workers: int = 0, progress: bool = False) -> ImageSizes:
    """The sizes of a dataset's images, and the medians as a suggestion for the input size.

    Args:
        dataset: with ``len()``, items ``(image, ...)`` or images: PIL images, or tensors and arrays (C, H, W) or (H, W,
            C).
        num_workers: threads that read images.
        progress: whether to show a bar.

    Returns:
        Sizes, which `holofunc.plots.image_sizes` draws.

    Raises:
        ValueError: if the dataset is empty. TypeError: If an item has no size.

    Example:
        >>> import torch
        >>> from holofunc import data
        >>> sizes = data.find_image_size([torch.zeros(3, *size) for size in ((20, 30), (40, 30), (30, 60))])
        >>> sizes.height, sizes.width, sizes.side
        (30, 30, 35)
    """
    if len(dataset) == 0:
        raise ValueError("dataset must hold at least one image, got none")
    found = parallel(lambda i: _image_size(dataset[i]), range(len(dataset)), num_workers=num_workers, progress=progress)
    heights, widths = (list(column) for column in zip(*found, strict=True))
    area = statistics.median(height * width for height, width in found)
    return ImageSizes(
        heights, widths, round(statistics.median(heights)), round(statistics.median(widths)), round(area**0.5)
    )


def parallel(
    fn: Callable[[Any], Any],
    items: Iterable[Any],
    *,
    num_workers: int | None = None,
    kind: Literal["thread", "process"] = "thread",
    progress: bool = False,
) -> list[Any]:
    """Compute ``[fn(item) for item in items]`` with several workers.

    Args:
        fn: function of one item; for processes it must be picklable, such as a function of a module.
        items: arguments, in the order of the results.
        num_workers: None is the number of cores, at most 16; 0 and 1 use only the current thread.
        kind: "thread" for work that waits (reading files) or runs outside Python (decoding images); "process" for
            Python code.
        progress: whether to show a bar.

    Returns:
        A list. The first error of ``fn`` is raised.

    Raises:
        ValueError: if ``num_workers`` is negative or ``kind`` is unknown.

    Example:
        >>> from holofunc import data
        >>> data.parallel(abs, [-1, 2, -3], num_workers=2)
        [1, 2, 3]
    """
    if num_workers is not None and num_workers < 0:
        raise ValueError(f"num_workers must be at least 0 or None, got {num_workers}")
    if kind not in ("thread", "process"):
        raise ValueError(f"kind must be 'thread' or 'process', got {kind!r}")
    items = list(items)
    shown = tqdm(total=len(items), disable=not progress)
    workers = min(16, os.cpu_count() or 1) if num_workers is None else num_workers
    with shown:
        if workers < 2:
            return [_counted(fn(item), shown) for item in items]
        make: Callable[[int], Executor] = ThreadPoolExecutor if kind == "thread" else ProcessPoolExecutor
        with make(workers) as pool:
            return [_counted(result, shown) for result in pool.map(fn, items)]


def problems(fn: Callable[[Any], Any], items: Iterable[Any]) -> dict[int, str]:
    """The ValueErrors that ``fn`` raises for items, as text by index.

    Example:
        >>> problems(float, ["1", "one"])
        {1: "could not convert string to float: 'one'"}
    """

    def problem(item: Any) -> str | None:
        try:
            fn(item)
        except ValueError as error:
            return str(error)
        return None

    return {number: why for number, why in enumerate(parallel(problem, items)) if why is not None}


def _counted(result: Any, bar: Any) -> Any:
    bar.update()
    return result


def _image_size(item: Any) -> tuple[int, int]:
    image = item[0] if isinstance(item, (tuple, list)) else item
    if hasattr(image, "height") and hasattr(image, "width"):  # a PIL image, without decoding it
        return int(image.height), int(image.width)
    shape = tuple(getattr(image, "shape", ()))
    if len(shape) == 2:
        return shape[0], shape[1]
    if len(shape) != 3:
        raise TypeError(f"dataset must hold PIL images or arrays (C, H, W) or (H, W, C), got {type(image).__name__}")
    return (shape[0], shape[1]) if shape[2] in (1, 3, 4) and shape[0] not in (1, 3, 4) else (shape[1], shape[2])
