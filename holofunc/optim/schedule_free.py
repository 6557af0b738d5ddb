"""Schedule-free optimization and primal averaging: averages in place of a learning-rate schedule."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from holofunc import tree
from holofunc.optim.adam import adamw
from holofunc.optim.base import GradientTransformation, MaybeParams, composed, inside
from holofunc.optim.capabilities import TiesWeights
from holofunc.optim.checks import need_params
from holofunc.optim.deprecation import renamed
from holofunc.optim.labels import Mask
from holofunc.optim.lookahead import by_path
from holofunc.optim.numerics import copies
from holofunc.optim.ranges import check_decay, check_fraction, check_nonnegative, known
from holofunc.optim.scalars import value_at, zero_count, zero_scalar
from holofunc.optim.sgd import sgd
from holofunc.typing import Params, PyTree, Scalar, Schedule

__all__ = [
    "PrimalAveragingState", "ScheduleFreeState", "primal_averaging", "schedule_free", "schedule_free_adamw",
    "schedule_free_sgd",
]  # fmt: skip


# --- schedule-free -----------------------------------------------------------------------------------------------


class _ScheduleFree(NamedTuple):
    step: Tensor
    interpolation: Tensor
    weight_sum: Tensor
    max_rate: Tensor
    z: PyTree
    inner: PyTree


class ScheduleFreeState(_ScheduleFree, TiesWeights):
    """Updates so far, interpolation, sum of weights, greatest learning rate; the iterate ``z``; the inner state."""

    __slots__ = ()

    def averaged(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        z = by_path(self.z)
        return {path: average_of(tree.upcast(params[path]), x, self.interpolation) for path, x in z.items()}


def average_of(y: Tensor, z: Tensor, b1: Scalar) -> Tensor:
    """The averaged iterate ``x``, from ``y = (1 - b1) * z + b1 * x``."""
    return z + (y - z) / b1


@renamed(weight_power="weight_lr_power")
def schedule_free(
    tx: GradientTransformation, learning_rate: Scalar | Schedule, *, b1: Scalar = 0.9, weight_lr_power: float = 2.0
) -> GradientTransformation:
    """Averaging in place of a learning-rate schedule. The parameters are ``y``, where gradients are taken:

        z = z + update of tx at y
        x = (1 - c) * x + c * z,  c = weight / sum of weights,  weight = (greatest learning_rate)**weight_lr_power
        y = (1 - b1) * z + b1 * x

    `eval_params` returns ``x``, from ``y`` and ``z``: no third copy is kept.

    Args:
        tx: an optimizer without momentum of its own, e.g. `sgd`, or `adamw` with ``b1=0``. Wrappers that keep weights
            (`lookahead`, `ema_params`) or accumulate gradients (`multi_steps`) are errors inside.
        learning_rate: that of ``tx``: a constant, or a warm-up.
        b1: in (0, 1): how close to ``x`` gradients are taken.
        weight_lr_power: power of the greatest learning rate so far by which iterates are weighed.

    Source: Defazio et al., "The road less scheduled" (arXiv 2405.15682).

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> params = {"w": torch.zeros(1)}
        >>> tx = optim.schedule_free(optim.sgd(1.0), 1.0, b1=0.5)
        >>> updates, state = tx.update({"w": torch.ones(1)}, tx.init(params), params)
        >>> updates, state = tx.update({"w": torch.ones(1)}, state, {"w": torch.tensor([-1.0])})
        >>> updates, optim.eval_params(state, {"w": torch.tensor([-1.75])})
        ({'w': tensor([-0.7500])}, {'w': tensor([-1.5000])})
    """
    tx = inside("schedule_free", tx)
    check_nonnegative(True, learning_rate=learning_rate)
    check_nonnegative(weight_lr_power=weight_lr_power)
    check_decay(b1=b1)
    if (number := known(b1)) == 0:
        raise ValueError(f"b1 must be in (0, 1), got {number}")

    def init(params: Params) -> ScheduleFreeState:
        zero = zero_scalar(params)
        return ScheduleFreeState(zero_count(params), zero + b1, zero, zero.clone(), copies(params), tx.init(params))

    def update(
        updates: PyTree, state: ScheduleFreeState, params: MaybeParams = None, **extra: Any
    ) -> tuple[PyTree, ScheduleFreeState]:
        need_params(params, "schedule_free")
        updates, inner = tx.update(updates, state.inner, params, **extra)
        rate = torch.zeros_like(state.max_rate) + value_at("learning_rate", learning_rate, state.step, updates)
        max_rate = torch.maximum(state.max_rate, rate.to(state.max_rate.dtype))
        weight = max_rate**weight_lr_power
        total = state.weight_sum + weight
        c = torch.where(total > 0, weight / torch.where(total > 0, total, 1.0), 0.0)
        # y_new - y, with x = z + (y - z) / b1 put in
        keep = tree.hoist(1 - c)
        z = tree.elementwise(lambda u, z: z + tree.upcast(u), updates, state.z)
        before = (
            state.interpolation if isinstance(b1, Tensor) else b1
        )  # the parameters were made with that of the last update

        def step(y: Tensor, old: Tensor, new: Tensor) -> Tensor:
            y = tree.upcast(y)
            x = new + keep * (average_of(y, old, before) - new)
            return new + b1 * (x - new) - y

        moved = tree.elementwise(step, params, state.z, z)
        now = torch.zeros_like(state.interpolation) + b1 if isinstance(b1, Tensor) else state.interpolation
        return moved, ScheduleFreeState(state.step + 1, now, total, max_rate, z, inner)

    return composed(init, update, tx, adds=(TiesWeights,))


@renamed(weight_power="weight_lr_power")
def schedule_free_sgd(
    learning_rate: Scalar | Schedule,
    *,
    b1: Scalar = 0.9,
    weight_lr_power: float = 2.0,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    """Gradient descent whose averages replace momentum and schedule: `schedule_free` of `sgd`, evaluated with
    `eval_params`:

        z = z - learning_rate * (g + weight_decay * y)

    Args:
        learning_rate: a constant, or a warm-up.
        b1, weight_lr_power: as `schedule_free`.
        weight_decay, mask: as `add_decayed_weights`, of the point ``y`` where gradients are taken.

    Source: Defazio et al. (arXiv 2405.15682). Their code warms up by an option of its own; here by a schedule.
    """
    return schedule_free(
        sgd(learning_rate, weight_decay=weight_decay, mask=mask), learning_rate, b1=b1, weight_lr_power=weight_lr_power
    )


@renamed(weight_power="weight_lr_power")
def schedule_free_adamw(
    learning_rate: Scalar | Schedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_lr_power: float = 2.0,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    """AdamW whose averages replace momentum and schedule: `schedule_free` of `adamw`, evaluated with `eval_params`:

        z = z - learning_rate * (g / (sqrt(nu_hat) + eps) + weight_decay * y)

    Args:
        learning_rate: a constant, or a warm-up.
        b1, weight_lr_power: as `schedule_free`.
        b2, eps: as `scale_by_adam`.
        weight_decay, mask: as `add_decayed_weights`, decoupled, of the point ``y`` where gradients are taken.

    Source: Defazio et al. (arXiv 2405.15682), algorithm 1, with warm-up by a schedule and the bias correction in the
    denominator alone: it enters neither the weights nor the decay.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.schedule_free_adamw(0.1), {"w": torch.ones(1)}
        >>> updates, state = tx.update({"w": torch.ones(1)}, tx.init(params), params)
        >>> updates
        {'w': tensor([-0.1000])}
    """
    inner = adamw(learning_rate, b1=0.0, b2=b2, eps=eps, weight_decay=weight_decay, mask=mask)
    return schedule_free(inner, learning_rate, b1=b1, weight_lr_power=weight_lr_power)


# --- primal averaging --------------------------------------------------------------------------------------------


class _PrimalAveraging(NamedTuple):
    interpolation: Tensor
    z: PyTree
    inner: PyTree


class PrimalAveragingState(_PrimalAveraging, TiesWeights):
    """The share of the average in ``y``, the iterate ``z``, the inner state."""

    __slots__ = ()

    def averaged(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            path: average_of(tree.upcast(params[path]), z, self.interpolation) for path, z in by_path(self.z).items()
        }


def primal_averaging(tx: GradientTransformation, *, b1: Scalar = 0.9, decay: Scalar = 0.99) -> GradientTransformation:
    """Generalized primal averaging: `schedule_free` with two constants. The parameters are ``y``, where gradients are
    taken:

        z = z + update of tx at y
        x = decay * x + (1 - decay) * z
        y = (1 - b1) * z + b1 * x

    `eval_params` returns ``x``. With ``decay == b1`` it is Nesterov's method around ``tx``.

    Args:
        tx: an optimizer without momentum of its own.
        b1: in (0, 1]: how close to ``x`` gradients are taken.
        decay: in [0, 1): of the average.

    Source: Defazio et al., "Smoothing DiLoCo with primal averaging for faster training of LLMs" (arXiv 2512.17131).

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.primal_averaging(optim.sgd(1.0), b1=0.5, decay=0.5), {"w": torch.zeros(1)}
        >>> updates, state = tx.update({"w": torch.ones(1)}, tx.init(params), params)
        >>> params = optim.apply_updates(params, updates)
        >>> params, optim.eval_params(state, params)
        ({'w': tensor([-0.7500])}, {'w': tensor([-0.5000])})
    """
    tx = inside("primal_averaging", tx)
    check_fraction(b1=b1)
    check_decay(decay=decay)

    def init(params: Params) -> PrimalAveragingState:
        return PrimalAveragingState(zero_scalar(params) + b1, copies(params), tx.init(params))

    def update(
        updates: PyTree, state: PrimalAveragingState, params: MaybeParams = None, **extra: Any
    ) -> tuple[PyTree, PrimalAveragingState]:
        need_params(params, "primal_averaging")
        updates, inner = tx.update(updates, state.inner, params, **extra)
        z = tree.elementwise(lambda u, z: z + tree.upcast(u), updates, state.z)
        before = state.interpolation if isinstance(b1, Tensor) else b1

        def step(y: Tensor, old: Tensor, new: Tensor) -> Tensor:
            y = tree.upcast(y)
            x = new + decay * (average_of(y, old, before) - new)
            return new + b1 * (x - new) - y

        now = torch.zeros_like(state.interpolation) + b1
        return tree.elementwise(step, params, state.z, z), PrimalAveragingState(now, z, inner)

    return composed(init, update, tx, adds=(TiesWeights,))
