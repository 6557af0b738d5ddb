"""U-Net, U-Net+ and U-Net++: an encoder's maps, brought back to the size of the image by decoders.

Source: Ronneberger et al., "U-Net" (arXiv 1505.04597); Zhou et al., "UNet++" (arXiv 1912.05074), where U-Net+ is
U-Net++ without its dense skips.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holofunc.model import Model
from holofunc.models.base import Images, build_model

__all__ = ["Layers", "Segmenter", "UNet", "UNetpp", "resized", "unet", "unetp", "unetpp"]


class Layers(NamedTuple):
    """What a body's convolutions are, and what follows each: normalization, activation and dropout, in this order.

    A convolution has a bias unless it is normalized.
    """

    act_layer: Callable[[], nn.Module] = nn.ReLU
    norm_layer: Callable[[int], nn.Module] | None = None
    drop_layer: Callable[[], nn.Module] | None = None
    conv_layer: Callable[..., nn.Module] = nn.Conv2d

    def conv(self, channels: int, out: int, kernel_size: int = 3, *, same_padding: bool = True) -> list[nn.Module]:
        padding = kernel_size // 2 if same_padding else 0
        layers = [self.conv_layer(channels, out, kernel_size, padding=padding, bias=self.norm_layer is None)]
        if self.norm_layer is not None:
            layers.append(self.norm_layer(out))
        layers.append(self.act_layer())
        if self.drop_layer is not None:
            layers.append(self.drop_layer())
        return layers

    def two_convs(self, channels: int, middle: int, out: int, *, same_padding: bool = True) -> list[nn.Module]:
        first = self.conv(channels, middle, same_padding=same_padding)
        return [*first, *self.conv(middle, out, same_padding=same_padding)]

    def encoder(self, in_channels: int, layout: Sequence[int], *, same_padding: bool = True) -> list[nn.Module]:
        """Stages of two convolutions with these widths; all but the first halve the size before."""
        if not layout or min(layout) < 1:
            raise ValueError(f"layout must hold widths of at least 1, got {list(layout)}")
        pools: list[list[nn.Module]] = [[] if i == 0 else [nn.MaxPool2d(2)] for i in range(len(layout))]
        return [
            nn.Sequential(*pool, *self.two_convs(channels, out, out, same_padding=same_padding))
            for pool, channels, out in zip(pools, [in_channels, *layout], layout, strict=False)
        ]

    def bridge(self, width: int, *, same_padding: bool = True) -> nn.Sequential:
        """Half the size again, twice the width in between: the lowest map."""
        return nn.Sequential(nn.MaxPool2d(2), *self.two_convs(width, 2 * width, width, same_padding=same_padding))


class Segmenter(Images):
    """A skeleton from images (N, C, H, W) to scores of the classes (N, K, H, W), or to a tuple of such."""

    def __init__(self, in_channels: int, least: int) -> None:
        super().__init__(in_channels)
        self.least = least

    def check_input(self, *inputs: Any) -> None:
        """As `Images.check_input`. Raises a ValueError also if a side has less than ``least`` pixels."""
        super().check_input(*inputs)
        (x,) = inputs
        if min(x.shape[-2:]) < self.least:
            raise ValueError(f"images must be at least {self.least} pixels high and wide, got shape {tuple(x.shape)}")


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """Interpolated so that the corners stay where they are."""
    return F.interpolate(x, size=list(size), mode="bilinear", align_corners=True)


class Up(nn.Module):
    """A map of twice the stride, brought to the size of the skips, and two convolutions of all of them."""

    def __init__(
        self,
        channels: int,
        skip_channels: int,
        out: int,
        layers: Layers,
        *,
        num_skips: int = 1,
        same_padding: bool = True,
        bilinear_upsampling: bool = True,
    ) -> None:
        super().__init__()
        self.same_padding = same_padding
        self.upsample = None if bilinear_upsampling else nn.ConvTranspose2d(channels, skip_channels, 2, 2)
        whole = (channels if bilinear_upsampling else skip_channels) + num_skips * skip_channels
        self.block = nn.Sequential(*layers.two_convs(whole, out, out, same_padding=same_padding))

    def forward(self, x: Tensor, *skips: Tensor) -> Tensor:
        size = skips[0].shape[-2:] if self.same_padding else [2 * side for side in x.shape[-2:]]
        if self.upsample is None:
            x = resized(x, size)
        else:
            x = self.upsample(x)
            x = F.pad(x, [0, size[1] - x.shape[-1], 0, size[0] - x.shape[-2]])  # of an odd size, the pooling left a row
        return self.block(torch.cat([*(_cropped(skip, size) for skip in skips), x], 1))


def _cropped(x: Tensor, size: Sequence[int]) -> Tensor:
    top, left = ((have - want) // 2 for have, want in zip(x.shape[-2:], size, strict=True))
    return x[..., top : top + size[0], left : left + size[1]]


class UNet(Segmenter):
    """The body: encoder, bridge, a decoder for each stage of the encoder, and a 1x1 convolution.

    Args:
        layout: widths of the encoder's stages; each but the first halves the size.
        same_padding: keep the size in each convolution. False, as in the paper: each takes a pixel off every side,
            skips are cropped at their center, and the output belongs to the image's center.
        bilinear_upsampling: interpolate; False, as in the paper: transposed convolutions.
        layers: the fields of `Layers`: ``act_layer()``, ``norm_layer(channels)``, ``drop_layer()`` and
            ``conv_layer(channels, out, kernel_size, padding=, bias=)``.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        layout: Sequence[int] = (64, 128, 256, 512),
        same_padding: bool = True,
        bilinear_upsampling: bool = True,
        **layers: Any,
    ) -> None:
        least = 1 if same_padding else 8
        for _ in layout:
            least = 2 * least + (0 if same_padding else 4)
        super().__init__(in_channels, least)
        kinds = Layers(**layers)
        self.encoder = nn.ModuleList(kinds.encoder(in_channels, layout, same_padding=same_padding))
        channels = layout[-1]
        self.bridge = kinds.bridge(channels, same_padding=same_padding)
        self.decoder = nn.ModuleList()
        for i, width in reversed(list(enumerate(layout))):
            out = layout[max(i - 1, 0)] if bilinear_upsampling else width  # interpolation leaves the channels as many
            up = Up(*(channels, width, out, kinds), same_padding=same_padding, bilinear_upsampling=bilinear_upsampling)
            self.decoder.append(up)
            channels = out
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for stage in self.encoder:
            x = stage(x)
            skips.append(x)
        x = self.bridge(x)
        for up in self.decoder:
            x = up(x, skips.pop())
        return self.classifier(x)


