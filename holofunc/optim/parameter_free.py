"""Step sizes that are learnt along the way: D-Adaptation's Adam, and mechanic around any optimizer."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from holofunc import tree
from holofunc.optim.adam import root, squares_average
from holofunc.optim.base import (
    GradientTransformation,
    MaybeParams,
    check_params,
    check_transformation,
    composed,
    named_chain,
    need_params,
)
from holofunc.optim.capabilities import Descends, KeepsStart
from holofunc.optim.labels import Mask, check_labels, mask_values
from holofunc.optim.numerics import (
    check_bound,
    check_decay,
    check_nonnegative,
    check_positive,
    copies,
    scalar_dtype,
    value_at,
    zero_count,
    zeros,
)
from holofunc.optim.transforms import moving_average
from holofunc.typing import Params, PyTree, Scalar, Schedule

__all__ = ["DAdaptState", "MechanicState", "dadapt_adamw", "mechanic", "scale_by_dadapt_adam"]


class DAdaptState(NamedTuple):
    """Updates so far, the estimate of the distance, its numerator, averages of steps, squares and scaled gradients."""

    count: Tensor  # type: ignore[assignment]
    distance: Tensor
    numerator: Tensor
    mu: PyTree
    nu: PyTree
    total: PyTree


def scale_by_dadapt_adam(
    learning_rate: Scalar | Schedule = 1.0,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    d0: float = 1e-6,
    growth_rate: float = float("inf"),
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    """Adam whose step size is a lower bound ``d`` of the distance to the solution; returns the descent itself. With
    ``b3 = sqrt(b2)`` and ``s`` the average that bounds ``d``:

        numerator = b3 * numerator + (1 - b3) * d * rate * <g, s / (sqrt(nu) + eps)>
        mu = b1 * mu + (1 - b1) * d * rate * g
        nu = b2 * nu + (1 - b2) * g**2
        s = b3 * s + (1 - b3) * d * rate * g
        p = p - mu / (sqrt(nu) + eps) - d * rate * weight_decay * p
        d = max(d, min(numerator / ((1 - b3) * norm1(s)), growth_rate * d))

    Args:
        learning_rate: ``rate``: leave it at 1, or a schedule that ends at 0.
        b1, b2: in [0, 1).
        eps: added outside of the root.
        d0: the first ``d``. Used in ``init`` alone.
        growth_rate: greatest factor by which ``d`` grows in one update.
        weight_decay: decoupled.
        mask: True where weights decay; None is everywhere.

    Source: Defazio and Mishchenko, "Learning-rate-free learning by D-adaptation" (arXiv 2301.07733), algorithm 5.
    """
    check_decay(b1=b1, b2=b2)
    check_nonnegative(True, learning_rate=learning_rate, weight_decay=weight_decay)
    check_nonnegative(eps=eps)
    check_positive(d0=d0)
    check_bound(growth_rate=growth_rate)
    if not growth_rate > 1:
        raise ValueError(f"growth_rate must be above 1, got {growth_rate}")
    b3 = b2**0.5

    def init(params: Params) -> DAdaptState:
        check_params(params, "scale_by_dadapt_adam")
        if mask is not None:
            check_labels("mask", mask, params, bool)
        count = zero_count(params)
        zero = torch.zeros_like(count, dtype=scalar_dtype(params))
        return DAdaptState(count, zero + d0, zero, *[zeros(params) for _ in range(3)])

    def update(
        updates: PyTree, state: DAdaptState, params: MaybeParams = None, **extra: Any
    ) -> tuple[PyTree, DAdaptState]:
        need_params(params, "scale_by_dadapt_adam")
        d = state.distance
        rate = tree.hoist(d * value_at("learning_rate", learning_rate, state.count, updates))
        decay = value_at("weight_decay", weight_decay, state.count, updates)
        gained = tree.total(
            tree.elementwise(lambda g, s, v: tree.wide(g) * _safe(s, root(v) + eps), updates, state.total, state.nu)
        )
        numerator = b3 * state.numerator + (1 - b3) * rate * gained
        scaled = tree.elementwise(lambda g: rate * tree.wide(g), updates)
        mu, nu = moving_average(scaled, state.mu, b1), squares_average(updates, state.nu, b2)
        total = moving_average(scaled, state.total, b3)
        norm1 = (1 - b3) * tree.total(tree.elementwise(torch.abs, total))
        estimate = torch.where(norm1 > 0, numerator / torch.where(norm1 > 0, norm1, 1.0), 0.0)
        new = torch.maximum(d, torch.minimum(estimate, d * growth_rate))
        out = tree.elementwise(
            lambda m, v, p, w: -_safe(m, root(v) + eps) - rate * decay * w * tree.wide(p),
            mu,
            nu,
            params,
            mask_values(mask, params),
        )
        return out, DAdaptState(state.count + 1, new.to(d.dtype), numerator.to(d.dtype), mu, nu, total)

    return composed(init, update, adds=(Descends,))


def _safe(x: Tensor, below: Tensor) -> Tensor:
    return x / torch.where(below > 0, below, 1.0)


def dadapt_adamw(learning_rate: Scalar | Schedule = 1.0, **options: Any) -> GradientTransformation:
    """AdamW whose step size ``d`` is learnt, by `scale_by_dadapt_adam`:

        p = p - mu / (sqrt(nu) + eps) - d * learning_rate * weight_decay * p         # d and learning_rate are in mu

    Args:
        learning_rate: a factor: 1, or a schedule that ends at 0.
        options: of `scale_by_dadapt_adam`: b1, b2, eps, d0, growth_rate, weight_decay, mask.

    Source: Defazio and Mishchenko (arXiv 2301.07733).

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.dadapt_adamw(weight_decay=0.01), {"w": torch.ones(1)}
        >>> tx.init(params)["dadapt"].distance
        tensor(1.0000e-06)
    """
    return named_chain(dadapt=scale_by_dadapt_adam(learning_rate, **options))


class MechanicState(NamedTuple):
    """The initial parameters, the sum of the inner updates; for each decay, reward, greatest product, sum of squared
    products, and share of the scale; the inner state.
    """

    start: PyTree
    total: PyTree
    reward: Tensor
    most: Tensor
    squares: Tensor
    shares: Tensor
    inner: PyTree


def mechanic(
    tx: GradientTransformation,
    *,
    decays: tuple[float, ...] = (0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999),
    s_init: float = 1e-6,
    weight_decay: Scalar = 0.01,
    eps: Scalar = 1e-8,
) -> GradientTransformation:
    """Learn the scale ``s`` of all updates of ``tx`` together: parameters are ``start + s * total``, where ``total`` is
    the sum of the inner updates. For each decay, with ``h = -<g + weight_decay * s * norm(g) / norm(p) * p, total>``:

        most = max(decay * most, abs(h));  squares = decay**2 * squares + h**2
        reward = max(0, decay * reward + share * h)
        share = (s_init / len(decays) * most + reward) / (sqrt(squares) + eps)

    and ``s`` is the sum of the shares.

    Args:
        tx: an optimizer with its schedule; the size of its learning rate does not matter.
        decays: how fast each share forgets.
        s_init: the first scale.
        weight_decay: of the products, at least 0.
        eps: added outside of the root.

    Source: Cutkosky et al., "Mechanic: a learning rate tuner" (arXiv 2306.00144), algorithm 1.

    Example:
        >>> from holofunc import optim
        >>> tx = optim.mechanic(optim.adamw(optim.schedules.cosine(1e-3, 100)))
    """
    check_transformation("tx", tx)
    if not decays:
        raise ValueError("decays must hold a number at least, got ()")
    check_decay(**{f"decays[{i}]": b for i, b in enumerate(decays)})
    check_positive(s_init=s_init)
    check_nonnegative(weight_decay=weight_decay, eps=eps)

    def init(params: Params) -> MechanicState:
        check_params(params, "mechanic")
        zero = torch.zeros(
            len(decays), dtype=scalar_dtype(params), device=next((p.device for p in tree.leaves(params)), None)
        )
        sums = zero, zero.clone(), zero.clone(), zero.clone()
        return MechanicState(copies(params), zeros(params), *sums, tx.init(params))

    def update(
        updates: PyTree, state: MechanicState, params: MaybeParams = None, **extra: Any
    ) -> tuple[PyTree, MechanicState]:
        need_params(params, "mechanic")
        steps, inner = tx.update(updates, state.inner, params, **extra)
        decay = state.shares.new_tensor(decays)
        s = state.shares.sum()
        norm = tree.global_norm(params)
        pull = tree.hoist(weight_decay * s * tree.global_norm(updates) / torch.where(norm > 0, norm, 1.0))
        h = -tree.total(
            tree.elementwise(lambda g, p, t: (tree.wide(g) + pull * tree.wide(p)) * t, updates, params, state.total)
        )
        most = torch.maximum(decay * state.most, h.abs())
        squares = decay.square() * state.squares + h.square()
        reward = (decay * state.reward + state.shares * h).clamp_min(0)
        shares = (s_init / len(decays) * most + reward) / (tree.safe_sqrt(squares) + torch.where(squares > 0, eps, 1.0))
        total = tree.elementwise(lambda t, u: t + tree.wide(u), state.total, steps)
        scale = tree.hoist(shares.sum())
        out = tree.elementwise(lambda x, t, p: x + scale * t - tree.wide(p), state.start, total, params)
        reward, most, squares, shares = (x.to(state.shares.dtype) for x in (reward, most, squares, shares))
        return out, MechanicState(state.start, total, reward, most, squares, shares, inner)

    return composed(init, update, tx, adds=(KeepsStart,))
