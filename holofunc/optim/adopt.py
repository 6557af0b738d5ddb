"""ADOPT, ACProp, MARS: preconditioned with the previous second moment; corrected by the previous gradient."""

from typing import NamedTuple

import torch
from torch import Tensor

from holofunc import tree
from holofunc.optim.adam import scale_by_adam
from holofunc.optim.base import GradientTransformation
from holofunc.optim.deprecation import renamed
from holofunc.optim.labels import Mask
from holofunc.optim.numerics import divisor, far_norm, root, scalar_dtype, shortening, squares_average, zeros
from holofunc.optim.ranges import check_bound, check_decay, check_flags, check_nonnegative
from holofunc.optim.scalars import bias_correction, zero_count
from holofunc.optim.transforms import descend, moving_average
from holofunc.typing import PyTree, Scalar, Schedule

__all__ = [
    "AcpropState", "AdoptState", "VarianceState", "acprop", "adopt", "mars", "reduce_variance", "scale_by_acprop",
    "scale_by_adopt",
]  # fmt: skip


# --- ADOPT -------------------------------------------------------------------------------------------------------


class AdoptState(NamedTuple):
    """Updates so far, moving averages of the divided gradients, and of the squares of the gradients."""

    step: Tensor
    mu: PyTree
    nu: PyTree


@renamed(clip="use_clipping")
def scale_by_adopt(
    b1: Scalar = 0.9, b2: Scalar = 0.9999, eps: Scalar = 1e-6, *, use_clipping: bool = True
) -> GradientTransformation:
    """Adam whose gradient is divided before it is averaged, by a root that has not seen it:

        u = g / max(sqrt(nu), eps),  clipped to [-c, c] with c = step**0.25
        mu = b1 * mu + (1 - b1) * u                                         # the update
        nu = b2 * nu + (1 - b2) * g**2

    where ``step`` is the number of updates before this one. The first gradient only initializes ``nu`` by its square,
    and moves nothing. This converges for any ``b2``.

    Args:
        b1, b2: in [0, 1).
        eps: least root to divide by.
        use_clipping: False leaves out the clipping, as the paper's algorithm 1 does.

    Source: Taniguchi et al., "ADOPT: modified Adam can converge with any b2 with the optimal rate" (arXiv 2411.02853),
    algorithm 2.
    """
    check_flags(use_clipping=use_clipping)
    check_decay(b1=b1, b2=b2)
    check_nonnegative(eps=eps)

    def update(updates: PyTree, state: AdoptState) -> tuple[PyTree, AdoptState]:
        dtype = scalar_dtype(updates)
        later = tree.hoist((state.step > 0).to(dtype))
        bound = tree.hoist(state.step.to(dtype) ** 0.25)

        def rule(g: Tensor, v: Tensor) -> Tensor:
            u = later * tree.upcast(g) / divisor(root(v).clamp_min(eps), 0.0)
            return torch.minimum(torch.maximum(u, -bound), bound) if use_clipping else u

        mu = moving_average(tree.elementwise(rule, updates, state.nu), state.mu, b1)
        nu = squares_average(updates, state.nu, b2 * later, tree.hoist(1 - later + later * (1 - b2)))
        return mu, AdoptState(state.step + 1, mu, nu)

    return GradientTransformation(lambda params: AdoptState(zero_count(params), zeros(params), zeros(params)), update)


