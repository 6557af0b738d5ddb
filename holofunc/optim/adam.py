"""Adam, AdamW, NAdam, RAdam, AdaMax, Yogi: a moving average of the gradient over the root of one of its square."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from holofunc import tree
from holofunc.optim.base import GradientTransformation
from holofunc.optim.deprecation import renamed
from holofunc.optim.labels import Mask
from holofunc.optim.numerics import ABSENT, bounded, divisor, is_zero, root, scalar_dtype, squares_average, zeros
from holofunc.optim.ranges import check_decay, check_dtype, check_flags, check_nonnegative
from holofunc.optim.scalars import bias_correction, gains, zero_count, zero_scalar
from holofunc.optim.transforms import descend, moving_average
from holofunc.typing import Params, PyTree, Scalar, Schedule

__all__ = [
    "AdamState", "AdamaxState", "NadamState", "adam", "adamax", "adamw", "nadam", "nadamw", "scale_by_adam",
    "scale_by_adamax", "scale_by_nadam", "scale_by_yogi",
]  # fmt: skip


# --- Adam --------------------------------------------------------------------------------------------------------


class AdamState(NamedTuple):
    """Updates so far, moving averages of gradients and of their squares; ``nu_max`` with amsgrad only."""

    step: Tensor
    mu: PyTree
    nu: PyTree
    nu_max: PyTree = ABSENT


def adam_state(params: Params, amsgrad: bool = False, mu_dtype: torch.dtype | None = None) -> AdamState:
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

        mu = b1 * mu + (1 - b1) * g           mu_hat = mu / (1 - b1**step)
        nu = b2 * nu + (1 - b2) * g**2        nu_hat = nu / (1 - b2**step)

    Args:
        b1: in [0, 1). The Python number ``b1=0`` keeps no ``mu``.
        b2: in [0, 1).
        eps: added outside of the root.
        eps_root: added inside of it.
        nesterov: look one step ahead: ``b1 * mu / (1 - b1**(step + 1)) + (1 - b1) * g / (1 - b1**step)`` in place of
            ``mu_hat``.
        amsgrad: divide by the root of the largest ``nu`` so far, debiased afterwards, as torch does.
        bias_corrected: False leaves out the divisions by ``1 - b**step``.
        mu_dtype: of ``mu``; None is fp32 for half precision, otherwise the parameter's own.

    Source: Kingma and Ba (arXiv 1412.6980); Dozat, "Incorporating Nesterov momentum into Adam" (2016); Reddi et al.,
    "On the convergence of Adam and beyond" (arXiv 1904.09237).
    """
    check_flags(nesterov=nesterov, amsgrad=amsgrad, bias_corrected=bias_corrected)
    check_decay(b1=b1, b2=b2)
    check_nonnegative(eps=eps, eps_root=eps_root)
    check_dtype(mu_dtype=mu_dtype)

    def init(params: Params) -> AdamState:
        state = adam_state(params, amsgrad, mu_dtype)
        return state._replace(mu=ABSENT) if is_zero(b1) else state

    def update(updates: PyTree, state: AdamState) -> tuple[PyTree, AdamState]:
        step, dtype = state.step + 1, scalar_dtype(updates)
        mu = ABSENT if is_zero(b1) else moving_average(updates, state.mu, b1)
        nu = squares_average(updates, state.nu, b2)
        nu_max = tree.elementwise(torch.maximum, state.nu_max, nu) if amsgrad else ABSENT
        c1, c2 = gains(b1, b2, step, dtype) if bias_corrected else (1.0, 1.0)
        first = mu_hat(updates, mu, b1, step, c1, nesterov)
        out = tree.elementwise(lambda m, v: m / divisor(root(v, c2, eps_root), eps), first, nu_max if amsgrad else nu)
        return out, AdamState(step, mu, nu, nu_max)

    return GradientTransformation(init, update)


def mu_hat(grads: PyTree, mu: PyTree, b1: Scalar, count: Tensor, c1: Scalar, nesterov: bool) -> PyTree:
    """``mu * c1``; looking ahead, ``b1 * mu / (1 - b1**(count + 1)) + (1 - b1) * g * c1``; without ``mu``, ``g``."""
    if isinstance(mu, tuple):
        return tree.elementwise(tree.upcast, grads)
    if not nesterov:
        return tree.elementwise(lambda m: tree.upcast(m) * c1, mu)
    next_c1 = tree.hoist(1 / bias_correction(b1, count + 1, c1.dtype)) if isinstance(c1, Tensor) else 1.0
    return tree.elementwise(lambda g, m: (b1 * next_c1) * tree.upcast(m) + ((1 - b1) * c1) * tree.upcast(g), grads, mu)


