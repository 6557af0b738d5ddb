"""RepViT: a mobile ConvNet arranged like a vision transformer, with token and channel mixers.

Source: Wang et al., "RepViT: revisiting mobile CNN from ViT perspective" (arXiv 2307.09283).
`holofunc.models.reparametrize` merges its branches and normalizations.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from holofunc.model import Model
from holofunc.models.base import Classifier, build_model, conv_bn
from holofunc.models.branches import below
from holofunc.ops.reparam import fuse_conv_bn, identity_conv, merge_branches

__all__ = ["RepViT", "repvit_m0_9", "repvit_m1_0", "repvit_m1_1"]


class ConvNorm(nn.Sequential):
    """A convolution and its normalization, merged into one layer for deployment."""

    def __init__(self, channels: int, out: int, kernel_size: int, stride: int = 1, groups: int = 1) -> None:
        conv, norm = conv_bn(channels, out, kernel_size, stride, groups=groups)
        super().__init__(conv, norm)
        self.eps = norm.eps
        self.deployed = partial(nn.Conv2d, channels, out, kernel_size, stride, kernel_size // 2, groups=groups)

    def merge(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return fuse_conv_bn(below(values, "0"), below(values, "1"), eps=self.eps)


class RepVGGDW(nn.Module):
    """``norm(conv3(x) + conv1(x) + x)``, depthwise."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv3 = ConvNorm(channels, channels, 3, groups=channels)
        self.conv1 = nn.Conv2d(channels, channels, 1, groups=channels)
        self.norm = nn.BatchNorm2d(channels)
        self.deployed = self.conv3.deployed

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv3(x) + self.conv1(x) + x)

    def merge(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        conv3, conv1 = self.conv3.merge(below(values, "conv3")), below(values, "conv1")
        bias, channels = conv1["bias"], len(conv1["bias"])
        identity = identity_conv(channels, groups=channels, dtype=bias.dtype, device=bias.device)
        return fuse_conv_bn(merge_branches([conv3, conv1, identity]), below(values, "norm"), eps=self.norm.eps)


class NormLinear(nn.Sequential):
    """A normalization and a linear layer, merged into one layer for deployment."""

    def __init__(self, channels: int, out: int) -> None:
        norm = nn.BatchNorm1d(channels)
        super().__init__(norm, nn.Linear(channels, out))
        self.eps = norm.eps
        self.deployed = partial(nn.Linear, channels, out)

    def merge(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        bn, linear = below(values, "0"), below(values, "1")
        scale = bn["weight"] * (bn["running_var"] + self.eps).rsqrt()
        shift = bn["bias"] - bn["running_mean"] * scale
        return {"weight": linear["weight"] * scale, "bias": linear["bias"] + linear["weight"] @ shift}


class SqueezeExcitation(nn.Module):
    """Squeeze and excitation (arXiv 1709.01507)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        narrow = max(8, int(channels / 4 + 4) // 8 * 8)
        self.fc1 = nn.Conv2d(channels, narrow, 1)
        self.fc2 = nn.Conv2d(narrow, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc2(torch.relu(self.fc1(x.mean((2, 3), keepdim=True)))))


class Mixer(nn.Module):
    """``x + block(x)`` with two pointwise convolutions and twice the inner width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block = nn.Sequential(ConvNorm(channels, 2 * channels, 1), nn.GELU(), ConvNorm(2 * channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


class RepViTBlock(nn.Module):
    """A token mixer (depthwise, with the stride) and a channel mixer (pointwise)."""

    def __init__(self, channels: int, out: int, *, downsample: bool, excite: bool) -> None:
        super().__init__()
        excitation = SqueezeExcitation(channels) if excite else nn.Identity()
        if downsample:
            self.token_mixer = nn.Sequential(
                ConvNorm(channels, channels, 3, 2, groups=channels), excitation, ConvNorm(channels, out, 1)
            )
        else:
            self.token_mixer = nn.Sequential(RepVGGDW(channels), excitation)
        self.channel_mixer = Mixer(out)

    def forward(self, x: Tensor) -> Tensor:
        return self.channel_mixer(self.token_mixer(x))


class RepViT(Classifier):
    """The body: a stem of two strided convolutions, four stages, global average, normalized linear head.

    Args:
        planes: channels per stage.
        num_blocks: per stage; from the second stage on, the first block downsamples.
    """

    def __init__(self, planes: Sequence[int], num_blocks: Sequence[int], *, num_classes: int, in_channels: int) -> None:
        first = planes[0]
        stem = nn.Sequential(ConvNorm(in_channels, first // 2, 3, 2), nn.GELU(), ConvNorm(first // 2, first, 3, 2))
        stages, channels = [stem], first
        for i, (width, depth) in enumerate(zip(planes, num_blocks, strict=True)):
            blocks = [RepViTBlock(channels, width, downsample=True, excite=False)] if i else []
            own = depth - len(blocks)
            for j in range(own):
                blocks.append(RepViTBlock(width, width, downsample=False, excite=j % 2 == 0 and j + 1 < own))
            stages.append(nn.Sequential(*blocks))
            channels = width
        super().__init__(in_channels, nn.Sequential(*stages), NormLinear(channels, num_classes))


# --- variants ----------------------------------------------------------------------------------------------------


def repvit_m0_9(num_classes: int = 10, in_channels: int = 3, weights: Any = None, **options: Any) -> Model:
    """RepViT-M0.9, 4.7 M parameters in training.

    Args:
        num_classes: outputs of the head.
        in_channels: channels of the images.
        weights: as for `resnet18`.
        options: those of `RepViT`.

    Example:
        >>> from holofunc import models
        >>> models.repvit_m0_9()
        Model(repvit_m0_9, 4,722,410 parameters)
    """
    options = {"planes": [48, 96, 192, 384], "num_blocks": [3, 4, 16, 3]} | options
    return build_model("repvit_m0_9", RepViT, num_classes, in_channels, weights, options)


def repvit_m1_0(num_classes: int = 10, in_channels: int = 3, weights: Any = None, **options: Any) -> Model:
    """RepViT-M1.0, 6.4 M parameters in training; arguments as for `repvit_m0_9`."""
    options = {"planes": [56, 112, 224, 448], "num_blocks": [3, 4, 16, 3]} | options
    return build_model("repvit_m1_0", RepViT, num_classes, in_channels, weights, options)


def repvit_m1_1(num_classes: int = 10, in_channels: int = 3, weights: Any = None, **options: Any) -> Model:
    """RepViT-M1.1, 7.8 M parameters in training; arguments as for `repvit_m0_9`."""
    options = {"planes": [64, 128, 256, 512], "num_blocks": [3, 4, 14, 3]} | options
    return build_model("repvit_m1_1", RepViT, num_classes, in_channels, weights, options)
