"""Activations."""

import torch
from torch import Tensor, nn

from holofunc.nn import functional

__all__ = ["FReLU", "HardMish", "NLReLU"]


class HardMish(nn.Module):
    """`holofunc.nn.functional.hard_mish` as a layer.

    Args:
        inplace: accepted for compatibility with Holocron, without effect.

    Example:
        >>> import torch
        >>> from holofunc import nn
        >>> nn.HardMish()(torch.tensor([-3.0, -1.0, 0.0, 2.0]))
        tensor([-0.0000, -0.5000,  0.0000,  2.0000])
    """

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return functional.hard_mish(x)


class NLReLU(nn.Module):
    """`holofunc.nn.functional.nl_relu` as a layer.

    Args:
        beta: steepness at zero, positive.
        inplace: accepted for compatibility with Holocron, without effect.

    Example:
        >>> import torch
        >>> from holofunc import nn
        >>> nn.NLReLU(beta=2.0)(torch.tensor([-1.0, 0.0, 1.0]))  # log 3
        tensor([0.0000, 0.0000, 1.0986])
    """

    def __init__(self, beta: float = 1.0, inplace: bool = False) -> None:
        super().__init__()
        if not beta > 0:
            raise ValueError(f"beta must be positive, got {beta}")
        self.beta = beta

    def forward(self, x: Tensor) -> Tensor:
        return functional.nl_relu(x, self.beta)

    def extra_repr(self) -> str:
        return f"beta={self.beta}"


class FReLU(nn.Module):
    """``max(x, bn(conv(x)))``: a ReLU whose threshold is computed by a depthwise convolution.

    Args:
        in_channels: channels of the images.
        kernel_size: of the convolution; odd, so that the output has the size of the input.

    Source: Ma et al., "Funnel activation for visual recognition" (arXiv 2007.11824).

    Example:
        >>> import torch
        >>> from holofunc import nn
        >>> x = torch.linspace(-1, 1, 36).view(1, 1, 6, 6)
        >>> bool((nn.FReLU(1)(x) >= x).all())
        True
    """

    def __init__(self, in_channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
        self.conv = nn.Conv2d(in_channels, in_channels, kernel_size, padding=kernel_size // 2, groups=in_channels)
        self.bn = nn.BatchNorm2d(in_channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.maximum(x, self.bn(self.conv(x)))
