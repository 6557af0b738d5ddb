"""SKNet: blocks that attend, per channel and image, to convolutions of different dilations.

Source: Li et al., "Selective kernel networks" (arXiv 1903.06586). As published by Holocron, the attention's logits pass
a sigmoid before the softmax, and the convolutions are neither grouped nor widened; ``paper=True`` builds the paper's
network.
"""

from typing import Any

import torch
from torch import Tensor, nn

from holofunc.model import Model
from holofunc.models.base import build_model, conv_bn
from holofunc.models.branches import norm_together
from holofunc.models.resnet import Residual, ResNet, bottleneck

__all__ = ["sknet50", "sknet101", "sknet152"]


class SKConv2d(nn.Module):
    """Convolutions of increasing dilation, summed with attention weights computed from their sum.

    Args:
        channels: of input and output.
        stride: of the convolutions.
        paths: number of convolutions.
        groups: of the convolutions.
        squeeze: the attention has ``channels / squeeze`` hidden channels, at least 32.
        sigmoid: apply a sigmoid to the logits before the softmax over the paths.
    """

    def __init__(self, channels: int, stride: int, *, paths: int, groups: int, squeeze: int, sigmoid: bool) -> None:
        super().__init__()
        self.path_convs = nn.ModuleList(
            nn.Sequential(*conv_bn(channels, channels, 3, stride, groups=groups, dilation=i + 1), nn.ReLU())
            for i in range(paths)
        )
        narrow = max(channels // squeeze, 32)
        logits = nn.Conv2d(narrow, channels * paths, 1)
        self.sa = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            *(*conv_bn(channels, narrow, 1), nn.ReLU()),
            *(logits, nn.Sigmoid() if sigmoid else nn.Identity()),
        )

    def forward(self, x: Tensor) -> Tensor:
        convs, norms, _ = zip(*self.path_convs, strict=True)
        features = norm_together(torch.cat([conv(x) for conv in convs], 1), norms)
        features = torch.relu(features).unflatten(1, (len(convs), -1))
        weights = self.sa(features.sum(1)).unflatten(1, (len(convs), -1)).softmax(1)
        return (features * weights).sum(1)


class SKBottleneck(Residual):
    """A bottleneck around an `SKConv2d`."""

    def __init__(
        self,
        channels: int,
        planes: int,
        stride: int,
        downsample: nn.Module | None,
        *,
        paths: int = 2,
        squeeze: int = 16,
        paper: bool = False,
    ) -> None:
        width, groups = (2 * planes, 32) if paper else (planes, 1)
        middle = [SKConv2d(width, stride, paths=paths, groups=groups, squeeze=squeeze, sigmoid=not paper)]
        super().__init__(bottleneck(middle, channels, width, planes * self.expansion), downsample)


# --- variants ----------------------------------------------------------------------------------------------------


def sknet50(num_classes: int = 10, in_channels: int = 3, weights: Any = None, **options: Any) -> Model:
    """SKNet-50, 35.2 M parameters; arguments as for `resnet18`.

    Args:
        num_classes: outputs of the head.
        in_channels: channels of the images.
        weights: as for `resnet18`.
        options: those of `ResNet`; ``paths`` (2), ``squeeze`` (16), and ``paper=True`` for the paper's 32 groups of
            twice the width and its attention without a sigmoid (27.5 M parameters for 1000 classes).

    Example:
        >>> from holofunc import models
        >>> models.sknet50()
        Model(sknet50, 35,224,394 parameters)
    """
    options = {"block": SKBottleneck, "num_blocks": [3, 4, 6, 3]} | options
    return build_model("sknet50", ResNet, num_classes, in_channels, weights, options)


def sknet101(num_classes: int = 10, in_channels: int = 3, weights: Any = None, **options: Any) -> Model:
    """SKNet-101, 64.7 M parameters; arguments as for `sknet50`."""
    options = {"block": SKBottleneck, "num_blocks": [3, 4, 23, 3]} | options
    return build_model("sknet101", ResNet, num_classes, in_channels, weights, options)


def sknet152(num_classes: int = 10, in_channels: int = 3, weights: Any = None, **options: Any) -> Model:
    """SKNet-152, 89.0 M parameters; arguments as for `sknet50`.

    Holocron 0.3.0 has 86 blocks in the third stage where the paper has 36: ``num_blocks=[3, 8, 86, 3]`` is its layout.
    """
    options = {"block": SKBottleneck, "num_blocks": [3, 8, 36, 3]} | options
    return build_model("sknet152", ResNet, num_classes, in_channels, weights, options)
