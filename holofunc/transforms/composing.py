"""The types of augmentations, and their composition."""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from holofunc import random, tree
from holofunc.typing import Batch, Key

__all__ = ["Augment", "check_images", "compose", "denormalized", "images_of", "is_size", "of_images", "one_of", "pair"]

Augment: TypeAlias = Callable[[Batch, Key], Batch]
"""`augment(batch, key) -> batch`, for a batch `(images, targets)`, for images (B, C, H, W), or one image (C, H, W)."""


def compose(*augments: Augment) -> Augment:
    """Apply augmentations in order, each with its own key.

    Args:
        *augments: augmentations, in this order.

    Returns:
        An augmentation.

    Raises:
        TypeError: if one of them is not callable.

    Example:
        >>> import torch
        >>> from holofunc import random, transforms
        >>> augment = transforms.compose(transforms.random_flip(), transforms.random_crop(padding=2))
        >>> images, labels = augment((torch.ones(2, 3, 8, 8), torch.tensor([0, 1])), random.key(0))
        >>> images.shape
        torch.Size([2, 3, 8, 8])
    """
    for augment in augments:
        if not callable(augment):
            raise TypeError(f"augments must be functions (batch, key) -> batch, got {augment!r}")

    def all_of_them(batch: Batch, key: Key) -> Batch:
        for i, augment in enumerate(augments):
            batch = augment(batch, random.fold_in(key, i))
        return batch

    return all_of_them


def one_of(*augments: Augment, weights: Sequence[float] | None = None) -> Augment:
    """Apply one of several augmentations to the whole batch, for instance MixUp or CutMix.

    All of them are computed, so that the step remains one graph; they must return equal shapes.

    Args:
        *augments: augmentations to choose from.
        weights: unnormalized probabilities; None is uniform.

    Returns:
        An augmentation.

    Raises:
        ValueError: if there is no augmentation, or not one weight for each; when called, if their results differ in
            shape or dtype.

    Example:
        >>> import torch
        >>> from holofunc import random, transforms
        >>> augment = transforms.one_of(transforms.mixup(10), transforms.cutmix(10))
        >>> images, targets = augment((torch.ones(4, 3, 8, 8), torch.arange(4)), random.key(0))
        >>> targets.shape
        torch.Size([4, 10])
    """
    shares = [1.0] * len(augments) if weights is None else list(weights)
    if not augments or len(shares) != len(augments) or min(shares) < 0 or sum(shares) <= 0:
        raise ValueError(
            f"weights must be one number for each of {len(augments)} augments, none negative, got {weights}"
        )
    bounds = [sum(shares[:i]) / sum(shares) for i in range(1, len(shares))]

    def chosen(batch: Batch, key: Key) -> Batch:
        keys = random.split(key, len(augments) + 1)
        draw = random.uniform(keys[0])
        result = augments[0](batch, keys[1])
        for i, bound in enumerate(bounds):
            later = augments[i + 1](batch, keys[i + 2])
            kinds = [[(tuple(x.shape), x.dtype) for x in tree.leaves(made)] for made in (result, later)]
            if kinds[0] != kinds[1]:
                raise ValueError(f"augments must return the same shapes and dtypes, got {kinds[0]} and {kinds[1]}")
            result = tree.map(lambda a, b, bound=bound: torch.where(draw < bound, a, b), result, later)
        return result

    return chosen


