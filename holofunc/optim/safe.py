"""Arithmetic that is safe at its ends: counters that do not overflow, norms that have a gradient at zero."""

from collections.abc import Sequence

import torch
from torch import Tensor

from holofunc import tree
from holofunc.optim.numerics import check_nonnegative, check_positive
from holofunc.typing import Scalar

__all__ = ["safe_increment", "safe_norm", "safe_rms"]


def safe_increment(count: Tensor) -> Tensor:
    """``count + 1``, or ``count`` where it is the largest number of its dtype: a counter that stays instead of turning
    negative.

    Raises:
        TypeError: what is no tensor, or a bool or complex one.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> optim.safe_increment(torch.tensor([4, 127], dtype=torch.int8))
        tensor([  5, 127], dtype=torch.int8)
    """
    if not isinstance(count, Tensor) or count.dtype == torch.bool or count.is_complex():
        kind = count.dtype if isinstance(count, Tensor) else repr(count)
        raise TypeError(f"count must be a tensor of integers or real numbers, got {kind}")
    info = torch.finfo(count.dtype) if count.is_floating_point() else torch.iinfo(count.dtype)
    return torch.where(count < info.max, count + 1, count)


def safe_norm(
    x: Tensor,
    min_norm: Scalar = 0.0,
    *,
    ord: float = 2.0,
    dim: int | Sequence[int] | None = None,
    keepdim: bool = False,
) -> Tensor:
    """``max(norm(x), min_norm)``, with gradient zero (not NaN) where ``norm(x) <= min_norm``.

    Args:
        x: a floating tensor.
        min_norm: at least 0.
        ord: of the norm of vectors, above 0; infinity is the largest element.
        dim: the axes of the vectors; None is all.
        keepdim: keep these axes, of length 1.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> optim.safe_norm(torch.tensor([3.0, 4.0])), torch.func.grad(optim.safe_norm)(torch.zeros(2))
        (tensor(5.), tensor([0., 0.]))
    """
    check_nonnegative(min_norm=min_norm)
    if ord != float("inf"):
        check_positive(ord=ord)
    axes = tuple(range(x.ndim)) if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)
    if x.numel() == 0:
        return torch.linalg.vector_norm(x, 2, axes, keepdim=keepdim).clamp_min(min_norm)
    long = ~(torch.linalg.vector_norm(x.detach(), ord, axes, keepdim=True) <= min_norm)  # a NaN is long
    norm = torch.linalg.vector_norm(torch.where(long, x, 1.0), ord, axes, keepdim=True)
    out = torch.where(long, norm, min_norm)
    return out if keepdim else out.squeeze(axes)


def safe_rms(x: Tensor, min_rms: Scalar = 0.0) -> Tensor:
    """``max(sqrt(mean(x**2)), min_rms)``, a 0-d tensor, with gradient zero (not NaN) where ``min_rms`` is reached.

    Args:
        x: a floating tensor; without elements its root mean square is 0.
        min_rms: at least 0.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> optim.safe_rms(torch.tensor([3.0, -3.0])), optim.safe_rms(torch.zeros(2), 0.1)
        (tensor(3.), tensor(0.1000))
    """
    check_nonnegative(min_rms=min_rms)
    square = tree.wide(x).square().sum() / max(x.numel(), 1)
    large = ~(square <= min_rms * min_rms)
    return torch.where(large, torch.where(large, square, 1.0).sqrt(), min_rms).to(x.dtype)
