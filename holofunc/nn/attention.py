"""Attention over pixels and channels."""

import torch
from torch import Tensor, nn

from holofunc.nn.downsample import ZPool

__all__ = ["SAM", "TripletAttention"]


class SAM(nn.Module):
    """``x * sigmoid(conv(x))``: one attention weight per pixel.

    Args:
        in_channels: channels of the images.

    Source: YOLOv4 (arXiv 2004.10934), the spatial attention of CBAM (arXiv 1807.06521) without pooling.
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.conv(x))


class DimAttention(nn.Module):
    """One attention weight per place of the plane that is left when dimension ``dim`` is pooled."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.compress = nn.Sequential(ZPool(1), conv, nn.BatchNorm2d(1, momentum=0.01), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.compress(x.transpose(1, self.dim)).transpose(1, self.dim)


class TripletAttention(nn.Module):
    """The mean of three gated copies, whose gates see all pairs of the dimensions channels, height and width.

    Source: Misra et al., "Rotate to attend: convolutional triplet attention module" (arXiv 2010.03045).
    """

    def __init__(self) -> None:
        super().__init__()
        self.c_branch = DimAttention(1)
        self.h_branch = DimAttention(2)
        self.w_branch = DimAttention(3)

    def forward(self, x: Tensor) -> Tensor:
        return (self.c_branch(x) + self.h_branch(x) + self.w_branch(x)) / 3.0
