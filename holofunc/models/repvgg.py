"""RepVGG: three branches per layer in training, merged into a plain stack of 3x3 convolutions.

Source: Ding et al., "RepVGG: making VGG-style ConvNets great again" (arXiv 2101.03697). As published by Holocron, each
stage has one more layer than the paper's; ``paper=True`` builds the paper's network. `holofunc.models.reparametrize`
merges the branches.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from holofunc.model import Model
from holofunc.models.base import Classifier, build_model
from holofunc.models.branches import Branches

__all__ = [
    "RepVGG",
    "repvgg_a0",
    "repvgg_a1",
    "repvgg_a2",
    "repvgg_b0",
    "repvgg_b1",
    "repvgg_b2",
    "repvgg_b3",
]


class RepBlock(nn.Module):
    """ReLU of the sum of a 3x3 convolution, a 1x1 convolution and, at stride 1, the input, each normalized."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.branches = Branches(channels, out, [3, 1] if stride > 1 else [3, 1, None], stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.branches(x))


class RepVGG(Classifier):
    """The body: five stages that halve the resolution, global average, linear head.

    Args:
        num_blocks: per stage; the first stage is the stem.
        width_mult: multiplies the widths 64, 64, 128 and 256; the first is at most 64.
        final_width_mult: multiplies the last width, 512.
        paper: include the layer that halves the resolution in ``num_blocks``.
    """

    def __init__(
        self,
        num_blocks: Sequence[int],
        width_mult: float,
        final_width_mult: float,
        *,
        num_classes: int,
        in_channels: int,
        paper: bool = False,
    ) -> None:
        widths = [int(w * width_mult) for w in (64, 64, 128, 256)] + [int(512 * final_width_mult)]
        widths[0] = min(64, widths[0])
        stages, channels = [], in_channels
        for depth, width in zip(num_blocks, widths, strict=True):
            more = [RepBlock(width, width, 1) for _ in range(depth - 1 if paper else depth)]
            stages.append(nn.Sequential(RepBlock(channels, width, 2), *more))
            channels = width
        super().__init__(in_channels, nn.Sequential(*stages), nn.Linear(channels, num_classes))


# --- variants ----------------------------------------------------------------------------------------------------


def repvgg_a0(num_classes: int = 10, in_channels: int = 3, weights: Any = None, **options: Any) -> Model:
    """RepVGG-A0, 24.7 M parameters in training.

    Args:
        num_classes: outputs of the head.
        in_channels: channels of the images.
        weights: as for `resnet18`.
        options: those of `RepVGG`.

    Example:
        >>> from holofunc import models
        >>> models.repvgg_a0()
        Model(repvgg_a0, 24,741,642 parameters)
    """
    options = {"num_blocks": [1, 2, 4, 14, 1], "width_mult": 0.75, "final_width_mult": 2.5} | options
    return build_model("repvgg_a0", RepVGG, num_classes, in_channels, weights, options)


def repvgg_a1(num_classes: int = 10, in_channels: int = 3, weights: Any = None, **options: Any) -> Model:
    """RepVGG-A1, 30.1 M parameters in training; arguments as for `repvgg_a0`."""
    options = {"num_blocks": [1, 2, 4, 14, 1], "width_mult": 1, "final_width_mult": 2.5} | options
    return build_model("repvgg_a1", RepVGG, num_classes, in_channels, weights, options)


def repvgg_a2(num_classes: int = 10, in_channels: int = 3, weights: Any = None, **options: Any) -> Model:
    """RepVGG-A2, 48.6 M parameters in training; arguments as for `repvgg_a0`."""
    options = {"num_blocks": [1, 2, 4, 14, 1], "width_mult": 1.5, "final_width_mult": 2.75} | options
    return build_model("repvgg_a2", RepVGG, num_classes, in_channels, weights, options)


def repvgg_b0(num_classes: int = 10, in_channels: int = 3, weights: Any = None, **options: Any) -> Model:
    """RepVGG-B0, 31.8 M parameters in training; arguments as for `repvgg_a0`."""
    options = {"num_blocks": [1, 4, 6, 16, 1], "width_mult": 1, "final_width_mult": 2.5} | options
    return build_model("repvgg_b0", RepVGG, num_classes, in_channels, weights, options)


def repvgg_b1(num_classes: int = 10, in_channels: int = 3, weights: Any = None, **options: Any) -> Model:
    """RepVGG-B1, 100.8 M parameters in training; arguments as for `repvgg_a0`."""
    options = {"num_blocks": [1, 4, 6, 16, 1], "width_mult": 2, "final_width_mult": 4} | options
    return build_model("repvgg_b1", RepVGG, num_classes, in_channels, weights, options)


def repvgg_b2(num_classes: int = 10, in_channels: int = 3, weights: Any = None, **options: Any) -> Model:
    """RepVGG-B2, 157.5 M parameters in training; arguments as for `repvgg_a0`."""
    options = {"num_blocks": [1, 4, 6, 16, 1], "width_mult": 2.5, "final_width_mult": 5} | options
    return build_model("repvgg_b2", RepVGG, num_classes, in_channels, weights, options)


def repvgg_b3(num_classes: int = 10, in_channels: int = 3, weights: Any = None, **options: Any) -> Model:
    """RepVGG-B3, 193.9 M parameters in training; arguments as for `repvgg_a0`."""
    options = {"num_blocks": [1, 4, 6, 16, 1], "width_mult": 3, "final_width_mult": 5} | options
    return build_model("repvgg_b3", RepVGG, num_classes, in_channels, weights, options)
