"""Darknet 24, 19, 53 and CSPDarknet53: the backbones of YOLO 1 to 4.

Source: Redmon et al., "You only look once" (arXiv 1506.02640); Redmon and Farhadi, "YOLO9000" (arXiv 1612.08242) and
"YOLOv3" (arXiv 1804.02767); Wang et al., "CSPNet" (arXiv 1911.11929); Bochkovskiy et al., "YOLOv4" (arXiv 2004.10934).
The bodies (such as `darknet24_body`) end before the average pooling, for use in detectors.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from holofunc.model import Model
from holofunc.models.base import Images, build_model, conv_bn
from holofunc.nn import DropBlock2d

__all__ = [
    "Darknet",
    "Layers",
    "cspdarknet53",
    "cspdarknet53_body",
    "cspdarknet53_mish",
    "darknet19",
    "darknet19_body",
    "darknet24",
    "darknet24_body",
    "darknet53",
    "darknet53_body",
    "leaky",
    "mish_dropped",
    "without_norm",
]

Layers = Callable[..., list[nn.Module]]


def leaky(channels: int, out: int, kernel_size: int, stride: int = 1, *, slope: float = 0.1) -> list[nn.Module]:
    """A convolution, its normalization and a leaky ReLU."""
    return [*conv_bn(channels, out, kernel_size, stride), nn.LeakyReLU(slope)]


def without_norm(channels: int, out: int, kernel_size: int, stride: int = 1) -> list[nn.Module]:
    """A convolution with a bias, and a leaky ReLU."""
    return [nn.Conv2d(channels, out, kernel_size, stride, kernel_size // 2), nn.LeakyReLU(0.1)]


def mish_dropped(
    channels: int, out: int, kernel_size: int, stride: int = 1, *, drop_block: float = 0.1
) -> list[nn.Module]:
    """A convolution, its normalization, Mish and DropBlock."""
    return [*conv_bn(channels, out, kernel_size, stride), nn.Mish(), DropBlock2d(drop_block)]


def _body(stem: list[nn.Module], name: str, stages: list[nn.Module]) -> nn.Sequential:
    return nn.Sequential(OrderedDict([("stem", nn.Sequential(*stem)), (name, nn.Sequential(*stages))]))


class ResBlock(nn.Module):
    """``drop(x + conv(x))`` of a 1x1 and a 3x3 convolution."""

    def __init__(self, channels: int, hidden: int, layers: Layers, drop: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = nn.Sequential(*layers(channels, hidden, 1), *layers(hidden, channels, 3))
        self.dropblock = drop

    def forward(self, x: Tensor) -> Tensor:
        out = x + self.conv(x)
        return out if self.dropblock is None else self.dropblock(out)


class CSPStage(nn.Module):
    """Halve the resolution, apply residual blocks to half of the channels, and concatenate the other half.

    In the first stage each "half" has all ``out`` channels.
    """

    def __init__(
        self, channels: int, out: int, depth: int, layers: Layers, block: Callable[[int, int], nn.Module], first: bool
    ) -> None:
        super().__init__()
        half, hidden = (out, out // 2) if first else (out // 2, out // 2)
        self.base_layer = nn.Sequential(*layers(channels, out, 3, 2), *layers(out, 2 * half, 1))
        self.main = nn.Sequential(*(block(half, hidden) for _ in range(depth)), *layers(half, half, 1))
        self.transition = nn.Sequential(*layers(2 * half, out, 1))

    def forward(self, x: Tensor) -> Tensor:
        kept, worked = self.base_layer(x).chunk(2, dim=1)
        return self.transition(torch.cat([kept, self.main(worked)], 1))


# --- bodies ------------------------------------------------------------------------------------------------------

DARKNET24 = ((192,), (128, 256, 256, 512), (*(256, 512) * 4, 512, 1024), (512, 1024) * 2)
DARKNET19 = ((64, 0), (128, 1), (256, 1), (512, 2), (1024, 2))
DARKNET53 = ((64, 1), (128, 2), (256, 8), (512, 8), (1024, 4))


def darknet24_body(
    in_channels: int = 3,
    stem_channels: int = 64,
    *,
    layout: Sequence[Sequence[int]] = DARKNET24,
    layers: Layers = without_norm,
) -> nn.Sequential:
    """The body of YOLOv1: convolutions with biases and no normalization, 1024 channels at stride 32.

    Args:
        in_channels: of the images.
        stem_channels: of the first convolution.
        layout: channels of the convolutions of each stage, alternately 1x1 and 3x3.
        layers: ``layers(channels, out, kernel_size, stride=1)``, a convolution with its normalization and activation.
    """
    stages: list[nn.Module] = []
    channels = stem_channels
    for widths in layout:
        stage: list[nn.Module] = [nn.MaxPool2d(2)]
        for i, width in enumerate(widths):
            stage += layers(channels, width, 3 if i % 2 or len(widths) == 1 else 1)
            channels = width
        stages.append(nn.Sequential(*stage))
    return _body(layers(in_channels, stem_channels, 7, 2), "layers", stages)


def darknet19_body(
    in_channels: int = 3,
    stem_channels: int = 32,
    *,
    layout: Sequence[tuple[int, int]] = DARKNET19,
    layers: Layers = leaky,
) -> nn.Sequential:
    """The body of YOLOv2: 1024 channels at stride 32; ``layout`` has the channels and bottlenecks of each stage."""
    stages: list[nn.Module] = []
    channels = stem_channels
    for width, squeezes in layout:
        stage = [nn.MaxPool2d(2), *layers(channels, width, 3)]
        for _ in range(squeezes):
            stage += [*layers(width, width // 2, 1), *layers(width // 2, width, 3)]
        stages.append(nn.Sequential(*stage))
        channels = width
    return _body(layers(in_channels, stem_channels, 3), "layers", stages)


def darknet53_body(
    in_channels: int = 3, stem_channels: int = 32, *, layout: Sequence[tuple[int, int]] = DARKNET53
) -> nn.Sequential:
    """The body of YOLOv3: 1024 channels at stride 32; ``layout`` has the channels and residual blocks of each stage."""
    stages: list[nn.Module] = []
    channels = stem_channels
    for width, depth in layout:
        blocks = [ResBlock(width, width // 2, leaky) for _ in range(depth)]
        stages.append(nn.Sequential(*leaky(channels, width, 3, 2), *blocks))
        channels = width
    return _body(leaky(in_channels, stem_channels, 3), "layers", stages)


def cspdarknet53_body(
    in_channels: int = 3,
    stem_channels: int = 32,
    *,
    layout: Sequence[tuple[int, int]] = DARKNET53,
    slope: float = 0.01,
    mish: bool = False,
    drop_block: float = 0.1,
    layers: Layers | None = None,
) -> nn.Sequential:
    """The body of YOLOv4: cross-stage partial connections, 1024 channels at stride 32.

    Args:
        in_channels: of the images.
        stem_channels: of the first convolution.
        layout: channels and residual blocks of each stage.
        slope: of the leaky ReLUs.
        mish: use Mish instead, followed by DropBlock.
        drop_block: probability of DropBlock.
        layers: ``layers(channels, out, kernel_size, stride=1)``, a convolution with its normalization and activation;
            overrides ``slope`` and ``mish``.
    """
    if layers is None:
        layers = partial(mish_dropped, drop_block=drop_block) if mish else partial(leaky, slope=slope)

    def block(channels: int, hidden: int) -> nn.Module:
        return ResBlock(channels, hidden, layers, DropBlock2d(drop_block) if mish else None)

    stages: list[nn.Module] = []
    channels = stem_channels
    for i, (width, depth) in enumerate(layout):
        stages.append(CSPStage(channels, width, depth, layers, block, first=i == 0))
        channels = width
    return _body(layers(in_channels, stem_channels, 3), "stages", stages)


class Darknet(Images):
    """A body (``features``), global average pooling and a linear ``classifier``.

    Args:
        body: ``body(in_channels, **options)``.
        pool_last: classify every pixel by a 1x1 convolution, then average: the same function with other weight shapes.
    """

    def __init__(
        self,
        body: Callable[..., nn.Module],
        *,
        num_classes: int,
        in_channels: int,
        pool_last: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(in_channels)
        self.features = body(in_channels, **options)
        channels = [m.out_channels for m in self.features.modules() if isinstance(m, nn.Conv2d)][-1]
        self.classifier = nn.Conv2d(channels, num_classes, 1) if pool_last else nn.Linear(channels, num_classes)
        self.pool_last = pool_last

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.classifier(x).mean((2, 3)) if self.pool_last else self.classifier(x.mean((2, 3)))


# --- variants ----------------------------------------------------------------------------------------------------


def darknet24(num_classes: int = 10, in_channels: int = 3, weights: Any = None, **options: Any) -> Model:
    """Darknet-24, 22.4 M parameters.

    Args:
        num_classes: outputs of the head.
        in_channels: channels of the images.
        weights: as for `resnet18`.
        options: those of the body, here `darknet24_body`.

    Example:
        >>> from holofunc import models
        >>> models.darknet24()
        Model(darknet24, 22,413,386 parameters)
    """
    return build_model("darknet24", Darknet, num_classes, in_channels, weights, {"body": darknet24_body} | options)


def darknet19(num_classes: int = 10, in_channels: int = 3, weights: Any = None, **options: Any) -> Model:
    """Darknet-19, 19.8 M parameters; arguments as for `darknet24`."""
    options = {"body": darknet19_body, "pool_last": True} | options
    return build_model("darknet19", Darknet, num_classes, in_channels, weights, options)


def darknet53(num_classes: int = 10, in_channels: int = 3, weights: Any = None, **options: Any) -> Model:
    """Darknet-53, 40.6 M parameters; arguments as for `darknet24`."""
    return build_model("darknet53", Darknet, num_classes, in_channels, weights, {"body": darknet53_body} | options)


def cspdarknet53(
    num_classes: int = 10, in_channels: int = 3, weights: Any = None, *, paper: bool = False, **options: Any
) -> Model:
    """CSPDarknet-53, 26.6 M parameters; arguments as for `darknet24`.

    As published by Holocron, the slope of its leaky ReLUs is 0.01; ``paper=True`` uses darknet's 0.1.
    """
    options = {"body": cspdarknet53_body, "slope": 0.1 if paper else 0.01} | options
    return build_model("cspdarknet53", Darknet, num_classes, in_channels, weights, options)


def cspdarknet53_mish(num_classes: int = 10, in_channels: int = 3, weights: Any = None, **options: Any) -> Model:
    """CSPDarknet-53 with Mish and DropBlock (``drop_block``, default 0.1), 26.6 M parameters; as `darknet24`."""
    options = {"body": cspdarknet53_body, "mish": True} | options
    return build_model("cspdarknet53_mish", Darknet, num_classes, in_channels, weights, options)
