"""Augmentation by windows: flips, crops, zooms and scale jitter of images, boxes and masks."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from holofunc import random
from holofunc.ops.checks import check_counts
from holofunc.transforms.composing import Augment, check_images, is_size, pair
from holofunc.transforms.views import view, view_boxes, view_labels
from holofunc.typing import Batch, Key

__all__ = [
    "large_scale_jitter",
    "random_crop",
    "random_flip",
    "random_resized_crop",
    "windowed",
    "zoom_out",
]

WHOLE = (0.0, 0.0, 1.0, 1.0)


# --- augmentations of windows ------------------------------------------------------------------------------------


def windowed(
    draw: Callable[[Key, tuple[int, int]], Tensor],
    size: tuple[int, int] | None = None,
    *,
    fill: float = 0.0,
    ignore_index: int = -100,
    min_visible: float = 0.0,
) -> Augment:
    """An augmentation that shows each image through a random window.

    Args:
        draw: ``draw(key, (H, W)) -> window``, of shape (4,) as in `view`.
        size: height and width of the result; those of the images where None.
        fill: what lies outside of an image.
        ignore_index: what lies outside of a mask, as in `view_labels`.
        min_visible: boxes of which less is left are dropped, as in `view_boxes`.

    Returns:
        An augmentation of a batch ``(images, targets)``. Targets are labels (B,) or soft targets (B, K), which stay;
        masks of classes (B, H, W), an integer dtype; boxes ``(boxes (B, M, 4) relative xyxy, labels (B, M), mask (B,
        M))``; or a dict of such by name, in which `boxes` and `mask` may stand beside `labels`, masks of classes and
        outlines of the objects (B, M, H, W), bool.

    Example:
        >>> import torch
        >>> from holofunc import random, transforms
        >>> left_half = transforms.windowed(lambda key, size: torch.tensor([0.0, 0.0, 0.5, 1.0]))
        >>> left_half(torch.tensor([[[1.0, 2.0]]]), random.key(0))
        tensor([[[1.0000, 1.2500]]])
    """

    def of_targets(targets: Any, window: Tensor, shape: tuple[int, int]) -> Any:
        """The targets of one sample."""
        if isinstance(targets, dict):
            moved = {}
            if "boxes" in targets:
                boxes, mask = view_boxes(targets["boxes"], targets["mask"], window, min_visible=min_visible)
                moved = {"boxes": boxes, "mask": mask}
            return {name: moved[name] if name in moved else of_targets(x, window, shape) for name, x in targets.items()}
        if isinstance(targets, tuple) and len(targets) == 3:
            boxes, mask = view_boxes(targets[0], targets[2], window, min_visible=min_visible)
            return tuple.__new__(type(targets), (boxes, targets[1], mask))  # a NamedTuple stays one
        if isinstance(targets, Tensor) and tuple(targets.shape) == shape and not targets.is_floating_point():
            return view_labels(targets, window, size, fill=ignore_index)
        if isinstance(targets, Tensor) and targets.dtype == torch.bool and tuple(targets.shape[1:]) == shape:
            return torch.func.vmap(lambda outline: view_labels(outline, window, size))(targets)
        return targets

    def one(image: Tensor, targets: Any, key: Key) -> tuple[Tensor, Any]:
        shape = (image.shape[1], image.shape[2])
        window = draw(key, shape)
        return view(image, window, size, fill=fill), of_targets(targets, window, shape)

    def augment(batch: Batch, key: Key) -> Batch:
        alone = isinstance(batch, Tensor)
        images, targets = (batch, ()) if alone else pair(batch)
        check_images(images)
        if images.ndim == 4:
            images, targets = torch.func.vmap(one)(images, targets, random.split(key, len(images)))
        else:
            images, targets = one(images, targets, key)
        return images if alone else (images, targets)

    return augment


def random_flip(p: float = 0.5, *, vertical: bool = False) -> Augment:
    """Mirror images, left to right or upside down, with their boxes and masks.

    Args:
        p: probability, in [0, 1].
        vertical: upside down.

    Returns:
        An augmentation, as `windowed` makes them.

    Raises:
        ValueError: if p is out of range.

    Example:
        >>> import torch
        >>> from holofunc import random, transforms
        >>> transforms.random_flip(1.0)(torch.tensor([[[1.0, 2.0, 3.0]]]), random.key(0))
        tensor([[[3., 2., 1.]]])
    """
    _check_probability(p)
    order = [0, 3, 2, 1] if vertical else [2, 1, 0, 3]

    def draw(key: Key, size: tuple[int, int]) -> Tensor:
        whole = torch.tensor(WHOLE, device=key.device)
        return torch.where(random.bernoulli(key, (), p), whole[order], whole)

    return windowed(draw)


def random_crop(
    size: int | tuple[int, int] | None = None,
    *,
    padding: int = 0,
    fill: float = 0.0,
    ignore_index: int = -100,
    min_visible: float = 0.0,
) -> Augment:
    """Crop a fixed number of pixels at a random position of the padded image.

    Args:
        size: height and width, or one number for both; those of the images where None.
        padding: pixels of the border.
        fill: what the border is made of, as in `windowed`, like all that follows.
        ignore_index: what the border of a mask is made of.
        min_visible: boxes of which less is left are dropped.

    Returns:
        An augmentation.

    Raises:
        ValueError: if a number is out of range; when called, if the image with its border is smaller than the piece.

    Example:
        >>> import torch
        >>> from holofunc import random, transforms
        >>> transforms.random_crop(2)(torch.ones(5, 3, 8, 8), random.key(0)).shape
        torch.Size([5, 3, 2, 2])
    """
    piece = _pair(size)
    check_counts(0, padding=padding)

    def draw(key: Key, size: tuple[int, int]) -> Tensor:
        height, width = size if piece is None else piece
        spare = size[0] + 2 * padding - height, size[1] + 2 * padding - width
        if min(spare) < 0:
            raise ValueError(f"size must be at most that of the images with their border, {size}, got {piece}")
        places = [random.randint(k, (), 0, n + 1) for k, n in zip(random.split(key), spare, strict=True)]
        top, left = ((place - padding) / n for place, n in zip(places, size, strict=True))
        return torch.stack([left, top, left + width / size[1], top + height / size[0]])

    return windowed(draw, piece, fill=fill, ignore_index=ignore_index, min_visible=min_visible)


def random_resized_crop(
    size: int | tuple[int, int] | None = None,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    min_visible: float = 0.0,
) -> Augment:
    """Show a crop of random area and aspect ratio in full size: the augmentation of ImageNet training.

    Args:
        size: height and width of the result, or one number for both; those of the images where None.
        scale: the piece's share of the area, in (0, 1].
        ratio: its width over its height in pixels, drawn evenly on a logarithmic scale.
        min_visible: boxes of which less is left are dropped, as in `windowed`.

    Returns:
        An augmentation. A piece that is too long for the image is as long as it.

    Raises:
        ValueError: if a range is none.

    Source: Szegedy et al., "Going Deeper with Convolutions" (CVPR 2015).

    Example:
        >>> import torch
        >>> from holofunc import random, transforms
        >>> transforms.random_resized_crop(4)(torch.ones(5, 3, 8, 8), random.key(0)).shape
        torch.Size([5, 3, 4, 4])
    """
    _check_range("scale", scale, 1.0)
    _check_range("ratio", ratio, math.inf)

    def draw(key: Key, size: tuple[int, int]) -> Tensor:
        keys = random.split(key, 4)
        area = random.uniform(keys[0], low=scale[0], high=scale[1])
        shape = random.uniform(keys[1], low=math.log(ratio[0]), high=math.log(ratio[1])).exp() * size[0] / size[1]
        extent = torch.stack([(area * shape).sqrt(), (area / shape).sqrt()]).clamp_max(1)
        corner = (1 - extent) * torch.stack([random.uniform(keys[2]), random.uniform(keys[3])])
        return torch.cat([corner, corner + extent])

    return windowed(draw, _pair(size), min_visible=min_visible)


def zoom_out(p: float = 0.5, *, max_scale: float = 4.0, fill: float = 0.0, ignore_index: int = -100) -> Augment:
    """Put images at a random position on a larger canvas, so that objects become smaller.

    Args:
        p: probability, in [0, 1].
        max_scale: the canvas's largest side, in sides of the image, at least 1; drawn evenly from 1.
        fill: what the canvas is made of, as in `windowed`.
        ignore_index: what the canvas of a mask is made of.

    Returns:
        An augmentation.

    Raises:
        ValueError: if a number is out of range.

    Source: Liu et al., "SSD: Single Shot MultiBox Detector" (ECCV 2016), section 3.6.

    Example:
        >>> import torch
        >>> from holofunc import random, transforms
        >>> bool(transforms.zoom_out(1.0)(torch.ones(1, 32, 32), random.key(0)).mean() < 1)
        True
    """
    _check_probability(p)
    if not 1 <= max_scale < math.inf:
        raise ValueError(f"max_scale must be finite and at least 1, got {max_scale}")

    def draw(key: Key, size: tuple[int, int]) -> Tensor:
        keys = random.split(key, 3)
        side = torch.where(random.bernoulli(keys[0], (), p), random.uniform(keys[1], low=1.0, high=max_scale), 1.0)
        corner = -random.uniform(keys[2], (2,)) * (side - 1)
        return torch.cat([corner, corner + side])

    return windowed(draw, fill=fill, ignore_index=ignore_index)


def large_scale_jitter(
    size: int | tuple[int, int] | None = None,
    *,
    scale: tuple[float, float] = (0.1, 2.0),
    fill: float = 0.0,
    ignore_index: int = -100,
    min_visible: float = 0.0,
) -> Augment:
    """Resize images by a random factor, then crop or pad them to a fixed size at a random position.

    Args:
        size: height and width of the result, or one number for both; those of the images where None. The shape of the
            image's content is kept.
        scale: the factor, relative to the size at which the whole image just fits.
        fill: what is padded, as in `windowed`, like all that follows.
        ignore_index: what masks are padded with.
        min_visible: boxes of which less is left are dropped.

    Returns:
        An augmentation.

    Raises:
        ValueError: if ``scale`` is no range.

    Source: Ghiasi et al., "Simple Copy-Paste is a Strong Data Augmentation Method for Instance Segmentation" (CVPR
        2021).

    Example:
        >>> import torch
        >>> from holofunc import random, transforms
        >>> transforms.large_scale_jitter(16)(torch.ones(2, 3, 8, 12), random.key(0)).shape
        torch.Size([2, 3, 16, 16])
    """
    _check_range("scale", scale, math.inf)
    shown = _pair(size)

    def draw(key: Key, size: tuple[int, int]) -> Tensor:
        height, width = size if shown is None else shown
        fits = min(height / size[0], width / size[1])
        keys = random.split(key)
        factor = random.uniform(keys[0], low=scale[0], high=scale[1]) * fits
        extent = torch.stack([width / (size[1] * factor), height / (size[0] * factor)])  # of the window
        corner = random.uniform(keys[1], (2,)) * (1 - extent)  # inside of the image if smaller, around it if larger
        return torch.cat([corner, corner + extent])

    return windowed(draw, shown, fill=fill, ignore_index=ignore_index, min_visible=min_visible)


def _pair(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    pair = (size, size) if isinstance(size, int) else size
    if pair is not None and not is_size(pair):
        raise ValueError(f"size must be a height and a width of at least 1, or one number for both, got {size}")
    return pair


def _check_probability(p: float) -> None:
    if not 0 <= p <= 1:
        raise ValueError(f"p must be in [0, 1], got {p}")


def _check_range(name: str, bounds: tuple[float, float], most: float) -> None:
    if not 0 < bounds[0] <= bounds[1] <= most:
        raise ValueError(f"{name} must be two numbers in (0, {most:g}], the lower first, got {bounds}")
