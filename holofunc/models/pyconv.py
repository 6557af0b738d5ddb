"""PyConvResNet: the 3x3 convolutions of a ResNet replaced by pyramids of kernels up to 9x9.

Source: Duta et al., "Pyramidal convolution" (arXiv 2006.11538). The stem has no pooling: the first
stage has the stride, with max pooling in its shortcut. (Holocron 0.3.0 lacks this stride and runs all stages at twice
the resolution.)
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from holofunc.model import Model
from holofunc.models.base import build_model
from holofunc.models.resnet import Residual, ResNet, bottleneck
from holofunc.nn import PyConv2d

__all__ = ["pyconv_resnet50", "pyconvhg_resnet50"]


class PyBottleneck(Residual):
    """A bottleneck with a `PyConv2d`, one level for each entry of ``groups``."""

    def __init__(
        self, channels: int, planes: int, stride: int, downsample: nn.Module | None, *, groups: Sequence[int]
    ) -> None:
        pyramid = PyConv2d(planes, planes, 3, len(groups), padding=1, groups=list(groups), stride=stride, bias=False)
        middle = [pyramid, nn.BatchNorm2d(planes), nn.ReLU()]
        super().__init__(bottleneck(middle, channels, planes, planes * self.expansion), downsample)


class PyHGBottleneck(PyBottleneck):
    """The block of PyConvHGResNet, with twice the inner width."""

    expansion = 2


# --- variants ----------------------------------------------------------------------------------------------------


def pyconv_resnet50(num_classes: int = 10, in_channels: int = 3, weights: Any = None, **options: Any) -> Model:
    """PyConvResNet-50, 22.8 M parameters; arguments as for `resnet18`.

    Example:
        >>> from holofunc import models
        >>> models.pyconv_resnet50()
        Model(pyconv_resnet50, 22,819,210 parameters)
    """
    options = {
        "block": PyBottleneck,
        "num_blocks": [3, 4, 6, 3],
        "stem_pool": False,
        "stage_options": [{"groups": g} for g in ([1, 4, 8, 16], [1, 4, 8], [1, 4], [1])],
    } | options
    return build_model("pyconv_resnet50", ResNet, num_classes, in_channels, weights, options)


def pyconvhg_resnet50(num_classes: int = 10, in_channels: int = 3, weights: Any = None, **options: Any) -> Model:
    """PyConvHGResNet-50 (more groups), 23.2 M parameters; arguments as for `resnet18`."""
    options = {
        "block": PyHGBottleneck,
        "num_blocks": [3, 4, 6, 3],
        "planes": [128, 256, 512, 1024],
        "stem_pool": False,
        "stage_options": [{"groups": g} for g in ([32, 32, 32, 32], [32, 64, 64], [32, 64], [32])],
    } | options
    return build_model("pyconvhg_resnet50", ResNet, num_classes, in_channels, weights, options)
