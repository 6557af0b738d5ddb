"""The pieces that optimizers are chained from: step sizes, momentum, weight decay, signs, sizes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from holofunc import tree
from holofunc.compile import opaque
from holofunc.optim.base import EmptyState, GradientTransformation, MaybeParams, composed, named_chain, stateless
from holofunc.optim.capabilities import Descends, KeepsProgress, PointsAnywhere, ReportsHyperparams
from holofunc.optim.checks import need_params
from holofunc.optim.labels import Mask, check_mask, mask_values
from holofunc.optim.numerics import block_rms, divisor, far_norm, is_zero, scalar_dtype, zeros
from holofunc.optim.ranges import check_decay, check_finite, check_flags, check_nonnegative, first_value, known
from holofunc.optim.scalars import bias_correction, value_at, zero_count
from holofunc.typing import Params, PyTree, Scalar, Schedule

__all__ = [
    "EmaState", "ScheduleState", "TraceState", "add_decayed_weights", "centralize", "ema", "moving_average",
    "normalize_by_update_norm", "scale", "scale_by_learning_rate", "scale_by_param_block_norm",
    "scale_by_param_block_rms", "scale_by_schedule", "scale_by_sign", "trace",
]  # fmt: skip


# --- step sizes --------------------------------------------------------------------------------------------------


class _Schedule(NamedTuple):
    step: Tensor


class ScheduleState(_Schedule, KeepsProgress):
    """Updates so far: the argument of a schedule."""

    __slots__ = ()


class _LearningRate(NamedTuple):
    step: Tensor
    rate: Tensor


class LearningRateState(_LearningRate, KeepsProgress, ReportsHyperparams):
    """Updates so far, and the learning rate of the latest one."""

    __slots__ = ()

    @property
    def progress(self) -> tuple[str, ...]:
        return ("step", "rate")

    @property
    def hyperparameters(self) -> dict[str, Tensor]:
        return {"learning_rate": self.rate}


def scale(factor: Scalar) -> GradientTransformation:
    """``u * factor``.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> optim.scale(-0.5).update({"w": torch.ones(1)}, ())[0]
        {'w': tensor([-0.5000])}
    """
    check_finite(factor=factor)
    tx = stateless(lambda updates, params: tree.elementwise(lambda u: tree.upcast(u) * factor, updates))
    return composed(*tx, adds=_direction_of(factor))


def _direction_of(factor: Scalar) -> tuple[type, ...]:
    """What is known of updates times ``factor``."""
    number = known(factor)
    return (PointsAnywhere,) if not number else (Descends,) if number < 0 else ()


def scale_by_schedule(schedule: Scalar | Schedule) -> GradientTransformation:
    """``u * schedule(step)``, where ``step`` is the number of updates before this one."""
    check_finite(True, schedule=schedule)
    first = first_value("schedule", schedule) if callable(schedule) else schedule

    def update(updates: PyTree, state: ScheduleState) -> tuple[PyTree, ScheduleState]:
        factor = value_at("schedule", schedule, state.step, updates)
        return tree.elementwise(lambda u: tree.upcast(u) * factor, updates), ScheduleState(state.step + 1)

    return composed(lambda params: ScheduleState(zero_count(params)), update, adds=_direction_of(first))


def scale_by_learning_rate(learning_rate: Scalar | Schedule) -> GradientTransformation:
    """``-learning_rate * u``: the end of an optimizer's chain, where direction becomes descent.

    Args:
        learning_rate: a number, a 0-d tensor, or a schedule of the number of updates before this one.

    Raises:
        ValueError: a negative rate.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> params = {"w": torch.ones(1)}
        >>> tx = optim.scale_by_learning_rate(optim.schedules.linear(1.0, 0.0, 4))
        >>> updates, state = tx.update(params, tx.init(params))
        >>> tx.update(params, state)[0]
        {'w': tensor([-0.7500])}
    """
    check_nonnegative(True, learning_rate=learning_rate)

    def rate_at(step: Tensor, like: PyTree) -> tuple[Scalar, Tensor]:
        rate = value_at("learning_rate", learning_rate, step, like)
        return rate, torch.zeros_like(step, dtype=scalar_dtype(like)) + rate

    def init(params: Params) -> LearningRateState:
        step = zero_count(params)
        return LearningRateState(step, rate_at(step, params)[1])

    def update(updates: PyTree, state: LearningRateState) -> tuple[PyTree, LearningRateState]:
        rate, known = rate_at(state.step, updates)
        return tree.elementwise(lambda u: tree.upcast(u) * -rate, updates), LearningRateState(state.step + 1, known)

    return composed(init, update, adds=(Descends,))


def descend(
    learning_rate: Scalar | Schedule,
    weight_decay: Scalar | Schedule,
    mask: Mask | None,
    *,
    decoupled: bool,
    **rules: GradientTransformation,
) -> GradientTransformation:
    """The shape of nearly all optimizers: weight decay, rules (decoupled: the other way round), learning rate."""
    check_flags(decoupled=decoupled)
    decay = {"weight_decay": add_decayed_weights(weight_decay, mask)}
    parts = {**rules, **decay} if decoupled else {**decay, **rules}
    return named_chain(**parts, learning_rate=scale_by_learning_rate(learning_rate))


# --- momentum ----------------------------------------------------------------------------------------------------


class TraceState(NamedTuple):
    """Updates so far, and the decaying sum."""

    step: Tensor
    trace: PyTree


def trace(decay: Scalar, *, nesterov: bool = False, dampening: Scalar = 0.0) -> GradientTransformation:
    """Momentum, a decaying sum: ``trace = decay * trace + (1 - dampening) * u``.

    The first sum is ``u`` itself, not dampened, as in ``torch.optim.SGD``.

    Args:
        decay: in [0, 1).
        nesterov: return ``u + decay * trace`` instead of ``trace``.
        dampening: in [0, 1).

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, g = optim.trace(0.5), {"w": torch.ones(1)}
        >>> updates, state = tx.update(g, tx.init(g))
        >>> tx.update(g, state)[0]
        {'w': tensor([1.5000])}
    """
    check_flags(nesterov=nesterov)
    check_decay(decay=decay, dampening=dampening)

    def update(updates: PyTree, state: TraceState) -> tuple[PyTree, TraceState]:
        gain = 1.0 if is_zero(dampening) else tree.hoist(1 - dampening * (state.step > 0).to(scalar_dtype(updates)))
        total = tree.elementwise(lambda u, t: decay * t + gain * tree.upcast(u), updates, state.trace)
        out = tree.elementwise(lambda u, t: tree.upcast(u) + decay * t, updates, total) if nesterov else total
        return out, TraceState(state.step + 1, total)

    return GradientTransformation(lambda params: TraceState(zero_count(params), zeros(params)), update)


def moving_average(updates: PyTree, average: PyTree, decay: Scalar) -> PyTree:
    """``decay * average + (1 - decay) * updates``, in the dtype of ``average``."""
    return tree.elementwise(
        lambda u, a: (tree.upcast(a) + (1 - decay) * (tree.upcast(u) - tree.upcast(a))).to(a.dtype), updates, average
    )


class EmaState(NamedTuple):
    """Updates so far, and their moving average."""

    step: Tensor
    ema: PyTree


def ema(decay: Scalar, *, debias: bool = True) -> GradientTransformation:
    """The moving average of the updates: ``ema = decay * ema + (1 - decay) * u``.

    Args:
        decay: in [0, 1).
        debias: divide by ``1 - decay**step``, so that the first averages are not too small.
    """
    check_flags(debias=debias)
    check_decay(decay=decay)

    def update(updates: PyTree, state: EmaState) -> tuple[PyTree, EmaState]:
        step, average = state.step + 1, moving_average(updates, state.ema, decay)
        out = average
        if debias:
            gain = tree.hoist(1 / bias_correction(decay, step, scalar_dtype(updates)))
            out = tree.elementwise(lambda a: a * gain, average)
        return out, EmaState(step, average)

    return GradientTransformation(lambda params: EmaState(zero_count(params), zeros(params)), update)


# --- weight decay ------------------------------------------------------------------------------------------------


def add_decayed_weights(weight_decay: Scalar | Schedule, mask: Mask | None = None) -> GradientTransformation:
    """``u + weight_decay * p``.

    In front of a rule it is L2 regularisation, behind it (and before the learning rate) it is decoupled.

    Args:
        weight_decay: at least 0; a number, a 0-d tensor or a schedule.
        mask: True where weights decay; None is everywhere. `no_decay_mask` is the usual one.

    Raises:
        ValueError: a negative ``weight_decay``; in ``init``, a ``mask`` of another structure.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> params = {"w": torch.full((2, 1), 10.0), "b": torch.full((1,), 10.0)}
        >>> tx = optim.add_decayed_weights(0.1, mask=optim.no_decay_mask)
        >>> tx.update({"w": torch.zeros(2, 1), "b": torch.zeros(1)}, tx.init(params), params)[0]
        {'w': tensor([[1.], [1.]]), 'b': tensor([0.])}
    """
    return decaying("add_decayed_weights", lambda u, p, decay: u + decay * p, weight_decay, mask)


def decaying(
    name: str, rule: Callable[[Tensor, Tensor, Any], Tensor], weight_decay: Scalar | Schedule, mask: Mask | None
) -> GradientTransformation:
    """The transformation ``name``: ``rule(u, p, weight_decay)`` for each element, where ``mask`` is True."""
    check_nonnegative(True, weight_decay=weight_decay)

    def init(params: Params) -> PyTree:
        check_mask(mask, params)
        return ScheduleState(zero_count(params)) if callable(weight_decay) else EmptyState()

    def update(updates: PyTree, state: Any, params: MaybeParams = None) -> tuple[PyTree, Any]:
        if is_zero(weight_decay):
            return updates, state
        need_params(params, name)
        now = weight_decay
        if callable(weight_decay):
            now, state = value_at("weight_decay", weight_decay, state.step, updates), ScheduleState(state.step + 1)
        if mask is None:
            return tree.elementwise(lambda u, p: rule(tree.upcast(u), tree.upcast(p), now), updates, params), state
        uses = mask_values(mask, params)
        decayed = tree.elementwise(lambda u, p, m: rule(tree.upcast(u), tree.upcast(p), now * m), updates, params, uses)
        return decayed, state

    return GradientTransformation(init, update)


# --- of each element, and of each tensor -------------------------------------------------------------------------


def scale_by_sign() -> GradientTransformation:
    """The sign of each element: -1, 0 or 1."""
    return stateless(lambda updates, params: tree.elementwise(torch.sign, updates))


def centralize() -> GradientTransformation:
    """Subtract from each tensor of two or more axes its mean over all axes but the first.

    Source: Yong et al., "Gradient centralization" (arXiv 2004.01461).

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> optim.centralize().update({"w": torch.tensor([[1.0, 3.0]]), "b": torch.ones(1)}, ())[0]
        {'w': tensor([[-1.,  1.]]), 'b': tensor([1.])}
    """

    def center(u: Tensor) -> Tensor:
        return u - u.mean(dim=tuple(range(1, u.ndim)), keepdim=True) if u.ndim > 1 else u

    return stateless(lambda updates, params: opaque(lambda u: tree.map(center, u), updates))


def normalize_by_update_norm(eps: Scalar = 1e-6) -> GradientTransformation:
    """``u / (norm(u) + eps)``, with the norm of all tensors together."""
    check_nonnegative(eps=eps)

    def fn(updates: PyTree, params: MaybeParams) -> PyTree:
        factor = tree.hoist(1 / divisor(far_norm(tree.global_norm, updates), eps))
        return tree.elementwise(lambda u: tree.upcast(u) * factor, updates)

    return stateless(fn)


def scale_by_param_block_norm(min_scale: Scalar = 1e-3) -> GradientTransformation:
    """``u * max(norm(p), min_scale)``, for each tensor."""
    return _scale_by_block(tree.leaf_norm, min_scale, "scale_by_param_block_norm")


def scale_by_param_block_rms(min_scale: Scalar = 1e-3) -> GradientTransformation:
    """``u * max(rms(p), min_scale)``, for each tensor."""
    return _scale_by_block(block_rms, min_scale, "scale_by_param_block_rms")


def _scale_by_block(measure: Any, min_scale: Scalar, name: str) -> GradientTransformation:
    check_nonnegative(min_scale=min_scale)

    def fn(updates: PyTree, params: MaybeParams) -> PyTree:
        need_params(params, name)
        return tree.elementwise(lambda u, s: tree.upcast(u) * s.clamp_min(min_scale), updates, measure(params))

    return stateless(fn, name)
