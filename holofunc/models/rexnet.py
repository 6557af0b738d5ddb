"""ReXNet: inverted bottlenecks whose width grows linearly from block to block.

Source: Han et al., "Rethinking channel dimensions for efficient model design" (arXiv 2007.00992).
"""

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from holofunc.model import Drop, Model
from holofunc.models.base import Classifier, build_model, conv_bn

__all__ = ["ReXNet", "rexnet1_0x", "rexnet1_3x", "rexnet1_5x", "rexnet2_0x", "rexnet2_2x"]


class SEBlock(nn.Module):
    """Squeeze and excitation (arXiv 1709.01507) with a BatchNorm."""

    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__()
        narrow = channels // ratio
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.conv = nn.Sequential(
            *conv_bn(channels, narrow, 1), nn.ReLU6(), nn.Conv2d(narrow, channels, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv(self.pool(x))


class ReXBlock(nn.Module):
    """Expansion, depthwise convolution, squeeze and excitation, projection; at stride 1 the input is added.

    Args:
        channels: of the input.
        out: channels of the output, at least ``channels`` if the stride is 1.
        expansion: factor of the inner width; 1 for no expansion layer.
        stride: of the depthwise convolution.
        se_ratio: reduction factor of the squeeze and excitation; 0 for none.
    """

    def __init__(self, channels: int, out: int, *, expansion: int, stride: int, se_ratio: int) -> None:
        super().__init__()
        width = channels * expansion
        layers: list[nn.Module] = [] if expansion == 1 else [*conv_bn(channels, width, 1), nn.SiLU()]
        layers += conv_bn(width, width, 3, stride, groups=width)
        if se_ratio:
            layers.append(SEBlock(width, se_ratio))
        layers += [nn.ReLU6(), *conv_bn(width, out, 1)]
        self.conv = nn.Sequential(*layers)
        self.new_channels = out - channels if stride == 1 and channels <= out else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        return out if self.new_channels is None else out + F.pad(x, [0, 0, 0, 0, 0, self.new_channels])


class ReXNet(Classifier):
    """The body: stem, six stages of blocks in one sequence, a 1x1 convolution, dropout and a linear head.

    Args:
        width_mult: multiplies all widths.
        depth_mult: multiplies the blocks per stage.
        in_planes: width of the first block.
        final_planes: by how many channels the last block is wider.
        se_ratio: reduction factor of squeeze and excitation, from the third stage on; 0 for none.
        dropout: probability before the head.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        width_mult: float = 1.0,
        depth_mult: float = 1.0,
        in_planes: int = 16,
        final_planes: int = 180,
        se_ratio: int = 12,
        dropout: float = 0.2,
    ) -> None:
        depths = [math.ceil(depth * depth_mult) for depth in (1, 2, 2, 3, 3, 5)]
        strides = [
            s for depth, first in zip(depths, (1, 2, 2, 2, 1, 2), strict=True) for s in (first, *[1] * (depth - 1))
        ]
        stem, plain = round(32 * width_mult), sum(depths[:2])
        layers: list[nn.Module] = [*conv_bn(in_channels, stem, 3, 2), nn.SiLU()]
        channels = stem
        for i, stride in enumerate(strides):
            out = round((in_planes + final_planes / len(strides) * i) * width_mult)
            layers.append(
                ReXBlock(channels, out, expansion=6 if i else 1, stride=stride, se_ratio=0 if i < plain else se_ratio)
            )
            channels = out
        wide = round(1280 * width_mult)
        layers += [*conv_bn(channels, wide, 1), nn.SiLU()]
        super().__init__(
            in_channels, nn.Sequential(*layers), nn.Sequential(Drop(dropout), nn.Linear(wide, num_classes))
        )


# --- variants ----------------------------------------------------------------------------------------------------


def rexnet1_0x(num_classes: int = 10, in_channels: int = 3, weights: Any = None, **options: Any) -> Model:
    """ReXNet, 3.5 M parameters.

    Args:
        num_classes: outputs of the head.
        in_channels: channels of the images.
        weights: as for `resnet18`.
        options: those of `ReXNet`.

    Example:
        >>> from holofunc import models
        >>> models.rexnet1_0x()
        Model(rexnet1_0x, 3,527,996 parameters)
    """
    return build_model("rexnet1_0x", ReXNet, num_classes, in_channels, weights, {"width_mult": 1.0} | options)


def rexnet1_3x(num_classes: int = 10, in_channels: int = 3, weights: Any = None, **options: Any) -> Model:
    """ReXNet, 1.3 times as wide, 5.9 M parameters; arguments as for `rexnet1_0x`."""
    return build_model("rexnet1_3x", ReXNet, num_classes, in_channels, weights, {"width_mult": 1.3} | options)


def rexnet1_5x(num_classes: int = 10, in_channels: int = 3, weights: Any = None, **options: Any) -> Model:
    """ReXNet, 1.5 times as wide, 7.8 M parameters; arguments as for `rexnet1_0x`."""
    return build_model("rexnet1_5x", ReXNet, num_classes, in_channels, weights, {"width_mult": 1.5} | options)


def rexnet2_0x(num_classes: int = 10, in_channels: int = 3, weights: Any = None, **options: Any) -> Model:
    """ReXNet, twice as wide, 13.8 M parameters; arguments as for `rexnet1_0x`."""
    return build_model("rexnet2_0x", ReXNet, num_classes, in_channels, weights, {"width_mult": 2.0} | options)


def rexnet2_2x(num_classes: int = 10, in_channels: int = 3, weights: Any = None, **options: Any) -> Model:
    """ReXNet, 2.2 times as wide, 16.7 M parameters; arguments as for `rexnet1_0x`."""
    return build_model("rexnet2_2x", ReXNet, num_classes, in_channels, weights, {"width_mult": 2.2} | options)
