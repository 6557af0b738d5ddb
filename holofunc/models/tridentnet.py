"""TridentNet: the same weights with three dilations, as three branches in the channels.

Source: Li et al., "Scale-aware trident networks for object detection" (arXiv 1901.01892). The paper's network is
a detector whose branches are trained on objects of different sizes; here, as in Holocron, the three branches are thirds
of the channels throughout the network, and the head uses all of them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holofunc.model import Model
from holofunc.models.base import build_model
from holofunc.models.resnet import Residual, ResNet

__all__ = ["tridentnet50"]


class TridentConv2d(nn.Conv2d):
    """One weight, applied to each third of the channels with dilation 1, 2 and 3."""

    def forward(self, x: Tensor) -> Tensor:
        margin = self.kernel_size[0] // 2
        thirds = [
            F.conv2d(part, self.weight, self.bias, self.stride, margin * dilation, dilation)
            for dilation, part in enumerate(x.chunk(Tridentneck.branches, 1), start=1)
        ]
        return torch.cat(thirds, 1)


class Tridentneck(Residual):
    """A bottleneck of trident convolutions; the shortcut is an ordinary convolution."""

    branches = 3

    def __init__(self, channels: int, planes: int, stride: int, downsample: nn.Module | None) -> None:
        def layers(channels: int, out: int, kernel_size: int, stride: int = 1) -> list[nn.Module]:
            return [
                TridentConv2d(channels, out, kernel_size, stride, bias=False),
                nn.BatchNorm2d(self.branches * out),
            ]

        channels = channels // self.branches
        conv = [
            *(*layers(channels, planes, 1), nn.ReLU()),
            *(*layers(planes, planes, 3, stride), nn.ReLU()),
            *layers(planes, self.expansion * planes, 1),
        ]
        super().__init__(conv, downsample)


# --- variants ----------------------------------------------------------------------------------------------------


def tridentnet50(num_classes: int = 10, in_channels: int = 3, weights: Any = None, **options: Any) -> Model:
    """TridentNet on ResNet-50, 45.8 M parameters; arguments as for `resnet18`.

    Example:
        >>> from holofunc import models
        >>> models.tridentnet50()
        Model(tridentnet50, 45,826,634 parameters)
    """
    options = {"block": Tridentneck, "num_blocks": [3, 4, 6, 3]} | options
    return build_model("tridentnet50", ResNet, num_classes, in_channels, weights, options)
