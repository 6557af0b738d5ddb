"""The view of an image, its mask and its boxes through a window.

A window (x1, y1, x2, y2), relative to the image, is what the augmented image shows: inside of the image it is a crop,
outside of it a zoom out, and with its sides swapped a flip.
"""

import torch
from torch import Tensor

from holofunc.typing import Scalar

__all__ = ["view", "view_boxes", "view_labels"]


def view(image: Tensor, window: Tensor, size: tuple[int, int] | None = None, *, fill: Scalar = 0.0) -> Tensor:
    """The part of an image in a window, by linear interpolation.

    Args:
        image: shape (C, H, W), floating point.
        window: shape (4,), (x1, y1, x2, y2) relative to the image.
        size: height and width of the result; those of the image where None.
        fill: what lies outside of the image.

    Returns:
        Shape (C, *size). Flips and shifts by whole pixels are exact; shrinking does not average.

    Example:
        >>> import torch
        >>> from holofunc import transforms
        >>> image = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
        >>> transforms.view(image, torch.tensor([1.0, 0.0, 0.0, 1.0]))
        tensor([[[4., 3., 2., 1.]]])
        >>> transforms.view(image, torch.tensor([0.5, 0.0, 1.5, 1.0]))
        tensor([[[3., 4., 0., 0.]]])
    """
    height, width = image.shape[1:] if size is None else size
    rows, inside_rows = _places(window[1], window[3], height, image.shape[1])
    columns, inside_columns = _places(window[0], window[2], width, image.shape[2])
    shown = _interpolated(_interpolated(image, rows, 1), columns, 2)
    return torch.where(inside_rows[:, None] & inside_columns, shown, fill).to(image.dtype)


def view_labels(labels: Tensor, window: Tensor, size: tuple[int, int] | None = None, *, fill: int = -100) -> Tensor:
    """The part of a mask of class indices in a window, by nearest neighbour.

    Args:
        labels: shape (H, W), an integer dtype or bool.
        window: as in `view`.
        size: as in `view`.
        fill: what lies outside, the `ignore_index` of the loss; of a bool mask, False does.

    Returns:
        Shape ``size``.

    Raises:
        ValueError: if the mask's dtype has no such number.

    Example:
        >>> import torch
        >>> from holofunc import transforms
        >>> transforms.view_labels(torch.tensor([[1, 2]]), torch.tensor([0.5, 0.0, 1.5, 1.0]))
        tensor([[   2, -100]])
    """
    if labels.dtype == torch.bool:
        fill = 0
    elif not torch.iinfo(labels.dtype).min <= fill <= torch.iinfo(labels.dtype).max:
        raise ValueError(f"fill must be a number that {labels.dtype} has, got {fill}: make the mask int64")
    height, width = labels.shape if size is None else size
    rows, inside_rows = _places(window[1], window[3], height, labels.shape[0])
    columns, inside_columns = _places(window[0], window[2], width, labels.shape[1])
    shown = labels[(rows + 0.5).long().clamp(0, labels.shape[0] - 1)]
    shown = shown[:, (columns + 0.5).long().clamp(0, labels.shape[1] - 1)]
    return torch.where(inside_rows[:, None] & inside_columns, shown, fill).to(labels.dtype)


def view_boxes(boxes: Tensor, mask: Tensor, window: Tensor, *, min_visible: float = 0.0) -> tuple[Tensor, Tensor]:
    """The positions of boxes in a window, clipped to it, and which of them are visible.

    Args:
        boxes: shape (M, 4), xyxy relative to the image.
        mask: shape (M,) bool, the boxes that are there.
        window: as in `view`.
        min_visible: boxes of which a smaller share of the area is left are dropped, in [0, 1].

    Returns:
        Boxes (M, 4) relative to the window, 0 where they are not shown, and the mask (M,) of those that are.

    Example:
        >>> import torch
        >>> from holofunc import transforms
        >>> boxes = torch.tensor([[0.0, 0.0, 0.75, 0.5]])
        >>> transforms.view_boxes(boxes, torch.tensor([True]), torch.tensor([0.5, 0.0, 1.0, 1.0]))
        (tensor([[0.0000, 0.0000, 0.5000, 0.5000]]), tensor([True]))
    """
    corner, extent = window[:2].repeat(2), (window[2:] - window[:2]).repeat(2)
    moved = (boxes - corner) / extent
    moved = torch.cat([torch.minimum(moved[:, :2], moved[:, 2:]), torch.maximum(moved[:, :2], moved[:, 2:])], 1)
    shown = moved.clamp(0, 1)
    area, left = ((b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) for b in (moved, shown))
    mask = mask & (left > 0) & (left >= min_visible * area)
    return torch.where(mask[:, None], shown, 0), mask


def _places(start: Tensor, end: Tensor, num: int, pixels: int) -> tuple[Tensor, Tensor]:
    """The source pixels, between -0.5 and ``pixels`` - 0.5, that ``num`` places of a window show; and which there
    are."""
    relative = start + (end - start) * (torch.arange(num, device=start.device) + 0.5) / num
    places = relative * pixels - 0.5
    whole = places.round()
    return torch.where((places - whole).abs() < 1e-3, whole, places), (relative >= 0) & (relative <= 1)


def _interpolated(image: Tensor, places: Tensor, dim: int) -> Tensor:
    last = image.shape[dim] - 1
    places = places.clamp(0, last)
    low = places.floor()
    share = (places - low).to(image.dtype).reshape(-1, *[1] * (2 - dim))
    low = low.long()
    a, b = (image[:, i] if dim == 1 else image[:, :, i] for i in (low, (low + 1).clamp_max(last)))
    return a + share * (b - a)
