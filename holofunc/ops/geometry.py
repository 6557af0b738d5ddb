"""The arithmetic of one pair of boxes, on coordinates that broadcast: what all of `holofunc.ops.boxes` is made of.

What concerns one box by itself is stacked: compiled on a CPU, a stack of two things or more is written down, once per
box and each in a row of its own, where all else is computed anew for every pair, from coordinates four numbers apart.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from holofunc.ops.arithmetic import safe_divide, upcast

__all__ = [
    "Shape",
    "Sides",
    "angle",
    "area",
    "check_shape",
    "consistency",
    "hull",
    "iou",
    "match",
    "match_shapes",
    "penalty",
    "sides",
]

FLAT = 1e-12  # the least height of which an aspect ratio is taken


class Sides(NamedTuple):
    """The coordinates of boxes, each of any shape."""

    x1: Tensor
    y1: Tensor
    x2: Tensor
    y2: Tensor


class Shape(NamedTuple):
    """What boxes are like wherever they lie."""

    area: Tensor
    angle: Tensor


def check_shape(name: str, boxes: Tensor) -> None:
    """Raise unless ``boxes`` is a tensor of four numbers a box."""
    if boxes.ndim == 0 or boxes.shape[-1] != 4:
        raise ValueError(f"{name} must have shape (..., 4), got {tuple(boxes.shape)}")


def sides(boxes: Tensor) -> Sides:
    """The coordinates of boxes (..., 4), at least float32."""
    return Sides(*upcast(boxes).unbind(-1))


def match(boxes1: Tensor, boxes2: Tensor, paired: bool) -> tuple[Sides, Sides]:
    """Both sets of boxes, shaped so that they broadcast to all pairs, or to the given ones."""
    a, b = (Sides(*torch.stack(sides(boxes)).unbind()) for boxes in _broadcast(boxes1, boxes2, paired))
    return a, b


def match_shapes(boxes1: Tensor, boxes2: Tensor, paired: bool) -> tuple[Shape, Shape]:
    """The shapes of both sets of boxes, which broadcast likewise."""
    a, b = (sides(boxes) for boxes in _broadcast(boxes1, boxes2, paired))
    return _shape(a), _shape(b)


def _shape(box: Sides) -> Shape:
    return Shape(*torch.stack([area(box), angle(box)]).unbind())


def _broadcast(boxes1: Tensor, boxes2: Tensor, paired: bool) -> tuple[Tensor, Tensor]:
    check_shape("boxes1", boxes1)
    check_shape("boxes2", boxes2)
    if paired:
        return boxes1, boxes2
    if min(boxes1.ndim, boxes2.ndim) < 2:
        raise ValueError(
            f"boxes1 and boxes2 must have shapes (..., M, 4) and (..., N, 4), or paired=True, got "
            f"{tuple(boxes1.shape)} and {tuple(boxes2.shape)}"
        )
    return boxes1.unsqueeze(-2), boxes2.unsqueeze(-3)


def _size(box: Sides) -> tuple[Tensor, Tensor]:
    return (box.x2 - box.x1).clamp_min(0), (box.y2 - box.y1).clamp_min(0)


def area(box: Sides) -> Tensor:
    """Width times height; 0 for swapped corners."""
    width, height = _size(box)
    return width * height


def _intersection(a: Sides, b: Sides) -> Sides:
    lower, upper = torch.maximum, torch.minimum
    return Sides(lower(a.x1, b.x1), lower(a.y1, b.y1), upper(a.x2, b.x2), upper(a.y2, b.y2))


def hull(a: Sides, b: Sides) -> Sides:
    """The smallest box around both."""
    lower, upper = torch.minimum, torch.maximum
    return Sides(lower(a.x1, b.x1), lower(a.y1, b.y1), upper(a.x2, b.x2), upper(a.y2, b.y2))


def iou(a: Sides, b: Sides) -> tuple[Tensor, Tensor]:
    """Intersection over union, and the union."""
    shared = area(_intersection(a, b))
    union = area(a) + area(b) - shared
    return safe_divide(shared, union), union


def penalty(a: Sides, b: Sides) -> Tensor:
    """Squared distance of the centres over the squared diagonal of the hull."""
    dx, dy = (a.x1 + a.x2) / 2 - (b.x1 + b.x2) / 2, (a.y1 + a.y2) / 2 - (b.y1 + b.y2) / 2
    outer = hull(a, b)  # at least as large as the distance, even if corners are swapped
    width, height = torch.maximum(outer.x2 - outer.x1, dx.abs()), torch.maximum(outer.y2 - outer.y1, dy.abs())
    return safe_divide(dx * dx + dy * dy, width * width + height * height)


def angle(box: Sides) -> Tensor:
    """arctan(width / height); 0 for a point."""
    width, height = torch.relu(box.x2 - box.x1), (box.y2 - box.y1).clamp_min(FLAT)  # relu: no gradient at a width of 0
    return torch.atan(width / height)


def consistency(a: Shape, b: Shape) -> Tensor:
    """The squared difference of the angles, in units of the largest."""
    return 4 / math.pi**2 * (a.angle - b.angle) ** 2
