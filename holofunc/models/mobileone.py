"""MobileOne: depthwise and pointwise convolutions with parallel branches in training, merged for inference.

Source: Vasu et al., "MobileOne: an improved one millisecond mobile backbone" (arXiv 2206.04040). As published by
Holocron, the stem is depthwise and pointwise too; ``paper=True`` builds the paper's dense stem.
`holofunc.models.reparametrize` merges the branches.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from holofunc.model import Model
from holofunc.models.base import Classifier, build_model
from holofunc.models.branches import Branches

__all__ = ["MobileOne", "mobileone_s0", "mobileone_s1", "mobileone_s2", "mobileone_s3"]


def _block(channels: int, out: int, overparam: int, stride: int) -> nn.Sequential:
    """A depthwise 3x3 and a pointwise layer, each with ``overparam`` branches and a few simpler ones."""
    depthwise = [*([None] if stride == 1 else []), 1, *[3] * overparam]
    pointwise = [*([None] if channels == out else []), *[1] * overparam]
    return nn.Sequential(
        *(Branches(channels, channels, depthwise, stride, depthwise=True), nn.ReLU()),
        *(Branches(channels, out, pointwise), nn.ReLU()),
    )


class MobileOne(Classifier):
    """The body: stem and four stages that halve the resolution, global average, linear head.

    Args:
        width_mults: multiply the stages' widths 64, 128, 256 and 512.
        num_blocks: per stage.
        overparam: number of branches of the full kernel size.
        paper: a dense 3x3 convolution in the stem.
    """

    def __init__(
        self,
        width_mults: Sequence[float],
        *,
        num_classes: int,
        in_channels: int,
        num_blocks: Sequence[int] = (2, 8, 10, 1),
        overparam: int = 1,
        paper: bool = False,
    ) -> None:
        channels = int(64 * min(1, width_mults[0]))
        stem = (
            nn.Sequential(Branches(in_channels, channels, [1, 3], 2), nn.ReLU())
            if paper
            else _block(in_channels, channels, overparam, 2)
        )
        stages: list[nn.Module] = []
        for i, (depth, mult) in enumerate(zip(num_blocks, width_mults, strict=True)):
            width, blocks = int(64 * 2**i * mult), []
            for j in range(depth):
                blocks.append(_block(channels, width, overparam, 1 if j else 2))
                channels = width
            stages.append(nn.Sequential(*blocks))
        super().__init__(in_channels, nn.Sequential(stem, *stages), nn.Linear(channels, num_classes))


# --- variants ----------------------------------------------------------------------------------------------------


def mobileone_s0(num_classes: int = 10, in_channels: int = 3, weights: Any = None, **options: Any) -> Model:
    """MobileOne-S0, 4.3 M parameters in training.

    Args:
        num_classes: outputs of the head.
        in_channels: channels of the images.
        weights: as for `resnet18`.
        options: those of `MobileOne`.

    Example:
        >>> from holofunc import models
        >>> models.mobileone_s0()
        Model(mobileone_s0, 4,277,991 parameters)
    """
    options = {"width_mults": [0.75, 1, 1, 2], "overparam": 4} | options
    return build_model("mobileone_s0", MobileOne, num_classes, in_channels, weights, options)


def mobileone_s1(num_classes: int = 10, in_channels: int = 3, weights: Any = None, **options: Any) -> Model:
    """MobileOne-S1, 3.6 M parameters in training; arguments as for `mobileone_s0`."""
    options = {"width_mults": [1.5, 1.5, 2, 2.5]} | options
    return build_model("mobileone_s1", MobileOne, num_classes, in_channels, weights, options)


def mobileone_s2(num_classes: int = 10, in_channels: int = 3, weights: Any = None, **options: Any) -> Model:
    """MobileOne-S2, 5.9 M parameters in training; arguments as for `mobileone_s0`."""
    options = {"width_mults": [1.5, 2, 2.5, 4]} | options
    return build_model("mobileone_s2", MobileOne, num_classes, in_channels, weights, options)


def mobileone_s3(num_classes: int = 10, in_channels: int = 3, weights: Any = None, **options: Any) -> Model:
    """MobileOne-S3, 8.1 M parameters in training; arguments as for `mobileone_s0`."""
    options = {"width_mults": [2, 2.5, 3, 4]} | options
    return build_model("mobileone_s3", MobileOne, num_classes, in_channels, weights, options)
