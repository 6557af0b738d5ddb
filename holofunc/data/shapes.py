"""Shapes on textured grounds: a synthetic segmentation and detection dataset, as a function of a key."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from holofunc import random
from holofunc.ops.checks import check_counts
from holofunc.typing import Key

__all__ = ["SHAPES", "Shapes", "draw_shapes"]

SHAPES = ("disc", "square", "triangle", "cross")
"""Names of the classes, by label; in a mask, a shape's class is its label plus 1, and 0 is the ground."""


class Shapes(NamedTuple):
    """Images with the masks and boxes of their shapes.

    Attributes:
        images: (N, 3, S, S), uint8.
        masks: class of each pixel, (N, S, S), int64: 0 for the ground, 1 + label for a shape.
        boxes: around the visible part of each shape, (N, M, 4): x1, y1, x2, y2 as shares of the side; 0 where none is.
        labels: of the shapes, (N, M), int64, in `SHAPES`; 0 where none is.
        present: which of the M there are, (N, M), bool. A shape that others hide by more than half is none.
    """

    images: Tensor
    masks: Tensor
    boxes: Tensor
    labels: Tensor
    present: Tensor


def draw_shapes(key: Key, count: int, *, size: int = 64, most: int = 3) -> Shapes:
    """Draw images of partly overlapping discs, squares, triangles and crosses of random size, angle and texture.

    Ground and shapes are filled alike, with stripes and clouds of two random colors, so that neither color nor texture
    tells them apart: only the outline does.

    Args:
        key: the images are a function of it, and each of them of its number: a longer set begins with a shorter one.
        count: N, at least 1.
        size: S, the side in pixels, at least 16.
        most: M, the most shapes on an image, at least 1; each number from 1 on is as frequent.

    Raises:
        ValueError: a number below its least.

    Example:
        >>> from holofunc import data, random
        >>> drawn = data.draw_shapes(random.key(0), 8, size=48)
        >>> drawn.images.shape, drawn.masks.shape, drawn.boxes.shape
        (torch.Size([8, 3, 48, 48]), torch.Size([8, 48, 48]), torch.Size([8, 3, 4]))
        >>> sorted(drawn.masks.unique().tolist())
        [0, 1, 2, 3, 4]
    """
    check_counts(count=count, most=most)
    check_counts(16, size=size)
    chunk = 256  # of images at a time, whose drafts fit in memory
    parts = []
    for first in range(0, count, chunk):
        keys = torch.stack([random.fold_in(key, i) for i in range(first, min(first + chunk, count))])
        parts.append(torch.vmap(lambda k: _draw(k, size, most))(keys))
    return Shapes(*(torch.cat(values) for values in zip(*parts, strict=True)))


def _draw(key: Key, size: int, most: int) -> Shapes:
    """One image."""
    number, kind, place, look = random.split(key, 4).unbind()
    labels = random.randint(kind, (most,), 0, len(SHAPES))
    inside = (
        _outlines(place, labels, size) & (torch.arange(most) < random.randint(number, (), 1, most + 1))[:, None, None]
    )
    hidden = inside.flip(0).cumsum(0).flip(0) - inside.long() > 0  # by a later shape
    visible = inside & ~hidden
    present = visible.sum((1, 2)) * 2 > inside.sum((1, 2))
    mask = (visible * (labels + 1)[:, None, None]).sum(0)
    fills = _fills(look, most + 1, size)
    images = (fills[1:] * visible[:, None]).sum(0) + fills[0] * (mask == 0)
    return Shapes(
        (images * 255).round().to(torch.uint8), mask, _boxes(visible, present), torch.where(present, labels, 0), present
    )


def _outlines(key: Key, labels: Tensor, size: int) -> Tensor:
    """Which pixels (M, S, S) are inside of each shape."""
    keys = random.split(key, 3).unbind()
    radius = random.uniform(keys[0], labels.shape, low=0.16, high=0.3) * size
    angle = random.uniform(keys[1], labels.shape, high=2 * math.pi)
    center = radius + random.uniform(keys[2], (2, *labels.shape)) * (size - 2 * radius)
    pixel = torch.arange(size) + 0.5
    x = pixel - center[0][:, None, None]
    y = (pixel[:, None] - center[1][:, None, None]).expand(-1, -1, size)
    sin, cos = angle.sin()[:, None, None], angle.cos()[:, None, None]
    u, v = (cos * x + sin * y) / radius[:, None, None], (cos * y - sin * x) / radius[:, None, None]
    far, near = torch.maximum(u.abs(), v.abs()), torch.minimum(u.abs(), v.abs())
    insides = (
        u.square() + v.square() < 0.85,
        far < 0.7,
        torch.maximum(-v, 0.866 * u.abs() + 0.5 * v) < 0.5,
        (far < 0.9) & (near < 0.3),
    )
    chosen = F.one_hot(labels, len(insides)).bool()
    return (torch.stack(insides, 1) & chosen[..., None, None]).any(1)


def _fills(key: Key, number: int, size: int) -> Tensor:
    """Stripes and clouds of two colors, (number, 3, S, S) in [0, 1]."""
    keys = random.split(key, 5).unbind()
    colors = random.uniform(keys[0], (2, number, 3, 1, 1))
    frequency = random.uniform(keys[1], (number, 2, 1, 1), low=-0.8, high=0.8)
    phase = random.uniform(keys[2], (number, 1, 1), high=2 * math.pi)
    pixel = torch.arange(size)
    stripes = (frequency[:, 0] * pixel + frequency[:, 1] * pixel[:, None] + phase).sin()
    clouds = F.interpolate(random.uniform(keys[3], (1, number, 6, 6), low=-1.0), size=(size, size), mode="bilinear")[0]
    share = ((stripes + 1.5 * clouds) / 2.5 + 1) / 2
    grain = random.uniform(keys[4], (size, size), low=-0.08, high=0.08)
    return (colors[0] + (colors[1] - colors[0]) * 0.6 * share[:, None] + grain).clamp(0, 1)


def _boxes(visible: Tensor, present: Tensor) -> Tensor:
    """Boxes (M, 4) around the pixels (M, S, S), as shares of the side."""
    size = visible.shape[-1]
    sides = []
    for axis in (1, 2):  # columns, then rows
        line = visible.any(axis).int()
        sides += [line.argmax(1), size - line.flip(1).argmax(1)]
    x1, x2, y1, y2 = sides
    return torch.where(present[:, None], torch.stack([x1, y1, x2, y2], 1) / size, 0)