class UNetpp(Segmenter):
    """The body of U-Net++: between encoder and decoder, cells of every size, each of those before it and one below it.

    Args:
        layout: widths of the encoder's stages; each but the first halves the size.
        dense: give a cell all cells of its size before it; False, as in U-Net+: the last of them.
        deep_supervision: return the scores of all cells of the image's size, a tuple with the last cell's at its end;
            each of the others has a 1x1 convolution of its own.
        bilinear_upsampling: as in `UNet`.
        layers: as in `UNet`.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        layout: Sequence[int] = (64, 128, 256, 512),
        dense: bool = True,
        deep_supervision: bool = False,
        bilinear_upsampling: bool = True,
        **layers: Any,
    ) -> None:
        super().__init__(in_channels, 2 ** len(layout))
        self.dense, self.deep_supervision = dense, deep_supervision
        kinds = Layers(**layers)
        self.encoder = nn.ModuleList(kinds.encoder(in_channels, layout))
        self.bridge = kinds.bridge(layout[-1])
        self.decoder = nn.ModuleList()
        depth, widths = len(layout), [*layout, layout[-1]]  # the bridge's is the last
        for i, width in reversed(list(enumerate(layout))):
            up = partial(Up, widths[i + 1], width, width, kinds, bilinear_upsampling=bilinear_upsampling)
            cells = (up(num_skips=j + 1 if dense else 1) for j in range(depth - i))
            self.decoder.append(nn.ModuleList(cells))
        count = depth - 1 if deep_supervision else 0
        self.auxiliary = nn.ModuleList(nn.Conv2d(layout[0], num_classes, 1) for _ in range(count))
        self.classifier = nn.Conv2d(layout[0], num_classes, 1)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        rows = []  # of cells of one size, the image's first
        for stage in self.encoder:
            x = stage(x)
            rows.append([x])
        rows.append([self.bridge(x)])
        ups: list[Any] = list(reversed(self.decoder))
        for j in range(len(ups)):
            for row, below, cells in zip(rows, rows[1:], ups[: len(ups) - j], strict=False):
                row.append(cells[j](below[j], *(row if self.dense else row[-1:])))
        *others, last = rows[0][1:]
        scores = self.classifier(last)
        if not self.deep_supervision:
            return scores
        return (*(head(x) for head, x in zip(self.auxiliary, others, strict=True)), scores)


# --- variants ----------------------------------------------------------------------------------------------------


def unet(num_classes: int = 10, in_channels: int = 3, weights: Any = None, **options: Any) -> Model:
    """U-Net with interpolation and without normalization, 18.1 M parameters.

    Args:
        num_classes: classes of a pixel.
        in_channels: channels of the images, whose sides have at least 16 pixels and need not be even.
        weights: as for `resnet18`.
        options: those of `UNet`; the paper's are ``same_padding=False, bilinear_upsampling=False`` and a width more
            in ``layout``.

    Returns:
        A model from images (N, C, H, W) to scores (N, K, H, W).

    Example:
        >>> import torch
        >>> from holofunc import models, random
        >>> model = models.unet(num_classes=3, layout=[8, 16])
        >>> params, buffers = model.init(random.key(0))
        >>> scores, _ = model.apply(params, buffers, torch.zeros(1, 3, 45, 60))
        >>> scores.shape
        torch.Size([1, 3, 45, 60])
    """
    return build_model("unet", UNet, num_classes, in_channels, weights, options)


def unetp(num_classes: int = 10, in_channels: int = 3, weights: Any = None, **options: Any) -> Model:
    """U-Net+, 28.3 M parameters; arguments as for `unetpp`."""
    return build_model("unetp", UNetpp, num_classes, in_channels, weights, {"dense": False} | options)


def unetpp(num_classes: int = 10, in_channels: int = 3, weights: Any = None, **options: Any) -> Model:
    """U-Net++ without normalization, 29.5 M parameters.

    Args:
        num_classes: classes of a pixel.
        in_channels: channels of the images.
        weights: as for `resnet18`.
        options: those of `UNetpp`.

    Example:
        >>> import torch
        >>> from holofunc import models, random
        >>> model = models.unetpp(num_classes=3, layout=[8, 16], deep_supervision=True)
        >>> params, buffers = model.init(random.key(0))
        >>> heads, _ = model.apply(params, buffers, torch.zeros(1, 3, 32, 32))
        >>> [head.shape for head in heads]
        [torch.Size([1, 3, 32, 32]), torch.Size([1, 3, 32, 32])]
    """
    return build_model("unetpp", UNetpp, num_classes, in_channels, weights, options)