def denormalized(augment: Augment, mean: float | Sequence[float], std: float | Sequence[float]) -> Augment:
    """Apply an augmentation of pixels in [0, 1] to normalized images, by undoing and redoing the normalization.

    Args:
        augment: an augmentation.
        mean: of the normalization, a number or one per channel.
        std: of the normalization, a number or one per channel.

    Returns:
        An augmentation.

    Raises:
        ValueError: if one of these is not finite, or ``std`` not positive; when called, if there is not one per
            channel.

    Example:
        >>> import torch
        >>> from holofunc import random, transforms
        >>> augment = transforms.denormalized(transforms.color_jitter(brightness=0.4), mean=0.5, std=0.25)
        >>> augment(torch.zeros(3, 8, 8), random.key(0)).shape
        torch.Size([3, 8, 8])
    """

    for name, value in (("mean", mean), ("std", std)):
        numbers = [value] if isinstance(value, (int, float)) else list(value)
        if not numbers or not all(math.isfinite(x) and (name == "mean" or x > 0) for x in numbers):
            kind = "finite" if name == "mean" else "finite and positive"
            raise ValueError(f"{name} must be a {kind} number, or one per channel, got {value}")

    def augmented(batch: Batch, key: Key) -> Batch:
        images = images_of(batch)
        check_images(images)
        for name, value in (("mean", mean), ("std", std)):
            if isinstance(value, Sequence) and len(value) not in (1, images.shape[-3]):
                raise ValueError(f"{name} must hold a number for each of {images.shape[-3]} channels, got {value}")
        shift, scale = (
            torch.as_tensor(x, dtype=images.dtype, device=images.device).reshape(-1, 1, 1) for x in (mean, std)
        )
        plain = images * scale + shift
        if isinstance(batch, Tensor):
            return (augment(plain, key) - shift) / scale
        images, *rest = augment((plain, *batch[1:]), key)
        return ((images - shift) / scale, *rest)

    return augmented


def of_images(transform: Callable[[Tensor, Key], Tensor]) -> Augment:
    """Make an augmentation of a function of one image (C, H, W) and a key; targets are not changed.

    Example:
        >>> import torch
        >>> from holofunc import random
        >>> shift = of_images(lambda image, key: image + random.uniform(key))
        >>> shift((torch.zeros(2, 1, 1, 1), torch.tensor([0, 1])), random.key(0))[0].flatten().tolist() != [0, 0]
        True
    """

    def augment(batch: Batch, key: Key) -> Batch:
        images = images_of(batch)
        check_images(images)
        if images.ndim == 3:
            return transform(images, key) if isinstance(batch, Tensor) else (transform(images, key), *batch[1:])
        images = torch.func.vmap(transform)(images, random.split(key, len(images)))
        return images if isinstance(batch, Tensor) else (images, *batch[1:])

    return augment


def images_of(batch: Batch) -> Any:
    """The images of a batch, which may be a pair or only images.

    Raises:
        TypeError: if it is neither.
    """
    if isinstance(batch, Tensor) or (isinstance(batch, (tuple, list)) and batch):
        return batch if isinstance(batch, Tensor) else batch[0]
    raise TypeError(f"batch must be images, or (images, targets), got {type(batch).__name__}")


def pair(batch: Batch) -> tuple[Any, Any]:
    """Images and targets.

    Raises:
        TypeError: if the batch is not a pair.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        got = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, (tuple, list)) else type(batch).__name__
        raise TypeError(f"batch must be a pair (images, targets), got {got}")
    return batch[0], batch[1]


def check_images(images: Any, batched: bool = False) -> None:
    """Check an image or a batch of images.

    Raises:
        TypeError: if the dtype is not floating point.
        ValueError: if the rank is wrong, or the batch is empty.

    Example:
        >>> import torch
        >>> check_images(torch.zeros(3, 8, 8, dtype=torch.uint8))
        Traceback (most recent call last):
        ...
        TypeError: images must be floating point, got torch.uint8
    """
    if not isinstance(images, Tensor) or images.ndim not in ((4,) if batched else (3, 4)):
        wanted = "(B, C, H, W)" if batched else "(B, C, H, W) or (C, H, W)"
        got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images must be a tensor {wanted}, got {got}")
    if images.ndim == 4 and not len(images):
        raise ValueError(f"images must hold at least one image, got shape {tuple(images.shape)}")
    if not images.is_floating_point():
        raise TypeError(f"images must be floating point, got {images.dtype}")


def is_size(value: Any) -> bool:
    """Whether a value is a height and a width, in pixels.

    Example:
        >>> is_size((2, 3)), is_size((2.5, 3)), is_size(3)
        (True, False, False)
    """
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(n, int) and n >= 1 for n in value)
