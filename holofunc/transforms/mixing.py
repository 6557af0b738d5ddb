"""Mixing of samples: MixUp and CutMix, with exact soft targets."""

import math
from typing import Any

import torch
from torch import Tensor

from holofunc import random
from holofunc.ops.checks import check_counts
from holofunc.transforms.composing import Augment, check_images, pair
from holofunc.typing import Batch, Key

__all__ = ["cutmix", "mixup", "soft_targets"]


def mixup(num_classes: int, alpha: float = 0.2, *, per_sample: bool = True) -> Augment:
    """Blend each image with another of the batch, and their targets: ``share * a + (1 - share) * b``.

    Args:
        num_classes: `K`; 1 for a yes-or-no target, 0 or 1.
        alpha: shares are drawn from Beta(alpha, alpha); at least 0, and 0 does not change images.
        per_sample: whether each pair has its own share, or all pairs have the same.

    Returns:
        An augmentation of batches ``(images, targets)``. Labels (B, ...) of images or pixels become soft
        targets (B, K, ...); a label outside the classes, such as an `ignore_index`, becomes zeros, which losses ignore.
        Soft targets (B, K, ...) are mixed. Boxes ``(boxes (B, M, 4), labels (B, M), mask (B, M))`` become those of both
        images, (B, 2 M, ...), with full weight.

    Raises:
        ValueError: if an option is out of range; when called, if targets fit neither form.
        TypeError: when called, if images are not floating point.

    Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization" (ICLR 2018), one permutation per batch; for boxes,
        Zhang et al., "Bag of Freebies for Training Object Detection Neural Networks" (2019), whose alpha is 1.5.

    Example:
        >>> import torch
        >>> from holofunc import random, transforms
        >>> augment = transforms.mixup(3)
        >>> images, targets = augment((torch.ones(2, 3, 4, 4), torch.tensor([0, 2])), random.key(1))
        >>> targets.sum(1)
        tensor([1., 1.])
    """
    _check(num_classes, alpha)

    def augment(batch: Batch, key: Key) -> Batch:
        images, targets = pair(batch)
        check_images(images, batched=True)
        boxed = isinstance(targets, tuple) and len(targets) == 3
        targets = targets if boxed else soft_targets(targets, num_classes)
        if alpha == 0:
            return images, targets
        order_key, share_key = random.split(key)
        order, share = random.permutation(order_key, len(images)), _shares(share_key, len(images), alpha, per_sample)
        mixed = _blend(images, images[order], share)
        return mixed, _of_both(targets, order) if boxed else _blend(targets, targets[order], share)

    return augment


def cutmix(num_classes: int, alpha: float = 1.0, *, per_sample: bool = True) -> Augment:
    """Paste a rectangle of another image of the batch into each; targets are mixed by the visible pixels.

    Args:
        num_classes: `K`; 1 for a yes-or-no target, 0 or 1.
        alpha: the rectangle's share of the area is drawn from Beta(alpha, alpha), before it is clipped at the border;
            at least 0, and 0 does not change images.
        per_sample: whether each pair has its own rectangle, or all pairs have the same.

    Returns:
        An augmentation of batches ``(images, targets)``. Targets become soft as in `mixup`, with the exact fraction
        of pixels; masks (B, H, W) of the size of the images are pasted like these and stay labels.

    Raises:
        ValueError: as in `mixup`.
        TypeError: as in `mixup`.

    Source: Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features" (ICCV
        2019).

    Example:
        >>> import torch
        >>> from holofunc import random, transforms
        >>> augment, images = transforms.cutmix(2), torch.stack([torch.zeros(1, 4, 4), torch.ones(1, 4, 4)])
        >>> images, targets = augment((images, torch.tensor([0, 1])), random.key(3))
        >>> torch.equal(images.mean((1, 2, 3)), targets[:, 1])
        True
    """
    _check(num_classes, alpha)

    def augment(batch: Batch, key: Key) -> Batch:
        images, targets = pair(batch)
        check_images(images, batched=True)
        num, _, height, width = images.shape
        dense = tuple(targets.shape) == (num, height, width) and not targets.is_floating_point()
        targets = targets if dense else soft_targets(targets, num_classes)
        if alpha == 0:
            return images, targets
        order_key, share_key, place_key = random.split(key, 3)
        order = random.permutation(order_key, num)
        side = (1 - _shares(share_key, num, alpha, per_sample)).sqrt()
        places = random.uniform(place_key, (2, num if per_sample else 1))
        rows, columns = (
            _between(place, side, n, images.device) for place, n in zip(places, (height, width), strict=True)
        )
        pasted = rows[:, :, None] & columns[:, None]  # (B or 1, H, W)
        seen = torch.where(pasted[:, None], images[order], images)
        if dense:
            return seen, torch.where(pasted, targets[order], targets)
        kept = 1 - pasted.to(targets.dtype).mean((1, 2))
        return seen, _blend(targets, targets[order], kept)

    return augment


def soft_targets(targets: Tensor, num_classes: int) -> Tensor:
    """Convert labels to soft targets.

    Args:
        targets: labels (B, ...), an integer dtype, or soft targets (B, K, ...), floating point.
        num_classes: `K`; for 1, labels of any dtype are the target itself.

    Returns:
        Shape (B, K, ...), floating point.

    Raises:
        ValueError: if targets are neither.

    Example:
        >>> import torch
        >>> soft_targets(torch.tensor([1, -100]), 2)
        tensor([[0., 1.],
                [0., 0.]])
    """
    if not isinstance(targets, Tensor) or targets.ndim == 0:
        raise ValueError(f"targets must be a tensor of labels or soft targets, got {type(targets).__name__}")
    if targets.is_floating_point() and targets.ndim > 1 and targets.shape[1] == num_classes:
        return targets
    if num_classes == 1:
        return targets.float().unsqueeze(1) if targets.ndim == 1 else targets.float()
    if targets.is_floating_point():
        raise ValueError(
            f"targets must be integers (B, ...) or floating point (B, {num_classes}, ...), got {targets.dtype} "
            f"{tuple(targets.shape)}"
        )
    classes = torch.arange(num_classes, device=targets.device).reshape(-1, *[1] * (targets.ndim - 1))
    return (targets.unsqueeze(1) == classes).float()


def _check(num_classes: int, alpha: float) -> None:
    check_counts(num_classes=num_classes)
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha must be finite and at least 0, got {alpha}")


def _shares(key: Key, num: int, alpha: float, per_sample: bool) -> Tensor:
    return random.beta(key, (num if per_sample else 1,), alpha, alpha)


def _blend(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    share = share.to(a.dtype).reshape(-1, *[1] * (a.ndim - 1))
    return share * a + (1 - share) * b


def _of_both(targets: Any, order: Tensor) -> Any:
    """Boxes, labels and mask of each image and of another; a NamedTuple stays one."""
    return tuple.__new__(type(targets), (torch.cat([x, x[order]], 1) for x in targets))


def _between(centre: Tensor, side: Tensor, num: int, device: torch.device) -> Tensor:
    """A mask (B, num) of the pixels in an interval, with ends rounded to pixels and clipped at the border."""
    pixel = torch.arange(num, device=device)
    low, high = ((centre + sign * side / 2) * num for sign in (-1, 1))
    return (pixel >= low.round()[:, None]) & (pixel < high.round()[:, None])
