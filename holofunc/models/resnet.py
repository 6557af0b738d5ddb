"""ResNet and ResNeXt: blocks, body, variants.

Source: He et al., "Deep residual learning" (arXiv 1512.03385); Xie et al., "Aggregated residual transformations"
(arXiv 1611.05431); the deep stem and the pooled shortcut of ResNet-D from He et al., "Bag of tricks" (arXiv
1812.01187). Strides are on the 3x3 convolutions, as in torchvision.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holofunc.model import Model
from holofunc.models.base import Classifier, build_model, conv_bn

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "ResNet",
    "Residual",
    "bottleneck",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet50d",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
]


class Residual(nn.Module):
    """``relu(conv(x) + downsample(x))``.

    The output has ``expansion`` times as many channels as the block has planes, for each of ``branches`` branches.
    """

    expansion = 4
    branches = 1

    def __init__(self, conv: Sequence[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv = nn.Sequential(*conv)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return torch.relu(self.conv(x) + shortcut)


class BasicBlock(Residual):
    """Two 3x3 convolutions."""

    expansion = 1

    def __init__(self, channels: int, planes: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__([*conv_bn(channels, planes, 3, stride), nn.ReLU(), *conv_bn(planes, planes, 3)], downsample)


class Bottleneck(Residual):
    """1x1, 3x3 and 1x1 convolutions, the middle one grouped in ResNeXt."""

    def __init__(
        self,
        channels: int,
        planes: int,
        stride: int,
        downsample: nn.Module | None,
        *,
        groups: int = 1,
        width_per_group: int = 64,
    ) -> None:
        width = int(planes * width_per_group / 64) * groups
        middle = [*conv_bn(width, width, 3, stride, groups=groups), nn.ReLU()]
        super().__init__(bottleneck(middle, channels, width, planes * self.expansion), downsample)


def bottleneck(middle: Sequence[nn.Module], channels: int, width: int, out: int) -> list[nn.Module]:
    """``middle``, with ``width`` channels, between a 1x1 convolution to and one from this width."""
    return [*conv_bn(channels, width, 1), nn.ReLU(), *middle, *conv_bn(width, out, 1)]


class ResNet(Classifier):
    """The body: stem, stages of residual blocks, global average pooling, linear head.

    As in Holocron's files, ``features`` is one sequence of the stem's layers and the stages, ``head`` the classifier.

    Args:
        block: the class of the blocks.
        num_blocks: per stage.
        planes: width of the blocks per stage; outputs have ``block.expansion`` times as many channels.
        stem_pool: end the stem with max pooling; otherwise the first stage has the stride, with max pooling in its
            shortcut.
        deep_stem: three 3x3 convolutions instead of one 7x7.
        avg_downsample: average pooling before the projection in shortcuts.
        stage_options: options of the blocks for each stage.
        block_options: options of all blocks.
    """

    def __init__(
        self,
        block: type[Any],
        num_blocks: Sequence[int],
        *,
        num_classes: int,
        in_channels: int,
        planes: Sequence[int] = (64, 128, 256, 512),
        stem_pool: bool = True,
        deep_stem: bool = False,
        avg_downsample: bool = False,
        stage_options: Sequence[Mapping[str, Any]] | None = None,
        **block_options: Any,
    ) -> None:
        channels = 64 * block.branches
        stem = _stem(in_channels, deep=deep_stem, pool=stem_pool)
        if block.branches > 1:
            stem.append(Repeat(block.branches))
        own_options = stage_options if stage_options is not None else [{} for _ in num_blocks]
        stages: list[nn.Module] = []
        for i, (depth, width, own) in enumerate(zip(num_blocks, planes, own_options, strict=True)):
            blocks, out = [], width * block.expansion * block.branches
            for j in range(depth):
                stride = 2 if j == 0 and (i > 0 or not stem_pool) else 1
                shortcut = None
                if (stride, channels) != (1, out):
                    pool = "avg" if avg_downsample else "max" if i == 0 and not stem_pool else None
                    shortcut = _shortcut(channels, out, stride, pool)
                blocks.append(block(channels, width, stride, shortcut, **block_options, **own))
                channels = out
            stages.append(nn.Sequential(*blocks))
        super().__init__(in_channels, nn.Sequential(*stem, *stages), nn.Linear(channels, num_classes))

    def zero_init_names(self) -> list[str]:
        """The weights of the last normalization of each block, which ``zero_init_residual`` sets to zero."""
        blocks = [(path, m) for path, m in self.named_modules() if isinstance(m, Residual)]
        return [f"{path}.conv.{len(m.conv) - 1}.weight" for path, m in blocks]


def _stem(in_channels: int, *, deep: bool, pool: bool) -> list[nn.Module]:
    if deep:
        convs = [(in_channels, 32, 3, 2), (32, 32, 3, 1), (32, 64, 3, 1)]
    else:
        convs = [(in_channels, 64, 7, 2)]
    layers: list[nn.Module] = [layer for conv in convs for layer in (*conv_bn(*conv), nn.ReLU())]
    return [*layers, nn.MaxPool2d(3, 2, padding=1)] if pool else layers


class Repeat(nn.Module):
    """Repeat the channels ``times`` times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        return x.repeat(1, self.times, 1, 1)


