"""Adan: Adam with Nesterov momentum from differences of gradients."""

from typing import NamedTuple

import torch
from torch import Tensor

from holofunc import tree
from holofunc.optim.adam import adam_state
from holofunc.optim.base import GradientTransformation, MaybeParams, composed, named_chain
from holofunc.optim.capabilities import Descends
from holofunc.optim.checks import need_params
from holofunc.optim.deprecation import moved_to_holocron
from holofunc.optim.labels import Mask, check_mask, mask_values
from holofunc.optim.numerics import ABSENT, divisor, root, scalar_dtype, squares_average, zeros
from holofunc.optim.ranges import check_decay, check_flags, check_nonnegative
from holofunc.optim.scalars import bias_correction, gains, value_at, zero_count
from holofunc.optim.transforms import ScheduleState, descend, moving_average
from holofunc.typing import Params, PyTree, Scalar, Schedule

__all__ = ["AdanState", "adan", "scale_by_adan", "scale_by_proximal_descent"]


class AdanState(NamedTuple):
    """Updates so far; averages of gradients, of their differences, and of the squares; the latest gradient."""

    step: Tensor
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
        step, mu, nu, nu_max = adam_state(params, amsgrad)
        return AdanState(step, mu, zeros(params), nu, zeros(params) if remembers else ABSENT, nu_max)

    def update(updates: PyTree, state: AdanState) -> tuple[PyTree, AdanState]:
        step, dtype = state.step + 1, scalar_dtype(updates)
        grads = tree.elementwise(tree.upcast, updates)
        difference = grads
        if remembers:
            later = tree.hoist((state.step > 0).to(dtype))
            difference = tree.elementwise(lambda g, before: later * (g - before), grads, state.previous)
        mu, delta = moving_average(grads, state.mu, b1), moving_average(difference, state.delta, b2)
        nu = squares_average(tree.elementwise(lambda g, d: g + b2 * d, grads, difference), state.nu, b3)
        nu_max = tree.elementwise(torch.maximum, state.nu_max, nu) if amsgrad else ABSENT
        c1, c3 = gains(b1, b3, step, dtype)
        c2 = tree.hoist(b2 / bias_correction(b2, step, dtype))
        out = tree.elementwise(
            lambda m, d, v: (m * c1 + d * c2) / divisor(root(v, c3), eps), mu, delta, nu_max if amsgrad else nu
        )
        return out, AdanState(step, mu, delta, nu, grads if remembers else ABSENT, nu_max)

    return GradientTransformation(init, update)


def scale_by_proximal_descent(
    learning_rate: Scalar | Schedule, weight_decay: Scalar | Schedule = 0.0, mask: Mask | None = None
) -> GradientTransformation:
    """The end of a chain with implicit weight decay, ``p = (p - rate * u) / (1 + rate * weight_decay)``.

    Args:
        learning_rate, weight_decay, mask: as `adamw`.
    """
    check_nonnegative(True, learning_rate=learning_rate, weight_decay=weight_decay)

    def init(params: Params) -> ScheduleState:
        check_mask(mask, params)
        return ScheduleState(zero_count(params))

    def update(updates: PyTree, state: ScheduleState, params: MaybeParams = None) -> tuple[PyTree, ScheduleState]:
        need_params(params, "scale_by_proximal_descent")
        rate = value_at("learning_rate", learning_rate, state.step, updates)
        decay = value_at("weight_decay", weight_decay, state.step, updates)
        out = tree.elementwise(
            lambda u, p, m: -rate * (tree.upcast(u) + decay * m * tree.upcast(p)) / (1 + rate * decay * m),
            updates,
            params,
            mask_values(mask, params),
        )
        return out, ScheduleState(state.step + 1)

    return composed(init, update, adds=(Descends,))


@moved_to_holocron(prev="grad", l2_too=False)
def adan(
    learning_rate: Scalar | Schedule,
    *,
    b1: Scalar = 0.98,
    b2: Scalar = 0.92,
    b3: Scalar = 0.99,
    eps: Scalar = 1e-8,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
    prox: bool = True,
    amsgrad: bool = False,
) -> GradientTransformation:
    """Adam with Nesterov momentum from differences of gradients. With ``u`` of `scale_by_adan`:

        p = (p - learning_rate * u) / (1 + learning_rate * weight_decay)

    Args:
        learning_rate, weight_decay, mask: as `adamw`.
        b1, b2, b3, eps, amsgrad: as `scale_by_adan`.
        prox: False decays as `adamw` does.

    Source: Xie et al. (arXiv 2208.06677), the authors' code without its optional clipping (`clip_by_global_norm`).

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.adan(0.1), {"w": torch.ones(1)}
        >>> tx.update(params, tx.init(params), params)[0]
        {'w': tensor([-0.1000])}
    """
    check_flags(prox=prox)
    rule = scale_by_adan(b1, b2, b3, eps, amsgrad=amsgrad)
    if prox:
        return named_chain(adan=rule, descent=scale_by_proximal_descent(learning_rate, weight_decay, mask))
    return descend(learning_rate, weight_decay, mask, decoupled=True, adan=rule)
