"""AdEMAMix, with two momenta of different age, and its simplified form, with one."""

from typing import NamedTuple

from torch import Tensor

from holofunc import tree
from holofunc.optim.adam import adam_state
from holofunc.optim.base import GradientTransformation
from holofunc.optim.labels import Mask
from holofunc.optim.numerics import ABSENT, divisor, is_zero, root, scalar_dtype, squares_average, zeros
from holofunc.optim.ranges import check_count, check_decay, check_nonnegative
from holofunc.optim.scalars import bias_correction, gains, value_at, zero_count
from holofunc.optim.schedules import half_life, linear
from holofunc.optim.transforms import descend, moving_average
from holofunc.typing import Params, PyTree, Scalar, Schedule

__all__ = [
    "AdEMAMixState", "SimplifiedAdEMAMixState", "ademamix", "scale_by_ademamix", "scale_by_simplified_ademamix",
    "simplified_ademamix",
]  # fmt: skip


# --- AdEMAMix ----------------------------------------------------------------------------------------------------


class AdEMAMixState(NamedTuple):
    """Updates so far; fast (absent for ``b1=0``) and slow averages of the gradients, and that of their squares."""

    step: Tensor
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
        step, mu, nu, _ = adam_state(params)
        return AdEMAMixState(step, mu if fast else ABSENT, zeros(params), nu)

    def update(updates: PyTree, state: AdEMAMixState) -> tuple[PyTree, AdEMAMixState]:
        step, dtype = state.step + 1, scalar_dtype(updates)
        slow_decay, mix = value_at("b3", b3, state.step, updates), value_at("alpha", alpha, state.step, updates)
        mu = moving_average(updates, state.mu, b1) if fast else ABSENT
        slow, nu = moving_average(updates, state.mu_slow, slow_decay), squares_average(updates, state.nu, b2)
        c1, c2 = gains(b1, b2, step, dtype)
        first = tree.elementwise(lambda m: m * c1, mu) if fast else tree.elementwise(tree.upcast, updates)
        out = tree.elementwise(lambda m, s, v: (m + mix * s) / divisor(root(v, c2), eps), first, slow, nu)
        return out, AdEMAMixState(step, mu, slow, nu)

    return GradientTransformation(init, update)


def ademamix(
    learning_rate: Scalar | Schedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    b3: Scalar | Schedule = 0.9999,
    alpha: Scalar | Schedule = 5.0,
    eps: Scalar = 1e-8,
    alpha_warmup: int | None = None,
    b3_warmup: int | None = None,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
    decoupled: bool = True,
) -> GradientTransformation:
    """AdamW with a second, slower momentum: ``p - learning_rate * (u + weight_decay * p)``, with ``u`` of
    `scale_by_ademamix`.

    Args:
        learning_rate, weight_decay, mask: as `adamw`.
        b1, b2, b3, alpha, eps: as `scale_by_ademamix`.
        alpha_warmup: updates over which ``alpha``, a number, grows linearly from 0.
        b3_warmup: updates over which ``b3``, a number, grows from ``b1``, its half-life linearly.
        decoupled: False adds the decay to the gradient.

    Source: Pagliardini et al. (arXiv 2409.03137). The paper warms both up over the whole run.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.ademamix(0.1, alpha_warmup=1000, b3_warmup=1000), {"w": torch.ones(1)}
        >>> tx.update(params, tx.init(params), params)[0]
        {'w': tensor([-0.1000])}
    """
    if alpha_warmup is not None:
        check_count(alpha_warmup=alpha_warmup)
        alpha = _counted_from_one(linear(0.0, _number(alpha=alpha), alpha_warmup))
    if b3_warmup is not None:
        check_count(b3_warmup=b3_warmup)
        check_decay(b1=b1)
        b3 = _counted_from_one(half_life(b1, _number(b3=b3), b3_warmup))
    rule = scale_by_ademamix(b1, b2, b3, alpha, eps)
    return descend(learning_rate, weight_decay, mask, decoupled=decoupled, ademamix=rule)


def _counted_from_one(schedule: Schedule) -> Schedule:
    return lambda step: schedule(step + 1)


def _number(**named: Scalar | Schedule) -> Scalar:
    ((name, value),) = named.items()
    if callable(value):
        raise TypeError(f"{name} must be a number where it is to be warmed up, got a schedule")
    check = check_decay if name == "b3" else check_nonnegative
    check(**named)
    return value


# --- simplified --------------------------------------------------------------------------------------------------


class SimplifiedAdEMAMixState(NamedTuple):
    """Updates so far, the decaying sum of the gradients, the moving average of their squares."""

    step: Tensor
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
        return SimplifiedAdEMAMixState(zero_count(params), zeros(params), zeros(params))

    def update(updates: PyTree, state: SimplifiedAdEMAMixState) -> tuple[PyTree, SimplifiedAdEMAMixState]:
        step = state.step + 1
        decay, mix = value_at("b1", b1, state.step, updates), value_at("alpha", alpha, state.step, updates)
        total = tree.elementwise(lambda g, m: decay * m + tree.upcast(g), updates, state.total)
        nu = squares_average(updates, state.nu, b2)
        c2 = tree.hoist(bias_correction(b2, step, scalar_dtype(updates)).rsqrt())
        out = tree.elementwise(
            lambda g, m, v: (m + mix * tree.upcast(g)) / divisor(root(v, c2), eps), updates, total, nu
        )
        return out, SimplifiedAdEMAMixState(step, total, nu)

    return GradientTransformation(init, update)


def simplified_ademamix(
    learning_rate: Scalar | Schedule,
    *,
    b1: Scalar | Schedule = 0.99,
    b2: Scalar = 0.95,
    alpha: Scalar | Schedule = 0.0,
    eps: Scalar = 1e-8,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    """AdEMAMix with one sum for both of its averages: ``p - learning_rate * (u + weight_decay * p)``, with ``u`` of
    `scale_by_simplified_ademamix`.

    Args:
        learning_rate: a number, a 0-d tensor or a schedule; ``1 - b1`` times that of `adamw`.
        b1, b2, alpha, eps: as `scale_by_simplified_ademamix`.
        weight_decay, mask: as `add_decayed_weights`, decoupled.

    Source: Morwani et al. (arXiv 2502.02431).

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.simplified_ademamix(0.1, alpha=2.0), {"w": torch.ones(1)}
        >>> tx.update({"w": torch.ones(1)}, tx.init(params), params)[0]
        {'w': tensor([-0.3000])}
    """
    rule = scale_by_simplified_ademamix(b1, b2, alpha, eps)
    return descend(learning_rate, weight_decay, mask, decoupled=True, simplified_ademamix=rule)
