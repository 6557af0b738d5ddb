"""Layers as pure functions; the modules of `holofunc.nn` hold their parameters.

Images are floating-point tensors of shape (N, C, H, W). Random functions take a ``key`` of `holofunc.random`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from holofunc import random
from holofunc.compile import opaque
from holofunc.model import drop
from holofunc.nn.patches import add2d, involution2d, norm_conv2d
from holofunc.ops.arithmetic import upcast
from holofunc.typing import Key, Scalar

__all__ = [
    "add2d",
    "binomial_kernel2d",
    "blur_pool2d",
    "concat_downsample2d",
    "drop_path",
    "dropblock2d",
    "dropout",
    "global_avg_pool2d",
    "global_max_pool2d",
    "hard_mish",
    "involution2d",
    "nl_relu",
    "norm_conv2d",
    "spatial_pyramid_pool2d",
    "z_pool",
]


# --- activations -------------------------------------------------------------------------------------------------


def hard_mish(x: Tensor) -> Tensor:
    """``x / 2 * clamp(x + 2, 0, 2)``: Mish without transcendental functions.

    Args:
        x: floating, any shape.

    Source: https://github.com/digantamisra98/H-Mish.

    Example:
        >>> import torch
        >>> from holofunc.nn import functional
        >>> functional.hard_mish(torch.tensor([-3.0, -1.0, 0.0, 2.0]))
        tensor([-0.0000, -0.5000,  0.0000,  2.0000])
    """
    return 0.5 * x * (x + 2.0).clamp(0.0, 2.0)


def nl_relu(x: Tensor, beta: Scalar = 1.0) -> Tensor:
    """``log(1 + beta * relu(x))``: ReLU on a logarithmic scale.

    Args:
        x: floating, any shape.
        beta: steepness at zero, positive.

    Source: Liu et al., "Natural-logarithm-rectified activation function" (arXiv 1908.03682).

    Example:
        >>> import math, torch
        >>> from holofunc.nn import functional
        >>> functional.nl_relu(torch.tensor([-1.0, 0.0, math.e - 1]))
        tensor([0., 0., 1.])
    """
    rectified = upcast(torch.relu(x))  # in bfloat16, 1 + x is 1 up to 0.004
    return torch.log(1.0 + beta * rectified).to(x.dtype)


# --- pooling and downsampling ------------------------------------------------------------------------------------


def z_pool(x: Tensor, dim: int = 1) -> Tensor:
    """The maximum and the mean over a dimension, concatenated along it.

    Returns:
        The shape of ``x`` with size 2 at ``dim``: the maximum, then the mean.

    Source: Misra et al., "Rotate to attend" (arXiv 2010.03045), eq. 1.

    Example:
        >>> import torch
        >>> from holofunc.nn import functional
        >>> functional.z_pool(torch.tensor([[1.0, 2.0, 6.0]]))
        tensor([[6., 3.]])
    """
    return torch.cat([x.max(dim, keepdim=True).values, x.mean(dim, keepdim=True)], dim)


def global_avg_pool2d(x: Tensor, flatten: bool = False) -> Tensor:
    """The mean of each channel: (N, C, 1, 1), or (N, C) if ``flatten``.

    Example:
        >>> import torch
        >>> from holofunc.nn import functional
        >>> functional.global_avg_pool2d(torch.arange(8.0).view(1, 2, 2, 2), flatten=True)
        tensor([[1.5000, 5.5000]])
    """
    return x.mean((2, 3), keepdim=not flatten)


def global_max_pool2d(x: Tensor, flatten: bool = False) -> Tensor:
    """The maximum of each channel: (N, C, 1, 1), or (N, C) if ``flatten``.

    Example:
        >>> import torch
        >>> from holofunc.nn import functional
        >>> functional.global_max_pool2d(torch.arange(8.0).view(1, 2, 2, 2), flatten=True)
        tensor([[3., 7.]])
    """
    pooled = x.flatten(2).max(-1).values
    return pooled if flatten else pooled[..., None, None]


def concat_downsample2d(x: Tensor, scale_factor: int) -> Tensor:
    """Space to depth: each square of pixels becomes the channels of one pixel.

    Args:
        x: (N, C, H, W), H and W divisible by ``scale_factor`` (s).

    Returns:
        (N, s * s * C, H / s, W / s); channel ``(i * s + j) * C + c`` is channel ``c`` of pixel ``(i, j)`` of a square.

    Raises:
        ValueError: H or W is not divisible by ``scale_factor``.

    Source: the passthrough layer of YOLOv2 (arXiv 1612.08242). `torch.nn.functional.pixel_unshuffle` is the same with
    the channels outermost.

    Example:
        >>> import torch
        >>> from holofunc.nn import functional
        >>> functional.concat_downsample2d(torch.arange(4.0).view(1, 1, 2, 2), 2).flatten()
        tensor([0., 1., 2., 3.])
    """
    height, width = x.shape[2:]
    if height % scale_factor or width % scale_factor:
        raise ValueError(f"scale_factor must divide the height and width of x, got {scale_factor} for {height}x{width}")
    squares = x.unflatten(3, (-1, scale_factor)).unflatten(2, (-1, scale_factor))
    return squares.permute(0, 3, 5, 1, 2, 4).flatten(1, 3)


def binomial_kernel2d(kernel_size: int) -> Tensor:
    """A binomial filter with sum 1: a float32 tensor of shape (kernel_size, kernel_size).

    Example:
        >>> from holofunc.nn import functional
        >>> functional.binomial_kernel2d(3)
        tensor([[0.0625, 0.1250, 0.0625],
                [0.1250, 0.2500, 0.1250],
                [0.0625, 0.1250, 0.0625]])
    """
    row = torch.tensor([math.comb(kernel_size - 1, i) for i in range(kernel_size)], dtype=torch.float32)
    return torch.outer(row, row) / 4 ** (kernel_size - 1)


def blur_pool2d(x: Tensor, kernel: Tensor, stride: int = 2) -> Tensor:
    """Apply a low-pass filter to each channel, then take every ``stride``-th pixel.

    Args:
        x: (N, C, H, W).
        kernel: (k, k), e.g. `binomial_kernel2d`.
        stride: at least 1.

    Returns:
        (N, C, ...); the input is reflection-padded by ``(k + stride - 2) // 2`` pixels on each side.

    Source: Zhang, "Making convolutional networks shift-invariant again" (arXiv 1904.11486).

    Example:
        >>> import torch
        >>> from holofunc.nn import functional
        >>> kernel = functional.binomial_kernel2d(3)
        >>> functional.blur_pool2d(torch.eye(4)[None, None], kernel)[0, 0]
        tensor([[0.5000, 0.1250],
                [0.1250, 0.3750]])
    """
    size, channels = kernel.shape[-1], x.shape[1]
    padded = F.pad(x, [(size + stride - 2) // 2] * 4, mode="reflect")
    return F.conv2d(padded, kernel.to(x.dtype).expand(channels, 1, size, size), stride=stride, groups=channels)


def spatial_pyramid_pool2d(x: Tensor, kernel_sizes: Sequence[int]) -> Tensor:
    """``x`` and its max poolings of several kernel sizes, concatenated along the channels.

    Each max pooling is computed from the next smaller one, which is cheaper and gives the same values: a maximum over 9
    pixels is a maximum over 5 maxima over 5 pixels.

    Args:
        x: (N, C, H, W).
        kernel_sizes: odd.

    Returns:
        (N, (1 + len(kernel_sizes)) * C, H, W), in the order given.

    Source: YOLOv4 (arXiv 2004.10934), after He et al. (arXiv 1406.4729).

    Example:
        >>> import torch
        >>> from holofunc.nn import functional
        >>> functional.spatial_pyramid_pool2d(torch.eye(3)[None, None], [3])[0, 1]
        tensor([[1., 1., 1.],
                [1., 1., 1.],
                [1., 1., 1.]])
    """
    pooled, size = {1: x}, 1
    for larger in sorted(set(kernel_sizes)):
        border = (larger - size) // 2
        pooled[larger] = _window_max(F.pad(pooled[size], [border] * 4, value=-math.inf), larger - size + 1)
        size = larger
    return torch.cat([x, *(pooled[size] for size in kernel_sizes)], 1)


# --- dropout -----------------------------------------------------------------------------------------------------


def dropout(x: Tensor, p: Scalar = 0.5, *, key: Key) -> Tensor:
    """Zero each element with probability ``p`` and scale the rest by ``1 / (1 - p)``.

    Args:
        x: floating, any shape.
        p: in [0, 1]; a 0-d tensor if it follows a schedule.
        key: of `holofunc.random`.

    Example:
        >>> import torch
        >>> from holofunc import random
        >>> from holofunc.nn import functional
        >>> functional.dropout(torch.ones(6), 0.5, key=random.key(1))
        tensor([2., 0., 2., 0., 0., 2.])
    """
    return drop(x, p, key=key)


def drop_path(x: Tensor, p: Scalar = 0.1, *, key: Key) -> Tensor:
    """Stochastic depth: `dropout` of whole samples (indices of the first dimension).

    Source: Huang et al., "Deep networks with stochastic depth" (arXiv 1603.09382), with scaling in
    training instead of evaluation.

    Example:
        >>> import torch
        >>> from holofunc import random
        >>> from holofunc.nn import functional
        >>> functional.drop_path(torch.ones(4, 2), 0.5, key=random.key(1))
        tensor([[2., 2.],
                [0., 0.],
                [2., 2.],
                [0., 0.]])
    """
    return drop(x, p, key=key, shared=1)


def dropblock2d(x: Tensor, p: Scalar, block_size: int, *, key: Key, per_channel: bool = False) -> Tensor:
    """Zero square blocks of pixels, and scale the rest by the ratio of all to remaining pixels.

    Each pixel is covered by ``block_size ** 2`` possible blocks, including those that extend beyond the border. A block
    is dropped with probability ``1 - (1 - p) ** (1 / block_size ** 2)``, so every pixel is dropped with probability
    exactly ``p``, for all sizes of maps and blocks.

    Args:
        x: (N, C, H, W).
        p: the expected fraction of zeros, in [0, 1]; a 0-d tensor if it follows a schedule.
        block_size: at least 1; may be even, and larger than the map.
        key: of `holofunc.random`.
        per_channel: draw blocks for each channel; by default the channels of an image share them.

    Source: Ghiasi et al., "DropBlock" (arXiv 1810.12890), algorithm 1. There all blocks are inside the map, and their
    rate is corrected for this on average, approximately; here the rate is exact for every pixel.

    Example:
        >>> import torch
        >>> from holofunc import random
        >>> from holofunc.nn import functional
        >>> functional.dropblock2d(torch.ones(1, 1, 4, 6), 0.3, 2, key=random.key(6))[0, 0]
        tensor([[1.2000, 1.2000, 1.2000, 1.2000, 1.2000, 1.2000],
                [1.2000, 1.2000, 1.2000, 1.2000, 1.2000, 1.2000],
                [1.2000, 1.2000, 1.2000, 1.2000, 0.0000, 0.0000],
                [1.2000, 1.2000, 1.2000, 1.2000, 0.0000, 0.0000]])
    """
    n, channels, height, width = x.shape
    shape = n, channels if per_channel else 1, height + block_size - 1, width + block_size - 1
    drawn = key, p, shape, block_size
    kept, scale = opaque(_kept, *drawn) if x.device.type == "cpu" else _kept(*drawn)
    return torch.where(kept > 0, x * scale.to(x.dtype), 0.0)


def _kept(key: Key, p: Scalar, shape: tuple[int, ...], block_size: int) -> tuple[Tensor, Tensor]:
    """A mask that is 0 in dropped blocks and 1 elsewhere, and the ratio of all pixels to remaining ones."""
    seeds = random.bernoulli(key, shape, 1.0 - (1.0 - p) ** (1.0 / block_size**2)).float()
    kept = 1.0 - _window_max(seeds, block_size)
    return kept, kept.numel() / kept.sum().clamp_min(1.0)


# --- windows -----------------------------------------------------------------------------------------------------


def _window_max(x: Tensor, size: int) -> Tensor:
    """The maximum of each ``size`` by ``size`` window, by doubling: ``2 * log2(size)`` passes instead of ``size**2``.

    Unlike a pooling layer it fuses when compiled. Ties share the gradient.
    """
    for dim in (2, 3):
        width = 1
        while width < size:
            step = min(width, size - width)
            count = x.shape[dim] - step
            x = torch.maximum(x.narrow(dim, 0, count), x.narrow(dim, step, count))
            width += step
    return x
