"""Mosaic: four images in one."""

from typing import Any

import torch
from torch import Tensor

from holofunc import random
from holofunc.transforms.composing import Augment, check_images, pair
from holofunc.transforms.views import view, view_boxes
from holofunc.typing import Batch, Key

__all__ = ["mosaic"]


def mosaic(p: float = 1.0, *, spread: float = 0.25, min_visible: float = 0.1) -> Augment:
    """Show each image with three others of the batch, one in each corner, at half the size or cropped.

    Args:
        p: probability of each image, in [0, 1].
        spread: largest offset of the point where the four meet from the middle, in sides of the image, in [0, 0.5).
        min_visible: boxes with a smaller visible fraction are dropped.

    Returns:
        An augmentation of batches ``(images, (boxes (B, M, 4) relative xyxy, labels (B, M), mask (B, M)))``. Boxes
        become (B, 4 M, ...), a static shape; the first M are those of the image itself.

    Raises:
        ValueError: if a number is out of range; when called, if targets are not boxes.

    Source: Bochkovskiy et al., "YOLOv4: Optimal Speed and Accuracy of Object Detection" (2020); three permutations of
        the batch instead of draws from the whole set.

    Example:
        >>> import torch
        >>> from holofunc import random, transforms
        >>> targets = torch.tensor([[[0.0, 0.0, 1.0, 1.0]]] * 4), torch.arange(4)[:, None], torch.ones(4, 1).bool()
        >>> images, (boxes, labels, mask) = transforms.mosaic()((torch.ones(4, 3, 8, 8), targets), random.key(0))
        >>> boxes.shape, int(mask.sum())
        (torch.Size([4, 4, 4]), 16)
    """
    if not 0 <= p <= 1 or not 0 <= spread < 0.5:
        raise ValueError(f"p must be in [0, 1] and spread in [0, 0.5), got {p} and {spread}")

    def augment(batch: Batch, key: Key) -> Batch:
        images, targets = pair(batch)
        check_images(images, batched=True)
        if not isinstance(targets, tuple) or len(targets) != 3:
            raise ValueError(f"targets must be (boxes, labels, mask), got {type(targets).__name__}")
        keys, num = random.split(key, 4), len(images)
        orders = [torch.arange(num, device=images.device), *(random.permutation(k, num) for k in keys[:3])]
        own = random.split(keys[3], num)
        tiles = torch.stack([images[order] for order in orders], 1)
        boxes = [torch.stack([x[order] for order in orders], 1) for x in targets]
        assembled = torch.func.vmap(lambda *x: _assembled(*x, p=p, spread=spread, least=min_visible))
        images, found = assembled(tiles, *boxes, own)
        return images, tuple.__new__(type(targets), found)  # a NamedTuple stays one

    return augment


def _assembled(
    tiles: Tensor, boxes: Tensor, labels: Tensor, mask: Tensor, key: Key, *, p: float, spread: float, least: float
) -> tuple[Tensor, Any]:
    """One mosaic of tiles (4, C, H, W) with boxes (4, M, 4), labels and mask (4, M)."""
    place_key, chance = random.split(key)
    x, y = random.uniform(place_key, (2,), low=0.5 - spread, high=0.5 + spread).to(boxes.dtype)
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    _, _, height, width = tiles.shape
    down, right = (torch.arange(n, device=x.device) + 0.5 for n in (height, width))
    below, beside = (down / height >= y)[:, None], (right / width >= x)[None]
    image, shown_boxes, shown_mask = tiles[0], [], []
    for i, (low, far) in enumerate(((False, False), (False, True), (True, False), (True, True))):
        corner = torch.stack([x if far else x - 0.5, y if low else y - 0.5])  # of a tile of half the size
        window = torch.cat([-corner / 0.5, (1 - corner) / 0.5])
        inside = (below if low else ~below) & (beside if far else ~beside)
        shown = view(tiles[i], window)
        image = torch.where(inside, shown, tiles.new_zeros(()) if i == 0 else image)
        moved, there = view_boxes(boxes[i], mask[i], window)
        quarter = torch.stack([x if far else zero, y if low else zero, one if far else x, one if low else y])
        cut = torch.cat([torch.maximum(moved[:, :2], quarter[:2]), torch.minimum(moved[:, 2:], quarter[2:])], 1)
        whole, left = ((b[:, 2:] - b[:, :2]).clamp_min(0).prod(1) for b in (boxes[i] / 2, cut))
        there = there & (left > 0) & (left >= least * whole)
        shown_boxes.append(torch.where(there[:, None], cut, 0))
        shown_mask.append(there)
    absent = torch.zeros_like(mask[1:]).flatten()
    own = torch.cat([boxes[0], torch.zeros_like(boxes[1:]).flatten(0, 1)]), torch.cat([mask[0], absent])
    chosen = random.bernoulli(chance, (), p)
    return torch.where(chosen, image, tiles[0]), (
        torch.where(chosen, torch.cat(shown_boxes), own[0]),
        labels.flatten(),
        torch.where(chosen, torch.cat(shown_mask), own[1]),
    )
