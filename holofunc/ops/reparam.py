"""Structural reparametrization: merging the branches of training into one convolution.

A convolution is a dict ``{"weight": (out, in / groups, *kernel), "bias": (out,)}``, the bias optional; a BatchNorm a
dict ``{"weight", "bias", "running_mean", "running_var"}`` of shape (C,), the first two optional. These are the
state-dict names of `torch.nn`, so a branch is a slice of a flat parameter dict. Everything is linear in evaluation:
a BatchNorm is a scaling of filters, an identity is a filter, and parallel filters add up.
"""

import functools
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["fuse_conv_bn", "identity_conv", "merge_branches", "pad_kernel"]


def fuse_conv_bn(conv: Mapping[str, Tensor], bn: Mapping[str, Tensor], *, eps: float = 1e-5) -> dict[str, Tensor]:
    """The convolution equal to ``conv`` followed by ``bn`` in evaluation mode.

    weight <- weight s and bias <- (bias - running_mean) s + bn bias, with
    s = bn weight / sqrt(running_var + eps), per output channel.

    Args:
        conv: ``weight`` of shape (out, ...) and, if it has one, ``bias``; a linear layer's serve as well.
        bn: ``running_mean``, ``running_var`` and, if it is affine, ``weight`` and ``bias``, all of shape (out,); other
            entries are not looked at.
        eps: the BatchNorm's.

    Returns:
        ``{"weight", "bias"}``, of the convolution's dtype.

    Raises:
        ValueError: if the numbers of channels differ.

    Example:
        >>> import torch
        >>> from holofunc.ops import reparam
        >>> bn = {"running_mean": torch.tensor([1.0]), "running_var": torch.tensor([4.0])}
        >>> reparam.fuse_conv_bn({"weight": torch.ones(1, 1, 1, 1)}, bn, eps=0.0)
        {'weight': tensor([[[[0.5000]]]]), 'bias': tensor([-0.5000])}
    """
    weight, mean = conv["weight"], bn["running_mean"]
    if mean.shape != weight.shape[:1]:
        raise ValueError(f"bn must have as many channels as conv has outputs, {len(weight)}, got {tuple(mean.shape)}")
    scale = (bn["running_var"] + eps).rsqrt() * bn.get("weight", 1)
    bias = (conv.get("bias", 0) - mean) * scale + bn.get("bias", 0)
    return {
        "weight": (weight * scale.reshape(-1, *[1] * (weight.ndim - 1))).to(weight.dtype),
        "bias": bias.to(weight.dtype),
    }


def identity_conv(
    channels: int,
    *,
    groups: int = 1,
    spatial_dims: int = 2,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """The 1x1 convolution that changes nothing; with `fuse_conv_bn`, a branch that is only a BatchNorm.

    Args:
        channels: at least 1.
        groups: those of the convolution it will be merged with; must divide ``channels``.
        spatial_dims: 2 for images.
        dtype: of the weight.
        device: of the weight.

    Returns:
        ``{"weight"}`` of shape (channels, channels / groups, 1, ...).

    Raises:
        ValueError: if groups does not divide channels.

    Example:
        >>> import torch
        >>> from holofunc.ops import reparam
        >>> reparam.identity_conv(2)["weight"].flatten(1)
        tensor([[1., 0.],
                [0., 1.]])
    """
    if channels < 1 or groups < 1 or channels % groups:
        raise ValueError(f"groups must divide channels, got groups={groups}, channels={channels}")
    width = channels // groups
    weight = torch.eye(width, dtype=dtype, device=device).repeat(groups, 1)
    return {"weight": weight.reshape(channels, width, *[1] * spatial_dims)}


def pad_kernel(weight: Tensor, kernel_size: Sequence[int]) -> Tensor:
    """The same filter with a margin of zeros, centred.

    Args:
        weight: shape (out, in, *kernel).
        kernel_size: at least as large, and larger by an even number, in every dimension.

    Returns:
        Shape (out, in, *kernel_size).

    Raises:
        ValueError: if the margin cannot be the same on both sides.

    Example:
        >>> import torch
        >>> from holofunc.ops import reparam
        >>> reparam.pad_kernel(torch.ones(1, 1, 1, 1), (1, 3))
        tensor([[[[0., 1., 0.]]]])
    """
    margins = [large - small for large, small in zip(kernel_size, weight.shape[2:], strict=True)]
    if any(margin < 0 or margin % 2 for margin in margins):
        raise ValueError(
            "kernel_size must exceed the kernel's by an even number, got "
            f"{tuple(kernel_size)} for {tuple(weight.shape[2:])}"
        )
    return F.pad(weight, [margin // 2 for margin in reversed(margins) for _ in range(2)])


def merge_branches(branches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The convolution equal to the sum of parallel ones, of whatever odd kernel sizes.

    Every branch must have the same stride, dilation 1, groups and channels, and a padding that keeps its output aligned
    with the others' (kernel_size // 2, or that of the largest less the difference).

    Args:
        branches: one or more ``{"weight", "bias"}``, the bias optional.

    Returns:
        ``{"weight", "bias"}`` with the largest kernel; no bias if no branch has one.

    Raises:
        ValueError: if there are no branches, or their channels or kernels do not fit.

    Example:
        >>> import torch
        >>> from holofunc.ops import reparam
        >>> k3 = {"weight": torch.ones(1, 1, 3, 3), "bias": torch.tensor([2.0])}
        >>> merged = reparam.merge_branches([k3, reparam.identity_conv(1)])
        >>> merged["weight"][0, 0], merged["bias"]
        (tensor([[1., 1., 1.],
                [1., 2., 1.],
                [1., 1., 1.]]), tensor([2.]))
    """
    weights = [branch["weight"] for branch in branches]
    shapes = {tuple(weight.shape[:2]) for weight in weights}
    if len(shapes) != 1:
        raise ValueError(f"branches must be one or more convolutions of the same channels, got {sorted(shapes)}")
    kernel_size = [max(sizes) for sizes in zip(*(weight.shape[2:] for weight in weights), strict=True)]
    merged = {"weight": functools.reduce(torch.add, [pad_kernel(weight, kernel_size) for weight in weights])}
    biases = [branch["bias"] for branch in branches if "bias" in branch]
    return merged | {"bias": functools.reduce(torch.add, biases)} if biases else merged