@renamed(clip="use_clipping")
def adopt(
    learning_rate: Scalar | Schedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.9999,
    eps: Scalar = 1e-6,
    use_clipping: bool = True,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    """Adam whose gradient is divided before it is averaged: ``p - learning_rate * (u + weight_decay * p)``, with ``u``
    of `scale_by_adopt`, which is zero in the first update.

    Args:
        learning_rate, weight_decay, mask: as `adamw`.
        b1, b2, eps, use_clipping: as `scale_by_adopt`.

    Source: Taniguchi et al. (arXiv 2411.02853).

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.adopt(0.1), {"w": torch.ones(1)}
        >>> first, state = tx.update({"w": torch.ones(1)}, tx.init(params), params)
        >>> first, tx.update({"w": torch.ones(1)}, state, params)[0]
        ({'w': tensor([-0.])}, {'w': tensor([-0.0100])})
    """
    return descend(
        learning_rate, weight_decay, mask, decoupled=True, adopt=scale_by_adopt(b1, b2, eps, use_clipping=use_clipping)
    )


# --- ACProp ------------------------------------------------------------------------------------------------------


class AcpropState(NamedTuple):
    """Updates so far, moving averages of the gradients, and of the squares of their distance from it."""

    step: Tensor
    mu: PyTree
    nu: PyTree


def scale_by_acprop(b1: Scalar = 0.9, b2: Scalar = 0.999, eps: Scalar = 1e-8) -> GradientTransformation:
    """The gradient over the root of a variance that has not seen it: ``g / (sqrt(nu_hat) + eps)``, and then

        mu = b1 * mu + (1 - b1) * g
        nu = b2 * nu + (1 - b2) * (g - mu)**2,  nu_hat = nu / (1 - b2**step)

    The first gradient, which has no variance before it, moves nothing. There is no momentum: ``mu`` only centers.

    Args:
        b1, b2: in [0, 1).
        eps: added outside of the root; gradients that hardly change need more than the authors' 1e-16.

    Source: Zhuang et al., "Momentum centering and asynchronous update for adaptive gradient methods" (arXiv
    2110.05454), whose code takes the first gradient itself as the first update, and adds ``eps`` to ``nu`` each time.
    """
    check_decay(b1=b1, b2=b2)
    check_nonnegative(eps=eps)

    def update(updates: PyTree, state: AcpropState) -> tuple[PyTree, AcpropState]:
        dtype = scalar_dtype(updates)
        later = tree.hoist((state.step > 0).to(dtype))
        c2 = tree.hoist(bias_correction(b2, state.step.clamp_min(1), dtype).rsqrt())

        out = tree.elementwise(lambda g, v: later * tree.upcast(g) / divisor(root(v, c2), eps), updates, state.nu)
        mu = moving_average(updates, state.mu, b1)
        surprise = tree.elementwise(lambda g, m: tree.upcast(g) - m, updates, mu)
        return out, AcpropState(state.step + 1, mu, squares_average(surprise, state.nu, b2))

    return GradientTransformation(lambda params: AcpropState(zero_count(params), zeros(params), zeros(params)), update)


def acprop(
    learning_rate: Scalar | Schedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    """The gradient over the root of the variance before it: ``p - learning_rate * (u + weight_decay * p)``, with ``u``
    of `scale_by_acprop`, which is zero in the first update.

    Args:
        learning_rate, weight_decay, mask: as `adamw`.
        b1, b2, eps: as `scale_by_acprop`.

    Source: Zhuang et al. (arXiv 2110.05454).

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.acprop(0.1, b1=0.5), {"w": torch.ones(1)}
        >>> first, state = tx.update({"w": torch.ones(1)}, tx.init(params), params)
        >>> first, tx.update({"w": torch.ones(1)}, state, params)[0]
        ({'w': tensor([-0.])}, {'w': tensor([-0.2000])})
    """
    return descend(learning_rate, weight_decay, mask, decoupled=True, acprop=scale_by_acprop(b1, b2, eps))


# --- MARS --------------------------------------------------------------------------------------------------------


class VarianceState(NamedTuple):
    """Updates so far, and the latest gradient."""

    step: Tensor
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

    def update(updates: PyTree, state: VarianceState) -> tuple[PyTree, VarianceState]:
        gain = tree.hoist(gamma * b1 / (1 - b1) * (state.step > 0).to(scalar_dtype(updates)))
        grads = tree.elementwise(tree.upcast, updates)
        corrected = tree.elementwise(lambda g, before: g + gain * (g - before), grads, state.previous)
        factors = tree.elementwise(lambda norm: shortening(norm, max_norm), far_norm(tree.leaf_norm, corrected))
        out = tree.elementwise(torch.mul, corrected, factors)
        return out, VarianceState(state.step + 1, grads)

    return GradientTransformation(lambda params: VarianceState(zero_count(params), zeros(params)), update)


def mars(
    learning_rate: Scalar | Schedule,
    *,
    b1: Scalar = 0.95,
    b2: Scalar = 0.99,
    gamma: Scalar = 0.025,
    eps: Scalar = 1e-8,
    max_norm: Scalar = 1.0,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    """MARS-AdamW: ``p - learning_rate * (u + weight_decay * p)``, with ``u`` of `scale_by_adam` of gradients that
    `reduce_variance` corrects.

    ``named_chain(variance=reduce_variance(), lion=scale_by_lion(0.95), ...)`` is MARS-Lion, and so on.

    Args:
        learning_rate, weight_decay, mask: as `adamw`.
        b1, b2, eps: as `scale_by_adam`.
        gamma, max_norm: as `reduce_variance`.

    Source: Yuan et al. (arXiv 2411.10438), algorithm 2, approximate.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.mars(0.1), {"w": torch.ones(1)}
        >>> tx.update({"w": torch.ones(1)}, tx.init(params), params)[0]
        {'w': tensor([-0.1000])}
    """
    rules = {"variance": reduce_variance(b1, gamma, max_norm=max_norm), "adam": scale_by_adam(b1, b2, eps)}
    return descend(learning_rate, weight_decay, mask, decoupled=True, **rules)
