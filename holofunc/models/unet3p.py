"""U-Net 3+: every decoder sees the maps of all sizes.

Source: Huang et al., "UNet 3+" (arXiv 2004.08790), without the module that first decides whether there is an organ.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from holofunc.model import Model
from holofunc.models.base import build_model
from holofunc.models.unet import Layers, Segmenter, resized

__all__ = ["UNet3p", "unet3p"]


class Resized(nn.Sequential):
    """The layers, on a map that was interpolated to a size before."""

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:  # type: ignore[override]
        return super().forward(resized(x, size))


class Aggregation(nn.Module):
    """Finer maps pooled, the one of this size, and coarser ones interpolated, each convolved to ``width`` channels.

    Args:
        finer: channels of the finer maps, the finest first.
        same: channels of the map of this size, None if it has ``width`` and is taken as it is.
        coarser: channels of the coarser maps, the coarsest last.
    """

    def __init__(
        self, finer: Sequence[int], same: int | None, coarser: Sequence[int], width: int, layers: Layers, paper: bool
    ) -> None:
        super().__init__()

        def conv(channels: int) -> list[nn.Module]:
            return layers.conv(channels, width) if paper else [layers.conv_layer(channels, width, 3, padding=1)]

        pools = [2 ** (len(finer) - i) for i in range(len(finer))]
        self.downsamples = nn.ModuleList(
            nn.Sequential(nn.MaxPool2d(pool), *conv(channels)) for pool, channels in zip(pools, finer, strict=True)
        )
        skip = [] if same is None else conv(same)
        self.skip = skip[0] if len(skip) == 1 else nn.Sequential(*skip)
        self.upsamples = nn.ModuleList(
            Resized(OrderedDict((str(1 + i), layer) for i, layer in enumerate(conv(channels)))) for channels in coarser
        )
        whole = width * (len(finer) + 1 + len(coarser))
        self.block = nn.Sequential(*layers.conv(whole, whole))

    def forward(self, finer: Sequence[Tensor], same: Tensor, coarser: Sequence[Tensor]) -> Tensor:
        size = same.shape[-2:]
        maps = [
            *(down(x) for down, x in zip(self.downsamples, finer, strict=True)),
            self.skip(same),
            *(up(x, size) for up, x in zip(self.upsamples, coarser, strict=True)),
        ]
        return self.block(torch.cat(maps, 1))


class UNet3p(Segmenter):
    """The body: encoder, from its second-lowest map on decoders of all maps, and a 1x1 convolution.

    Args:
        layout: widths of the encoder's stages, the first also that of each map within the decoders.
        deep_supervision: return the scores of the lowest map and of all decoders, at the image's size: a tuple, the
            last decoder's scores at its end. Each of the others is convolved 3x3, then interpolated.
        paper: normalize and activate each map within the decoders, and convolve the highest one too.
        layers: as in `holofunc.models.unet.UNet`; convolutions are normalized by default.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        layout: Sequence[int] = (64, 128, 256, 512, 1024),
        deep_supervision: bool = False,
        paper: bool = False,
        **layers: Any,
    ) -> None:
        super().__init__(in_channels, 2 ** (len(layout) - 1))
        kinds = Layers(**{"norm_layer": nn.BatchNorm2d} | layers)
        self.encoder = nn.ModuleList(kinds.encoder(in_channels, layout))
        width, last = layout[0], len(layout) - 1
        whole = width * len(layout)
        self.decoder = nn.ModuleList(
            Aggregation(
                *(layout[:i], layout[i] if i or paper else None, [*[whole] * (last - 1 - i), layout[-1]]),
                *(width, kinds, paper),
            )
            for i in range(last)
        )
        self.deep_supervision = deep_supervision
        lower = [layout[-1], *[whole] * (last - 1)] if deep_supervision else []
        self.auxiliary = nn.ModuleList(nn.Conv2d(channels, num_classes, 3, padding=1) for channels in lower)
        self.classifier = nn.Conv2d(whole, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        size = x.shape[-2:]
        maps = []
        for stage in self.encoder:
            x = stage(x)
            maps.append(x)
        decoded = [maps.pop()]  # the lowest first
        for aggregation in reversed(self.decoder):
            same = maps.pop()
            decoded.append(aggregation(maps, same, decoded[::-1]))
        *others, x = decoded
        scores = self.classifier(x)
        if not self.deep_supervision:
            return scores
        return (*(resized(head(x), size) for head, x in zip(self.auxiliary, others, strict=True)), scores)


def unet3p(num_classes: int = 10, in_channels: int = 3, weights: Any = None, **options: Any) -> Model:
    """U-Net 3+, 26.9 M parameters.

    Args:
        num_classes: classes of a pixel.
        in_channels: channels of the images, whose sides have at least 16 pixels.
        weights: as for `resnet18`.
        options: those of `UNet3p`.

    Returns:
        A model from images (N, C, H, W) to scores (N, K, H, W), or a tuple of them with ``deep_supervision``.

    Example:
        >>> from holofunc import models
        >>> models.unet3p(num_classes=10)
        Model(unet3p, 26,927,370 parameters)
    """
    return build_model("unet3p", UNet3p, num_classes, in_channels, weights, options)
