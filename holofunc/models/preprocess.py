"""Images as a checkpoint's accuracy was measured on them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Preprocess"]


@dataclass(frozen=True)
class Preprocess:
    """Resize the shorter side, cut out the centre, scale to [0, 1], subtract the mean and divide by the deviation.

    Args:
        resize_size: pixels of the shorter side.
        input_size: pixels of the square.
        mean: per channel.
        std: per channel.
        interpolation: ``"bilinear"`` or ``"bicubic"``, antialiased.

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

    def __call__(self, image: Any) -> Tensor:
        """
        Args:
            image: uint8 or floating (in [0, 1]) of shape (C, H, W) or (N, C, H, W), or a PIL image.

        Returns:
            Floating, (C, S, S) or (N, C, S, S) with S the input size.
        """
        x = image if isinstance(image, Tensor) else torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        if x.ndim not in (3, 4) or x.shape[-3] != len(self.mean):
            shape = f"({len(self.mean)}, H, W) or (N, {len(self.mean)}, H, W)"
            raise ValueError(f"image must have shape {shape}, got {tuple(x.shape)}")
        x = x if x.is_floating_point() else x / 255
        scale = self.resize_size / min(x.shape[-2:])
        height, width = (max(self.resize_size, int(side * scale)) for side in x.shape[-2:])
        batch = x if x.ndim == 4 else x[None]
        batch = F.interpolate(batch, (height, width), mode=self.interpolation, antialias=True)
        top, left = (height - self.input_size) // 2, (width - self.input_size) // 2
        batch = batch[..., top : top + self.input_size, left : left + self.input_size]
        mean, std = (batch.new_tensor(v)[:, None, None] for v in (self.mean, self.std))
        out = (batch - mean) / std
        return out if x.ndim == 4 else out[0]
