"""Box operators: IoU and its variants, losses, and non-maximum suppression.

Boxes are ``(x1, y1, x2, y2)`` along the last dimension, in any unit. Every function of two sets of boxes is pairwise,
``(..., M, 4), (..., N, 4) -> (..., M, N)``, or with ``paired=True`` row by row, ``(..., 4), (..., 4) -> (...)``. Half
precision is computed in float32, float64 is kept. Boxes without area, and boxes with their corners swapped (which count
as having none), give finite values and gradients; `check_boxes` raises for the latter where data enters.
"""

import torch
from torch import Tensor

from holofunc.ops import geometry
from holofunc.ops.arithmetic import safe_divide
from holofunc.ops.suppression import Kept, dynamic_nms, nms

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


def check_boxes(boxes: Tensor) -> None:
    """Raise for boxes that are not finite or have their corners swapped.

    It reads values, so it waits for the device and cannot run while tracing: call it where data enters, on the host.
    The operators themselves look at shapes only.

    Args:
        boxes: shape (..., 4).

    Raises:
        ValueError: if the last dimension is not 4, a value is not finite, or x2 < x1 or y2 < y1.

    Example:
        >>> import torch
        >>> from holofunc.ops import boxes
        >>> boxes.check_boxes(torch.tensor([[0.0, 0.0, 2.0, 1.0], [3.0, 0.0, 2.0, 1.0]]))
        Traceback (most recent call last):
        ...
        ValueError: boxes must be finite with x1 <= x2 and y1 <= y2, got [3.0, 0.0, 2.0, 1.0]
    """
    geometry.check_shape("boxes", boxes)
    wrong = boxes[~(boxes.isfinite().all(-1) & (boxes[..., 2:] >= boxes[..., :2]).all(-1))]
    if len(wrong):
        raise ValueError(f"boxes must be finite with x1 <= x2 and y1 <= y2, got {wrong[0].tolist()}")


# --- measures ----------------------------------------------------------------------------------------------------


