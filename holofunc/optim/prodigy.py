"""Prodigy and D-Adaptation: Adam whose step size is an estimate of the distance to the solution."""

from typing import NamedTuple

import torch
from torch import Tensor

from holofunc import tree
from holofunc.optim.base import GradientTransformation, MaybeParams, composed, named_chain
from holofunc.optim.capabilities import Descends, KeepsStart
from holofunc.optim.checks import need_params
from holofunc.optim.labels import Mask, check_mask, mask_values
from holofunc.optim.numerics import ABSENT, copies, divisor, is_zero, root, scalar_dtype, squares_average, zeros
from holofunc.optim.ranges import check_bound, check_decay, check_flags, check_nonnegative, check_positive
from holofunc.optim.scalars import bias_correction, value_at, zero_count, zero_scalar
from holofunc.optim.transforms import moving_average
from holofunc.typing import Params, PyTree, Scalar, Schedule

__all__ = ["DAdaptState", "ProdigyState", "dadapt_adamw", "prodigy", "scale_by_dadapt_adam", "scale_by_prodigy"]


# --- Prodigy -----------------------------------------------------------------------------------------------------


class ProdigyState(NamedTuple):
    """Updates so far; the estimate of the distance to the solution and its numerator; averages, initial parameters; the
    largest estimate, where ``growth_rate`` holds the one in use back.
    """

    step: Tensor
    distance: Tensor
    numerator: Tensor
    mu: PyTree
    nu: PyTree
    total: PyTree
    start: PyTree
    largest: PyTree = ABSENT