def adam(
    learning_rate: Scalar | Schedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    nesterov: bool = False,
    amsgrad: bool = False,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
    mu_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    """Adam: ``p - learning_rate * u``, with ``u`` of `scale_by_adam`.

    Args:
        learning_rate: a number, a 0-d tensor or a schedule.
        b1, b2, eps, eps_root, nesterov, amsgrad, mu_dtype: as `scale_by_adam`.
        weight_decay, mask: as `add_decayed_weights`, in front of the rule: L2 regularisation; `adamw` decouples it.

    Source: Kingma and Ba (arXiv 1412.6980), algorithm 1; ``nesterov``, ``amsgrad`` and the decay came later.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> params = {"w": torch.ones(1)}
        >>> tx = optim.adam(0.1)
        >>> tx.update({"w": torch.ones(1)}, tx.init(params), params)[0]
        {'w': tensor([-0.1000])}
    """
    rule = scale_by_adam(b1, b2, eps, eps_root=eps_root, nesterov=nesterov, amsgrad=amsgrad, mu_dtype=mu_dtype)
    return descend(learning_rate, weight_decay, mask, decoupled=False, adam=rule)


def adamw(
    learning_rate: Scalar | Schedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    nesterov: bool = False,
    amsgrad: bool = False,
    weight_decay: Scalar | Schedule = 1e-2,
    mask: Mask | None = None,
    mu_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    """Adam with decoupled weight decay: ``p - learning_rate * (u + weight_decay * p)``, with ``u`` of `scale_by_adam`.

    Args:
        learning_rate: a number, a 0-d tensor or a schedule.
        b1, b2, eps, eps_root, nesterov, amsgrad, mu_dtype: as `scale_by_adam`.
        weight_decay, mask: as `add_decayed_weights`, decoupled.

    Source: Loshchilov and Hutter (arXiv 1711.05101), with the decay scaled by the learning rate as in torch and optax.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> params = {"w": torch.ones(1)}
        >>> tx = optim.adamw(optim.schedules.cosine(0.1, 1000), mask=optim.no_decay_mask)
        >>> tx.update({"w": torch.ones(1)}, tx.init(params), params)[0]
        {'w': tensor([-0.1000])}
    """
    rule = scale_by_adam(b1, b2, eps, eps_root=eps_root, nesterov=nesterov, amsgrad=amsgrad, mu_dtype=mu_dtype)
    return descend(learning_rate, weight_decay, mask, decoupled=True, adam=rule)


def nadamw(
    learning_rate: Scalar | Schedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    amsgrad: bool = False,
    weight_decay: Scalar | Schedule = 1e-2,
    mask: Mask | None = None,
    mu_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    """`adamw` with ``nesterov=True``, the NAdamW of timm, optax and the AlgoPerf baselines:
    ``p - learning_rate * (u + weight_decay * p)``.

    Args:
        learning_rate, weight_decay, mask: as `adamw`.
        b1, b2, eps, eps_root, amsgrad, mu_dtype: as `scale_by_adam`.

    Source: Dozat (2016), decoupled as in Loshchilov and Hutter (arXiv 1711.05101).
    """
    rule = scale_by_adam(b1, b2, eps, eps_root=eps_root, nesterov=True, amsgrad=amsgrad, mu_dtype=mu_dtype)
    return descend(learning_rate, weight_decay, mask, decoupled=True, adam=rule)


# --- NAdam -------------------------------------------------------------------------------------------------------


class NadamState(NamedTuple):
    """Updates so far, the product of the momenta so far, moving averages of gradients and of their squares."""

    step: Tensor
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

    def momentum(step: Tensor, dtype: torch.dtype) -> Tensor:
        return b1 * (1 - 0.5 * torch.exp(math.log(0.96) * momentum_decay * step.to(dtype)))

    def init(params: Params) -> NadamState:
        step, mu, nu, _ = adam_state(params)
        return NadamState(step, zero_scalar(params) + 1, mu, nu)

    def update(updates: PyTree, state: NadamState) -> tuple[PyTree, NadamState]:
        step, dtype = state.step + 1, scalar_dtype(updates)
        mu, nu = moving_average(updates, state.mu, b1), squares_average(updates, state.nu, b2)
        now, later = momentum(step, dtype), momentum(step + 1, dtype)
        product = state.mu_product * now
        for_g, for_mu = tree.hoist((1 - now) / (1 - product)), tree.hoist(later / (1 - product * later))
        c2 = tree.hoist(bias_correction(b2, step, dtype).rsqrt())
        out = tree.elementwise(
            lambda g, m, v: (for_mu * m + for_g * tree.upcast(g)) / divisor(tree.safe_sqrt(v * c2 * c2), eps),
            updates,
            mu,
            nu,
        )
        return out, NadamState(step, product, mu, nu)

    return GradientTransformation(init, update)


def nadam(
    learning_rate: Scalar | Schedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    momentum_decay: Scalar = 4e-3,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
    decoupled: bool = True,
) -> GradientTransformation:
    """Adam with Nesterov momentum that warms up: ``p - learning_rate * (u + weight_decay * p)``, with ``u`` of
    `scale_by_nadam`.

    Args:
        learning_rate, weight_decay, mask: as `adamw`.
        b1, b2, eps, momentum_decay: as `scale_by_nadam`.
        decoupled: False adds the decay to the gradient, as ``torch.optim.NAdam`` does by default.

    Source: Dozat, "Incorporating Nesterov momentum into Adam" (2016), in the form of ``torch.optim.NAdam``: ``mu``
    averages with ``b1`` throughout. The decay is decoupled by default.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.nadam(0.1), {"w": torch.ones(1)}
        >>> tx.update(params, tx.init(params), params)[0]
        {'w': tensor([-0.1056])}
    """
    rule = scale_by_nadam(b1, b2, eps, momentum_decay=momentum_decay)
    return descend(learning_rate, weight_decay, mask, decoupled=decoupled, nadam=rule)


# --- AdaMax, Yogi ------------------------------------------------------------------------------------------------


class AdamaxState(NamedTuple):
    """Updates so far, moving average of the gradients, decaying maximum of their sizes."""

    step: Tensor
    mu: PyTree
    nu: PyTree


def scale_by_adamax(b1: Scalar = 0.9, b2: Scalar = 0.999, eps: Scalar = 1e-8) -> GradientTransformation:
    """``mu_hat / nu`` with ``nu = max(b2 * nu, |g| + eps)``.

    Source: Kingma and Ba (arXiv 1412.6980), section 7.
    """
    check_decay(b1=b1, b2=b2)
    check_nonnegative(eps=eps)

    def update(updates: PyTree, state: AdamaxState) -> tuple[PyTree, AdamaxState]:
        step = state.step + 1
        mu = moving_average(updates, state.mu, b1)
        nu = tree.elementwise(lambda g, v: torch.maximum(b2 * v, tree.upcast(g).abs() + eps), updates, state.nu)
        c1 = tree.hoist(1 / bias_correction(b1, step, scalar_dtype(updates)))
        return tree.elementwise(lambda m, v: m * c1 / (divisor(v, eps) if is_zero(eps) else v), mu, nu), AdamaxState(
            step, mu, nu
        )

    return GradientTransformation(lambda params: AdamaxState(zero_count(params), zeros(params), zeros(params)), update)


def adamax(
    learning_rate: Scalar | Schedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
    decoupled: bool = True,
) -> GradientTransformation:
    """Adam with the maximum norm in place of the root: ``p - learning_rate * (u + weight_decay * p)``, with ``u`` of
    `scale_by_adamax`.

    Args:
        learning_rate: a number, a 0-d tensor or a schedule.
        b1, b2, eps: as `scale_by_adamax`.
        weight_decay, mask, decoupled: as in `nadam`.

    Source: Kingma and Ba (arXiv 1412.6980), algorithm 2, which has no ``eps`` (here where torch has it) and no decay.
    """
    return descend(learning_rate, weight_decay, mask, decoupled=decoupled, adamax=scale_by_adamax(b1, b2, eps))


@renamed(initial="initial_accumulator_value")
def scale_by_yogi(
    b1: Scalar = 0.9, b2: Scalar = 0.999, eps: Scalar = 1e-3, *, initial_accumulator_value: float = 1e-6
) -> GradientTransformation:
    """Adam with ``nu = nu - (1 - b2) * sign(nu - g**2) * g**2``, which falls more slowly.

    Source: Zaheer et al., "Adaptive methods for nonconvex optimization" (NeurIPS 2018).
    """
    check_decay(b1=b1, b2=b2)
    check_nonnegative(eps=eps, initial_accumulator_value=initial_accumulator_value)

    def init(params: Params) -> AdamState:
        state = adam_state(params)
        return state._replace(nu=tree.elementwise(lambda v: v + initial_accumulator_value, state.nu))

    def square_step(g: Tensor, v: Tensor) -> Tensor:
        square = bounded(tree.upcast(g).square())
        return v - (1 - b2) * torch.sign(v - square) * square

    def update(updates: PyTree, state: AdamState) -> tuple[PyTree, AdamState]:
        step = state.step + 1
        mu, nu = moving_average(updates, state.mu, b1), tree.elementwise(square_step, updates, state.nu)
        c1, c2 = gains(b1, b2, step, scalar_dtype(updates))
        return tree.elementwise(lambda m, v: m * c1 / divisor(root(v, c2), eps), mu, nu), AdamState(step, mu, nu)

    return GradientTransformation(init, update)