def box_iou(boxes1: Tensor, boxes2: Tensor, *, paired: bool = False) -> Tensor:
    """Intersection over union, |A and B| / |A or B|; 0 for boxes without area.

    Args:
        boxes1: shape (..., M, 4), xyxy.
        boxes2: shape (..., N, 4), xyxy.
        paired: row i against row i only: shapes (..., 4) and (..., 4).

    Returns:
        Shape (..., M, N), or (...) if paired; in [0, 1].

    Raises:
        ValueError: if a last dimension is not 4.

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
    return geometry.iou(*geometry.match(boxes1, boxes2, paired))[0]


def box_giou(boxes1: Tensor, boxes2: Tensor, *, paired: bool = False) -> Tensor:
    """IoU minus the share of the hull that belongs to neither box, (|C| - |A or B|) / |C|.

    Args:
        boxes1: shape (..., M, 4), xyxy.
        boxes2: shape (..., N, 4), xyxy.
        paired: row i against row i only.

    Returns:
        Shape (..., M, N), or (...) if paired; in [-1, 1].

    Raises:
        ValueError: if a last dimension is not 4.

    Source: Rezatofighi et al., "Generalized Intersection over Union" (CVPR 2019).

    Example:
        >>> import torch
        >>> from holofunc.ops import boxes
        >>> boxes.box_giou(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([[2.0, 0.0, 3.0, 1.0]]))
        tensor([[-0.3333]])
    """
    a, b = geometry.match(boxes1, boxes2, paired)
    iou, union = geometry.iou(a, b)
    hull = geometry.area(geometry.hull(a, b))
    return iou - safe_divide(hull - union, hull)


def box_diou(boxes1: Tensor, boxes2: Tensor, *, paired: bool = False) -> Tensor:
    """IoU minus the squared distance of the centres in units of the hull's diagonal (`iou_penalty`).

    Args:
        boxes1: shape (..., M, 4), xyxy.
        boxes2: shape (..., N, 4), xyxy.
        paired: row i against row i only.

    Returns:
        Shape (..., M, N), or (...) if paired; in [-1, 1].

    Raises:
        ValueError: if a last dimension is not 4.

    Source: Zheng et al., "Distance-IoU Loss" (AAAI 2020).

    Example:
        >>> import torch
        >>> from holofunc.ops import boxes
        >>> boxes.box_diou(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([[2.0, 0.0, 3.0, 1.0]]))
        tensor([[-0.4000]])
    """
    a, b = geometry.match(boxes1, boxes2, paired)
    return geometry.iou(a, b)[0] - geometry.penalty(a, b)


def box_ciou(boxes1: Tensor, boxes2: Tensor, *, paired: bool = False, detach_alpha: bool = True) -> Tensor:
    """`box_diou` minus alpha v, where v measures how different the aspect ratios are (`aspect_ratio_consistency`).

    alpha = v / (1 - IoU + v), so that aspect ratios matter once boxes overlap.

    Args:
        boxes1: shape (..., M, 4), xyxy.
        boxes2: shape (..., N, 4), xyxy.
        paired: row i against row i only.
        detach_alpha: take alpha for a constant in derivatives, as its authors do.

    Returns:
        Shape (..., M, N), or (...) if paired.

    Raises:
        ValueError: if a last dimension is not 4.

    Source: Zheng et al., "Distance-IoU Loss" (AAAI 2020), eq. 9-11.

    Example:
        >>> import torch
        >>> from holofunc.ops import boxes
        >>> boxes.box_ciou(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([[0.0, 0.0, 2.0, 1.0]]))
        tensor([[0.4468]])
    """
    a, b = geometry.match(boxes1, boxes2, paired)
    iou = geometry.iou(a, b)[0]
    v = geometry.consistency(*geometry.match_shapes(boxes1, boxes2, paired))
    alpha = v / (1 - iou + v).clamp_min(torch.finfo(v.dtype).eps)  # both are 0 for equal boxes
    return iou - geometry.penalty(a, b) - (alpha.detach() if detach_alpha else alpha) * v


def iou_penalty(boxes1: Tensor, boxes2: Tensor, *, paired: bool = False) -> Tensor:
    """The squared distance of two boxes' centres over the squared diagonal of their hull; 0 for two equal points.

    Args:
        boxes1: shape (..., M, 4), xyxy.
        boxes2: shape (..., N, 4), xyxy.
        paired: row i against row i only.

    Returns:
        Shape (..., M, N), or (...) if paired; in [0, 1].

    Raises:
        ValueError: if a last dimension is not 4.

    Source: Zheng et al., "Distance-IoU Loss" (AAAI 2020), eq. 6.

    Example:
        >>> import torch
        >>> from holofunc.ops import boxes
        >>> boxes.iou_penalty(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([[2.0, 0.0, 3.0, 1.0]]))
        tensor([[0.4000]])
    """
    return geometry.penalty(*geometry.match(boxes1, boxes2, paired))


def aspect_ratio(boxes: Tensor) -> Tensor:
    """The aspect ratio as an angle, arctan(width / height); 0 for a point.

    Args:
        boxes: shape (..., 4), xyxy.

    Returns:
        Shape (...); in [0, pi / 2].

    Raises:
        ValueError: if the last dimension is not 4.

    Example:
        >>> import torch
        >>> from holofunc.ops import boxes
        >>> boxes.aspect_ratio(torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0]]))
        tensor([0.7854, 1.5708])
    """
    geometry.check_shape("boxes", boxes)
    return geometry.angle(geometry.sides(boxes))


def aspect_ratio_consistency(boxes1: Tensor, boxes2: Tensor, *, paired: bool = False) -> Tensor:
    """How different two boxes' aspect ratios are, v = 4 / pi^2 (arctan(w1 / h1) - arctan(w2 / h2))^2.

    Args:
        boxes1: shape (..., M, 4), xyxy.
        boxes2: shape (..., N, 4), xyxy.
        paired: row i against row i only.

    Returns:
        Shape (..., M, N), or (...) if paired; in [0, 1].

    Raises:
        ValueError: if a last dimension is not 4.

    Source: Zheng et al., "Distance-IoU Loss" (AAAI 2020), eq. 9.

    Example:
        >>> import torch
        >>> from holofunc.ops import boxes
        >>> boxes.aspect_ratio_consistency(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([[0.0, 0.0, 1.0, 0.0]]))
        tensor([[0.2500]])
    """
    return geometry.consistency(*geometry.match_shapes(boxes1, boxes2, paired))


# --- losses ------------------------------------------------------------------------------------------------------


def giou_loss(boxes1: Tensor, boxes2: Tensor, *, paired: bool = False) -> Tensor:
    """1 - `box_giou`.

    Args:
        boxes1: shape (..., M, 4), xyxy.
        boxes2: shape (..., N, 4), xyxy.
        paired: row i against row i only, the usual training loss.

    Returns:
        Shape (..., M, N), or (...) if paired; in [0, 2].

    Raises:
        ValueError: if a last dimension is not 4.

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
        boxes1: shape (..., M, 4), xyxy.
        boxes2: shape (..., N, 4), xyxy.
        paired: row i against row i only, the usual training loss.

    Returns:
        Shape (..., M, N), or (...) if paired; in [0, 2].

    Raises:
        ValueError: if a last dimension is not 4.

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
        boxes1: shape (..., M, 4), xyxy.
        boxes2: shape (..., N, 4), xyxy.
        paired: row i against row i only, the usual training loss.
        detach_alpha: take the trade-off alpha for a constant in derivatives, as its authors do.

    Returns:
        Shape (..., M, N), or (...) if paired.

    Raises:
        ValueError: if a last dimension is not 4.

    Example:
        >>> import torch
        >>> from holofunc.ops import boxes
        >>> boxes.ciou_loss(torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([0.0, 0.0, 2.0, 1.0]), paired=True)
        tensor(0.5532)
    """
    return 1 - box_ciou(boxes1, boxes2, paired=paired, detach_alpha=detach_alpha)
