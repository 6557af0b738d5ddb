"""Convolutions and similar layers."""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from holofunc.nn import functional
from holofunc.nn.patches import Extent, pair

__all__ = ["Add2d", "Involution2d", "NormConv2d", "PyConv2d", "SlimConv2d"]

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class PatchConv2d(_ConvNd):
    """The parameters and padding of a convolution, for `NormConv2d` and `Add2d`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Extent,
        stride: Extent,
        padding: Extent | str,
        dilation: Extent,
        groups: int,
        bias: bool,
        padding_mode: PaddingMode,
        eps: float,
    ) -> None:
        padding = padding if isinstance(padding, str) else pair(padding)
        size = pair(kernel_size), pair(stride), padding, pair(dilation)
        super().__init__(in_channels, out_channels, *size, False, pair(0), groups, bias, padding_mode)
        self.eps = eps

    def padded(self, x: Tensor) -> Tensor:
        amounts = self._reversed_padding_repeated_twice
        return (
            F.pad(x, amounts, "constant" if self.padding_mode == "zeros" else self.padding_mode) if any(amounts) else x
        )


class NormConv2d(PatchConv2d):
    """`holofunc.nn.functional.norm_conv2d` as a layer, with the arguments of `torch.nn.Conv2d` and ``eps``.

    Example:
        >>> import torch
        >>> from holofunc import nn
        >>> x, layer = torch.arange(32.0).sin().view(1, 2, 4, 4), nn.NormConv2d(2, 3, 3)
        >>> torch.allclose(layer(2 * x + 1), layer(x), atol=1e-5)  # invariant to contrast and brightness
        True
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Extent,
        stride: Extent = 1,
        padding: Extent | str = 0,
        dilation: Extent = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        eps: float = 1e-14,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, eps
        )

    def forward(self, x: Tensor) -> Tensor:
        return functional.norm_conv2d(
            self.padded(x), self.weight, self.bias, self.stride, 0, self.dilation, self.groups, self.eps
        )


