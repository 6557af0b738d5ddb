"""Padding of the boxes of several images to tensors of one shape."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from holofunc.ops.checks import check_counts
from holofunc.ops.targets import Targets, check_targets

__all__ = ["collate_boxes", "pad_targets"]


def pad_targets(targets: Sequence[Any], max_boxes: int, *, num_classes: int | None = None) -> Targets:
    """Check the boxes of N images and pad them to ``max_boxes`` rows each.

    Args:
        targets: for each image ``{"boxes": (M, 4), "labels": (M,)}`` or a pair of these: xyxy as fractions of the
            image, and class indices; M may be 0.
        max_boxes: rows for each image, at least 1.
        num_classes: if given, labels must lie below it.

    Returns:
        ``Targets(boxes, labels, mask)``, float32, int64 and bool; padding is 0.

    Raises:
        TypeError: if an entry has no boxes and labels.
        ValueError: if an image has more boxes than fit, a box lies outside of the image, is not finite or has its
            corners swapped, or a label is out of range; the message names the image and the box.

    Example:
        >>> import torch
        >>> from holofunc import data
        >>> one = {"boxes": torch.tensor([[0.1, 0.2, 0.5, 0.6]]), "labels": torch.tensor([3])}
        >>> none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
        >>> data.pad_targets([one, none], max_boxes=2).mask
        tensor([[ True, False],
                [False, False]])
    """
    check_counts(max_boxes=max_boxes)
    pairs = [_pair(each, i) for i, each in enumerate(targets)]
    for i, (boxes, _) in enumerate(pairs):
        if len(boxes) > max_boxes:
            raise ValueError(f"max_boxes={max_boxes} rows cannot hold the {len(boxes)} boxes of image {i}")
    size = len(pairs), max_boxes
    padded = Targets(torch.zeros(*size, 4), torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=torch.bool))
    for i, (boxes, labels) in enumerate(pairs):
        padded.boxes[i, : len(boxes)] = boxes
        padded.labels[i, : len(boxes)] = labels
        padded.mask[i, : len(boxes)] = True
    check_targets(padded, num_classes)
    return padded


def _pair(target: Any, image: int) -> tuple[Tensor, Tensor]:
    """Boxes (M, 4) and labels (M,) of one image."""
    if isinstance(target, Mapping) and {"boxes", "labels"} <= set(target):
        target = target["boxes"], target["labels"]
    if not isinstance(target, (tuple, list)) or len(target) != 2:
        raise TypeError(f"the target of image {image} must hold boxes and labels, got {type(target).__name__}")
    boxes, labels = (torch.as_tensor(part) for part in target)
    boxes = boxes.reshape(-1, 4) if boxes.numel() == 0 else boxes
    if boxes.ndim != 2 or boxes.shape[1] != 4 or labels.shape != boxes.shape[:1]:
        shapes = f"{tuple(boxes.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"boxes and labels of image {image} must have shapes (M, 4) and (M,), got {shapes}")
    if labels.numel() and (labels.is_floating_point() or labels.dtype == torch.bool):
        raise TypeError(f"labels of image {image} must be integers, got {labels.dtype}")
    return boxes, labels


def collate_boxes(
    max_boxes: int, *, num_classes: int | None = None
) -> Callable[[Sequence[Any]], tuple[Tensor, Targets]]:
    """The `collate` of `Batches` for samples ``(image, boxes and labels)``: it stacks images and pads targets.

    Args:
        max_boxes: as in `pad_targets`.
        num_classes: as in `pad_targets`.

    Example:
        >>> import torch
        >>> from holofunc import data
        >>> boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
        >>> samples = [(torch.zeros(3, 8, 8), (boxes, torch.tensor([label]))) for label in (0, 1)]
        >>> images, targets = next(iter(data.Batches(samples, 2, collate=data.collate_boxes(5))))
        >>> images.shape, targets.boxes.shape
        (torch.Size([2, 3, 8, 8]), torch.Size([2, 5, 4]))
    """
    return partial(_collate, max_boxes=max_boxes, num_classes=num_classes)


def _collate(samples: Sequence[Any], max_boxes: int, num_classes: int | None) -> tuple[Tensor, Targets]:
    images, targets = zip(*samples, strict=True)
    shapes = sorted({tuple(image.shape) for image in images})
    if len(shapes) > 1:
        raise ValueError(f"images of a batch must have one shape, got {shapes}: give the dataset an image_size")
    return torch.stack(images), pad_targets(targets, max_boxes, num_classes=num_classes)
