"""AdaBelief, Adan, AdEMAMix: relatives of Adam with other moments."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from holofunc import tree
from holofunc.optim.adam import adam_state, gains, mu_hat, rectified, root, squares_average
from holofunc.optim.base import GradientTransformation, MaybeParams, check_params, composed, need_params
from holofunc.optim.capabilities import Descends
from holofunc.optim.labels import Mask, check_labels, mask_values
from holofunc.optim.numerics import (
    ABSENT,
    bias_correction,
    check_decay,
    check_flags,
    check_nonnegative,
    is_zero,
    scalar_dtype,
    value_at,
    zero_count,
    zeros,
)
from holofunc.optim.transforms import ScheduleState, moving_average
from holofunc.typing import Params, PyTree, Scalar, Schedule

__all__ = [
    "AdEMAMixState",
    "AdanState",
    "BeliefState",
    "SimplifiedAdEMAMixState",
    "scale_by_adan",
    "scale_by_ademamix",
    "scale_by_belief",
    "scale_by_proximal_descent",
    "scale_by_simplified_ademamix",
]

# --- AdaBelief -----------------------------------------------------------------------------------------------------


class BeliefState(NamedTuple):
    """As `AdamState`, with squares of what was not expected of the gradients in ``nu``."""

    count: Tensor  # type: ignore[assignment]
    mu: PyTree
    nu: PyTree
    nu_max: PyTree = ABSENT


def scale_by_belief(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-16,
    *,
    eps_root: Scalar = 1e-16,
    rectify: bool = False,
    amsgrad: bool = False,
    nesterov: bool = False,
) -> GradientTransformation:
    """``mu_hat / (sqrt(nu_hat) + eps)`` with ``nu = b2 * nu + (1 - b2) * (g - mu)**2 + eps_root``.

    ``eps_root`` accumulates in the state.

    Args:
        b1, b2: in [0, 1).
        eps: added outside of the root.
        eps_root: added to ``nu`` at each update.
        rectify: as `scale_by_radam` with ``threshold=5, eps_scaled=True`` (the default of the authors' code); leaves
            no room for amsgrad and nesterov.
        amsgrad: divide by the root of the largest ``nu`` so far, debiased afterwards.
        nesterov: as in `scale_by_adam`.

    Source: Zhuang et al., "AdaBelief optimizer" (arXiv 2010.07468).
    """
    check_flags(rectify=rectify, amsgrad=amsgrad, nesterov=nesterov)
    check_decay(b1=b1, b2=b2)
    check_nonnegative(eps=eps, eps_root=eps_root)
    if rectify and (amsgrad or nesterov):
        raise ValueError("rectify=True leaves no room for amsgrad and nesterov, got one of them")

    def init(params: Params) -> BeliefState:
        return BeliefState(*adam_state(params, "scale_by_belief", amsgrad))

    def update(
        updates: PyTree, state: BeliefState, params: MaybeParams = None, **extra: Any
    ) -> tuple[PyTree, BeliefState]:
        count, dtype = state.count + 1, scalar_dtype(updates)
        mu = moving_average(updates, state.mu, b1)
        surprise = tree.elementwise(lambda g, m: tree.wide(g) - m, updates, mu)
        nu = tree.elementwise(lambda v: v + eps_root, squares_average(surprise, state.nu, b2))
        nu_max = tree.elementwise(torch.maximum, state.nu_max, nu) if amsgrad else ABSENT
        if rectify:
            out = rectified(mu, nu, count, b1, b2, eps, 5.0, False, True)
        else:
            c1, c2 = gains(b1, b2, count, dtype)
            first = mu_hat(updates, mu, b1, count, c1, nesterov)
            out = tree.elementwise(lambda m, v: m / (root(v, c2) + eps), first, nu_max if amsgrad else nu)
        return out, BeliefState(count, mu, nu, nu_max)

    return GradientTransformation(init, update)


# --- Adan --------------------------------------------------------------------------------------------------------


class AdanState(NamedTuple):
    """Updates so far; averages of gradients, of their differences, and of the squares; the latest gradient."""

    count: Tensor  # type: ignore[assignment]
    mu: PyTree
    delta: PyTree
    nu: PyTree
    previous: PyTree = ABSENT
    nu_max: PyTree = ABSENT


def scale_by_adan(
    b1: Scalar = 0.98,
    b2: Scalar = 0.92,
    b3: Scalar = 0.99,
    eps: Scalar = 1e-8,
    *,
    amsgrad: bool = False,
    prev: str = "grad",
) -> GradientTransformation:
    """``(mu_hat + b2 * delta_hat) / (sqrt(nu_hat) + eps)``, where, with ``d = g - previous g`` (0 at first),

        mu = b1 * mu + (1 - b1) * g,  delta = b2 * delta + (1 - b2) * d,  nu = b3 * nu + (1 - b3) * (g + b2 * d)**2

    Args:
        b1, b2, b3: in [0, 1); each is 1 minus the paper's.
        eps: added outside of the root.
        amsgrad: an addition to the paper: divide by the root of the largest ``nu`` so far, debiased afterwards.
        prev: ``"zero"`` takes the previous gradient as zero always, as Holocron 0.3.0 does, which never stores it.

    Source: Xie et al., "Adan" (arXiv 2208.06677).
    """
    check_flags(amsgrad=amsgrad)
    check_decay(b1=b1, b2=b2, b3=b3)
    check_nonnegative(eps=eps)
    if prev not in ("grad", "zero"):
        raise ValueError(f"prev must be 'grad' or 'zero', got {prev!r}")
    remembers = prev == "grad"

    def init(params: Params) -> AdanState:
        count, mu, nu, nu_max = adam_state(params, "scale_by_adan", amsgrad)
        return AdanState(count, mu, zeros(params), nu, zeros(params) if remembers else ABSENT, nu_max)

    def update(updates: PyTree, state: AdanState, params: MaybeParams = None, **extra: Any) -> tuple[PyTree, AdanState]:
        count, dtype = state.count + 1, scalar_dtype(updates)
        grads = tree.elementwise(tree.wide, updates)
        difference = grads
        if remembers:
            later = tree.hoist((state.count > 0).to(dtype))
            difference = tree.elementwise(lambda g, before: later * (g - before), grads, state.previous)
        mu, delta = moving_average(grads, state.mu, b1), moving_average(difference, state.delta, b2)
        nu = squares_average(tree.elementwise(lambda g, d: g + b2 * d, grads, difference), state.nu, b3)
        nu_max = tree.elementwise(torch.maximum, state.nu_max, nu) if amsgrad else ABSENT
        c1, c3 = gains(b1, b3, count, dtype)
        c2 = tree.hoist(b2 / bias_correction(b2, count, dtype))
        out = tree.elementwise(
            lambda m, d, v: (m * c1 + d * c2) / (root(v, c3) + eps), mu, delta, nu_max if amsgrad else nu
        )
        return out, AdanState(count, mu, delta, nu, grads if remembers else ABSENT, nu_max)

    return GradientTransformation(init, update)


def scale_by_proximal_descent(
    learning_rate: Scalar | Schedule, weight_decay: Scalar | Schedule = 0.0, mask: Mask | None = None
) -> GradientTransformation:
    """The end of a chain with implicit weight decay, ``p = (p - rate * u) / (1 + rate * weight_decay)``.

    Args:
        learning_rate: a number, a 0-d tensor or a schedule.
        weight_decay: likewise.
        mask: True where weights decay; None is everywhere.
    """
    check_nonnegative(True, learning_rate=learning_rate, weight_decay=weight_decay)

    def init(params: Params) -> ScheduleState:
        check_params(params, "scale_by_proximal_descent")
        if mask is not None:
            check_labels("mask", mask, params, bool)
        return ScheduleState(zero_count(params))

    def update(
        updates: PyTree, state: ScheduleState, params: MaybeParams = None, **extra: Any
    ) -> tuple[PyTree, ScheduleState]:
        need_params(params, "scale_by_proximal_descent")
        rate = value_at("learning_rate", learning_rate, state.count, updates)
        decay = value_at("weight_decay", weight_decay, state.count, updates)
        out = tree.elementwise(
            lambda u, p, m: -rate * (tree.wide(u) + decay * m * tree.wide(p)) / (1 + rate * decay * m),
            updates,
            params,
            mask_values(mask, params),
        )
        return out, ScheduleState(state.count + 1)

    return composed(init, update, adds=(Descends,))


# --- AdEMAMix ----------------------------------------------------------------------------------------------------


class AdEMAMixState(NamedTuple):
    """Updates so far; fast (absent for ``b1=0``) and slow averages of the gradients, and that of their squares."""

    count: Tensor  # type: ignore[assignment]
    mu: PyTree
    mu_slow: PyTree
    nu: PyTree


def scale_by_ademamix(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    b3: Scalar | Schedule = 0.9999,
    alpha: Scalar | Schedule = 5.0,
    eps: Scalar = 1e-8,
) -> GradientTransformation:
    """``(mu_hat + alpha * mu_slow) / (sqrt(nu_hat) + eps)``, where ``mu_slow = b3 * mu_slow + (1 - b3) * g``.

    Args:
        b1, b2: in [0, 1). The Python number ``b1=0`` keeps no ``mu``.
        b3: in [0, 1); a number, a 0-d tensor or a schedule (`half_life_warmup`).
        alpha: at least 0; a number, a 0-d tensor or a schedule.
        eps: added outside of the root.

    Source: Pagliardini et al., "The AdEMAMix optimizer" (arXiv 2409.03137).
    """
    check_decay(b1=b1, b2=b2)
    check_decay(True, b3=b3)
    check_nonnegative(True, alpha=alpha)
    check_nonnegative(eps=eps)
    fast = not is_zero(b1)

    def init(params: Params) -> AdEMAMixState:
        count, mu, nu, _ = adam_state(params, "scale_by_ademamix")
        return AdEMAMixState(count, mu if fast else ABSENT, zeros(params), nu)

    def update(
        updates: PyTree, state: AdEMAMixState, params: MaybeParams = None, **extra: Any
    ) -> tuple[PyTree, AdEMAMixState]:
        count, dtype = state.count + 1, scalar_dtype(updates)
        slow_decay, mix = value_at("b3", b3, state.count, updates), value_at("alpha", alpha, state.count, updates)
        mu = moving_average(updates, state.mu, b1) if fast else ABSENT
        slow, nu = moving_average(updates, state.mu_slow, slow_decay), squares_average(updates, state.nu, b2)
        c1, c2 = gains(b1, b2, count, dtype)
        first = tree.elementwise(lambda m: m * c1, mu) if fast else tree.elementwise(tree.wide, updates)
        out = tree.elementwise(lambda m, s, v: (m + mix * s) / (root(v, c2) + eps), first, slow, nu)
        return out, AdEMAMixState(count, mu, slow, nu)

    return GradientTransformation(init, update)


class SimplifiedAdEMAMixState(NamedTuple):
    """Updates so far, the decaying sum of the gradients, the moving average of their squares."""

    count: Tensor  # type: ignore[assignment]
    total: PyTree
    nu: PyTree


def scale_by_simplified_ademamix(
    b1: Scalar | Schedule = 0.99, b2: Scalar = 0.95, alpha: Scalar | Schedule = 0.0, eps: Scalar = 1e-8
) -> GradientTransformation:
    """``(total + alpha * g) / (sqrt(nu_hat) + eps)`` with ``total = b1 * total + g``: AdEMAMix in the memory of Adam.

    The sum is larger than Adam's average by ``1 / (1 - b1)``: divide learning rates by that.

    Args:
        b1: in [0, 1); a number, a 0-d tensor or a schedule.
        b2: in [0, 1).
        alpha: at least 0; a number, a 0-d tensor or a schedule.
        eps: added outside of the root.

    Source: Morwani et al., "Connections between schedule-free optimizers, AdEMAMix, and accelerated SGD variants"
    (arXiv 2502.02431).
    """
    check_decay(True, b1=b1)
    check_decay(b2=b2)
    check_nonnegative(True, alpha=alpha)
    check_nonnegative(eps=eps)

    def init(params: Params) -> SimplifiedAdEMAMixState:
        check_params(params, "scale_by_simplified_ademamix")
        return SimplifiedAdEMAMixState(zero_count(params), zeros(params), zeros(params))

    def update(
        updates: PyTree, state: SimplifiedAdEMAMixState, params: MaybeParams = None, **extra: Any
    ) -> tuple[PyTree, SimplifiedAdEMAMixState]:
        count = state.count + 1
        decay, mix = value_at("b1", b1, state.count, updates), value_at("alpha", alpha, state.count, updates)
        total = tree.elementwise(lambda g, m: decay * m + tree.wide(g), updates, state.total)
        nu = squares_average(updates, state.nu, b2)
        c2 = tree.hoist(bias_correction(b2, count, scalar_dtype(updates)).rsqrt())
        out = tree.elementwise(lambda g, m, v: (m + mix * tree.wide(g)) / (root(v, c2) + eps), updates, total, nu)
        return out, SimplifiedAdEMAMixState(count, total, nu)

    return GradientTransformation(init, update)
