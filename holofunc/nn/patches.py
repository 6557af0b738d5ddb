"""Functions of image patches that do not materialize all products of patches and filters."""

import functools
import itertools
import math
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from holofunc.compile import torch_internals
from holofunc.ops.arithmetic import upcast

__all__ = ["add2d", "involution2d", "norm_conv2d"]

Extent: TypeAlias = int | tuple[int, ...]
"""One number for height and width, or both."""


def pair(extent: Extent) -> tuple[int, ...]:
    """Height and width."""
    return (extent, extent) if isinstance(extent, int) else extent


def norm_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Extent = 1,
    padding: Extent = 0,
    dilation: Extent = 1,
    groups: int = 1,
    eps: float = 1e-14,
) -> Tensor:
    """A convolution of patches that are standardized over their channels and pixels.

    ``sum(weight * (patch - mean) / std) + bias`` is ``conv2d(x, weight - weight.mean()) / std + bias``, so
    patches are never materialized.

    Args:
        x: (N, C, H, W).
        weight: (out_channels, C / groups, k, k).
        bias: (out_channels,).
        stride, padding, dilation, groups: as in `torch.nn.functional.conv2d`; each group of channels is
            standardized separately. Zero padding is part of a patch.
        eps: added to the variance. The standard deviation is at least ``sqrt(finfo.eps)`` times the
            distance of the patch mean from the image mean, so that rounding errors are not amplified.

    Source: Kim et al., "Normalized convolutional neural network" (arXiv 2005.05274).

    Example:
        >>> import torch
        >>> from holofunc.nn import functional
        >>> x = torch.tensor([[[[1.0, 3.0]]]])
        >>> functional.norm_conv2d(x, torch.tensor([[[[0.0, 1.0]]]]))
        tensor([[[[1.]]]])
    """
    shifted = _shifted(x, padding, groups)
    _, scale = _patch_moments(shifted, weight.shape[2:], stride, dilation, groups, eps)
    centered = weight - weight.mean((1, 2, 3), keepdim=True)
    y = F.conv2d(shifted, centered, None, stride, 0, dilation, groups)
    scaled = y.unflatten(1, (groups, -1)) * scale.view(*scale.shape[:2], 1, *y.shape[2:])
    y = scaled.flatten(1, 2).to(x.dtype)
    return y if bias is None else y + bias.view(-1, 1, 1)


def add2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Extent = 1,
    padding: Extent = 0,
    dilation: Extent = 1,
    groups: int = 1,
    normalize_slices: bool = False,
    eps: float = 1e-14,
) -> Tensor:
    """``-sum(abs(patch - weight)) + bias``: a convolution with distances instead of products.

    One kernel (`torch.cdist`) computes the distances of all patches to all filters and keeps the differences in
    registers, forward and backward. Memory is ``C * k * k`` numbers per pixel: 0.25 GB for 32 x 64 x 56 x 56 -> 64 with
    3 x 3 filters, where all differences would take 15 GB, several times over.

    Args:
        x: (N, C, H, W).
        weight: (out_channels, C / groups, k, k).
        bias: (out_channels,).
        stride, padding, dilation, groups: as in `torch.nn.functional.conv2d`.
        normalize_slices: standardize the patches first, as `norm_conv2d` does.
        eps: likewise.

    Source: Chen et al., "AdderNet" (arXiv 1912.13200), eq. 2. The gradient is that of the formula; the paper trains
    with surrogates instead (eq. 5 and 6).

    Example:
        >>> import torch
        >>> from holofunc.nn import functional
        >>> x = torch.tensor([[[[1.0, 3.0]]]])
        >>> functional.add2d(x, torch.tensor([[[[0.0, 1.0]]]]))
        tensor([[[[-3.]]]])
    """
    size = weight.shape[2:]
    if normalize_slices:
        x, padding = _shifted(x, padding, groups), 0
    patches = F.unfold(x, size, dilation, padding, stride).unflatten(1, (groups, -1))
    if normalize_slices:
        mean, scale = _patch_moments(x, size, stride, dilation, groups, eps)
        patches = (patches - mean[:, :, None]) * scale[:, :, None]
    filters = weight.flatten(1).unflatten(0, (groups, -1))
    distances = _pairwise_l1(patches.mT, filters).mT.flatten(1, 2)
    y = -distances.unflatten(-1, _output_size(x, size, stride, padding, dilation)).to(x.dtype)
    return y if bias is None else y + bias.view(-1, 1, 1)


