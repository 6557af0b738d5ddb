"""Anchors: typical box shapes of a dataset."""

import torch
from torch import Tensor

from holofunc import random
from holofunc.ops.arithmetic import safe_divide
from holofunc.ops.checks import check_counts
from holofunc.ops.targets import Targets
from holofunc.typing import Key

__all__ = ["anchor_iou", "anchors"]


def anchors(boxes: Tensor | Targets, count: int, *, key: Key, steps: int = 100) -> Tensor:
    """Anchors for a dataset's boxes, by k-means with the distance ``1 - IoU`` of boxes of one centre.

    Args:
        boxes: (M, 4) xyxy as fractions of the image, or `Targets`.
        count: number of anchors, at least 1.
        key: for the initialization (k-means++).
        steps: largest number of iterations; it stops at convergence.

    Returns:
        Widths and heights (count, 2), by area, the smallest first.

    Raises:
        ValueError: if there are fewer boxes with an area than anchors, or an option is out of range.

    Source: Redmon and Farhadi, "YOLO9000" (arXiv 1612.08242), section 2.

    Example:
        >>> import torch
        >>> from holofunc import data, random
        >>> boxes = torch.tensor([[0, 0, 0.1, 0.1], [0, 0, 0.12, 0.1], [0.5, 0.5, 0.9, 1], [0.4, 0.5, 0.8, 1]])
        >>> data.anchors(boxes, 2, key=random.key(0))
        tensor([[0.1100, 0.1000],
                [0.4000, 0.5000]])
    """
    if isinstance(boxes, Targets):
        boxes = boxes.boxes[boxes.mask]
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes must have shape (M, 4), got {tuple(boxes.shape)}")
    check_counts(count=count)
    sizes = (boxes[:, 2:] - boxes[:, :2]).float()
    sizes = sizes[(sizes > 0).all(1)]
    if len(sizes) < count:
        raise ValueError(f"boxes must hold at least {count} with an area, one per anchor, got {len(sizes)}")
    centers = _start(sizes, count, key)
    for _ in range(steps):
        member = anchor_iou(sizes, centers).argmax(1)
        sums = torch.zeros_like(centers).index_add(0, member, sizes)
        counts = torch.bincount(member, minlength=count)[:, None]
        moved = torch.where(counts > 0, sums / counts.clamp_min(1), centers)
        if torch.equal(moved, centers):
            break
        centers = moved
    return centers[centers.prod(1).argsort(stable=True)]


def anchor_iou(sizes: Tensor, anchors: Tensor) -> Tensor:
    """The IoU of boxes of these sizes (M, 2) with anchors (A, 2) of the same centre: (M, A).

    The mean over boxes of the maximum over anchors measures how well anchors fit a dataset.
    """
    shared = torch.minimum(sizes[:, None], anchors).prod(-1)
    return safe_divide(shared, sizes.prod(-1)[:, None] + anchors.prod(-1) - shared)


def _start(sizes: Tensor, count: int, key: Key) -> Tensor:
    chosen = [sizes[int(random.randint(key, (), 0, len(sizes)))]]
    for i in range(1, count):
        nearest = anchor_iou(sizes, torch.stack(chosen)).amax(1)
        weights = (1 - nearest).clamp_min(1e-9).double().square().cumsum(0)
        draw = random.uniform(random.fold_in(key, i), (), dtype=torch.float64).to(weights.device) * weights[-1]
        chosen.append(sizes[min(int(torch.searchsorted(weights, draw)), len(sizes) - 1)])
    return torch.stack(chosen)
