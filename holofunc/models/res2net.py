"""Res2Net: a ResNet whose blocks have several scales.

Source: Gao et al., "Res2Net: a new multi-scale backbone architecture" (arXiv 1904.01169).
"""

from typing import Any

import torch
from torch import Tensor, nn

from holofunc.model import Model
from holofunc.models.base import build_model, conv_bn
from holofunc.models.resnet import Residual, ResNet, bottleneck

__all__ = ["res2net50_26w_4s"]


class ScaleConv2d(nn.Module):
    """``scale`` groups of channels; each but the last is convolved after the previous group's output is added.

    The last group is passed through. At the start of a stage nothing is added, and the last group is average-pooled
    with the stride of the convolutions.
    """

    def __init__(self, width: int, scale: int, stride: int, starts_stage: bool) -> None:
        super().__init__()
        self.conv = nn.ModuleList(
            nn.Sequential(*conv_bn(width, width, 3, stride), nn.ReLU()) for _ in range(max(1, scale - 1))
        )
        self.downsample = nn.AvgPool2d(3, stride, padding=1) if starts_stage else None

    def forward(self, x: Tensor) -> Tensor:
        *parts, last = x.chunk(len(self.conv) + 1, dim=1)
        outputs: list[Tensor] = []
        for conv, part in zip(self.conv, parts, strict=True):
            chained = outputs and self.downsample is None
            outputs.append(conv(part + outputs[-1] if chained else part))
        return torch.cat([*outputs, last if self.downsample is None else self.downsample(last)], 1)


class Bottle2neck(Residual):
    """A bottleneck with a `ScaleConv2d`."""

    def __init__(
        self,
        channels: int,
        planes: int,
        stride: int,
        downsample: nn.Module | None,
        *,
        width_per_group: int = 26,
        scale: int = 4,
    ) -> None:
        if scale < 2:
            raise ValueError(f"scale must be at least 2, got {scale}")
        width = planes * width_per_group // 64
        middle = [ScaleConv2d(width, scale, stride, starts_stage=downsample is not None)]
        super().__init__(bottleneck(middle, channels, width * scale, planes * self.expansion), downsample)


# --- variants ----------------------------------------------------------------------------------------------------


def res2net50_26w_4s(num_classes: int = 10, in_channels: int = 3, weights: Any = None, **options: Any) -> Model:
    """Res2Net-50 with 4 scales of width 26, 23.7 M parameters; arguments as for `resnet18`.

    Args:
        num_classes: outputs of the head.
        in_channels: channels of the images.
        weights: as for `resnet18`.
        options: those of `ResNet`; ``width_per_group`` (26 at the first stage) and ``scale`` (groups of channels).

    Example:
        >>> from holofunc import models
        >>> models.res2net50_26w_4s()
        Model(res2net50_26w_4s, 23,670,610 parameters)
    """
    options = {"block": Bottle2neck, "num_blocks": [3, 4, 6, 3]} | options
    return build_model("res2net50_26w_4s", ResNet, num_classes, in_channels, weights, options)
