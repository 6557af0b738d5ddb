"""Targets and detections of a batch of images, as tensors of fixed shape."""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Detections", "Targets", "check_layout", "check_targets"]

ROUNDING = 1e-6
"""By how much float32 may put a box outside of its image."""


class Targets(NamedTuple):
    """The true boxes of a batch, M rows for each image; rows where ``mask`` is False are padding.

    Attributes:
        boxes: (N, M, 4) floating, xyxy as fractions of the image's width and height, in [0, 1].
        labels: (N, M) int64, in [0, num_classes).
        mask: (N, M) bool.
    """

    boxes: Tensor
    labels: Tensor
    mask: Tensor


class Detections(NamedTuple):
    """The boxes found in a batch, D rows for each image, best first; rows where ``mask`` is False are all zeros.

    Attributes:
        boxes: (N, D, 4) floating, xyxy as fractions of the image's width and height, in [0, 1].
        scores: (N, D) floating, in [0, 1].
        labels: (N, D) int64.
        mask: (N, D) bool.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    mask: Tensor


def check_layout(targets: Targets, images: int | None = None) -> None:
    """Raise for targets of a wrong type, shape or dtype; values are not looked at, so that it works while tracing.

    Args:
        targets: of a batch.
        images: N, if it is known.

    Raises:
        TypeError: if ``targets`` are no `Targets`, or dtypes are wrong.
        ValueError: if shapes do not fit.

    Example:
        >>> import torch
        >>> from holofunc.ops import targets
        >>> targets.check_layout(torch.zeros(1, 2, 4))
        Traceback (most recent call last):
        ...
        TypeError: targets must be Targets(boxes, labels, mask), got Tensor
    """
    if not isinstance(targets, Targets):
        raise TypeError(f"targets must be Targets(boxes, labels, mask), got {type(targets).__name__}")
    boxes, labels, mask = targets
    rows = tuple(boxes.shape[:2])
    if boxes.shape != (*rows, 4) or labels.shape != rows or mask.shape != rows or images not in (None, len(boxes)):
        n = "N" if images is None else images
        shapes = ", ".join(str(tuple(x.shape)) for x in targets)
        raise ValueError(f"targets must have shapes ({n}, M, 4), ({n}, M) and ({n}, M), got {shapes}")
    if labels.is_floating_point() or mask.dtype != torch.bool or not boxes.is_floating_point():
        got = ", ".join(str(x.dtype) for x in targets)
        raise TypeError(f"targets must be floating boxes, integer labels and a bool mask, got {got}")


def check_targets(targets: Targets, num_classes: int | None = None) -> None:
    """Refuse targets that no detector can learn; padding may hold anything, and float32 may have rounded by 1e-6.

    It reads values, so it waits for the device and cannot run while tracing: call it where data enters, on the host.

    Args:
        targets: of a batch.
        num_classes: if given, labels must lie below it.

    Raises:
        TypeError: if ``targets`` are no `Targets`, or dtypes are wrong.
        ValueError: if shapes do not fit, a box is not finite, lies outside of the image or has its corners swapped, or
            a label is out of range; the message names the image and the row.

    Example:
        >>> import torch
        >>> from holofunc.ops import targets
        >>> boxes = torch.tensor([[[0.1, 0.1, 1.2, 0.5]]])
        >>> targets.check_targets(targets.Targets(boxes, torch.tensor([[0]]), torch.tensor([[True]])))
        Traceback (most recent call last):
        ...
        ValueError: boxes must lie in [0, 1], fractions of the image, got [0.1, 0.1, 1.2, 0.5] (image 0, box 0)
    """
    check_layout(targets)
    boxes, labels, mask = targets
    high = float("inf") if num_classes is None else num_classes
    faults = (
        ("boxes must be finite", ~boxes.isfinite().all(-1), boxes),
        ("boxes must lie in [0, 1], fractions of the image", ((boxes - 0.5).abs() > 0.5 + ROUNDING).any(-1), boxes),
        ("boxes must have x1 <= x2 and y1 <= y2", (boxes[..., 2:] < boxes[..., :2]).any(-1), boxes),
        (f"labels must lie in [0, {num_classes or 'num_classes'})", (labels < 0) | (labels >= high), labels),
    )
    for expected, wrong, values in faults:
        places = (wrong & mask).nonzero()
        if len(places):
            image, row = places[0].tolist()
            value = values[image, row]
            shown = [round(x, 6) for x in value.tolist()] if value.ndim else int(value)
            raise ValueError(f"{expected}, got {shown} (image {image}, box {row})")
