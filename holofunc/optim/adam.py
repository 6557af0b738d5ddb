"""Adam, NAdam, RAdam: a moving average of the gradient over the root of one of its square."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from holofunc import tree
from holofunc.optim.base import GradientTransformation, MaybeParams, check_params
from holofunc.optim.numerics import (
    ABSENT,
    bias_correction,
    bounded,
    check_decay,
    check_flags,
    check_nonnegative,
    is_zero,
    scalar_dtype,
    zero_count,
    zeros,
)
from holofunc.optim.transforms import moving_average
from holofunc.typing import Params, PyTree, Scalar

__all__ = [
    "AdamState",
    "NadamState",
    "scale_by_adam",
    "scale_by_nadam",
    "scale_by_radam",
]

# --- shared by the rules -------------------------------------------------------------------------------------------


def squares_average(updates: PyTree, average: PyTree, decay: Scalar, share: Scalar | None = None) -> PyTree:
    """``decay * average + (1 - decay) * updates**2``; what a square has made infinite stays so, as in torch.

    ``share`` is ``1 - decay`` for a ``decay`` in fp32, which would be off by 1e-4 near 1.
    """
    share = 1 - decay if share is None else share

    def rule(u: Tensor, a: Tensor) -> Tensor:
        gained = share * tree.wide(u) * tree.wide(u)  # in this order it overflows last
        return a + (gained - share * bounded(a))

    return tree.elementwise(rule, updates, average)


def root(nu: Tensor, gain: Scalar = 1.0, eps_root: Scalar = 0.0) -> Tensor:
    """``sqrt(nu * gain**2 + eps_root)``, with gradient zero at zero."""
    return tree.safe_sqrt(nu) * gain if is_zero(eps_root) else torch.sqrt(nu * (gain * gain) + eps_root)


def gains(b1: Scalar, b2: Scalar, count: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``mu_hat = mu * c1`` and ``sqrt(nu_hat) = sqrt(nu) * c2``: the factors ``(c1, c2)``."""
    c1, c2 = bias_correction(b1, count, dtype), bias_correction(b2, count, dtype)
    return tree.hoist(1 / c1), tree.hoist(c2.rsqrt())


