"""Convolutions and what takes their place."""

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["PyConv2d"]


class PyConv2d(nn.ModuleList):
    """A pyramid of convolutions of growing kernels, concatenated.

    With P the power of two at or above ``num_levels``, level ``i`` has a kernel of ``kernel_size + 2 * i`` and
    ``out_channels / P`` channels, twice that in the last ``P - num_levels`` levels.

    Args:
        in_channels: channels of the images.
        out_channels: divisible by P.
        kernel_size: of the first level; the others are padded to the same output size.
        num_levels: at least 1.
        padding: of the first level.
        groups: per level; by default 1, then 4, 8, 16 ..., at most the channels of the level.
        options: of `torch.nn.Conv2d`: ``stride``, ``dilation``, ``bias``, ``padding_mode``.

    Source: Duta et al., "Pyramidal convolution" (arXiv 2006.11538).
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
