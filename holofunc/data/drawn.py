"""Digits on canvases: a synthetic detection dataset, as a function of a key."""

import torch
import torch.nn.functional as F
from torch import Tensor

from holofunc import random
from holofunc.data.embedded import digits
from holofunc.ops.checks import check_counts
from holofunc.ops.targets import Targets
from holofunc.typing import Key

__all__ = ["canvases"]

INK = 0.3
"""Threshold of the pixels of a digit that determine its box."""


def canvases(
    key: Key,
    count: int,
    *,
    size: int = 96,
    max_digits: int = 4,
    scale: tuple[float, float] = (0.2, 0.4),
    split: str = "train",
) -> tuple[Tensor, Targets]:
    """Images of handwritten digits (`digits`) of several sizes on cloudy backgrounds, with their boxes.

    The canvas is divided into the smallest number of equal cells for ``max_digits``, and digits are in different cells,
    so they may touch but rarely overlap. One image in ten has no digit.

    Args:
        key: the same key gives the same images.
        count: N, at least 1.
        size: pixels of an image's side, at least 32.
        max_digits: M, at least 1.
        scale: smallest and largest side of a digit, as a fraction of the image.
        split: source of the digits, ``"train"``, ``"test"`` or ``"all"``.

    Returns:
        Images (N, 1, size, size), float32 in [0, 1], and `Targets` of M rows; labels are the digits.

    Raises:
        ValueError: if an option is out of range.

    Example:
        >>> from holofunc import data, random
        >>> images, targets = data.canvases(random.key(0), 8, size=64)
        >>> images.shape, targets.boxes.shape
        (torch.Size([8, 1, 64, 64]), torch.Size([8, 4, 4]))
    """
    check_counts(count=count, max_digits=max_digits)
    check_counts(32, size=size)
    if not 0.05 <= scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale must be two numbers, 0.05 <= least <= greatest <= 1, got {scale}")
    pixels, labels = digits(split)
    parts = [_cut(image[0]) for image in pixels]
    ground_key, number_key, cell_key, draw_key, digit_key = random.split(key, 5)
    images = _grounds(ground_key, count, size)
    side = next(n for n in range(1, max_digits + 1) if n * n >= max_digits)
    numbers = random.randint(number_key, (count,), 0, 10 * max_digits)
    numbers = torch.where(numbers < max_digits, 0, 1 + numbers % max_digits)
    cells = random.uniform(cell_key, (count, side**2)).argsort(1)
    draws = random.uniform(draw_key, (count, max_digits, 4))
    chosen = random.randint(digit_key, (count, max_digits), 0, len(parts))
    boxes = torch.zeros(count, max_digits, 4)
    for i in range(count):
        for j in range(int(numbers[i])):
            cell = divmod(int(cells[i, j]), side)
            part = parts[int(chosen[i, j])]
            boxes[i, j] = _place(images[i, 0], part, cell, side, scale, draws[i, j].tolist())
    mask = torch.arange(max_digits) < numbers[:, None]
    return images, Targets(boxes / size, torch.where(mask, labels[chosen], 0), mask)


def _cut(digit: Tensor) -> Tensor:
    """Crop a digit to its ink."""
    rows, columns = (digit > INK).any(1).nonzero(), (digit > INK).any(0).nonzero()
    return digit[int(rows[0]) : int(rows[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1]


def _grounds(key: Key, count: int, size: int) -> Tensor:
    """Noisy cloudy backgrounds, at most half as bright as digits."""
    cloud_key, grain_key = random.split(key)
    clouds = random.uniform(cloud_key, (count, 1, 5, 5), high=0.4)
    smooth = F.interpolate(clouds, size=(size, size), mode="bicubic", align_corners=True).clamp(0, 0.4)
    return smooth + random.uniform(grain_key, (count, 1, size, size), high=0.1)


def _place(
    canvas: Tensor, part: Tensor, cell: tuple[int, int], side: int, scale: tuple[float, float], draws: list[float]
) -> Tensor:
    """Draw a digit into its cell of the canvas, in place; returns its box in pixels."""
    size = len(canvas)
    pixels = size * (scale[0] + (scale[1] - scale[0]) * draws[0])
    height, width = (max(2, round(pixels * n / 8)) for n in part.shape)
    corner = []
    for extent, index, draw in ((height, cell[0], draws[1]), (width, cell[1], draws[2])):
        middle = size * (index + 0.3 + 0.4 * draw) / side
        corner.append(min(max(0, round(middle - extent / 2)), size - extent))
    top, left = corner
    ink = F.interpolate(part[None, None], size=(height, width), mode="bilinear", align_corners=False)[0, 0]
    there = canvas[top : top + height, left : left + width]
    there += ink * (0.7 + 0.3 * draws[3] - there)
    return torch.tensor([left, top, left + width, top + height], dtype=torch.float32)
