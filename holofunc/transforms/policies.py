"""RandAugment: a few random operations per image."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from holofunc import random
from holofunc.ops.checks import check_counts
from holofunc.transforms.composing import Augment, of_images
from holofunc.transforms.pixels import blend, gray
from holofunc.typing import Key

__all__ = ["OPERATIONS", "equalized", "rand_augment"]

HALF = (torch.float16, torch.bfloat16)
OPERATIONS = (
    *("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast"),
    *("sharpness", "posterize", "solarize", "autocontrast", "equalize"),
)


def rand_augment(num_ops: int = 2, magnitude: float = 9.0, *, fill: float = 0.0) -> Augment:
    """Apply ``num_ops`` random geometric, colour or histogram operations of equal strength to each image.

    Each is drawn from ``identity, shear, translate`` (both ways), ``rotate, brightness, color, contrast, sharpness,
    posterize, solarize, autocontrast, equalize``. Operations that were not drawn are computed with strength zero, so
    that a batch with different operations is one graph.

    Args:
        num_ops: number of consecutive operations, at least 1.
        magnitude: strength, from 0 to 30: 30 shears by 0.3, translates by 0.45 of a side, rotates by 30 degrees, scales
            colours by 1 +- 0.9, keeps 4 bits, inverts everything above 0.
        fill: value of pixels from outside the image.

    Returns:
        An augmentation of images in [0, 1] (use `denormalized` for others); targets are not changed.

    Raises:
        ValueError: if an option is out of range.

    Source: Cubuk et al., "RandAugment: Practical Automated Data Augmentation with a Reduced Search Space" (2019), with
        torchvision's ranges; linear interpolation.

    Example:
        >>> import torch
        >>> from holofunc import random, transforms
        >>> transforms.rand_augment()(torch.full((2, 3, 8, 8), 0.5), random.key(0)).shape
        torch.Size([2, 3, 8, 8])
    """
    check_counts(num_ops=num_ops)
    if not 0 <= magnitude <= 30:
        raise ValueError(f"magnitude must be in [0, 30], got {magnitude}")

    def augment(image: Tensor, key: Key) -> Tensor:
        kind, image = (
            image.dtype,
            image.float() if image.dtype in HALF else image,
        )  # histograms count beyond 256
        for own in random.split(key, num_ops):
            drawn, sign = random.split(own)
            operation = random.randint(drawn, (), 0, len(OPERATIONS))
            image = _applied(
                image, operation, torch.where(random.bernoulli(sign, (), 0.5), -1.0, 1.0), magnitude / 30, fill
            )
        return image.to(kind)

    return of_images(augment)


def _applied(image: Tensor, operation: Tensor, sign: Tensor, strength: float, fill: float) -> Tensor:
    """Apply one operation by its index; the others have no effect."""
    chosen = {name: (operation == i).to(image.dtype) for i, name in enumerate(OPERATIONS)}
    signed = sign.to(image.dtype) * strength
    on = {name: chosen[name] * signed for name in OPERATIONS}
    moving = torch.stack([chosen[name] for name in OPERATIONS[1:6]]).sum() > 0
    image = torch.where(moving, _moved(image, on, fill), image)
    image = blend(image, torch.zeros_like(image), 1 + 0.9 * on["brightness"])
    image = blend(image, gray(image), 1 + 0.9 * on["color"])
    image = blend(image, gray(image).mean(), 1 + 0.9 * on["contrast"])
    image = blend(image, _smooth(image), 1 + 0.9 * on["sharpness"])
    levels = 2.0 ** (8 - round(4 * strength))
    image = torch.where(
        chosen["posterize"] > 0, (image * 255).floor().div(256 / levels).floor() * (256 / levels) / 255, image
    )
    image = torch.where((chosen["solarize"] > 0) & (image >= 1 - strength), 1 - image, image)
    low, high = image.amin((1, 2), keepdim=True), image.amax((1, 2), keepdim=True)
    stretched = (image - low) / torch.where(high > low, high - low, 1)
    image = torch.where((chosen["autocontrast"] > 0) & (high > low), stretched, image)
    return torch.where(chosen["equalize"] > 0, equalized(image), image)


def _moved(image: Tensor, on: dict[str, Tensor], fill: float) -> Tensor:
    """Shear, translate and rotate about the middle, as one affine map of the output pixels."""
    _, height, width = image.shape
    angle = on["rotate"] * (math.pi / 6)
    cos, sin = angle.cos(), angle.sin()
    shear_x, shear_y = 0.3 * on["shear_x"], 0.3 * on["shear_y"]
    rows = [cos, (shear_x - sin) * (height / width), 0.9 * on["translate_x"]]  # grids go from -1 to 1: two sides
    rows += [(shear_y + sin) * (width / height), cos, 0.9 * on["translate_y"]]
    y, x = ((2 * torch.arange(n, device=image.device) + 1) / n - 1 for n in (height, width))
    places = torch.stack(torch.broadcast_tensors(x, y[:, None], torch.ones_like(x)), -1).to(image.dtype)
    grid = (places @ torch.stack(rows).reshape(2, 3).T)[None]
    sampled = F.grid_sample((image - fill)[None], grid, align_corners=False)[0]
    return sampled + fill


def _smooth(image: Tensor) -> Tensor:
    """Blur with a 3x3 kernel, except at the border."""
    if min(image.shape[1:]) < 3:
        return image
    kernel = image.new_tensor([[1.0, 1.0, 1.0], [1.0, 5.0, 1.0], [1.0, 1.0, 1.0]]) / 13
    inner = F.conv2d(image[:, None], kernel[None, None])[:, 0]
    inside = F.pad(torch.ones_like(image[0, 1:-1, 1:-1]), (1, 1, 1, 1)) > 0
    return torch.where(inside, F.pad(inner, (1, 1, 1, 1)), image)


def equalized(image: Tensor) -> Tensor:
    """Equalize the histogram of each channel, with 256 levels.

    Example:
        >>> import torch
        >>> equalized(torch.tensor([0.4, 0.6]).expand(1, 400, 2))[0, 0]
        tensor([0., 1.])
    """
    channels = image.shape[0]
    level = (image.clamp(0, 1) * 255).round().long().reshape(channels, -1)
    ones = torch.ones_like(level, dtype=image.dtype)
    histogram = torch.zeros_like(image[:, :1, :1]).expand(-1, 16, 16).reshape(channels, 256).scatter_add(1, level, ones)
    upto = histogram.cumsum(1)
    last = torch.where(histogram > 0, torch.arange(256, device=image.device), -1).amax(1, keepdim=True)
    step = ((upto[:, -1:] - histogram.gather(1, last)) / 255).floor()
    table = (((upto - histogram) + (step / 2).floor()) / torch.where(step > 0, step, 1)).floor().clamp(0, 255) / 255
    return torch.where(step[..., None] > 0, table.gather(1, level).reshape(image.shape), image)
