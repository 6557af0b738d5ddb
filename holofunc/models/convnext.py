"""ConvNeXt: a ResNet with the design choices of vision transformers.

Source: Liu et al., "A ConvNet for the 2020s" (arXiv 2201.03545). As published by Holocron, the normalizations before
downsampling have epsilon 1e-5 instead of the paper's 1e-6; ``paper=True`` uses the paper's.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from holofunc.model import Model
from holofunc.models.base import Classifier, build_model
from holofunc.nn import DropPath

__all__ = [
    "ConvNeXt",
    "convnext_atto",
    "convnext_base",
    "convnext_femto",
    "convnext_large",
    "convnext_nano",
    "convnext_pico",
    "convnext_small",
    "convnext_tiny",
    "convnext_xl",
]


class LayerNorm2d(nn.LayerNorm):
    """Layer normalization over the channels of each pixel."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class LayerScale(nn.Module):
    """A learned factor per channel, initially small (arXiv 2103.17239)."""

    def __init__(self, channels: int, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight[:, None, None]


class Bottlenext(nn.Module):
    """``x + conv(x)``: depthwise 7x7, normalization, and two 1x1 convolutions with four times the inner width."""

    def __init__(self, channels: int, *, drop_path: float, layer_scale: float) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(channels, channels, 7, padding=3, groups=channels),
            LayerNorm2d(channels, eps=1e-6),
            nn.Conv2d(channels, 4 * channels, 1),
            nn.GELU(),
            nn.Conv2d(4 * channels, channels, 1),
            LayerScale(channels, layer_scale),
            DropPath(drop_path),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class ConvNeXt(Classifier):
    """The body: a stem of 4x4 patches, four stages with downsampling in between, a normalized linear head.

    Args:
        num_blocks: per stage.
        planes: channels per stage.
        drop_path: probability of skipping the last block; it grows linearly from zero at the first block.
        layer_scale: initial value of the layer scales.
        paper: epsilon 1e-6 in the downsampling layers too.
    """

    def __init__(
        self,
        num_blocks: Sequence[int],
        planes: Sequence[int],
        *,
        num_classes: int,
        in_channels: int,
        drop_path: float = 0.0,
        layer_scale: float = 1e-6,
        paper: bool = False,
    ) -> None:
        last = max(sum(num_blocks) - 1, 1)
        rates = (drop_path * i / last for i in itertools.count())
        stages: list[nn.Module] = []
        for i, (depth, channels) in enumerate(zip(num_blocks, planes, strict=True)):
            blocks: list[nn.Module] = [
                Bottlenext(channels, drop_path=next(rates), layer_scale=layer_scale) for _ in range(depth)
            ]
            if i + 1 < len(planes):
                norm = LayerNorm2d(channels, eps=1e-6 if paper else 1e-5)
                blocks.append(nn.Sequential(norm, nn.Conv2d(channels, planes[i + 1], 2, stride=2)))
            stages.append(nn.Sequential(*blocks))
        stem = [nn.Conv2d(in_channels, planes[0], 4, stride=4), LayerNorm2d(planes[0], eps=1e-6)]
        head = nn.Sequential(nn.LayerNorm(planes[-1], eps=1e-6), nn.Linear(planes[-1], num_classes))
        super().__init__(in_channels, nn.Sequential(*stem, *stages), head)


# --- variants ----------------------------------------------------------------------------------------------------


def convnext_atto(num_classes: int = 10, in_channels: int = 3, weights: Any = None, **options: Any) -> Model:
    """ConvNeXt-Atto, 3.4 M parameters.

    Args:
        num_classes: outputs of the head.
        in_channels: channels of the images.
        weights: as for `resnet18`.
        options: those of `ConvNeXt`.

    Example:
        >>> from holofunc import models
        >>> models.convnext_atto()
        Model(convnext_atto, 3,377,730 parameters)
    """
    options = {"num_blocks": [2, 2, 6, 2], "planes": [40, 80, 160, 320]} | options
    return build_model("convnext_atto", ConvNeXt, num_classes, in_channels, weights, options)


def convnext_femto(num_classes: int = 10, in_channels: int = 3, weights: Any = None, **options: Any) -> Model:
    """ConvNeXt-Femto, 4.8 M parameters; arguments as for `convnext_atto`."""
    options = {"num_blocks": [2, 2, 6, 2], "planes": [48, 96, 192, 384]} | options
    return build_model("convnext_femto", ConvNeXt, num_classes, in_channels, weights, options)


def convnext_pico(num_classes: int = 10, in_channels: int = 3, weights: Any = None, **options: Any) -> Model:
    """ConvNeXt-Pico, 8.5 M parameters; arguments as for `convnext_atto`."""
    options = {"num_blocks": [2, 2, 6, 2], "planes": [64, 128, 256, 512]} | options
    return build_model("convnext_pico", ConvNeXt, num_classes, in_channels, weights, options)


def convnext_nano(num_classes: int = 10, in_channels: int = 3, weights: Any = None, **options: Any) -> Model:
    """ConvNeXt-Nano, 15.0 M parameters; arguments as for `convnext_atto`."""
    options = {"num_blocks": [2, 2, 8, 2], "planes": [80, 160, 320, 640]} | options
    return build_model("convnext_nano", ConvNeXt, num_classes, in_channels, weights, options)


def convnext_tiny(num_classes: int = 10, in_channels: int = 3, weights: Any = None, **options: Any) -> Model:
    """ConvNeXt-T, 27.8 M parameters; arguments as for `convnext_atto`."""
    options = {"num_blocks": [3, 3, 9, 3], "planes": [96, 192, 384, 768]} | options
    return build_model("convnext_tiny", ConvNeXt, num_classes, in_channels, weights, options)


def convnext_small(num_classes: int = 10, in_channels: int = 3, weights: Any = None, **options: Any) -> Model:
    """ConvNeXt-S, 49.5 M parameters; arguments as for `convnext_atto`."""
    options = {"num_blocks": [3, 3, 27, 3], "planes": [96, 192, 384, 768]} | options
    return build_model("convnext_small", ConvNeXt, num_classes, in_channels, weights, options)


def convnext_base(num_classes: int = 10, in_channels: int = 3, weights: Any = None, **options: Any) -> Model:
    """ConvNeXt-B, 87.6 M parameters; arguments as for `convnext_atto`."""
    options = {"num_blocks": [3, 3, 27, 3], "planes": [128, 256, 512, 1024]} | options
    return build_model("convnext_base", ConvNeXt, num_classes, in_channels, weights, options)


def convnext_large(num_classes: int = 10, in_channels: int = 3, weights: Any = None, **options: Any) -> Model:
    """ConvNeXt-L, 196.2 M parameters; arguments as for `convnext_atto`."""
    options = {"num_blocks": [3, 3, 27, 3], "planes": [192, 384, 768, 1536]} | options
    return build_model("convnext_large", ConvNeXt, num_classes, in_channels, weights, options)


def convnext_xl(num_classes: int = 10, in_channels: int = 3, weights: Any = None, **options: Any) -> Model:
    """ConvNeXt-XL, 348.2 M parameters; arguments as for `convnext_atto`."""
    options = {"num_blocks": [3, 3, 27, 3], "planes": [256, 512, 1024, 2048]} | options
    return build_model("convnext_xl", ConvNeXt, num_classes, in_channels, weights, options)
