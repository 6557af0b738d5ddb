"""RAdam and AdaBelief: Adam with a rectified variance; with the variance of ``g - mu``."""

from typing import NamedTuple

import torch
from torch import Tensor

from holofunc import tree
from holofunc.optim.adam import AdamState, adam_state, mu_hat
from holofunc.optim.base import GradientTransformation
from holofunc.optim.labels import Mask
from holofunc.optim.numerics import ABSENT, divisor, is_zero, root, scalar_dtype, squares_average
from holofunc.optim.ranges import check_decay, check_flags, check_nonnegative
from holofunc.optim.scalars import bias_correction, gains
from holofunc.optim.transforms import descend, moving_average
from holofunc.typing import PyTree, Scalar, Schedule

__all__ = ["BeliefState", "adabelief", "radam", "scale_by_belief", "scale_by_radam"]


# --- RAdam -------------------------------------------------------------------------------------------------------


def rectifier(b2: Scalar, count: Tensor, threshold: Scalar, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``(rectified, r)``: whether RAdam's ``rho > threshold``, and its factor where that holds (otherwise 1).

    In fp64, as these differences are small.
    """
    c2 = bias_correction(b2, count, torch.float64)
    limit = 2 / (1 - b2) - 1
    rho = limit - 2 * count * (1 - c2) / c2
    rectified = rho > threshold
    safe = torch.where(rectified & (rho > 4), rho, 5.0)  # no root of a negative number, whose gradient would be NaN
    square = (safe - 4) * (safe - 2) * limit / ((limit - 4) * (limit - 2) * safe)
    return tree.hoist(rectified), tree.hoist(torch.where(rectified, square.abs().sqrt(), 1.0).to(dtype))


def scale_by_radam(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    *,
    threshold: float = 5.0,
    force_adaptive_momentum: bool = False,
    eps_scaled: bool = False,
) -> GradientTransformation:
    """Adam, rectified: until the variance of its step can be told, the momentum alone. With ``mu`` and ``nu`` of
    `scale_by_adam`:

        rho_inf = 2 / (1 - b2) - 1
        rho = rho_inf - 2 * step * b2**step / (1 - b2**step)
        r = sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
        u = r * mu_hat / (sqrt(nu_hat) + eps) if rho > threshold, otherwise mu_hat

    Args:
        b1, b2: in [0, 1).
        eps: added outside of the root.
        threshold: 4 is the paper's, 5 that of its authors' code.
        force_adaptive_momentum: before the threshold too, divide by the root (unrectified).
        eps_scaled: divide by ``(sqrt(nu) + eps) / sqrt(1 - b2**step)`` as ``torch.optim.RAdam`` does.

    Source: Liu et al., "On the variance of the adaptive learning rate and beyond" (arXiv 1908.03265).
    """
    check_flags(force_adaptive_momentum=force_adaptive_momentum, eps_scaled=eps_scaled)
    check_decay(b1=b1, b2=b2)
    check_nonnegative(eps=eps, threshold=threshold)

    def update(updates: PyTree, state: AdamState) -> tuple[PyTree, AdamState]:
        step = state.step + 1
        mu, nu = moving_average(updates, state.mu, b1), squares_average(updates, state.nu, b2)
        out = rectified(mu, nu, step, b1, b2, eps, threshold, force_adaptive_momentum, eps_scaled)
        return out, AdamState(step, mu, nu)

    return GradientTransformation(lambda params: adam_state(params), update)


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
        adaptive = m * gain / divisor(root(v, c2), eps * c2 if scaled and not is_zero(eps) else eps)
        return adaptive if force else torch.where(is_rectified, adaptive, m * c1)

    return tree.elementwise(rule, mu, nu)


def radam(
    learning_rate: Scalar | Schedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    threshold: float = 5.0,
    eps_scaled: bool = False,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
    decoupled: bool = True,
) -> GradientTransformation:
    """Rectified Adam: ``p - learning_rate * (u + weight_decay * p)``, with ``u`` of `scale_by_radam`.

    Args:
        learning_rate, weight_decay, mask: as `adamw`.
        b1, b2, eps, threshold, eps_scaled: as `scale_by_radam`; ``eps_scaled=True`` is ``torch.optim.RAdam``.
        decoupled: False adds the decay to the gradient.

    Source: Liu et al. (arXiv 1908.03265), with the threshold of the authors' code; the paper's is 4, and it has no
    decay.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.radam(0.1), {"w": torch.full((1,), 2.0)}
        >>> tx.update(params, tx.init(params), params)[0]
        {'w': tensor([-0.2000])}
    """
    rule = scale_by_radam(b1, b2, eps, threshold=threshold, eps_scaled=eps_scaled)
    return descend(learning_rate, weight_decay, mask, decoupled=decoupled, radam=rule)


# --- AdaBelief ---------------------------------------------------------------------------------------------------


class BeliefState(NamedTuple):
    """As `AdamState`; ``nu`` averages ``(g - mu)**2``."""

    step: Tensor
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

    def update(updates: PyTree, state: BeliefState) -> tuple[PyTree, BeliefState]:
        step, dtype = state.step + 1, scalar_dtype(updates)
        mu = moving_average(updates, state.mu, b1)
        surprise = tree.elementwise(lambda g, m: tree.upcast(g) - m, updates, mu)
        nu = tree.elementwise(lambda v: v + eps_root, squares_average(surprise, state.nu, b2))
        nu_max = tree.elementwise(torch.maximum, state.nu_max, nu) if amsgrad else ABSENT
        if rectify:
            out = rectified(mu, nu, step, b1, b2, eps, 5.0, False, True)
        else:
            c1, c2 = gains(b1, b2, step, dtype)
            first = mu_hat(updates, mu, b1, step, c1, nesterov)
            out = tree.elementwise(lambda m, v: m / divisor(root(v, c2), eps), first, nu_max if amsgrad else nu)
        return out, BeliefState(step, mu, nu, nu_max)

    return GradientTransformation(lambda params: BeliefState(*adam_state(params, amsgrad)), update)


def adabelief(
    learning_rate: Scalar | Schedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-16,
    eps_root: Scalar = 1e-16,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
    decoupled: bool = True,
    rectify: bool = False,
    amsgrad: bool = False,
    nesterov: bool = False,
) -> GradientTransformation:
    """Adam whose steps are long where gradients are as expected: ``p - learning_rate * (u + weight_decay * p)``, with
    ``u`` of `scale_by_belief`.

    Args:
        learning_rate, weight_decay, mask: as `adamw`.
        b1, b2, eps, eps_root, rectify, amsgrad, nesterov: as `scale_by_belief`.
        decoupled: False adds the decay to the gradient.

    Source: Zhuang et al. (arXiv 2010.07468); the authors' code rectifies by default.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.adabelief(0.1), {"w": torch.ones(1)}
        >>> tx.update(params, tx.init(params), params)[0]
        {'w': tensor([-0.1111])}
    """
    rule = scale_by_belief(b1, b2, eps, eps_root=eps_root, rectify=rectify, amsgrad=amsgrad, nesterov=nesterov)
    return descend(learning_rate, weight_decay, mask, decoupled=decoupled, belief=rule)
