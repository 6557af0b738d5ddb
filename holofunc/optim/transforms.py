"""The plain pieces optimizers are chained from: step sizes, momentum, weight decay, clipping, noise."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from holofunc import random, tree
from holofunc.compile import opaque
from holofunc.optim.base import (
    EmptyState,
    GradientTransformation,
    MaybeParams,
    check_params,
    composed,
    need_params,
    stateless,
)
from holofunc.optim.capabilities import Descends, KeepsProgress, ReportsHyperparams
from holofunc.optim.labels import Mask, check_labels, mask_values
from holofunc.optim.numerics import (
    bias_correction,
    check_bound,
    check_decay,
    check_finite,
    check_flags,
    check_nonnegative,
    is_zero,
    known,
    scalar_dtype,
    value_at,
    zero_count,
    zeros,
)
from holofunc.typing import Key, Params, PyTree, Scalar, Schedule

__all__ = [
    "EmaState",
    "NoiseState",
    "ScheduleState",
    "TraceState",
    "add_decayed_weights",
    "add_noise",
    "centralize",
    "clip_by_global_norm",
    "clip_by_value",
    "ema",
    "keep_params_nonnegative",
    "moving_average",
    "nan_to_num",
    "scale",
    "scale_by_learning_rate",
    "scale_by_schedule",
    "scale_by_sign",
    "trace",
    "zero_nans",
]

# --- step sizes --------------------------------------------------------------------------------------------------


class _Schedule(NamedTuple):
    count: Tensor  # type: ignore[assignment]


class ScheduleState(_Schedule, KeepsProgress):
    """Updates so far: the argument of a schedule."""

    __slots__ = ()

    @property
    def progress(self) -> tuple[str, ...]:
        return ("count",)


class _LearningRate(NamedTuple):
    count: Tensor  # type: ignore[assignment]
    rate: Tensor


class LearningRateState(_LearningRate, KeepsProgress, ReportsHyperparams):
    """Updates so far, and the learning rate of the latest one."""

    __slots__ = ()

    @property
    def progress(self) -> tuple[str, ...]:
        return ("count", "rate")

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
    tx = stateless(lambda updates, params: tree.elementwise(lambda u: tree.wide(u) * factor, updates), "scale")
    sign = known(factor)
    return composed(*tx, adds=(Descends,)) if sign is not None and sign < 0 else tx


def scale_by_schedule(schedule: Scalar | Schedule) -> GradientTransformation:
    """``u * schedule(count)``, where ``count`` is the number of updates before this one."""
    check_finite(True, schedule=schedule)

    def init(params: Params) -> ScheduleState:
        check_params(params, "scale_by_schedule")
        return ScheduleState(zero_count(params))

    def update(
        updates: PyTree, state: ScheduleState, params: MaybeParams = None, **extra: Any
    ) -> tuple[PyTree, ScheduleState]:
        factor = value_at("schedule", schedule, state.count, updates)
        return tree.elementwise(lambda u: tree.wide(u) * factor, updates), ScheduleState(state.count + 1)

    return GradientTransformation(init, update)


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

    def rate_at(count: Tensor, like: PyTree) -> tuple[Scalar, Tensor]:
        rate = value_at("learning_rate", learning_rate, count, like)
        return rate, torch.zeros_like(count, dtype=scalar_dtype(like)) + rate

    def init(params: Params) -> LearningRateState:
        check_params(params, "scale_by_learning_rate")
        count = zero_count(params)
        return LearningRateState(count, rate_at(count, params)[1])

    def update(
        updates: PyTree, state: LearningRateState, params: MaybeParams = None, **extra: Any
    ) -> tuple[PyTree, LearningRateState]:
        rate, known = rate_at(state.count, updates)
        return tree.elementwise(lambda u: tree.wide(u) * -rate, updates), LearningRateState(state.count + 1, known)

    return composed(init, update, adds=(Descends,))


# --- momentum ----------------------------------------------------------------------------------------------------


class TraceState(NamedTuple):
    """Updates so far, and the decaying sum."""

    count: Tensor  # type: ignore[assignment]
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

    def init(params: Params) -> TraceState:
        check_params(params, "trace")
        return TraceState(zero_count(params), zeros(params))

    def update(
        updates: PyTree, state: TraceState, params: MaybeParams = None, **extra: Any
    ) -> tuple[PyTree, TraceState]:
        gain = 1.0 if is_zero(dampening) else tree.hoist(1 - dampening * (state.count > 0).to(scalar_dtype(updates)))
        total = tree.elementwise(lambda u, t: decay * t + gain * tree.wide(u), updates, state.trace)
        out = tree.elementwise(lambda u, t: tree.wide(u) + decay * t, updates, total) if nesterov else total
        return out, TraceState(state.count + 1, total)

    return GradientTransformation(init, update)


def moving_average(updates: PyTree, average: PyTree, decay: Scalar) -> PyTree:
    """``decay * average + (1 - decay) * updates``, in the dtype of ``average``."""
    return tree.elementwise(
        lambda u, a: (tree.wide(a) + (1 - decay) * (tree.wide(u) - tree.wide(a))).to(a.dtype), updates, average
    )


class EmaState(NamedTuple):
    """Updates so far, and their moving average."""

    count: Tensor  # type: ignore[assignment]
    ema: PyTree


def ema(decay: Scalar, *, debias: bool = True) -> GradientTransformation:
    """The moving average of the updates: ``ema = decay * ema + (1 - decay) * u``.

    Args:
        decay: in [0, 1).
        debias: divide by ``1 - decay**count``, so that the first averages are not too small.
    """
    check_flags(debias=debias)
    check_decay(decay=decay)

    def init(params: Params) -> EmaState:
        check_params(params, "ema")
        return EmaState(zero_count(params), zeros(params))

    def update(updates: PyTree, state: EmaState, params: MaybeParams = None, **extra: Any) -> tuple[PyTree, EmaState]:
        count, average = state.count + 1, moving_average(updates, state.ema, decay)
        out = average
        if debias:
            gain = tree.hoist(1 / bias_correction(decay, count, scalar_dtype(updates)))
            out = tree.elementwise(lambda a: a * gain, average)
        return out, EmaState(count, average)

    return GradientTransformation(init, update)


# --- weight decay --------------------------------------------------------------------------------------------------


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
    check_nonnegative(True, weight_decay=weight_decay)

    def init(params: Params) -> PyTree:
        check_params(params, "add_decayed_weights")
        if mask is not None:
            check_labels("mask", mask, params, bool)
        return ScheduleState(zero_count(params)) if callable(weight_decay) else EmptyState()

    def update(updates: PyTree, state: Any, params: MaybeParams = None, **extra: Any) -> tuple[PyTree, Any]:
        if is_zero(weight_decay):
            return updates, state
        need_params(params, "add_decayed_weights")
        if callable(weight_decay):
            now, state = value_at("weight_decay", weight_decay, state.count, updates), ScheduleState(state.count + 1)
        else:
            now = weight_decay
        if mask is None:
            return tree.elementwise(lambda u, p: tree.wide(u) + now * tree.wide(p), updates, params), state
        uses = mask_values(mask, params)
        decayed = tree.elementwise(lambda u, p, m: tree.wide(u) + now * m * tree.wide(p), updates, params, uses)
        return decayed, state

    return GradientTransformation(init, update)


# --- bounds ------------------------------------------------------------------------------------------------------


def clip_by_global_norm(max_norm: Scalar) -> GradientTransformation:
    """Shorten the updates, all together, to a Euclidean norm of at most ``max_norm``.

    ``torch.nn.utils.clip_grad_norm_`` divides by ``norm + 1e-6`` instead of ``norm``.

    Raises:
        ValueError: a negative ``max_norm``.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> optim.clip_by_global_norm(1.0).update({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}, ())[0]
        {'a': tensor([0.6000]), 'b': tensor([0.8000])}
    """
    check_bound(max_norm=max_norm)

    def fn(updates: PyTree, params: MaybeParams) -> PyTree:
        norm = tree.global_norm(updates)
        long = ~(norm <= max_norm)  # a NaN is too long
        factor = tree.hoist(torch.where(long, max_norm / torch.where(long, norm, 1.0), 1.0))
        return tree.elementwise(lambda u: tree.wide(u) * factor, updates)

    return stateless(fn, "clip_by_global_norm")


def clip_by_value(max_value: Scalar) -> GradientTransformation:
    """Clip each element of the updates to [-max_value, max_value].

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> optim.clip_by_value(1.0).update({"w": torch.tensor([3.0, -0.5])}, ())[0]
        {'w': tensor([ 1.0000, -0.5000])}
    """
    check_bound(max_value=max_value)
    return stateless(
        lambda updates, params: tree.elementwise(lambda u: u.clamp(-max_value, max_value), updates), "clip_by_value"
    )


def scale_by_sign() -> GradientTransformation:
    """The sign of each element: -1, 0 or 1."""
    return stateless(lambda updates, params: tree.elementwise(torch.sign, updates), "scale_by_sign")


def zero_nans() -> GradientTransformation:
    """Zero in place of each NaN; to refuse whole updates, see `apply_if_finite`."""
    return stateless(
        lambda updates, params: tree.elementwise(lambda u: torch.where(u.isnan(), torch.zeros_like(u), u), updates),
        "zero_nans",
    )


def nan_to_num(nan: float = 0.0, posinf: float | None = None, neginf: float | None = None) -> GradientTransformation:
    """Numbers in place of NaN and the infinities; None is the largest and the smallest number of the dtype."""
    given = {"nan": nan, "posinf": posinf, "neginf": neginf}
    check_finite(**{name: value for name, value in given.items() if value is not None})
    return stateless(
        lambda updates, params: tree.elementwise(lambda u: u.nan_to_num(nan, posinf, neginf), updates), "nan_to_num"
    )


def keep_params_nonnegative() -> GradientTransformation:
    """Cut updates short where they would make a parameter negative; stands at the end of a chain."""

    def fn(updates: PyTree, params: MaybeParams) -> PyTree:
        need_params(params, "keep_params_nonnegative")
        return tree.elementwise(lambda u, p: torch.maximum(u, -tree.wide(p).to(u.dtype)), updates, params)

    return stateless(fn, "keep_params_nonnegative")


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

    return stateless(lambda updates, params: opaque(lambda u: tree.map(center, u), updates), "centralize")


# --- noise -------------------------------------------------------------------------------------------------------


class _Noise(NamedTuple):
    count: Tensor  # type: ignore[assignment]
    key: Key


class NoiseState(_Noise, KeepsProgress):
    """Updates so far, and the key that the noise of all updates derives from."""

    __slots__ = ()

    @property
    def progress(self) -> tuple[str, ...]:
        return ("count",)


def add_noise(key: Key, eta: Scalar, *, gamma: Scalar = 0.55) -> GradientTransformation:
    """Gaussian noise of variance ``eta / (1 + count)**gamma`` on each element.

    Args:
        key: the noise is a function of it, of the number of the update and of the paths.
        eta: variance of the first noise.
        gamma: how fast the variance falls.

    Source: Neelakantan et al., "Adding gradient noise improves learning" (arXiv 1511.06807).
    """
    check_nonnegative(eta=eta, gamma=gamma)
    random.check_key(key)

    def init(params: Params) -> NoiseState:
        check_params(params, "add_noise")
        return NoiseState(zero_count(params), key.clone())

    def update(
        updates: PyTree, state: NoiseState, params: MaybeParams = None, **extra: Any
    ) -> tuple[PyTree, NoiseState]:
        dtype = scalar_dtype(updates)
        std = (eta / (1 + state.count.to(dtype)) ** gamma) ** 0.5
        draws = std * random.normal(random.fold_in(state.key, state.count), (tree.size(updates),), dtype=dtype)
        pairs = zip(tree.leaves(updates), tree.leaves(cut_draws(draws, updates)), strict=True)
        noisy = tree.rebuild(updates, [tree.wide(u) + noise for u, noise in pairs])
        return noisy, NoiseState(state.count + 1, state.key)

    return GradientTransformation(init, update)


def cut_draws(draws: Tensor, like: PyTree) -> PyTree:
    """A vector of one draw per element of ``like`` as a tree of its shapes, in the order of the sorted paths."""
    flat = dict(tree.leaves_with_path(like))
    names = sorted(flat)  # a draw must not depend on the order of a dict
    pieces = dict(zip(names, draws.split([flat[n].numel() for n in names]), strict=True))
    return tree.rebuild(like, [pieces[path].view(x.shape).to(x.device) for path, x in flat.items()])
