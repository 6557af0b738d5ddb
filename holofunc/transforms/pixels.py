"""Augmentation of pixels: colour jitter, random erasing, and their elementary operations."""

import math

import torch
from torch import Tensor

from holofunc import random
from holofunc.transforms.composing import Augment, of_images
from holofunc.typing import Key, Scalar

__all__ = ["blend", "color_jitter", "gray", "random_erasing", "shift_hue"]


def gray(image: Tensor) -> Tensor:
    """The brightness of each pixel, (1, H, W): ``0.299 r + 0.587 g + 0.114 b``, or the mean over the channels.

    Example:
        >>> import torch
        >>> gray(torch.ones(3, 1, 1))
        tensor([[[1.]]])
    """
    if image.shape[0] != 3:
        return image.mean(0, keepdim=True)
    return (image * image.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0, keepdim=True)


def blend(image: Tensor, other: Tensor, factor: Scalar) -> Tensor:
    """``factor * image + (1 - factor) * other``, clipped to [0, 1].

    Example:
        >>> import torch
        >>> blend(torch.tensor(0.5), torch.tensor(0.0), 3.0)
        tensor(1.)
    """
    return (other + factor * (image - other)).clamp(0, 1)


def shift_hue(image: Tensor, turns: Scalar) -> Tensor:
    """Rotate the hue of images (3, H, W); images with another number of channels are not changed.

    The rotation is a matrix about the grey axis, which unlike a conversion to HSV is continuous.

    Example:
        >>> import torch
        >>> shift_hue(torch.tensor([1.0, 0.0, 0.0])[:, None, None], 1 / 3).flatten().round(decimals=3)
        tensor([0., 1., 0.])
    """
    if image.shape[0] != 3:
        return image
    angle = torch.as_tensor(turns, dtype=image.dtype, device=image.device) * (2 * math.pi)
    third, root = (1 - angle.cos()) / 3, angle.sin() / math.sqrt(3)
    straight, left, right = angle.cos() + third, third - root, third + root
    matrix = torch.stack([straight, left, right, right, straight, left, left, right, straight]).reshape(3, 3)
    return torch.einsum("ij,jhw->ihw", matrix, image).clamp(0, 1)


def color_jitter(
    *, brightness: float = 0.0, contrast: float = 0.0, saturation: float = 0.0, hue: float = 0.0
) -> Augment:
    """Change brightness, contrast, saturation and hue of images by random amounts.

    Args:
        brightness: pixels are multiplied by a factor from [1 - brightness, 1 + brightness], not below 0.
        contrast: the same for their distance from the image's mean grey.
        saturation: the same for their distance from their own grey.
        hue: hues are rotated by up to this fraction of the circle, in [0, 0.5].

    Returns:
        An augmentation of images in [0, 1] (use `denormalized` for others), in this order; targets are not changed.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> import torch
        >>> from holofunc import random, transforms
        >>> transforms.color_jitter(brightness=0.5)(torch.full((2, 3, 1, 1), 0.5), random.key(0)).shape
        torch.Size([2, 3, 1, 1])
    """
    if not all(0 <= amount < math.inf for amount in (brightness, contrast, saturation)) or not 0 <= hue <= 0.5:
        raise ValueError(
            "brightness, contrast and saturation must be finite and at least 0 and hue in [0, 0.5], got "
            f"{brightness}, {contrast}, {saturation} and {hue}"
        )

    def jitter(image: Tensor, key: Key) -> Tensor:
        bright, contrasted, colourful, turned = random.split(key, 4)
        if brightness:
            image = blend(image, torch.zeros_like(image), _factor(bright, brightness))
        if contrast:
            image = blend(image, gray(image).mean(), _factor(contrasted, contrast))
        if saturation:
            image = blend(image, gray(image), _factor(colourful, saturation))
        return shift_hue(image, random.uniform(turned, low=-hue, high=hue)) if hue else image

    return of_images(jitter)


def random_erasing(
    p: float = 0.5,
    *,
    scale: tuple[float, float] = (0.02, 0.33),
    ratio: tuple[float, float] = (0.3, 3.3),
    value: float | None = 0.0,
) -> Augment:
    """Overwrite a random rectangle of each image.

    Args:
        p: probability, in [0, 1].
        scale: the rectangle's fraction of the area, in (0, 1].
        ratio: width / height, uniform on a logarithmic scale.
        value: fill value; None is normal noise per pixel.

    Returns:
        An augmentation; targets are not changed.

    Raises:
        ValueError: if an option is out of range.

    Source: Zhong et al., "Random Erasing Data Augmentation" (AAAI 2020). A rectangle that is too long for the image is
        clipped instead of drawn again.

    Example:
        >>> import torch
        >>> from holofunc import random, transforms
        >>> bool(transforms.random_erasing(1.0)(torch.ones(2, 3, 16, 16), random.key(0)).mean() < 1)
        True
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p must be in [0, 1], got {p}")
    for name, (low, high), most in (("scale", scale, 1.0), ("ratio", ratio, math.inf)):
        if not 0 < low <= high <= most:
            raise ValueError(f"{name} must be two numbers in (0, {most:g}], the lower first, got {(low, high)}")

    def erase(image: Tensor, key: Key) -> Tensor:
        chance, area_key, shape_key, place_key, noise_key = random.split(key, 5)
        _, height, width = image.shape
        pixels = random.uniform(area_key, low=scale[0], high=scale[1]) * height * width
        shape = random.uniform(shape_key, low=math.log(ratio[0]), high=math.log(ratio[1])).exp()
        places = random.uniform(place_key, (2,))
        sides = (pixels / shape).sqrt().round().clamp(1, height), (pixels * shape).sqrt().round().clamp(1, width)
        spans = []
        for place, side, size in zip(places, sides, (height, width), strict=True):
            start, pixel = (place * (size - side + 1)).floor(), torch.arange(size, device=image.device)
            spans.append((pixel >= start) & (pixel < start + side))
        erased = spans[0][:, None] & spans[1] & random.bernoulli(chance, (), p)
        filling = value if value is not None else random.normal(noise_key, image.shape, dtype=image.dtype)
        return torch.where(erased, filling, image)

    return of_images(erase)


def _factor(key: Key, amount: float) -> Tensor:
    return random.uniform(key, low=max(0.0, 1 - amount), high=1 + amount)