def rectifier(b2: Scalar, count: Tensor, threshold: Scalar, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``(rectified, r)``: whether RAdam's ``rho > threshold``, and its factor where that holds (otherwise 1).

    rho_inf = 2 / (1 - b2) - 1,  rho = rho_inf - 2 * count * b2**count / (1 - b2**count),
    r**2 = (rho - 4) (rho - 2) rho_inf / ((rho_inf - 4) (rho_inf - 2) rho); in fp64, as these differences are small.
    """
    c2 = bias_correction(b2, count, torch.float64)
    limit = 2 / (1 - b2) - 1
    rho = limit - 2 * count * (1 - c2) / c2
    rectified = rho > threshold
    safe = torch.where(rectified & (rho > 4), rho, 5.0)  # no root of a negative number, whose gradient would be NaN
    square = (safe - 4) * (safe - 2) * limit / ((limit - 4) * (limit - 2) * safe)
    return tree.hoist(rectified), tree.hoist(torch.where(rectified, square.abs().sqrt(), 1.0).to(dtype))


# --- Adam --------------------------------------------------------------------------------------------------------


class AdamState(NamedTuple):
    """Updates so far, moving averages of gradients and of their squares; ``nu_max`` with amsgrad only."""

    count: Tensor  # type: ignore[assignment]
    mu: PyTree
    nu: PyTree
    nu_max: PyTree = ABSENT


def adam_state(params: Params, name: str, amsgrad: bool = False, mu_dtype: torch.dtype | None = None) -> AdamState:
    check_params(params, name)
    return AdamState(zero_count(params), zeros(params, mu_dtype), zeros(params), zeros(params) if amsgrad else ABSENT)


def scale_by_adam(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    *,
    eps_root: Scalar = 0.0,
    nesterov: bool = False,
    amsgrad: bool = False,
    bias_corrected: bool = True,
    mu_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    """``mu_hat / (sqrt(nu_hat + eps_root) + eps)``, where

        mu = b1 * mu + (1 - b1) * g           mu_hat = mu / (1 - b1**count)
        nu = b2 * nu + (1 - b2) * g**2        nu_hat = nu / (1 - b2**count)

    Args:
        b1: in [0, 1). The Python number ``b1=0`` keeps no ``mu``.
        b2: in [0, 1).
        eps: added outside of the root.
        eps_root: added inside of it.
        nesterov: look one step ahead: ``b1 * mu / (1 - b1**(count + 1)) + (1 - b1) * g / (1 - b1**count)`` in place of
            ``mu_hat``.
        amsgrad: divide by the root of the largest ``nu`` so far, debiased afterwards, as torch does.
        bias_corrected: False leaves out the divisions by ``1 - b**count``.
        mu_dtype: of ``mu``; None is fp32 for half precision, otherwise the parameter's own.

    Source: Kingma and Ba (arXiv 1412.6980); Dozat, "Incorporating Nesterov momentum into Adam" (2016); Reddi et al.,
    "On the convergence of Adam and beyond" (arXiv 1904.09237).
    """
    check_flags(nesterov=nesterov, amsgrad=amsgrad, bias_corrected=bias_corrected)
    check_decay(b1=b1, b2=b2)
    check_nonnegative(eps=eps, eps_root=eps_root)

    def init(params: Params) -> AdamState:
        state = adam_state(params, "scale_by_adam", amsgrad, mu_dtype)
        return state._replace(mu=ABSENT) if is_zero(b1) else state

    def update(updates: PyTree, state: AdamState, params: MaybeParams = None, **extra: Any) -> tuple[PyTree, AdamState]:
        count, dtype = state.count + 1, scalar_dtype(updates)
        mu = ABSENT if is_zero(b1) else moving_average(updates, state.mu, b1)
        nu = squares_average(updates, state.nu, b2)
        nu_max = tree.elementwise(torch.maximum, state.nu_max, nu) if amsgrad else ABSENT
        c1, c2 = gains(b1, b2, count, dtype) if bias_corrected else (1.0, 1.0)
        first = mu_hat(updates, mu, b1, count, c1, nesterov)
        out = tree.elementwise(lambda m, v: m / (root(v, c2, eps_root) + eps), first, nu_max if amsgrad else nu)
        return out, AdamState(count, mu, nu, nu_max)

    return GradientTransformation(init, update)


def mu_hat(grads: PyTree, mu: PyTree, b1: Scalar, count: Tensor, c1: Scalar, nesterov: bool) -> PyTree:
    """``mu * c1``; looking ahead, ``b1 * mu / (1 - b1**(count + 1)) + (1 - b1) * g * c1``; without ``mu``, ``g``."""
    if isinstance(mu, tuple):
        return tree.elementwise(tree.wide, grads)
    if not nesterov:
        return tree.elementwise(lambda m: tree.wide(m) * c1, mu)
    next_c1 = tree.hoist(1 / bias_correction(b1, count + 1, c1.dtype)) if isinstance(c1, Tensor) else 1.0
    return tree.elementwise(lambda g, m: (b1 * next_c1) * tree.wide(m) + ((1 - b1) * c1) * tree.wide(g), grads, mu)


# --- NAdam and RAdam -----------------------------------------------------------------------------------------------


class NadamState(NamedTuple):
    """Updates so far, the product of the momenta so far, moving averages of gradients and of their squares."""

    count: Tensor  # type: ignore[assignment]
    mu_product: Tensor
    mu: PyTree
    nu: PyTree


def scale_by_nadam(
    b1: Scalar = 0.9, b2: Scalar = 0.999, eps: Scalar = 1e-8, *, momentum_decay: Scalar = 4e-3
) -> GradientTransformation:
    """Adam with Nesterov momentum and a momentum that warms up:

        momentum(t) = b1 * (1 - 0.5 * 0.96**(t * momentum_decay))
        (momentum(t + 1) * mu / (1 - product(t + 1)) + (1 - momentum(t)) * g / (1 - product(t))) / (sqrt(nu_hat) + eps)

    where ``product(t)`` is that of the momenta 1 to t. ``scale_by_adam(nesterov=True)`` has constant momentum.

    Source: Dozat (2016), in the form of ``torch.optim.NAdam``.
    """
    check_decay(b1=b1, b2=b2)
    check_nonnegative(eps=eps, momentum_decay=momentum_decay)

    def momentum(count: Tensor, dtype: torch.dtype) -> Tensor:
        return b1 * (1 - 0.5 * torch.exp(math.log(0.96) * momentum_decay * count.to(dtype)))

    def init(params: Params) -> NadamState:
        count, mu, nu, _ = adam_state(params, "scale_by_nadam")
        return NadamState(count, torch.ones_like(count, dtype=scalar_dtype(params)), mu, nu)

    def update(
        updates: PyTree, state: NadamState, params: MaybeParams = None, **extra: Any
    ) -> tuple[PyTree, NadamState]:
        count, dtype = state.count + 1, scalar_dtype(updates)
        mu, nu = moving_average(updates, state.mu, b1), squares_average(updates, state.nu, b2)
        now, later = momentum(count, dtype), momentum(count + 1, dtype)
        product = state.mu_product * now
        for_g, for_mu = tree.hoist((1 - now) / (1 - product)), tree.hoist(later / (1 - product * later))
        c2 = tree.hoist(bias_correction(b2, count, dtype).rsqrt())
        out = tree.elementwise(
            lambda g, m, v: (for_mu * m + for_g * tree.wide(g)) / (tree.safe_sqrt(v * c2 * c2) + eps), updates, mu, nu
        )
        return out, NadamState(count, product, mu, nu)

    return GradientTransformation(init, update)


def scale_by_radam(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    *,
    threshold: float = 5.0,
    force_adaptive_momentum: bool = False,
    eps_scaled: bool = False,
) -> GradientTransformation:
    """Adam, rectified: ``r * mu_hat / (sqrt(nu_hat) + eps)`` once ``rho > threshold``, before that ``mu_hat``.

    Args:
        b1, b2: in [0, 1).
        eps: added outside of the root.
        threshold: 4 is the paper's, 5 that of its authors' code.
        force_adaptive_momentum: before the threshold too, divide by the root (unrectified).
        eps_scaled: divide by ``(sqrt(nu) + eps) / sqrt(1 - b2**count)`` as ``torch.optim.RAdam`` does.

    Source: Liu et al., "On the variance of the adaptive learning rate and beyond" (arXiv 1908.03265).
    """
    check_flags(force_adaptive_momentum=force_adaptive_momentum, eps_scaled=eps_scaled)
    check_decay(b1=b1, b2=b2)
    check_nonnegative(eps=eps, threshold=threshold)

    def update(updates: PyTree, state: AdamState, params: MaybeParams = None, **extra: Any) -> tuple[PyTree, AdamState]:
        count = state.count + 1
        mu, nu = moving_average(updates, state.mu, b1), squares_average(updates, state.nu, b2)
        out = rectified(mu, nu, count, b1, b2, eps, threshold, force_adaptive_momentum, eps_scaled)
        return out, AdamState(count, mu, nu)

    return GradientTransformation(lambda params: adam_state(params, "scale_by_radam"), update)


def rectified(
    mu: PyTree,
    nu: PyTree,
    count: Tensor,
    b1: Scalar,
    b2: Scalar,
    eps: Scalar,
    threshold: float,
    force: bool,
    scaled: bool,
) -> PyTree:
    dtype = scalar_dtype(mu)
    c1, c2 = gains(b1, b2, count, dtype)
    is_rectified, r = rectifier(b2, count, threshold, dtype)
    gain = tree.hoist(c1 * r)

    def rule(m: Tensor, v: Tensor) -> Tensor:
        adaptive = m * gain / (root(v, c2) + (eps * c2 if scaled else eps))
        return adaptive if force else torch.where(is_rectified, adaptive, m * c1)

    return tree.elementwise(rule, mu, nu)