class Add2d(PatchConv2d):
    """`holofunc.nn.functional.add2d` as a layer, with the arguments of `torch.nn.Conv2d` and two more.

    Args:
        normalize_slices: standardize the patches first, as `NormConv2d` does.
        eps: added to their variance.

    Example:
        >>> import torch
        >>> from holofunc import nn
        >>> y = nn.Add2d(3, 8, 3, padding=1, bias=False)(torch.ones(2, 3, 6, 6))
        >>> y.shape, bool((y < 0).all())  # minus a distance
        (torch.Size([2, 8, 6, 6]), True)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Extent,
        stride: Extent = 1,
        padding: Extent | str = 0,
        dilation: Extent = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        normalize_slices: bool = False,
        eps: float = 1e-14,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, eps
        )
        self.normalize_slices = normalize_slices

    def forward(self, x: Tensor) -> Tensor:
        options = self.normalize_slices, self.eps
        return functional.add2d(
            self.padded(x), self.weight, self.bias, self.stride, 0, self.dilation, self.groups, *options
        )


class SlimConv2d(nn.Module):
    """A convolution of reweighted and halved channels; the output has three quarters of the input channels.

    Two copies of the input are weighted by channel attention ``w`` and by its flip, and each is folded to half its
    channels. One is convolved, the other is reduced by a 1x1 convolution to half its channels and then convolved.

    Args:
        in_channels: divisible by 4.
        kernel_size, stride, padding, dilation, groups, bias, padding_mode: of the two spatial convolutions.
        r: reduction factor of the hidden channels of the attention.
        L: minimum number of hidden channels.

    Source: Qiu et al., "SlimConv: reducing channel redundancy in convolutional neural networks by weights flipping"
    (arXiv 2003.07469).

    Example:
        >>> import torch
        >>> from holofunc import nn
        >>> nn.SlimConv2d(8, 3, padding=1)(torch.zeros(2, 8, 6, 6)).shape
        torch.Size([2, 6, 6, 6])
    """

    def __init__(
        self,
        in_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        r: int = 32,
        L: int = 2,
    ) -> None:
        super().__init__()
        if in_channels % 4:
            raise ValueError(f"in_channels must be divisible by 4, got {in_channels}")
        hidden, half, quarter = max(in_channels // r, L), in_channels // 2, in_channels // 4
        options: Any = stride, padding, dilation, groups, bias, padding_mode
        self.fc1 = nn.Conv2d(in_channels, hidden, 1)
        self.bn = nn.BatchNorm2d(hidden)
        self.fc2 = nn.Conv2d(hidden, in_channels, 1)
        self.conv_top = nn.Conv2d(half, half, kernel_size, *options)
        self.conv_bot1 = nn.Conv2d(half, quarter, 1)
        self.conv_bot2 = nn.Conv2d(quarter, quarter, kernel_size, *options)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.shape[0] == 1:
            raise ValueError(
                "SlimConv2d normalizes one value per image and channel, so train=True needs at least 2 images, got 1"
            )
        w = torch.sigmoid(self.fc2(torch.relu(self.bn(self.fc1(functional.global_avg_pool2d(x))))))
        top, bottom = (sum((x * attention).chunk(2, 1)) for attention in (w, w.flip(1)))
        return torch.cat([self.conv_top(top), self.conv_bot2(self.conv_bot1(bottom))], 1)


class PyConv2d(nn.ModuleList):
    """Parallel convolutions with kernels of increasing size, concatenated.

    Level ``i`` has kernel size ``kernel_size + 2 * i`` and ``out_channels / P`` channels, where P is the smallest power
    of two that is at least ``num_levels``; the last ``P - num_levels`` levels have twice as many.

    Args:
        in_channels: channels of the images.
        out_channels: divisible by P.
        kernel_size: of the first level; the others are padded so that all outputs have the same size.
        num_levels: at least 1.
        padding: of the first level.
        groups: per level; by default 1, then 4, 8, 16 ..., limited by the channels of the level.
        options: of `torch.nn.Conv2d`: ``stride``, ``dilation``, ``bias``, ``padding_mode``.

    Source: Duta et al., "Pyramidal convolution" (arXiv 2006.11538).

    Example:
        >>> import torch
        >>> from holofunc import nn
        >>> layer = nn.PyConv2d(8, 16, 3, num_levels=3, padding=1)
        >>> [(conv.kernel_size[0], conv.out_channels, conv.groups) for conv in layer]
        [(3, 4, 1), (5, 4, 4), (7, 8, 8)]
        >>> layer(torch.zeros(2, 8, 9, 9)).shape
        torch.Size([2, 16, 9, 9])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        num_levels: int = 2,
        padding: int = 0,
        groups: list[int] | None = None,
        **options: Any,
    ) -> None:
        if num_levels < 1:
            raise ValueError(f"num_levels must be at least 1, got {num_levels}")
        parts = 1 << (num_levels - 1).bit_length()
        if out_channels % parts:
            raise ValueError(f"out_channels must be divisible by {parts} for {num_levels} levels, got {out_channels}")
        doubled = parts - num_levels
        widths = [out_channels // parts * (2 if i >= num_levels - doubled else 1) for i in range(num_levels)]
        if groups is None:
            groups = [1, *(min(4 << i, width) for i, width in enumerate(widths[1:]))]
        if len(groups) != num_levels:
            raise ValueError(f"groups must have one entry per level ({num_levels}), got {groups}")
        dilation = options.get("dilation", 1)
        super().__init__(
            nn.Conv2d(in_channels, width, kernel_size + 2 * i, padding=padding + dilation * i, groups=group, **options)
            for i, (width, group) in enumerate(zip(widths, groups, strict=True))
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([conv(x) for conv in self], 1)


class Involution2d(nn.Module):
    """A kernel for each position, computed from the pixel at its centre (with a stride, from ``stride**2`` pixels).

    Args:
        in_channels: channels of the images, divisible by ``groups``.
        kernel_size, padding, stride, dilation: as in `torch.nn.Conv2d`; the image may be of any size.
        groups: kernels per position.
        reduction_ratio: of the channels between the two 1x1 convolutions that compute the kernels.

    Source: Li et al., "Involution" (arXiv 2103.06255), algorithm 1: without the normalization and activation of eq. 6.

    Example:
        >>> import torch
        >>> from holofunc import nn
        >>> layer = nn.Involution2d(8, 7, padding=3, groups=2)
        >>> layer(torch.zeros(2, 8, 6, 6)).shape, layer.span.out_channels  # 2 kernels of 7 x 7 per position
        (torch.Size([2, 8, 6, 6]), 98)
    """

    def __init__(
        self,
        in_channels: int,
        kernel_size: int,
        padding: int = 0,
        stride: int = 1,
        groups: int = 1,
        dilation: int = 1,
        reduction_ratio: float = 1,
    ) -> None:
        super().__init__()
        if in_channels % groups:
            raise ValueError(f"groups must divide in_channels={in_channels}, got {groups}")
        hidden = int(in_channels / reduction_ratio)
        if hidden < 1:
            raise ValueError(f"reduction_ratio must be at most in_channels={in_channels}, got {reduction_ratio}")
        self.kernel_size, self.padding, self.stride, self.dilation = kernel_size, padding, stride, dilation
        self.groups = groups
        self.reduce = nn.Conv2d(in_channels, hidden, 1)
        self.span = nn.Conv2d(hidden, groups * kernel_size**2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return functional.involution2d(
            x,
            self.span(self.reduce(self.centers(x))),
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )

    def centers(self, x: Tensor) -> Tensor:
        """The centres of the windows, (N, C, H', W'), after cropping or padding the borders."""
        lost = self.dilation * (self.kernel_size - 1) - 2 * self.padding
        first, last = lost // 2, lost - lost // 2
        if lost:
            x = F.pad(x, (-first, -last, -first, -last))
        return F.avg_pool2d(x, self.stride, ceil_mode=True) if self.stride > 1 else x

    def extra_repr(self) -> str:
        sizes = f"kernel_size={self.kernel_size}, padding={self.padding}, stride={self.stride}"
        return f"{sizes}, groups={self.groups}, dilation={self.dilation}"
