"""Non-maximum suppression, with outputs of fixed and of variable size."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from holofunc.ops import geometry
from holofunc.ops.arithmetic import upcast
from holofunc.ops.checks import check_counts

__all__ = ["Kept", "decompositions", "dynamic_nms", "nms"]


class Kept(NamedTuple):
    """Boxes that survive suppression, best first; ``indices`` is 0 where ``mask`` is False."""

    indices: Tensor  # (..., D) int64
    mask: Tensor  # (..., D) bool


def nms(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    *,
    labels: Tensor | None = None,
    max_detections: int | None = None,
    score_threshold: float = -math.inf,
) -> Kept:
    """Greedy non-maximum suppression with an output of fixed size: take the best box, drop what overlaps it, repeat.

    Every shape is known before it runs, so it compiles without a break (the repetition is one operator of the graph)
    and maps over batches. It takes ``max_detections`` steps and N^2 memory: with many candidates select the best
    thousand first (`torch.topk`).

    Args:
        boxes: shape (..., N, 4), xyxy, N at least 1.
        scores: shape (..., N). A score of -inf (padding) or NaN is never kept.
        iou_threshold: boxes whose IoU with a better one is above this are dropped, in [0, 1].
        labels: classes, shape (..., N): boxes of different classes do not suppress each other.
        max_detections: D, at least 1; N where None.
        score_threshold: boxes must score above this.

    Returns:
        ``Kept(indices, mask)``, both of shape (..., D).

    Raises:
        ValueError: if shapes do not fit, there are no boxes, or an option is out of range.

    Source: the boxes `torchvision.ops.nms` keeps, in its order (`dynamic_nms`).

    Example:
        >>> import torch
        >>> from holofunc.ops import boxes
        >>> b = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 1.9], [5.0, 5.0, 6.0, 6.0]])
        >>> boxes.nms(b, torch.tensor([0.8, 0.9, 0.1]), 0.5)
        Kept(indices=tensor([1, 2, 0]), mask=tensor([ True,  True, False]))
    """
    geometry.check_shape("boxes", boxes)
    if scores.shape != boxes.shape[:-1] or scores.shape[-1] == 0:
        raise ValueError(
            "boxes and scores must have shapes (..., N, 4) and (..., N) with N at least 1, got "
            f"{tuple(boxes.shape)} and {tuple(scores.shape)}"
        )
    if labels is not None and labels.shape != scores.shape:
        raise ValueError(f"labels must have shape {tuple(scores.shape)}, got {tuple(labels.shape)}")
    if not 0 <= iou_threshold <= 1:
        raise ValueError(f"iou_threshold must be in [0, 1], got {iou_threshold}")
    if math.isnan(score_threshold):
        raise ValueError("score_threshold must be a number, got nan")
    size = scores.shape[-1]
    steps = size if max_detections is None else max_detections
    check_counts(max_detections=steps)
    drops = geometry.iou(*geometry.match(boxes, boxes, paired=False))[0] > iou_threshold
    if labels is not None:
        drops = drops & (labels[..., :, None] == labels[..., None, :])
    drops = drops | torch.eye(size, dtype=torch.bool, device=boxes.device)  # a box without area is dropped by itself
    left = torch.where(scores > score_threshold, upcast(scores), -math.inf).detach()
    return Kept(*_take(left, drops, steps))


@torch.library.custom_op("holofunc::take_best", mutates_args=())
def _take(scores: Tensor, drops: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """``steps`` times the best score that is left, and what it drops taken away; for all leading dimensions at once.

    An operator of its own because unrolled into a graph it would be compiled for a second per step.
    """
    return _taken(scores, drops, steps)


def _taken(scores: Tensor, drops: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    indices, values = [], []
    for _ in range(steps):
        value, best = scores.max(-1, keepdim=True)
        indices.append(best)
        values.append(value)
        row = best[..., None].expand(*best.shape, scores.shape[-1])
        scores = scores.masked_fill(drops.gather(-2, row).squeeze(-2), -math.inf)
    mask = torch.cat(values, -1) > -math.inf
    return torch.where(mask, torch.cat(indices, -1), 0), mask


def decompositions() -> dict[Any, Callable[..., Any]]:
    """The operator of `nms` in terms of torch's own, for programs that are to run where holofunc is not installed.

    Example:
        >>> from holofunc.ops.suppression import decompositions
        >>> [str(op) for op in decompositions()]
        ['holofunc.take_best.default']
    """
    return {torch.ops.holofunc.take_best.default: _taken}


@_take.register_fake
def _(scores: Tensor, drops: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    indices = torch.empty(*scores.shape[:-1], steps, dtype=torch.int64, device=scores.device)
    return indices, torch.empty_like(indices, dtype=torch.bool)


@_take.register_vmap
def _(
    info: object, in_dims: tuple[int | None, int | None, None], scores: Tensor, drops: Tensor, steps: int
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    pairs = list(zip((scores, drops), in_dims[:2], strict=True))
    size = next(t.shape[dim] for t, dim in pairs if dim is not None)
    both = [t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0) for t, dim in pairs]
    return _take(*both, steps), (0, 0)


def dynamic_nms(boxes: Tensor, scores: Tensor, iou_threshold: float, *, labels: Tensor | None = None) -> Tensor:
    """`nms` by torchvision's kernel: as many indices as boxes are kept.

    Faster than `nms` outside of compiled code; it neither maps over batches nor compiles without a break.

    Args:
        boxes: shape (N, 4), xyxy; N may be 0.
        scores: shape (N,). A score of -inf or NaN is never kept.
        iou_threshold: boxes whose IoU with a better one is above this are dropped.
        labels: classes, shape (N,): boxes of different classes do not suppress each other.

    Returns:
        Indices, int64, best first.

    Example:
        >>> import torch
        >>> from holofunc.ops import boxes
        >>> b = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 1.9], [5.0, 5.0, 6.0, 6.0]])
        >>> boxes.dynamic_nms(b, torch.tensor([0.8, 0.9, 0.1]), 0.5)
        tensor([1, 2])
    """
    from torchvision import ops  # not at import time: importing torchvision costs as much as torch

    boxes, scores = upcast(boxes), upcast(scores)
    rows = (scores > -math.inf).nonzero().squeeze(1)  # the others are never kept, nor do they drop any
    if labels is None:
        groups: Sequence[Tensor] = [rows]
    else:
        # class by class: moving each class to a place of its own, so that one call serves all, rounds the coordinates
        order = rows[labels[rows].argsort(stable=True)]
        groups = order.split(labels[order].unique_consecutive(return_counts=True)[1].tolist())
    kept = torch.cat([rows[:0], *(group[ops.nms(boxes[group], scores[group], iou_threshold)] for group in groups)])
    kept = kept.sort().values  # of equal scores the first comes first
    return kept[scores[kept].argsort(descending=True, stable=True)]