class MaxPooled(nn.Sequential):
    """A 3x3 max pooling before the sequence, which does not shift the indices in parameter names."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.max_pool2d(x, 3, 2, padding=1))


def _shortcut(channels: int, out: int, stride: int, pool: str | None) -> nn.Sequential:
    if pool == "avg":
        return nn.Sequential(nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False), *conv_bn(channels, out, 1))
    if pool == "max":
        return MaxPooled(*conv_bn(channels, out, 1))
    return nn.Sequential(*conv_bn(channels, out, 1, stride))


# --- variants ----------------------------------------------------------------------------------------------------


def resnet18(num_classes: int = 10, in_channels: int = 3, weights: Any = None, **options: Any) -> Model:
    """ResNet-18, 11.2 M parameters.

    Args:
        num_classes: outputs of the head.
        in_channels: channels of the images.
        weights: a record of `holofunc.models.weights`, its name, a path or a URL, loaded by `Model.init`; with
            ``new_head=True`` all but the head. None initializes at random.
        options: ``zero_init_residual`` (default False) and those of `ResNet`; with bottleneck blocks also ``groups``
            and ``width_per_group``.

    Example:
        >>> from holofunc import models
        >>> models.resnet18(num_classes=10)
        Model(resnet18, 11,181,642 parameters)
    """
    options = {"block": BasicBlock, "num_blocks": [2, 2, 2, 2]} | options
    return build_model("resnet18", ResNet, num_classes, in_channels, weights, options)


def resnet34(num_classes: int = 10, in_channels: int = 3, weights: Any = None, **options: Any) -> Model:
    """ResNet-34, 21.3 M parameters; arguments as for `resnet18`."""
    options = {"block": BasicBlock, "num_blocks": [3, 4, 6, 3]} | options
    return build_model("resnet34", ResNet, num_classes, in_channels, weights, options)


def resnet50(num_classes: int = 10, in_channels: int = 3, weights: Any = None, **options: Any) -> Model:
    """ResNet-50, 23.5 M parameters; arguments as for `resnet18`."""
    options = {"block": Bottleneck, "num_blocks": [3, 4, 6, 3]} | options
    return build_model("resnet50", ResNet, num_classes, in_channels, weights, options)


def resnet50d(num_classes: int = 10, in_channels: int = 3, weights: Any = None, **options: Any) -> Model:
    """ResNet-50-D: a stem of three 3x3 convolutions, average pooling in shortcuts; arguments as for `resnet18`."""
    options = {"block": Bottleneck, "num_blocks": [3, 4, 6, 3], "deep_stem": True, "avg_downsample": True} | options
    return build_model("resnet50d", ResNet, num_classes, in_channels, weights, options)


def resnet101(num_classes: int = 10, in_channels: int = 3, weights: Any = None, **options: Any) -> Model:
    """ResNet-101, 42.5 M parameters; arguments as for `resnet18`."""
    options = {"block": Bottleneck, "num_blocks": [3, 4, 23, 3]} | options
    return build_model("resnet101", ResNet, num_classes, in_channels, weights, options)


def resnet152(num_classes: int = 10, in_channels: int = 3, weights: Any = None, **options: Any) -> Model:
    """ResNet-152, 58.2 M parameters; arguments as for `resnet18`.

    Holocron 0.3.0 has 86 blocks in the third stage where the paper has 36: ``num_blocks=[3, 8, 86, 3]`` is its layout.
    """
    options = {"block": Bottleneck, "num_blocks": [3, 8, 36, 3]} | options
    return build_model("resnet152", ResNet, num_classes, in_channels, weights, options)


def resnext50_32x4d(num_classes: int = 10, in_channels: int = 3, weights: Any = None, **options: Any) -> Model:
    """ResNeXt-50, 32 groups of width 4; arguments as for `resnet18`."""
    options = {"block": Bottleneck, "num_blocks": [3, 4, 6, 3], "groups": 32, "width_per_group": 4} | options
    return build_model("resnext50_32x4d", ResNet, num_classes, in_channels, weights, options)


def resnext101_32x8d(num_classes: int = 10, in_channels: int = 3, weights: Any = None, **options: Any) -> Model:
    """ResNeXt-101, 32 groups of width 8; arguments as for `resnet18`."""
    options = {"block": Bottleneck, "num_blocks": [3, 4, 23, 3], "groups": 32, "width_per_group": 8} | options
    return build_model("resnext101_32x8d", ResNet, num_classes, in_channels, weights, options)