def involution2d(
    x: Tensor, kernels: Tensor, *, stride: int = 1, padding: int = 0, dilation: int = 1, groups: int = 1
) -> Tensor:
    """A convolution with a different kernel at each position, shared by the channels of a group.

    Args:
        x: (N, C, H, W).
        kernels: (N, groups * k * k, H', W'), where H' and W' are the output sizes of a convolution with these options.
        stride, padding, dilation: as in `torch.nn.functional.conv2d`.
        groups: divides C.

    Returns:
        (N, C, H', W').

    Source: Li et al., "Involution: inverting the inherence of convolution" (arXiv 2103.06255), eq. 4.

    Example:
        >>> import torch
        >>> from holofunc.nn import functional
        >>> x = torch.tensor([[[[1.0, 3.0]], [[5.0, 7.0]]]])
        >>> functional.involution2d(x, torch.tensor([[[[2.0, -1.0]]]])).flatten()
        tensor([ 2., -3., 10., -7.])
    """
    size = math.isqrt(kernels.shape[1] // groups)
    height, width = _output_size(x, (size, size), stride, padding, dilation)
    if kernels.shape[1:] != (groups * size * size, height, width):
        raise ValueError(
            f"kernels must have shape (N, groups * k * k, {height}, {width}) for x of shape {tuple(x.shape)} and "
            f"groups={groups}, got {tuple(kernels.shape)}"
        )
    padded = F.pad(x, [padding] * 4).unflatten(1, (groups, -1))
    weights = kernels.unflatten(1, (groups, size, size, 1))
    rows = [slice(i * dilation, i * dilation + (height - 1) * stride + 1, stride) for i in range(size)]
    columns = [slice(j * dilation, j * dilation + (width - 1) * stride + 1, stride) for j in range(size)]
    places = itertools.product(enumerate(rows), enumerate(columns))
    terms = (weights[:, :, i, j] * padded[..., row, column] for (i, row), (j, column) in places)
    return functools.reduce(torch.add, terms).flatten(1, 2)


def _shifted(x: Tensor, padding: Extent, groups: int) -> Tensor:
    """Padded images minus the mean of each group: this does not change standardized patches, but reduces rounding."""
    height, width = pair(padding)
    padded = F.pad(x, (width, width, height, height)).unflatten(1, (groups, -1))
    return (padded - padded.mean((2, 3, 4), keepdim=True).detach()).flatten(1, 2)


def _patch_moments(
    x: Tensor,
    size: tuple[int, ...],
    stride: Extent,
    dilation: Extent,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Mean and inverse standard deviation of each patch: (N, groups, L), at least float32.

    The variance of a patch is the mean of its pixels' variances over channels plus the variance of their means. This
    needs patches of two maps instead of all channels, and is as accurate as the two-pass formula.
    """
    channels = upcast(x).unflatten(1, (groups, -1))
    maps = torch.cat([channels.mean(2), channels.var(2, correction=0)], 1)
    means, variances = F.unfold(maps, size, dilation, 0, stride).unflatten(1, (2, groups, -1)).unbind(1)
    mean = means.mean(2)
    variance = variances.mean(2) + means.var(2, correction=0)
    resolution = torch.finfo(x.dtype).eps * mean.square()
    return mean, torch.rsqrt(torch.maximum(variance, resolution) + eps)


def _pairwise_l1(x: Tensor, y: Tensor) -> Tensor:
    """L1 distances of rows, (..., M, J) and (..., K, J) to (..., M, K), at least float32."""
    x = upcast(x)
    y = y.to(x.dtype)
    if torch_internals.forward_differentiating():  # cdist has no forward-mode derivative
        return torch.stack([(x - row[..., None, :]).abs().sum(-1) for row in y.unbind(-2)], -1)
    return torch.cdist(x, y, p=1.0)


def _output_size(
    x: Tensor,
    size: tuple[int, ...],
    stride: Extent,
    padding: Extent,
    dilation: Extent,
) -> tuple[int, int]:
    """Height and width of a convolution's output."""
    options = zip(x.shape[2:], size, pair(stride), pair(padding), pair(dilation), strict=True)
    height, width = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in options)
    return height, width
