"""ResNet and ResNeXt: blocks, body, variants.

Sources: He et al., "Deep residual learning" (arXiv 1512.03385); Xie et al., "Aggregated residual transformations"
(arXiv 1611.05431); the deep stem and the pooled shortcut of ResNet-D from He et al., "Bag of tricks" (arXiv
1812.01187). Strides are on the 3x3 convolutions, as in torchvision.
"""

from typing import Any

import torch
from torch import Tensor, nn

from holofunc.model import Model
from holofunc.models.base import Images, build_model, conv_bn

__all__ = [
    "ResNet",
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
    """``relu(conv(x) + downsample(x))``."""

    def __init__(self, conv: nn.Sequential, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv = conv
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return torch.relu(self.conv(x) + shortcut)


class BasicBlock(Residual):
    """Two 3x3 convolutions."""

    expansion = 1

    def __init__(self, channels: int, planes: int, stride: int, downsample: nn.Module | None, **_: Any) -> None:
        conv = [*conv_bn(channels, planes, 3, stride), nn.ReLU(), *conv_bn(planes, planes, 3)]
        super().__init__(nn.Sequential(*conv), downsample)


class Bottleneck(Residual):
    """1x1, 3x3 and 1x1 convolutions, the middle one grouped in ResNeXt."""

    expansion = 4

    def __init__(
        self,
        channels: int,
        planes: int,
        stride: int,
        downsample: nn.Module | None,
        *,
        groups: int,
        width_per_group: int,
    ) -> None:
        width = int(planes * width_per_group / 64) * groups
        conv = [
            *(*conv_bn(channels, width, 1), nn.ReLU()),
            *(*conv_bn(width, width, 3, stride, groups=groups), nn.ReLU()),
            *conv_bn(width, planes * self.expansion, 1),
        ]
        super().__init__(nn.Sequential(*conv), downsample)


class ResNet(Images):
    """The body: stem, four stages of residual blocks, global average, linear head.

    ``features`` holds the stem's layers and the stages in one sequence, ``head`` the classifier, as Holocron's files
    name them.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        num_blocks: list[int],
        *,
        num_classes: int,
        in_channels: int,
        groups: int = 1,
        width_per_group: int = 64,
        deep_stem: bool = False,
        avg_downsample: bool = False,
    ) -> None:
        super().__init__(in_channels)
        channels = 64
        if deep_stem:
            stem = [
                *(*conv_bn(in_channels, 32, 3, 2), nn.ReLU()),
                *(*conv_bn(32, 32, 3), nn.ReLU()),
                *(*conv_bn(32, channels, 3), nn.ReLU()),
            ]
        else:
            stem = [*conv_bn(in_channels, channels, 7, 2), nn.ReLU()]
        stages = []
        for i, depth in enumerate(num_blocks):
            planes, blocks = 64 * 2**i, []
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                out = planes * block.expansion
                shortcut = _shortcut(channels, out, stride, avg_downsample) if (stride, channels) != (1, out) else None
                blocks.append(block(channels, planes, stride, shortcut, groups=groups, width_per_group=width_per_group))
                channels = out
            stages.append(nn.Sequential(*blocks))
        self.features = nn.Sequential(*stem, nn.MaxPool2d(3, 2, padding=1), *stages)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))

    def zero_init_names(self) -> list[str]:
        """The scales of each block's last normalization, which ``zero_init_residual`` starts at zero."""
        blocks = [(path, m) for path, m in self.named_modules() if isinstance(m, Residual)]
        return [f"{path}.conv.{len(m.conv) - 1}.weight" for path, m in blocks]


def _shortcut(channels: int, out: int, stride: int, avg_downsample: bool) -> nn.Sequential:
    if not avg_downsample:
        return nn.Sequential(*conv_bn(channels, out, 1, stride))
    return nn.Sequential(nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False), *conv_bn(channels, out, 1))


# --- variants ----------------------------------------------------------------------------------------------------


def resnet18(num_classes: int = 10, in_channels: int = 3, **options: Any) -> Model:
    """ResNet-18, 11.2 M parameters.

    Args:
        num_classes: outputs of the head.
        in_channels: channels of the images.
        options: ``zero_init_residual`` (default False), ``num_blocks`` (blocks per stage), ``groups``,
            ``width_per_group``, ``deep_stem``, ``avg_downsample`` as in `ResNet`.

    Example:
        >>> from holofunc import models
        >>> models.resnet18(num_classes=10)
        Model(resnet18, 11,181,642 parameters)
    """
    return _resnet("resnet18", BasicBlock, [2, 2, 2, 2], num_classes, in_channels, options)


def resnet34(num_classes: int = 10, in_channels: int = 3, **options: Any) -> Model:
    """ResNet-34, 21.3 M parameters; arguments as for `resnet18`."""
    return _resnet("resnet34", BasicBlock, [3, 4, 6, 3], num_classes, in_channels, options)


def resnet50(num_classes: int = 10, in_channels: int = 3, **options: Any) -> Model:
    """ResNet-50, 23.5 M parameters; arguments as for `resnet18`."""
    return _resnet("resnet50", Bottleneck, [3, 4, 6, 3], num_classes, in_channels, options)


def resnet50d(num_classes: int = 10, in_channels: int = 3, **options: Any) -> Model:
    """ResNet-50-D: a stem of three 3x3 convolutions, shortcuts that pool before they project; as `resnet18`."""
    options = {"deep_stem": True, "avg_downsample": True, **options}
    return _resnet("resnet50d", Bottleneck, [3, 4, 6, 3], num_classes, in_channels, options)


def resnet101(num_classes: int = 10, in_channels: int = 3, **options: Any) -> Model:
    """ResNet-101, 42.5 M parameters; arguments as for `resnet18`."""
    return _resnet("resnet101", Bottleneck, [3, 4, 23, 3], num_classes, in_channels, options)


def resnet152(num_classes: int = 10, in_channels: int = 3, **options: Any) -> Model:
    """ResNet-152, 58.2 M parameters; arguments as for `resnet18`.

    Holocron 0.3.0 has 86 blocks in the third stage where the paper has 36: ``num_blocks=[3, 8, 86, 3]`` is its layout.
    """
    return _resnet("resnet152", Bottleneck, [3, 8, 36, 3], num_classes, in_channels, options)


def resnext50_32x4d(num_classes: int = 10, in_channels: int = 3, **options: Any) -> Model:
    """ResNeXt-50, 32 groups of width 4; arguments as for `resnet18`."""
    options = {"groups": 32, "width_per_group": 4, **options}
    return _resnet("resnext50_32x4d", Bottleneck, [3, 4, 6, 3], num_classes, in_channels, options)


def resnext101_32x8d(num_classes: int = 10, in_channels: int = 3, **options: Any) -> Model:
    """ResNeXt-101, 32 groups of width 8; arguments as for `resnet18`."""
    options = {"groups": 32, "width_per_group": 8, **options}
    return _resnet("resnext101_32x8d", Bottleneck, [3, 4, 23, 3], num_classes, in_channels, options)


def _resnet(
    name: str,
    block: type[BasicBlock] | type[Bottleneck],
    num_blocks: list[int],
    num_classes: int,
    in_channels: int,
    options: dict[str, Any],
) -> Model:
    options = {"num_blocks": num_blocks, **options}
    return build_model(name, ResNet, block, num_classes=num_classes, in_channels=in_channels, **options)
