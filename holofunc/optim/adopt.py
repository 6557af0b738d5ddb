"""Rules whose divisor or correction comes from the gradients before this one: ADOPT, ACProp, MARS; MADGRAD's sums."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from holofunc import tree
from holofunc.optim.adam import root, squares_average
from holofunc.optim.base import GradientTransformation, MaybeParams, check_params, composed, need_params
from holofunc.optim.capabilities import Descends, KeepsStart
from holofunc.optim.numerics import (
    bias_correction,
    check_bound,
    check_decay,
    check_flags,
    check_nonnegative,
    copies,
    scalar_dtype,
    value_at,
    zero_count,
    zeros,
)
from holofunc.optim.transforms import moving_average
from holofunc.typing import Params, PyTree, Scalar, Schedule

__all__ = [
    "AcpropState",
    "AdoptState",
    "MadgradState",
    "VarianceState",
    "reduce_variance",
    "scale_by_acprop",
    "scale_by_adopt",
    "scale_by_madgrad",
]

# --- divided by a root that has not seen the gradient -----------------------------------------------------------------


class AdoptState(NamedTuple):
    """Updates so far, moving averages of the divided gradients, and of the squares of the gradients."""

    count: Tensor  # type: ignore[assignment]
    mu: PyTree
    nu: PyTree


def scale_by_adopt(
    b1: Scalar = 0.9, b2: Scalar = 0.9999, eps: Scalar = 1e-6, *, clip: bool = True
) -> GradientTransformation:
    """Adam whose gradient is divided before it is averaged, by a root that has not seen it:

        u = g / max(sqrt(nu), eps),  clipped to [-c, c] with c = count**0.25
        mu = b1 * mu + (1 - b1) * u                                         # the update
        nu = b2 * nu + (1 - b2) * g**2

    where ``count`` is the number of updates before this one. The first gradient only initializes ``nu`` by its square,
    and moves nothing. This converges for any ``b2``.

    Args:
        b1, b2: in [0, 1).
        eps: least root to divide by.
        clip: False leaves out the clipping, as the paper's algorithm 1 does.

    Source: Taniguchi et al., "ADOPT: modified Adam can converge with any b2 with the optimal rate" (arXiv 2411.02853),
    algorithm 2.
    """
    check_flags(clip=clip)
    check_decay(b1=b1, b2=b2)
    check_nonnegative(eps=eps)

    def init(params: Params) -> AdoptState:
        check_params(params, "scale_by_adopt")
        return AdoptState(zero_count(params), zeros(params), zeros(params))

    def update(
        updates: PyTree, state: AdoptState, params: MaybeParams = None, **extra: Any
    ) -> tuple[PyTree, AdoptState]:
        dtype = scalar_dtype(updates)
        later = tree.hoist((state.count > 0).to(dtype))
        bound = tree.hoist(state.count.to(dtype) ** 0.25)

        def rule(g: Tensor, v: Tensor) -> Tensor:
            below = root(v).clamp_min(eps)
            u = later * tree.wide(g) / torch.where(below > 0, below, 1.0)  # with eps=0, what has had no gradient yet
            return torch.minimum(torch.maximum(u, -bound), bound) if clip else u

        mu = moving_average(tree.elementwise(rule, updates, state.nu), state.mu, b1)
        nu = squares_average(updates, state.nu, b2 * later, tree.hoist(1 - later + later * (1 - b2)))
        return mu, AdoptState(state.count + 1, mu, nu)

    return GradientTransformation(init, update)


class AcpropState(NamedTuple):
    """Updates so far, moving averages of the gradients, and of the squares of their distance from it."""

    count: Tensor  # type: ignore[assignment]
    mu: PyTree
    nu: PyTree


def scale_by_acprop(b1: Scalar = 0.9, b2: Scalar = 0.999, eps: Scalar = 1e-8) -> GradientTransformation:
    """The gradient over the root of a variance that has not seen it: ``g / (sqrt(nu_hat) + eps)``, and then

        mu = b1 * mu + (1 - b1) * g
        nu = b2 * nu + (1 - b2) * (g - mu)**2,  nu_hat = nu / (1 - b2**count)

    The first gradient, which has no variance before it, moves nothing. There is no momentum: ``mu`` only centers.

    Args:
        b1, b2: in [0, 1).
        eps: added outside of the root; gradients that hardly change need more than the authors' 1e-16.

    Source: Zhuang et al., "Momentum centering and asynchronous update for adaptive gradient methods" (arXiv
    2110.05454), whose code takes the first gradient itself as the first update, and adds ``eps`` to ``nu`` each time.
    """
    check_decay(b1=b1, b2=b2)
    check_nonnegative(eps=eps)

    def init(params: Params) -> AcpropState:
        check_params(params, "scale_by_acprop")
        return AcpropState(zero_count(params), zeros(params), zeros(params))

    def update(
        updates: PyTree, state: AcpropState, params: MaybeParams = None, **extra: Any
    ) -> tuple[PyTree, AcpropState]:
        dtype = scalar_dtype(updates)
        later = tree.hoist((state.count > 0).to(dtype))
        c2 = tree.hoist(bias_correction(b2, state.count.clamp_min(1), dtype).rsqrt())

        def rule(g: Tensor, v: Tensor) -> Tensor:
            below = root(v, c2) + eps
            return later * tree.wide(g) / torch.where(below > 0, below, 1.0)

        out = tree.elementwise(rule, updates, state.nu)
        mu = moving_average(updates, state.mu, b1)
        surprise = tree.elementwise(lambda g, m: tree.wide(g) - m, updates, mu)
        return out, AcpropState(state.count + 1, mu, squares_average(surprise, state.nu, b2))

    return GradientTransformation(init, update)


# --- MARS --------------------------------------------------------------------------------------------------------


class VarianceState(NamedTuple):
    """Updates so far, and the latest gradient."""

    count: Tensor  # type: ignore[assignment]
    previous: PyTree


def reduce_variance(b1: Scalar = 0.95, gamma: Scalar = 0.025, *, max_norm: Scalar = 1.0) -> GradientTransformation:
    """MARS's correction of a gradient by the one before it, in front of a rule with momentum ``b1``:

        c = g + gamma * b1 / (1 - b1) * (g - previous)                      # at first c = g
        c = c * min(1, max_norm / norm(c))                                  # for each tensor

    Args:
        b1: of the rule that follows, in [0, 1).
        gamma: how much is corrected; 0 is nothing.
        max_norm: of each tensor; infinity does not clip.

    Source: Yuan et al., "MARS: unleashing the power of variance reduction for training large models" (arXiv
    2411.10438), in the approximate form, whose previous gradient is of the previous batch.
    """
    check_decay(b1=b1)
    check_nonnegative(gamma=gamma)
    check_bound(max_norm=max_norm)

    def init(params: Params) -> VarianceState:
        check_params(params, "reduce_variance")
        return VarianceState(zero_count(params), zeros(params))

    def update(
        updates: PyTree, state: VarianceState, params: MaybeParams = None, **extra: Any
    ) -> tuple[PyTree, VarianceState]:
        gain = tree.hoist(gamma * b1 / (1 - b1) * (state.count > 0).to(scalar_dtype(updates)))
        grads = tree.elementwise(tree.wide, updates)
        corrected = tree.elementwise(lambda g, before: g + gain * (g - before), grads, state.previous)

        def shorten(c: Tensor, norm: Tensor) -> Tensor:
            long = ~(norm <= max_norm)  # a NaN is too long
            return torch.where(long, c * (max_norm / torch.where(long, norm, 1.0)), c)

        out = tree.elementwise(shorten, corrected, tree.leaf_norm(corrected))
        return out, VarianceState(state.count + 1, grads)

    return GradientTransformation(init, update)


# --- MADGRAD -----------------------------------------------------------------------------------------------------


class MadgradState(NamedTuple):
    """Updates so far, weighted sums of the gradients and of their squares, initial parameters."""

    count: Tensor  # type: ignore[assignment]
    total: PyTree
    squares: PyTree
    start: PyTree


def scale_by_madgrad(
    learning_rate: Scalar | Schedule, momentum: Scalar = 0.9, eps: Scalar = 1e-6
) -> GradientTransformation:
    """Dual averaging under a cube root; returns the descent itself:

        total = total + rate * g,  squares = squares + rate * g**2          # rate = learning_rate * sqrt(count)
        z = start - total / (cbrt(squares) + eps)
        p = momentum * p + (1 - momentum) * z

    Args:
        learning_rate: a number, a 0-d tensor or a schedule. It is inside of the root: four times as much moves 2.5
            times as far.
        momentum: in [0, 1).
        eps: added outside of the root.

    Source: Defazio and Jelassi, "Adaptivity without compromise" (arXiv 2101.11075).
    """
    check_nonnegative(True, learning_rate=learning_rate)
    check_decay(momentum=momentum)
    check_nonnegative(eps=eps)

    def init(params: Params) -> MadgradState:
        check_params(params, "scale_by_madgrad")
        return MadgradState(zero_count(params), zeros(params), zeros(params), copies(params))

    def update(
        updates: PyTree, state: MadgradState, params: MaybeParams = None, **extra: Any
    ) -> tuple[PyTree, MadgradState]:
        need_params(params, "scale_by_madgrad")
        count, dtype = state.count + 1, scalar_dtype(updates)
        rate = value_at("learning_rate", learning_rate, state.count, updates)
        rate = tree.hoist(rate * count.to(dtype).sqrt())
        total = tree.elementwise(lambda g, s: s + rate * tree.wide(g), updates, state.total)
        squares = tree.elementwise(lambda g, v: v + rate * tree.wide(g).square(), updates, state.squares)

        def rule(p: Tensor, start: Tensor, s: Tensor, v: Tensor) -> Tensor:
            moved = v > 0
            step = torch.where(moved, s / (torch.where(moved, v, 1.0) ** (1 / 3) + eps), 0.0)
            return (1 - momentum) * (start - step - tree.wide(p))

        out = tree.elementwise(rule, params, state.start, total, squares)
        return out, MadgradState(count, total, squares, state.start)

    return composed(init, update, adds=(Descends, KeepsStart))
