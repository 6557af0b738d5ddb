"""Overlap of boxes: measures, losses and suppression.

Boxes are ``(x1, y1, x2, y2)`` along the last dimension, in any unit. Every function of two sets of boxes is pairwise,
``(..., M, 4), (..., N, 4) -> (..., M, N)``, or with ``paired=True`` row by row, ``(..., 4), (..., 4) -> (...)``. Half
precision is computed in float32, float64 is kept. Boxes without area, and boxes with their corners swapped (which count
as having none), give finite values and gradients; `check_boxes` refuses the latter where data enters.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from holofunc.ops.arithmetic import safe_divide, upcast

__all__ = [
    "Kept",
    "aspect_ratio",
    "aspect_ratio_consistency",
    "box_ciou",
    "box_diou",
    "box_giou",
    "box_iou",
    "check_boxes",
    "ciou_loss",
    "diou_loss",
    "dynamic_nms",
    "giou_loss",
    "iou_penalty",
    "nms",
]


# --- the boundary ------------------------------------------------------------------------------------------------


def check_boxes(boxes: Tensor) -> None:
    """Refuse boxes that are not finite or have their corners swapped.

    It reads values, so it waits for the device and cannot run while tracing: call it where data enters, on the host.
    The operators themselves look at shapes only.

    Args:
        boxes: Shape (..., 4).

    Raises:
        ValueError: If the last dimension is not 4, a value is not finite, or x2 < x1 or y2 < y1.

    Example:
        >>> import torch
        >>> from holofunc.ops import boxes
        >>> boxes.check_boxes(torch.tensor([[0.0, 0.0, 2.0, 1.0], [3.0, 0.0, 2.0, 1.0]]))
        Traceback (most recent call last):
        ...
        ValueError: boxes must be finite with x1 <= x2 and y1 <= y2, got [3.0, 0.0, 2.0, 1.0]
    """
    _check_shape("boxes", boxes)
    wrong = boxes[~(boxes.isfinite().all(-1) & (boxes[..., 2:] >= boxes[..., :2]).all(-1))]
    if len(wrong):
        raise ValueError(f"boxes must be finite with x1 <= x2 and y1 <= y2, got {wrong[0].tolist()}")


def _check_shape(name: str, boxes: Tensor) -> None:
    if boxes.ndim == 0 or boxes.shape[-1] != 4:
        raise ValueError(f"{name} must have shape (..., 4), got {tuple(boxes.shape)}")


class _Sides(NamedTuple):
    x1: Tensor
    y1: Tensor
    x2: Tensor
    y2: Tensor


def _match(boxes1: Tensor, boxes2: Tensor, paired: bool) -> tuple[_Sides, _Sides]:
    """Both sets of boxes in one precision, shaped so that they broadcast to all pairs, or to the given ones."""
    _check_shape("boxes1", boxes1)
    _check_shape("boxes2", boxes2)
    if not paired and min(boxes1.ndim, boxes2.ndim) < 2:
        raise ValueError(
            f"boxes1 and boxes2 must have shapes (..., M, 4) and (..., N, 4), or paired=True, got "
            f"{tuple(boxes1.shape)} and {tuple(boxes2.shape)}"
        )
    boxes1, boxes2 = upcast(boxes1), upcast(boxes2)
    if not paired:
        boxes1, boxes2 = boxes1.unsqueeze(-2), boxes2.unsqueeze(-3)
    return _Sides(*boxes1.unbind(-1)), _Sides(*boxes2.unbind(-1))


# --- one pair of boxes -------------------------------------------------------------------------------------------


def _size(box: _Sides) -> tuple[Tensor, Tensor]:
    return (box.x2 - box.x1).clamp_min(0), (box.y2 - box.y1).clamp_min(0)


def _area(box: _Sides) -> Tensor:
    width, height = _size(box)
    return width * height


def _intersection(a: _Sides, b: _Sides) -> _Sides:
    lower, upper = torch.maximum, torch.minimum
    return _Sides(lower(a.x1, b.x1), lower(a.y1, b.y1), upper(a.x2, b.x2), upper(a.y2, b.y2))


def _hull(a: _Sides, b: _Sides) -> _Sides:
    lower, upper = torch.minimum, torch.maximum
    return _Sides(lower(a.x1, b.x1), lower(a.y1, b.y1), upper(a.x2, b.x2), upper(a.y2, b.y2))


def _iou(a: _Sides, b: _Sides) -> tuple[Tensor, Tensor]:
    """Intersection over union, and the union."""
    shared = _area(_intersection(a, b))
    union = _area(a) + _area(b) - shared
    return safe_divide(shared, union), union


def _penalty(a: _Sides, b: _Sides) -> Tensor:
    """Squared distance of the centres over the squared diagonal of the hull."""
    dx, dy = (a.x1 + a.x2) / 2 - (b.x1 + b.x2) / 2, (a.y1 + a.y2) / 2 - (b.y1 + b.y2) / 2
    width, height = _size(_hull(a, b))
    return safe_divide(dx * dx + dy * dy, width * width + height * height)


def _angle(box: _Sides) -> Tensor:
    width, height = _size(box)
    flat = height == 0
    return torch.where(flat, math.pi / 2 * (width > 0), torch.atan(width / torch.where(flat, 1, height)))


def _consistency(a: _Sides, b: _Sides) -> Tensor:
    return 4 / math.pi**2 * (_angle(a) - _angle(b)) ** 2


# --- measures ----------------------------------------------------------------------------------------------------


def box_iou(boxes1: Tensor, boxes2: Tensor, *, paired: bool = False) -> Tensor:
    """Intersection over union, |A and B| / |A or B|; 0 for boxes without area.

    Args:
        boxes1: Shape (..., M, 4), xyxy.
        boxes2: Shape (..., N, 4), xyxy.
        paired: Row i against row i only: shapes (..., 4) and (..., 4).

    Returns:
        Shape (..., M, N), or (...) if paired; in [0, 1].

    Raises:
        ValueError: If a last dimension is not 4.

    Example:
        >>> import torch
        >>> from holofunc.ops import boxes
        >>> a = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 1.0, 1.0]])
        >>> boxes.box_iou(a, a)
        tensor([[1.0000, 0.2500],
                [0.2500, 1.0000]])
        >>> boxes.box_iou(a, a, paired=True)
        tensor([1., 1.])
    """
    return _iou(*_match(boxes1, boxes2, paired))[0]


def box_giou(boxes1: Tensor, boxes2: Tensor, *, paired: bool = False) -> Tensor:
    """IoU minus the share of the hull that belongs to neither box, (|C| - |A or B|) / |C|.

    Args:
        boxes1: Shape (..., M, 4), xyxy.
        boxes2: Shape (..., N, 4), xyxy.
        paired: Row i against row i only.

    Returns:
        Shape (..., M, N), or (...) if paired; in [-1, 1].

    Raises:
        ValueError: If a last dimension is not 4.

    Source: Rezatofighi et al., "Generalized Intersection over Union" (CVPR 2019).

    Example:
        >>> import torch
        >>> from holofunc.ops import boxes
        >>> boxes.box_giou(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([[2.0, 0.0, 3.0, 1.0]]))
        tensor([[-0.3333]])
    """
    a, b = _match(boxes1, boxes2, paired)
    iou, union = _iou(a, b)
    hull = _area(_hull(a, b))
    return iou - safe_divide(hull - union, hull)


def box_diou(boxes1: Tensor, boxes2: Tensor, *, paired: bool = False) -> Tensor:
    """IoU minus the squared distance of the centres in units of the hull's diagonal (`iou_penalty`).

    Args:
        boxes1: Shape (..., M, 4), xyxy.
        boxes2: Shape (..., N, 4), xyxy.
        paired: Row i against row i only.

    Returns:
        Shape (..., M, N), or (...) if paired; in [-1, 1].

    Raises:
        ValueError: If a last dimension is not 4.

    Source: Zheng et al., "Distance-IoU Loss" (AAAI 2020).

    Example:
        >>> import torch
        >>> from holofunc.ops import boxes
        >>> boxes.box_diou(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([[2.0, 0.0, 3.0, 1.0]]))
        tensor([[-0.4000]])
    """
    a, b = _match(boxes1, boxes2, paired)
    return _iou(a, b)[0] - _penalty(a, b)


def box_ciou(boxes1: Tensor, boxes2: Tensor, *, paired: bool = False, detach_alpha: bool = True) -> Tensor:
    """`box_diou` minus alpha v, where v measures how different the aspect ratios are (`aspect_ratio_consistency`).

    alpha = v / (1 - IoU + v), so that aspect ratios matter once boxes overlap.

    Args:
        boxes1: Shape (..., M, 4), xyxy.
        boxes2: Shape (..., N, 4), xyxy.
        paired: Row i against row i only.
        detach_alpha: Take alpha for a constant in derivatives, as its authors do.

    Returns:
        Shape (..., M, N), or (...) if paired.

    Raises:
        ValueError: If a last dimension is not 4.

    Source: Zheng et al., "Distance-IoU Loss" (AAAI 2020), eq. 9-11.

    Example:
        >>> import torch
        >>> from holofunc.ops import boxes
        >>> boxes.box_ciou(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([[0.0, 0.0, 2.0, 1.0]]))
        tensor([[0.4468]])
    """
    a, b = _match(boxes1, boxes2, paired)
    iou = _iou(a, b)[0]
    v = _consistency(a, b)
    alpha = safe_divide(v, 1 - iou + v)
    return iou - _penalty(a, b) - (alpha.detach() if detach_alpha else alpha) * v


def iou_penalty(boxes1: Tensor, boxes2: Tensor, *, paired: bool = False) -> Tensor:
    """The squared distance of two boxes' centres over the squared diagonal of their hull; 0 for two equal points.

    Args:
        boxes1: Shape (..., M, 4), xyxy.
        boxes2: Shape (..., N, 4), xyxy.
        paired: Row i against row i only.

    Returns:
        Shape (..., M, N), or (...) if paired; in [0, 1].

    Raises:
        ValueError: If a last dimension is not 4.

    Source: Zheng et al., "Distance-IoU Loss" (AAAI 2020), eq. 6.

    Example:
        >>> import torch
        >>> from holofunc.ops import boxes
        >>> boxes.iou_penalty(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([[2.0, 0.0, 3.0, 1.0]]))
        tensor([[0.4000]])
    """
    return _penalty(*_match(boxes1, boxes2, paired))


def aspect_ratio(boxes: Tensor) -> Tensor:
    """The aspect ratio as an angle, arctan(width / height); 0 for a point.

    Args:
        boxes: Shape (..., 4), xyxy.

    Returns:
        Shape (...); in [0, pi / 2].

    Raises:
        ValueError: If the last dimension is not 4.

    Example:
        >>> import torch
        >>> from holofunc.ops import boxes
        >>> boxes.aspect_ratio(torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0]]))
        tensor([0.7854, 1.5708])
    """
    _check_shape("boxes", boxes)
    return _angle(_Sides(*upcast(boxes).unbind(-1)))


def aspect_ratio_consistency(boxes1: Tensor, boxes2: Tensor, *, paired: bool = False) -> Tensor:
    """How different two boxes' aspect ratios are, v = 4 / pi^2 (arctan(w1 / h1) - arctan(w2 / h2))^2.

    Args:
        boxes1: Shape (..., M, 4), xyxy.
        boxes2: Shape (..., N, 4), xyxy.
        paired: Row i against row i only.

    Returns:
        Shape (..., M, N), or (...) if paired; in [0, 1].

    Raises:
        ValueError: If a last dimension is not 4.

    Source: Zheng et al., "Distance-IoU Loss" (AAAI 2020), eq. 9.

    Example:
        >>> import torch
        >>> from holofunc.ops import boxes
        >>> boxes.aspect_ratio_consistency(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([[0.0, 0.0, 1.0, 0.0]]))
        tensor([[0.2500]])
    """
    return _consistency(*_match(boxes1, boxes2, paired))


# --- losses ------------------------------------------------------------------------------------------------------


def giou_loss(boxes1: Tensor, boxes2: Tensor, *, paired: bool = False) -> Tensor:
    """1 - `box_giou`.

    Args:
        boxes1: Shape (..., M, 4), xyxy.
        boxes2: Shape (..., N, 4), xyxy.
        paired: Row i against row i only, the usual training loss.

    Returns:
        Shape (..., M, N), or (...) if paired; in [0, 2].

    Raises:
        ValueError: If a last dimension is not 4.

    Example:
        >>> import torch
        >>> from holofunc.ops import boxes
        >>> predicted = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 2.0, 1.0]])
        >>> boxes.giou_loss(predicted, torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(2, 4), paired=True)
        tensor([0.0000, 0.5000])
    """
    return 1 - box_giou(boxes1, boxes2, paired=paired)


def diou_loss(boxes1: Tensor, boxes2: Tensor, *, paired: bool = False) -> Tensor:
    """1 - `box_diou`.

    Args:
        boxes1: Shape (..., M, 4), xyxy.
        boxes2: Shape (..., N, 4), xyxy.
        paired: Row i against row i only, the usual training loss.

    Returns:
        Shape (..., M, N), or (...) if paired; in [0, 2].

    Raises:
        ValueError: If a last dimension is not 4.

    Example:
        >>> import torch
        >>> from holofunc.ops import boxes
        >>> boxes.diou_loss(torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([2.0, 0.0, 3.0, 1.0]), paired=True)
        tensor(1.4000)
    """
    return 1 - box_diou(boxes1, boxes2, paired=paired)


def ciou_loss(boxes1: Tensor, boxes2: Tensor, *, paired: bool = False, detach_alpha: bool = True) -> Tensor:
    """1 - `box_ciou`.

    Args:
        boxes1: Shape (..., M, 4), xyxy.
        boxes2: Shape (..., N, 4), xyxy.
        paired: Row i against row i only, the usual training loss.
        detach_alpha: Take the trade-off alpha for a constant in derivatives, as its authors do.

    Returns:
        Shape (..., M, N), or (...) if paired.

    Raises:
        ValueError: If a last dimension is not 4.

    Example:
        >>> import torch
        >>> from holofunc.ops import boxes
        >>> boxes.ciou_loss(torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([0.0, 0.0, 2.0, 1.0]), paired=True)
        tensor(0.5532)
    """
    return 1 - box_ciou(boxes1, boxes2, paired=paired, detach_alpha=detach_alpha)


# --- suppression -------------------------------------------------------------------------------------------------


class Kept(NamedTuple):
    """Boxes that survive suppression, best first; `indices` is 0 where `mask` is False."""

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

    Every shape is known before it runs, so it compiles without a break and maps over batches. It takes
    `max_detections` steps and N^2 memory: with many candidates select the best thousand first (`torch.topk`).

    Args:
        boxes: Shape (..., N, 4), xyxy, N at least 1.
        scores: Shape (..., N). A score of -inf (padding) or NaN is never kept.
        iou_threshold: Boxes whose IoU with a better one is above this are dropped, in [0, 1].
        labels: Classes, shape (..., N): boxes of different classes do not suppress each other.
        max_detections: D, at least 1; N where None.
        score_threshold: Boxes must score above this.

    Returns:
        ``Kept(indices, mask)``, both of shape (..., D).

    Raises:
        ValueError: If shapes do not fit, there are no boxes, or an option is out of range.

    Source: the boxes `torchvision.ops.nms` keeps, in its order (`dynamic_nms`).

    Example:
        >>> import torch
        >>> from holofunc.ops import boxes
        >>> b = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 1.9], [5.0, 5.0, 6.0, 6.0]])
        >>> boxes.nms(b, torch.tensor([0.8, 0.9, 0.1]), 0.5)
        Kept(indices=tensor([1, 2, 0]), mask=tensor([ True,  True, False]))
    """
    _check_shape("boxes", boxes)
    if scores.shape != boxes.shape[:-1] or scores.shape[-1] == 0:
        raise ValueError(
            "boxes and scores must have shapes (..., N, 4) and (..., N) with N at least 1, got "
            f"{tuple(boxes.shape)} and {tuple(scores.shape)}"
        )
    if labels is not None and labels.shape != scores.shape:
        raise ValueError(f"labels must have shape {tuple(scores.shape)}, got {tuple(labels.shape)}")
    if not 0 <= iou_threshold <= 1:
        raise ValueError(f"iou_threshold must be in [0, 1], got {iou_threshold}")
    if max_detections is not None and max_detections < 1:
        raise ValueError(f"max_detections must be at least 1, got {max_detections}")

    size = scores.shape[-1]
    drops = box_iou(boxes, boxes) > iou_threshold
    if labels is not None:
        drops = drops & (labels[..., :, None] == labels[..., None, :])
    drops = drops | torch.eye(size, dtype=torch.bool, device=boxes.device)
    left = torch.where(scores > score_threshold, upcast(scores), -math.inf)
    indices, mask = [], []
    for _ in range(size if max_detections is None else max_detections):
        best = left.argmax(-1, keepdim=True)
        mask.append(left.gather(-1, best) > -math.inf)
        indices.append(torch.where(mask[-1], best, 0))
        dropped = drops.gather(-2, best[..., None].expand(*best.shape, size)).squeeze(-2)
        left = torch.where(dropped, -math.inf, left)
    return Kept(torch.cat(indices, -1), torch.cat(mask, -1))


def dynamic_nms(boxes: Tensor, scores: Tensor, iou_threshold: float, *, labels: Tensor | None = None) -> Tensor:
    """`nms` by torchvision's kernel: as many indices as boxes are kept.

    Faster than `nms` outside of compiled code; it neither maps over batches nor compiles without a break.

    Args:
        boxes: Shape (N, 4), xyxy.
        scores: Shape (N,).
        iou_threshold: Boxes whose IoU with a better one is above this are dropped.
        labels: Classes, shape (N,): boxes of different classes do not suppress each other.

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

    if labels is None:
        return ops.nms(upcast(boxes), upcast(scores), iou_threshold)
    return ops.batched_nms(upcast(boxes), upcast(scores), labels, iou_threshold)