def scale_by_prodigy(
    learning_rate: Scalar | Schedule = 1.0,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    b3: Scalar | None = None,
    eps: Scalar = 1e-8,
    d0: float = 1e-6,
    d_coef: Scalar = 1.0,
    growth_rate: float | None = None,
    bias_corrected: bool = False,
    safeguard_warmup: bool = False,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    """Adam whose step size is an estimate ``d`` of the distance to the solution; returns the descent itself:

        mu = b1 * mu + (1 - b1) * d * g
        nu = b2 * nu + (1 - b2) * (d * g)**2
        numerator = b3 * numerator + (1 - b3) * rate * d**2 * <g, start - p>
        total = b3 * total + (1 - b3) * rate * d**2 * g
        p = p - rate * d * (mu / (sqrt(nu) + d * eps) + weight_decay * p)
        d = max(d, d_coef * numerator / norm1(total))

    Args:
        learning_rate: ``rate``: leave it at 1, or a schedule that ends at 0.
        b1, b2: in [0, 1).
        b3: None is ``sqrt(b2)``.
        eps: added outside of the root, times ``d``.
        d0: the first ``d``. Used in ``init`` alone.
        d_coef: factor of the estimate.
        growth_rate: greatest factor by which ``d`` grows in one update towards the largest estimate so far, once it has
            left ``d0``; None is any. The authors name 1.02.
        bias_corrected: multiply ``rate`` by ``sqrt(1 - b2**step) / (1 - b1**step)``.
        safeguard_warmup: leave ``rate`` out of ``total``.
        weight_decay, mask: as `add_decayed_weights`, decoupled.

    Source: Mishchenko and Defazio, "Prodigy" (arXiv 2306.06101), algorithm 4.
    """
    check_flags(bias_corrected=bias_corrected, safeguard_warmup=safeguard_warmup)
    check_decay(b1=b1, b2=b2)
    b3 = b2**0.5 if b3 is None else b3
    check_decay(b3=b3)
    check_nonnegative(True, learning_rate=learning_rate, weight_decay=weight_decay)
    check_nonnegative(eps=eps, d_coef=d_coef)
    check_positive(d0=d0)
    if growth_rate is not None:
        check_bound(growth_rate=growth_rate)

    def init(params: Params) -> ProdigyState:
        check_mask(mask, params)
        zero = zero_scalar(params)
        largest = ABSENT if growth_rate is None else zero + d0
        mu, nu, total = (zeros(params) for _ in range(3))
        return ProdigyState(zero_count(params), zero + d0, zero, mu, nu, total, copies(params), largest)

    def update(updates: PyTree, state: ProdigyState, params: MaybeParams = None) -> tuple[PyTree, ProdigyState]:
        need_params(params, "scale_by_prodigy")
        count, d, dtype = state.step + 1, state.distance, scalar_dtype(updates)
        rate = value_at("learning_rate", learning_rate, state.step, updates)
        if bias_corrected:
            rate = rate * bias_correction(b2, count, dtype).sqrt() / bias_correction(b1, count, dtype)
        decay = value_at("weight_decay", weight_decay, state.step, updates)
        scaled = tree.elementwise(lambda g: d * tree.upcast(g), updates)
        mu, nu = moving_average(scaled, state.mu, b1), squares_average(scaled, state.nu, b2)
        gained = tree.total(tree.elementwise(lambda g, x, p: g * (x - tree.upcast(p)), scaled, state.start, params))
        numerator = b3 * state.numerator + (1 - b3) * rate * d * gained
        weight = tree.hoist((1 - b3) * d * (1.0 if safeguard_warmup else rate))
        total = tree.elementwise(lambda g, s: b3 * s + weight * g, scaled, state.total)
        norm1 = tree.total(tree.elementwise(torch.abs, total))
        estimate = torch.where(norm1 > 0, d_coef * numerator / torch.where(norm1 > 0, norm1, 1.0), 0.0)
        new, largest = torch.maximum(d, estimate), state.largest
        if growth_rate is not None:
            largest = torch.maximum(largest, estimate)
            new = torch.minimum(largest, torch.where(d <= d0, new, d) * growth_rate)
        step = tree.hoist(-rate * d)
        out = tree.elementwise(
            lambda m, v, p, w: (
                step * (m / divisor(root(v), 0.0 if is_zero(eps) else d * eps) + decay * w * tree.upcast(p))
            ),
            mu,
            nu,
            params,
            mask_values(mask, params),
        )
        return out, ProdigyState(count, new.to(d.dtype), numerator.to(d.dtype), mu, nu, total, state.start, largest)

    return composed(init, update, adds=(Descends, KeepsStart))


def prodigy(
    learning_rate: Scalar | Schedule = 1.0,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    b3: Scalar | None = None,
    eps: Scalar = 1e-8,
    d0: float = 1e-6,
    d_coef: Scalar = 1.0,
    growth_rate: float | None = None,
    bias_corrected: bool = False,
    safeguard_warmup: bool = False,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    """Adam whose step size is an estimate of the distance from the initial parameters to the solution:
    ``p - learning_rate * d * (u + weight_decay * p)``, with ``d`` and the rest of `scale_by_prodigy`.

    Args:
        learning_rate: a factor: 1, or a schedule that ends at 0.
        b1, b2, b3, eps, d0, d_coef, growth_rate, bias_corrected, safeguard_warmup: as `scale_by_prodigy`.
        weight_decay: decoupled; scaled by the estimated step size too.
        mask: True where weights decay; None is everywhere.

    Source: Mishchenko and Defazio (arXiv 2306.06101), algorithm 4; the options and the decay are those of their code.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.prodigy(), {"w": torch.ones(1)}
        >>> tx.init(params)["prodigy"].distance
        tensor(1.0000e-06)
    """
    rule = scale_by_prodigy(
        learning_rate,
        b1=b1,
        b2=b2,
        b3=b3,
        eps=eps,
        d0=d0,
        d_coef=d_coef,
        growth_rate=growth_rate,
        bias_corrected=bias_corrected,
        safeguard_warmup=safeguard_warmup,
        weight_decay=weight_decay,
        mask=mask,
    )
    return named_chain(prodigy=rule)


# --- D-Adaptation ------------------------------------------------------------------------------------------------


class DAdaptState(NamedTuple):
    """Updates so far, the estimate of the distance, its numerator, averages of steps, squares and scaled gradients."""

    step: Tensor
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
        weight_decay, mask: as `add_decayed_weights`, decoupled.

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
        check_mask(mask, params)
        zero = zero_scalar(params)
        return DAdaptState(zero_count(params), zero + d0, zero, *[zeros(params) for _ in range(3)])

    def update(updates: PyTree, state: DAdaptState, params: MaybeParams = None) -> tuple[PyTree, DAdaptState]:
        need_params(params, "scale_by_dadapt_adam")
        d = state.distance
        rate = tree.hoist(d * value_at("learning_rate", learning_rate, state.step, updates))
        decay = value_at("weight_decay", weight_decay, state.step, updates)
        gained = tree.total(
            tree.elementwise(
                lambda g, s, v: tree.upcast(g) * (s / divisor(root(v), eps)), updates, state.total, state.nu
            )
        )
        numerator = b3 * state.numerator + (1 - b3) * rate * gained
        scaled = tree.elementwise(lambda g: rate * tree.upcast(g), updates)
        mu, nu = moving_average(scaled, state.mu, b1), squares_average(updates, state.nu, b2)
        total = moving_average(scaled, state.total, b3)
        norm1 = (1 - b3) * tree.total(tree.elementwise(torch.abs, total))
        estimate = torch.where(norm1 > 0, numerator / torch.where(norm1 > 0, norm1, 1.0), 0.0)
        new = torch.maximum(d, torch.minimum(estimate, d * growth_rate))
        out = tree.elementwise(
            lambda m, v, p, w: -m / divisor(root(v), eps) - rate * decay * w * tree.upcast(p),
            mu,
            nu,
            params,
            mask_values(mask, params),
        )
        return out, DAdaptState(state.step + 1, new.to(d.dtype), numerator.to(d.dtype), mu, nu, total)

    return composed(init, update, adds=(Descends,))


def dadapt_adamw(
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
    """AdamW whose step size ``d`` is learnt, by `scale_by_dadapt_adam`:

        p = p - mu / (sqrt(nu) + eps) - d * learning_rate * weight_decay * p         # d and learning_rate are in mu

    Args:
        learning_rate: a factor: 1, or a schedule that ends at 0.
        b1, b2, eps, d0, growth_rate, weight_decay, mask: as `scale_by_dadapt_adam`.

    Source: Defazio and Mishchenko (arXiv 2301.07733).

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.dadapt_adamw(weight_decay=0.01), {"w": torch.ones(1)}
        >>> tx.init(params)["dadapt"].distance
        tensor(1.0000e-06)
    """
    rule = scale_by_dadapt_adam(
        learning_rate, b1=b1, b2=b2, eps=eps, d0=d0, growth_rate=growth_rate, weight_decay=weight_decay, mask=mask
    )
    return named_chain(dadapt=rule)
