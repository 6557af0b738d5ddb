"""Numerics: moments and their roots, one scalar per tensor, arithmetic that is safe at its ends."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from holofunc import tree
from holofunc.optim.ranges import check_nonnegative, check_positive, known
from holofunc.typing import Params, PyTree, Scalar

__all__ = [
    "ABSENT", "block_rms", "bounded", "copies", "divisor", "far_norm", "in_shapes_of", "is_zero", "ratio_or_one",
    "root", "safe_increment", "safe_norm", "safe_rms", "scalar_dtype", "shortening", "sizes", "squares_average",
    "zeros",
]  # fmt: skip

ABSENT = ()
"""A part that a state does without, by the options of its rule. None would do too, but `torch.vmap` returns none."""


def is_zero(value: Any) -> bool:
    """Whether ``value`` is the Python number 0: a constant that lets a rule leave something out."""
    return isinstance(value, (int, float)) and value == 0


def scalar_dtype(like: PyTree) -> torch.dtype:
    """The dtype for numbers that meet the tensors of ``like``: float64 if one of them is, otherwise float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tree.leaves(like)) else torch.float32


def zeros(params: Params, dtype: torch.dtype | None = None) -> PyTree:
    """Zeros of the shapes of ``params`` in ``dtype``; None is fp32 for half precision, otherwise the leaf's own."""
    return tree.elementwise(lambda p: torch.zeros_like(p, dtype=dtype or tree.upcast(p).dtype), params)


def copies(params: Params) -> PyTree:
    """The parameters in memory of their own, in fp32 for half precision."""
    return tree.elementwise(lambda p: tree.upcast(p).clone(), params)


def in_shapes_of(vector: Tensor, like: PyTree) -> PyTree:
    """A vector of one number for each element of ``like`` as a tree of its shapes, in the order of the sorted paths."""
    flat = dict(tree.leaves_with_path(like))
    names = sorted(flat)  # a draw must not depend on the order of a dict
    pieces = dict(zip(names, vector.split([flat[n].numel() for n in names]), strict=True))
    return tree.rebuild(like, [pieces[path].view(x.shape).to(x.device) for path, x in flat.items()])


def bounded(x: Tensor) -> Tensor:
    """``x``, with the largest number of its dtype for an infinity, so that it can be subtracted from another one."""
    most = torch.finfo(x.dtype).max
    return x.clamp(-most, most)


def squares_average(updates: PyTree, average: PyTree, decay: Scalar, share: Scalar | None = None) -> PyTree:
    """``decay * average + (1 - decay) * updates**2``; what a square has made infinite stays so, as in torch.

    ``share`` is ``1 - decay`` for a ``decay`` in fp32, which would be off by 1e-4 near 1.
    """
    share = 1 - decay if share is None else share

    def rule(u: Tensor, a: Tensor) -> Tensor:
        gained = share * tree.upcast(u) * tree.upcast(u)  # in this order it overflows last
        return a + (gained - share * bounded(a))

    return tree.elementwise(rule, updates, average)


def root(nu: Tensor, gain: Scalar = 1.0, eps_root: Scalar = 0.0) -> Tensor:
    """``sqrt(nu * gain**2 + eps_root)``, with gradient zero at zero."""
    return tree.safe_sqrt(nu) * gain if is_zero(eps_root) else torch.sqrt(nu * (gain * gain) + eps_root)


def divisor(size: Tensor, eps: Scalar) -> Tensor:
    """``size + eps``; without ``eps``, infinite in place of zero, so that what has had no gradient rests."""
    return torch.where(size > 0, size, math.inf) if is_zero(eps) else size + eps


# --- one scalar per tensor ---------------------------------------------------------------------------------------


def sizes(like: PyTree) -> PyTree:
    """The number of elements of each leaf, at least 1, as `tree.elementwise` takes it."""
    return tree.leaf_values(tree.map_shapes(lambda shape: float(max(shape.numel(), 1)), like), like)


def block_rms(values: PyTree) -> PyTree:
    """The root of the mean square of each leaf."""
    squares = tree.leaf_sum(tree.elementwise(lambda x: tree.upcast(x).square(), values))
    return tree.elementwise(lambda s, n: tree.safe_sqrt(s / n), squares, sizes(values))


def ratio_or_one(above: Tensor, below: Tensor, valid: Tensor) -> Tensor:
    """``above / below`` where ``valid``, otherwise 1; the gradient too is that of 1 there."""
    return torch.where(valid, above / torch.where(valid, below, 1.0), 1.0)


def far_norm(norm: Callable[[PyTree], PyTree], values: PyTree) -> PyTree:
    """``norm(values)``, also where their squares overflow: there, of values that are smaller by 2**80.

    Every length that something is divided by is measured so: a norm that has become infinite would make of the longest
    gradient the shortest update.
    """
    near = norm(values)
    sizes = [known(x.amax()) if x.numel() else 0.0 for x in tree.leaves(near)]
    if None not in sizes and math.inf not in sizes:
        return near
    far = norm(tree.elementwise(lambda x: tree.upcast(x) * 2.0**-80, values))
    return tree.elementwise(lambda near, f: torch.where(near.isinf(), f * 2.0**80, near), near, far)


def shortening(size: Tensor, most: Scalar) -> Tensor:
    """The factor, at most 1, that makes of ``size`` the least of it and ``most``; NaN for a NaN."""
    long = ~(size <= most)
    return torch.where(long, most / torch.where(long, size, 1.0), 1.0)


# --- safe at its ends --------------------------------------------------------------------------------------------


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
    square = tree.upcast(x).square().sum() / max(x.numel(), 1)
    large = ~(square <= min_rms * min_rms)
    return torch.where(large, torch.where(large, square, 1.0).sqrt(), min_rms).to(x.dtype)
