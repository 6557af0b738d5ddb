"""Clipping: of global norms, of elements, of tensors, of channels (AGC); NaN and infinities replaced."""

import math

import torch
from torch import Tensor

from holofunc import tree
from holofunc.compile import opaque
from holofunc.optim.base import GradientTransformation, MaybeParams, stateless
from holofunc.optim.checks import need_params
from holofunc.optim.deprecation import renamed
from holofunc.optim.numerics import block_rms, far_norm, shortening
from holofunc.optim.ranges import check_bound, check_finite, check_nonnegative
from holofunc.typing import PyTree, Scalar

__all__ = [
    "adaptive_grad_clip", "clip_by_block_rms", "clip_by_global_norm", "clip_by_value", "keep_params_nonnegative",
    "nan_to_num", "zero_nans",
]  # fmt: skip


def clip_by_global_norm(max_norm: Scalar) -> GradientTransformation:
    """Shorten the updates, all together, to a Euclidean norm of at most ``max_norm``.

    ``torch.nn.utils.clip_grad_norm_`` divides by ``norm + 1e-6`` instead of ``norm``.

    Raises:
        ValueError: a negative ``max_norm``.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> optim.clip_by_global_norm(1.0).update({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}, ())[0]
        {'a': tensor([0.6000]), 'b': tensor([0.8000])}
    """
    check_bound(max_norm=max_norm)
    # squares of what is much longer than max_norm do not overflow, and those of what is much shorter do not matter
    most = 1.0 if isinstance(max_norm, Tensor) else max_norm
    unit = 2.0 ** min(max(-45 - math.frexp(most)[1], -100), 60)

    def fn(updates: PyTree, params: MaybeParams) -> PyTree:
        norm = tree.global_norm(tree.elementwise(lambda u: tree.upcast(u) * unit, updates)) / unit
        factor = tree.hoist(shortening(norm, max_norm))
        return tree.elementwise(lambda u: tree.upcast(u) * factor, updates)

    return stateless(fn)


def clip_by_value(max_value: Scalar) -> GradientTransformation:
    """Clip each element of the updates to [-max_value, max_value].

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> optim.clip_by_value(1.0).update({"w": torch.tensor([3.0, -0.5])}, ())[0]
        {'w': tensor([ 1.0000, -0.5000])}
    """
    check_bound(max_value=max_value)
    return stateless(lambda updates, params: tree.elementwise(lambda u: u.clamp(-max_value, max_value), updates))


def clip_by_block_rms(threshold: Scalar) -> GradientTransformation:
    """Scale each tensor's update down to a root mean square of at most ``threshold``.

    Source: Shazeer and Stern, Adafactor (arXiv 1804.04235), section 6.
    """
    check_bound(threshold=threshold)

    def fn(updates: PyTree, params: MaybeParams) -> PyTree:
        factors = tree.elementwise(lambda rms: shortening(rms, threshold), far_norm(block_rms, updates))
        return tree.elementwise(lambda u, factor: tree.upcast(u) * factor, updates, factors)

    return stateless(fn)


@renamed(clipping="threshold")
def adaptive_grad_clip(threshold: Scalar = 0.01, eps: Scalar = 1e-3) -> GradientTransformation:
    """Shorten the update of each output channel to ``threshold`` times the norm of its weights.

    A channel is an index of the first axis; a vector or a scalar is one channel.

    Args:
        threshold: at least 0.
        eps: least norm that weights count with, so that zero weights can move.

    Source: Brock et al., "High-performance large-scale image recognition without normalization" (arXiv 2102.06171).

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> params, grads = {"w": torch.ones(2, 4)}, {"w": torch.tensor([[1.0] * 4, [0.0] * 4])}
        >>> optim.adaptive_grad_clip(0.5).update(grads, (), params)[0]["w"][:, 0]
        tensor([0.5000, 0.0000])
    """
    check_bound(threshold=threshold)
    check_nonnegative(eps=eps)

    def norm(x: Tensor) -> Tensor:
        axes = tuple(range(1, x.ndim)) if x.ndim > 1 else None
        return tree.safe_sqrt(tree.upcast(x).square().sum(axes, keepdim=x.ndim > 1))

    def clip(u: Tensor, p: Tensor, threshold: Scalar, eps: Scalar) -> Tensor:
        u, largest = tree.upcast(u), norm(p).clamp_min(eps) * threshold
        size = far_norm(norm, u)
        return u * torch.where(size > largest, largest / torch.where(size > largest, size, 1.0), 1.0)

    def fn(updates: PyTree, params: MaybeParams) -> PyTree:
        need_params(params, "adaptive_grad_clip")

        def clipped(updates: PyTree, params: PyTree, *bounds: Scalar) -> PyTree:
            return tree.map(lambda u, p: clip(u, p, *bounds), updates, params)

        return opaque(clipped, updates, params, threshold, eps)

    return stateless(fn)


def zero_nans() -> GradientTransformation:
    """Zero in place of each NaN; to skip whole updates, see `apply_if_finite`."""
    return stateless(
        lambda updates, params: tree.elementwise(lambda u: torch.where(u.isnan(), torch.zeros_like(u), u), updates),
        "zero_nans",
    )


def nan_to_num(nan: float = 0.0, posinf: float | None = None, neginf: float | None = None) -> GradientTransformation:
    """Numbers in place of NaN and the infinities; None is the largest and the smallest number of the dtype."""
    given = {"nan": nan, "posinf": posinf, "neginf": neginf}
    check_finite(**{name: value for name, value in given.items() if value is not None})
    return stateless(lambda updates, params: tree.elementwise(lambda u: u.nan_to_num(nan, posinf, neginf), updates))


def keep_params_nonnegative() -> GradientTransformation:
    """Cut updates short where they would make a parameter negative; stands at the end of a chain."""

    def fn(updates: PyTree, params: MaybeParams) -> PyTree:
        need_params(params, "keep_params_nonnegative")
        return tree.elementwise(lambda u, p: torch.maximum(u, -tree.upcast(p).to(u.dtype)), updates, params)

    return stateless(fn)
