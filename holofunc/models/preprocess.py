"""The image preprocessing of a checkpoint."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

__all__ = ["Preprocess"]


@dataclass(frozen=True)
class Preprocess:
    """Resize the shorter side, crop the centre, scale to [0, 1] and normalize.

    Sizes, crop position and the rounding of uint8 images are those of torchvision's presets, with which the accuracies
    were measured; PIL images are resized by PIL.

    Args:
        resize_size: length of the shorter side in pixels, at least ``input_size``.
        input_size: side of the square crop in pixels.
        mean: per channel.
        std: per channel.
        interpolation: ``"bilinear"`` or ``"bicubic"``, antialiased.

    Raises:
        ValueError: sizes are below 1 or in the wrong order, or another argument is invalid.

    Example:
        >>> import torch
        >>> from holofunc import models
        >>> preprocess = models.weights.checkpoints("resnet18")[0].transforms()
        >>> preprocess(torch.zeros(3, 300, 400, dtype=torch.uint8)).shape
        torch.Size([3, 224, 224])
    """

    resize_size: int
    input_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        if not 1 <= self.input_size <= self.resize_size:
            raise ValueError(f"sizes must be 1 <= input_size <= resize_size, got {self.input_size}, {self.resize_size}")
        if self.interpolation not in ("bilinear", "bicubic"):
            raise ValueError(f"interpolation must be 'bilinear' or 'bicubic', got {self.interpolation!r}")
        if not self.mean or len(self.mean) != len(self.std):
            raise ValueError(f"mean and std must have one number per channel, got {self.mean} and {self.std}")

    def __call__(self, image: Any) -> Tensor:
        """
        Args:
            image: uint8 or floating (in [0, 1]) of shape (C, H, W) or (N, C, H, W), or a PIL image.

        Returns:
            Floating, (C, S, S) or (N, C, S, S) with S the input size.

        Raises:
            TypeError: not an image of these types. ValueError: the shape is wrong.
        """
        if isinstance(image, Image.Image):
            picture = image.convert("L" if len(self.mean) == 1 else "RGB")
            method = Image.Resampling[self.interpolation.upper()]
            x = _tensor(picture.resize(self._resized(picture.height, picture.width)[::-1], method))
        elif isinstance(image, Tensor):
            x = self._resize(self._checked(image))
        else:
            raise TypeError(f"image must be a tensor or a PIL image, got {type(image).__name__}")
        top, left = (round((side - self.input_size) / 2) for side in x.shape[-2:])
        x = x[..., top : top + self.input_size, left : left + self.input_size]
        x = x if x.is_floating_point() else x / 255
        mean, std = (x.new_tensor(v)[:, None, None] for v in (self.mean, self.std))
        return (x - mean) / std

    def _checked(self, x: Tensor) -> Tensor:
        if x.ndim not in (3, 4) or x.shape[-3] != len(self.mean):
            shape = f"({len(self.mean)}, H, W) or (N, {len(self.mean)}, H, W)"
            raise ValueError(f"image must have shape {shape}, got {tuple(x.shape)}")
        if x.dtype != torch.uint8 and not x.is_floating_point():
            raise TypeError(f"image must be uint8 or floating point, got {x.dtype}")
        return x

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        def scaled(side: int, other: int) -> int:
            return self.resize_size if side <= other else int(self.resize_size * side / other)

        return scaled(height, width), scaled(width, height)

    def _resize(self, x: Tensor) -> Tensor:
        batch = (x if x.ndim == 4 else x[None]).to(x.dtype if x.is_floating_point() else torch.float32)
        size = self._resized(*batch.shape[-2:])
        batch = F.interpolate(batch, size, mode=self.interpolation, antialias=True)
        if x.dtype == torch.uint8:
            batch = batch.round().clamp(0, 255).to(torch.uint8)
        return batch if x.ndim == 4 else batch[0]


def _tensor(picture: Image.Image) -> Tensor:
    levels = torch.from_numpy(np.array(picture))
    return levels[None] if levels.ndim == 2 else levels.permute(2, 0, 1)
