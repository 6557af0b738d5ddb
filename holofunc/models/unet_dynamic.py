"""U-Nets on the maps of any model.

Source: the decoder is the one that fastai published (arXiv 2002.04688, 4.2): pixel shuffle, normalized skips.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holofunc.model import Model
from holofunc.models.base import build_model, image_channels
from holofunc.models.maps import Features, features
from holofunc.models.unet import Layers, Segmenter, resized
from holofunc.typing import Buffers, Key, Params

__all__ = ["DynamicUNet", "dynamic_unet"]


def _shuffle(channels: int, layers: Layers) -> nn.Sequential:
    """Twice the size, as many channels."""
    return nn.Sequential(*layers.conv(channels, 4 * channels, 1), nn.PixelShuffle(2))


class UBlock(nn.Module):
    """A map of twice the stride, enlarged, and a normalized skip, through two convolutions."""

    def __init__(self, channels: int, skip_channels: int, out: int, layers: Layers, same_padding: bool) -> None:
        super().__init__()
        self.upsample = _shuffle(channels, layers)
        self.bn = (layers.norm_layer or nn.BatchNorm2d)(skip_channels)
        whole = channels + skip_channels
        self.block = nn.Sequential(layers.act_layer(), *layers.two_convs(whole, out, out, same_padding=same_padding))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.upsample(x)
        if x.shape[-2:] != skip.shape[-2:]:
            x = F.interpolate(x, size=skip.shape[-2:], mode="nearest")
        return self.block(torch.cat([self.bn(skip), x], 1))


class DynamicUNet(Segmenter):
    """The body: the layers of a model up to the last of some maps, a bridge, a decoder for each map, a 1x1 convolution.

    Args:
        pyramid: the maps, the largest first.
        same_padding: False: each of the decoders' convolutions takes a pixel off every side, and unless the output is
            enlarged, it belongs to the image's center.
        final_upsampling: enlarge what the last decoder returns to the size of the image.
        layers: as in `holofunc.models.unet.UNet`.
    """

    def __init__(
        self,
        pyramid: Features,
        *,
        num_classes: int,
        in_channels: int,
        same_padding: bool = True,
        final_upsampling: bool | None = None,
        **layers: Any,
    ) -> None:
        super().__init__(in_channels, max(pyramid.strides.values()))
        kinds = Layers(**layers)
        self.encoder = pyramid.module()
        *outs, channels = pyramid.channels.values()
        self.bridge = nn.Sequential(
            (kinds.norm_layer or nn.BatchNorm2d)(channels),
            kinds.act_layer(),
            *kinds.two_convs(channels, 2 * channels, channels),
        )
        skips = [channels, *reversed(outs)]
        self.decoder = nn.ModuleList()
        for skip, out in zip(skips, [*skips[1:], skips[-1]], strict=True):
            self.decoder.append(UBlock(channels, skip, out, kinds, same_padding))
            channels = out
        if final_upsampling is None:
            final_upsampling = min(pyramid.strides.values()) > 1
        self.upsample = _shuffle(channels, kinds) if final_upsampling else None
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        skips = list(self.encoder(x).values())
        x = self.bridge(skips[-1])
        for up in self.decoder:
            x = up(x, skips.pop())
        if self.upsample is not None:
            x = self.upsample(x)
            if x.shape[-2:] != size:
                x = resized(x, size)
        return self.classifier(x)


class Started(Model):
    """A model whose ``encoder`` starts as another model does."""

    def __init__(self, build: Callable[[], nn.Module], *, encoder: Model, **options: Any) -> None:
        super().__init__(build, **options)
        self._encoder = encoder

    def init(
        self, key: Key, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Params, Buffers]:
        whole = super().init(key, device, dtype)
        for own, start in zip(whole, self._encoder.init(key, device, dtype), strict=True):
            own.update({f"encoder.{n}": v for n, v in start.items() if f"encoder.{n}" in own})
        return whole


def dynamic_unet(
    encoder: Model,
    num_classes: int = 10,
    weights: Any = None,
    *,
    names: Sequence[str | int] | None = None,
    name: str | None = None,
    **options: Any,
) -> Model:
    """A U-Net whose encoder is another model, of `holofunc.models`, lifted from torchvision, timm, or one's own.

    Building computes and loads nothing. The encoder's parameters and buffers are named ``encoder.`` and as they are in
    the encoder; they start as those of ``encoder.init``, published weights included, without what comes after the last
    map.

    Args:
        encoder: what `holofunc.models.features` can follow.
        num_classes: classes of a pixel.
        weights: of the whole, a path or a URL.
        names: of the maps, the largest first, as `holofunc.models.features` takes them; None is the last map at each
            resolution below the image's.
        name: shown in messages; by default, made of the encoder's.
        options: those of `DynamicUNet`. ``final_upsampling`` is on by default if no map has the image's size, so that
            the output has.

    Returns:
        A model from images (N, C, H, W) to scores (N, K, H, W).

    Raises:
        ValueError: fewer than two maps, maps that are not in the order of their sizes, or a name that is none.

    Example:
        >>> import torch
        >>> from holofunc import models, random
        >>> model = models.dynamic_unet(models.convnext_atto(), num_classes=3)
        >>> params, buffers = model.init(random.key(0))
        >>> scores, _ = model.apply(params, buffers, torch.zeros(1, 3, 64, 80))
        >>> scores.shape
        torch.Size([1, 3, 64, 80])
    """
    pyramid = features(encoder, names)
    strides = list(pyramid.strides.values())
    if len(strides) < 2 or strides != sorted(strides):
        raise ValueError(f"names must be of two maps or more, the largest first, got maps of strides {strides}")
    return build_model(
        name or f"U-Net on {encoder.name}",
        partial(DynamicUNet, pyramid),
        num_classes,
        image_channels(encoder.skeleton),
        weights,
        options,
        make=partial(Started, encoder=encoder),
    )
