"""Constraints: fixed norms, a brake on their growth, floors of updates, projections."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from holofunc import tree
from holofunc.compile import opaque
from holofunc.optim.base import GradientTransformation, MaybeParams, stateless
from holofunc.optim.checks import check_function, need_params
from holofunc.optim.numerics import far_norm, ratio_or_one, shortening
from holofunc.optim.ranges import check_nonnegative, check_positive
from holofunc.typing import Params, PyTree, Scalar

__all__ = [
    "HyperballState", "brake_radial", "floor_rows", "keep_norms", "project", "projection_box", "projection_l1_ball",
    "projection_l2_ball", "projection_nonnegative", "projection_simplex",
]  # fmt: skip


class HyperballState(NamedTuple):
    """The norm that each parameter keeps."""

    norm: PyTree


def keep_norms() -> GradientTransformation:
    """End each update on the sphere where its parameter began: ``p + u`` gets the norm of the initial ``p``.

    Stands at the end of a chain, ``masked`` to matrices. With updates of a fixed length before the learning rate it is
    the hyperball: ``chain(rule, scale_by_trust_ratio(), scale_by_learning_rate(rate), keep_norms())``, in which rates
    are angles and there is no weight decay. What is zero at first is left alone.

    Source: Wen et al., "Hyperball optimization" (2025); the sphere as in Heo et al., AdamP (arXiv 2006.08217).

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.keep_norms(), {"w": torch.tensor([3.0, 4.0])}
        >>> updates, _ = tx.update({"w": torch.tensor([-3.0, 0.0])}, tx.init(params), params)
        >>> optim.apply_updates(params, updates)
        {'w': tensor([0., 5.])}
    """

    def init(params: Params) -> HyperballState:
        return HyperballState(tree.map(lambda p: tree.safe_sqrt(tree.upcast(p).square().sum()), params))

    def update(updates: PyTree, state: HyperballState, params: MaybeParams = None) -> tuple[PyTree, HyperballState]:
        need_params(params, "keep_norms")
        moved = tree.elementwise(lambda p, u: tree.upcast(p) + tree.upcast(u), params, updates)
        norm = far_norm(tree.leaf_norm, moved)
        factor = tree.elementwise(lambda n, m: ratio_or_one(n, m, (n > 0) & (m > 0)), state.norm, norm)
        return tree.elementwise(lambda m, f, p: m * f - tree.upcast(p), moved, factor, params), state

    return GradientTransformation(init, update)


def brake_radial(factor: Scalar = 0.5) -> GradientTransformation:
    """Let weights grow by the share ``factor`` only: where ``u`` points outward, ``p + u`` gets the norm

        norm(p) + factor * <u, p> / norm(p)

    which damps the radial part, and takes back the drift of straight steps along a sphere. Stands at the end of a
    chain. Inward updates, and those of weights of zero, pass. With 0 weights never grow.

    Args:
        factor: in [0, 1].

    Source: the radial brake of the step-count records of modded-nanogpt (spring 2026), by its author's description.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> params = {"w": torch.tensor([2.0, 0.0])}
        >>> optim.brake_radial(0.5).update({"w": torch.tensor([1.0, 0.0])}, (), params)[0]
        {'w': tensor([0.5000, 0.0000])}
    """
    check_nonnegative(factor=factor)
    if not isinstance(factor, Tensor) and factor > 1:
        raise ValueError(f"factor must be in [0, 1], got {factor}")

    def fn(updates: PyTree, params: MaybeParams) -> PyTree:
        need_params(params, "brake_radial")
        wide = tree.elementwise(tree.upcast, updates)
        moved = tree.elementwise(lambda p, u: tree.upcast(p) + u, params, wide)
        inner = tree.leaf_sum(tree.elementwise(lambda p, u: tree.upcast(p) * u, params, wide))

        def ratio(along: Tensor, before: Tensor, after: Tensor) -> Tensor:
            outward = (along > 0) & (before > 0) & (after > 0)
            target = before + factor * along / torch.where(before > 0, before, 1.0)
            return ratio_or_one(target, after, outward)

        ratios = tree.elementwise(ratio, inner, tree.leaf_norm(params), far_norm(tree.leaf_norm, moved))
        return tree.elementwise(
            lambda m, r, p, u: torch.where(r == 1, u, m * r - tree.upcast(p)), moved, ratios, params, wide
        )

    return stateless(fn)


def floor_rows(ratio: Scalar) -> GradientTransformation:
    """Lengthen the update of each row to ``ratio`` times the norm of its weights, where it is shorter.

    A row is an index of the first axis (an output channel); vectors, numbers and rows without an update pass. Stands
    behind a rule: with a learning rate after it, no row falls asleep.

    Args:
        ratio: at least 0.

    Source: the row floor of the step-count records of modded-nanogpt (spring 2026).

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> params, grads = {"w": torch.ones(2, 4)}, {"w": torch.tensor([[0.1] * 4, [3.0] * 4])}
        >>> optim.floor_rows(0.5).update(grads, (), params)[0]["w"][:, 0]
        tensor([0.5000, 3.0000])
    """
    check_nonnegative(ratio=ratio)

    def fn(updates: PyTree, params: MaybeParams) -> PyTree:
        need_params(params, "floor_rows")
        return opaque(_floored, updates, params, ratio)

    return stateless(fn)


def _floored(updates: PyTree, params: PyTree, ratio: Scalar) -> PyTree:
    def norm(x: Tensor) -> Tensor:
        return tree.safe_sqrt(x.square().sum(tuple(range(1, x.ndim)), keepdim=True))

    def rule(u: Tensor, p: Tensor) -> Tensor:
        u, p = tree.upcast(u), tree.upcast(p)
        if u.ndim < 2:
            return u
        own, least = far_norm(norm, u), ratio * far_norm(norm, p)
        return u * ratio_or_one(least, own, (own > 0) & (own < least))

    return tree.map(rule, updates, params)


def project(projection: Callable[[Params], Params]) -> GradientTransformation:
    """End each update at ``projection(params + updates)``: the nearest point of a set. Stands at the end of a chain.

    Args:
        projection: of a tree of tensors to one of the same structure, such as `projection_l2_ball`.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.chain(optim.sgd(1.0), optim.project(optim.projection_nonnegative)), {"w": torch.ones(1)}
        >>> tx.update({"w": torch.full((1,), 3.0)}, tx.init(params), params)[0]
        {'w': tensor([-1.])}
    """
    check_function(projection=projection)

    def fn(updates: PyTree, params: MaybeParams) -> PyTree:
        need_params(params, "project")
        target = projection(tree.elementwise(lambda p, u: tree.upcast(p) + tree.upcast(u), params, updates))
        return tree.elementwise(lambda x, p: x - tree.upcast(p), target, params)

    return stateless(fn)


def projection_nonnegative(params: Params) -> Params:
    """The nearest tree without negative elements."""
    return tree.elementwise(lambda p: p.clamp_min(0), params)


def projection_box(params: Params, lower: Scalar, upper: Scalar) -> Params:
    """The nearest tree with elements in [lower, upper]."""
    if not isinstance(lower, Tensor) and not isinstance(upper, Tensor) and lower > upper:
        raise ValueError(f"lower must be at most upper, got {lower} and {upper}")
    return tree.elementwise(lambda p: p.clamp_min(lower).clamp_max(upper), params)


def projection_l2_ball(params: Params, radius: Scalar = 1.0) -> Params:
    """The nearest tree of a global norm of at most ``radius``.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> optim.projection_l2_ball({"w": torch.tensor([3.0, 4.0])})
        {'w': tensor([0.6000, 0.8000])}
    """
    check_nonnegative(radius=radius)
    factor = shortening(far_norm(tree.global_norm, params), radius)
    return tree.elementwise(lambda p: p * factor, params)


def projection_simplex(params: Params, total: Scalar = 1.0) -> Params:
    """The nearest tree, each leaf of it on its own, of nonnegative elements that sum to ``total``.

    Source: Duchi et al., "Efficient projections onto the l1-ball" (ICML 2008), by sorting.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> optim.projection_simplex({"w": torch.tensor([1.0, 0.5, -1.0])})
        {'w': tensor([0.7500, 0.2500, 0.0000])}
    """
    check_positive(total=total)
    return opaque(_on_simplex, params, total)


def projection_l1_ball(params: Params, radius: Scalar = 1.0) -> Params:
    """The nearest tree, each leaf of it on its own, whose sizes of elements sum to at most ``radius``."""
    check_positive(radius=radius)
    return opaque(_in_l1_ball, params, radius)


def _on_simplex(params: Params, total: Scalar) -> Params:
    return tree.map(lambda p: (p - _threshold(p.flatten(), total)).clamp_min(0) if p.numel() else p, params)


def _in_l1_ball(params: Params, radius: Scalar) -> Params:
    def rule(p: Tensor) -> Tensor:
        if not p.numel():
            return p
        outside = p.abs().sum() > radius
        shrunk = p.sign() * (p.abs() - _threshold(p.abs().flatten(), radius)).clamp_min(0)
        return torch.where(outside, shrunk, p)

    return tree.map(rule, params)


def _threshold(x: Tensor, total: Scalar) -> Tensor:
    """The number that, taken from each element and cut at 0, leaves ``total``."""
    falling = tree.upcast(x).sort(descending=True).values
    means = (falling.cumsum(0) - total) / torch.arange(1, len(x) + 1, dtype=falling.dtype, device=x.device)
    last = (falling > means).sum() - 1
    return means.gather(0, last[None])[0]
