"""Wrappers that keep a second set of parameters: slow weights, averages, schedule-free iterates."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from holofunc import tree
from holofunc.optim.base import (
    GradientTransformation,
    MaybeParams,
    check_params,
    check_transformation,
    composed,
    need_params,
)
from holofunc.optim.capabilities import KeepsCopies, KeepsProgress, KeepsWeights, TiesWeights
from holofunc.optim.layerwise import sizes
from holofunc.optim.nesting import check_inside, init_inside
from holofunc.optim.numerics import (
    ABSENT,
    bounded,
    check_decay,
    check_flags,
    check_fraction,
    check_nonnegative,
    copies,
    known,
    scalar_dtype,
    value_at,
    zero_count,
    zeros,
)
from holofunc.typing import Params, PyTree, Scalar, Schedule

__all__ = [
    "EmaParamsState",
    "LookaheadState",
    "ScheduleFreeState",
    "ScoutState",
    "ema_params",
    "lookahead",
    "schedule_free",
    "scout",
]


def by_path(values: PyTree) -> dict[str, Tensor]:
    return dict(tree.leaves_with_path(values))


class _Lookahead(NamedTuple):
    count: Tensor  # type: ignore[assignment]
    slow: PyTree
    inner: PyTree
    inner_slow: PyTree = ABSENT


class LookaheadState(_Lookahead, KeepsWeights, KeepsCopies):
    """Fast updates so far, the slow weights, the state of the inner optimizer, and what it was at the last sync."""

    __slots__ = ()

    @property
    def copies(self) -> tuple[str, ...]:
        return ("inner_slow",)

    def averaged(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return by_path(self.slow)


def lookahead(
    tx: GradientTransformation, sync_rate: Scalar = 0.5, sync_period: int = 6, *, inner_state: str = "keep"
) -> GradientTransformation:
    """Every ``sync_period`` updates of ``tx``, move slow weights towards the fast ones, and the fast ones there:

        slow = slow + sync_rate * (p - slow);  p = slow

    The slow weights are kept in fp32 at least. A parameter moves by adding ``slow - p`` to it, which may miss ``slow``
    by one rounding; the next sync starts from the exact slow weights again. `eval_params` returns the slow weights.

    Args:
        tx: the inner optimizer.
        sync_rate: in (0, 1].
        sync_period: fast updates between syncs, at least 1.
        inner_state: what a sync does to the state of ``tx``: ``"keep"`` it, ``"reset"`` it, or ``"pullback"``: move it
            back towards the last sync as the weights (the paper's three variants). Schedules go on, and injected
            hyperparameters stay, in all three.

    Source: Zhang et al., "Lookahead optimizer: k steps forward, 1 step back" (arXiv 1907.08610).

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> params = {"w": torch.zeros(1)}
        >>> tx = optim.lookahead(optim.sgd(1.0), sync_rate=0.5, sync_period=2)
        >>> state = tx.init(params)
        >>> for _ in range(2):
        ...     updates, state = tx.update({"w": torch.ones(1)}, state, params)
        ...     params = optim.apply_updates(params, updates)
        >>> params
        {'w': tensor([-1.])}
    """
    check_transformation("tx", tx)
    check_inside("lookahead", tx)
    _check_sync(sync_rate, sync_period, at_least=1)
    if inner_state not in ("keep", "reset", "pullback"):
        raise ValueError(f"inner_state must be 'keep', 'reset' or 'pullback', got {inner_state!r}")

    def init(params: Params) -> LookaheadState:
        check_params(params, "lookahead")
        inner = init_inside("lookahead", tx, params)
        held = tree.map(torch.clone, inner) if inner_state == "pullback" else ABSENT
        return LookaheadState(zero_count(params), copies(params), inner, held)

    def update(
        updates: PyTree, state: LookaheadState, params: MaybeParams = None, **extra: Any
    ) -> tuple[PyTree, LookaheadState]:
        need_params(params, "lookahead")
        updates, inner = tx.update(updates, state.inner, params, **extra)
        count = state.count + 1
        now = count % sync_period == 0
        slow = synced(now, sync_rate, state.slow, params, updates)
        updates = tree.elementwise(lambda u, s, p: torch.where(now, s - tree.wide(p), u), updates, slow, params)
        held = state.inner_slow
        if inner_state == "reset":
            inner = tree.where(now, _with_progress(tx.init(params), inner), inner)
        elif inner_state == "pullback":
            held = tree.where(now, tree.map(lambda a, b: _mixed(a, b, sync_rate), held, inner), held)
            inner = tree.where(now, _with_progress(held, inner), inner)
        return updates, LookaheadState(count, slow, inner, held)

    return composed(init, update, tx, adds=(KeepsWeights,))


def _with_progress(state: PyTree, now: PyTree) -> PyTree:
    """``state``, with what tells how far training has come (the fields that ``progress`` names) as it is ``now``."""
    if state is None or not tree.is_node(state):
        return state
    kept, others = now.progress if isinstance(now, KeepsProgress) else (), tree.children(now)
    pairs = tree.children(state).items()
    return tree.with_children(state, [others[n] if n in kept else _with_progress(x, others[n]) for n, x in pairs])


def _check_sync(sync_rate: Scalar, sync_period: int, at_least: int) -> None:
    check_fraction(sync_rate=sync_rate)
    if isinstance(sync_period, bool) or not isinstance(sync_period, int) or sync_period < at_least:
        raise ValueError(f"sync_period must be an int of at least {at_least}, got {sync_period!r}")


def _mixed(old: Tensor, new: Tensor, rate: Scalar) -> Tensor:
    return old + rate * (new - bounded(old)) if old.is_floating_point() else new


def synced(now: Tensor, rate: Scalar, slow: PyTree, params: PyTree, updates: PyTree) -> PyTree:
    """The slow weights: moved towards ``params + updates`` by ``rate`` where ``now`` holds."""
    return tree.elementwise(
        lambda s, p, u: torch.where(now, s + rate * (tree.wide(p) + tree.wide(u) - s), s), slow, params, updates
    )


class _Scout(NamedTuple):
    count: Tensor  # type: ignore[assignment]
    slow: PyTree
    inner: PyTree
    mean: PyTree
    deviation: PyTree
    low: PyTree
    high: PyTree


class ScoutState(_Scout, KeepsWeights):
    """As `LookaheadState`; of the updates since the last sync, mean, sum of squared deviations, least and greatest."""

    __slots__ = ()

    def averaged(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return by_path(self.slow)


def scout(
    tx: GradientTransformation, sync_rate: Scalar = 0.5, sync_period: int = 6, *, compat: bool = False
) -> GradientTransformation:
    """Lookahead with a rate that grows where the fast updates since the last sync scatter little:

        spread = mean over tensors of the mean over elements of std(u) / max(abs(u - mean(u)))
        rate = clamp(1 - spread, sync_rate, 1)

    The statistic has no scale and does not see a common direction. For ``sync_period`` k it lies between
    ``sqrt(k) / (k - 1)`` and ``sqrt(k / (k - 1))``, so the rate exceeds 0.5 only where it is below 0.5: never,
    in practice, at the defaults, where this is `lookahead`. Elements whose updates were all equal count as 1.

    Args:
        tx: the inner optimizer.
        sync_rate: least rate, in (0, 1].
        sync_period: fast updates between syncs, at least 3.
        compat: keep the raw statistic, in which equal updates make NaN and throw the weights back to the last sync.

    Source: Holocron 0.3.0, whose memory of all updates is replaced by running sums.

    Example:
        >>> from holofunc import optim
        >>> tx = optim.scout(optim.adam(1e-3), sync_period=20)
    """
    check_flags(compat=compat)
    check_transformation("tx", tx)
    check_inside("scout", tx)
    _check_sync(sync_rate, sync_period, at_least=3)

    def init(params: Params) -> ScoutState:
        check_params(params, "scout")
        sums = [zeros(params) for _ in range(4)]
        return ScoutState(zero_count(params), copies(params), init_inside("scout", tx, params), *sums)

    def spread(deviation: Tensor, mean: Tensor, low: Tensor, high: Tensor, share: Tensor) -> Tensor:
        std = tree.safe_sqrt(deviation / (sync_period - 1))
        furthest = torch.maximum(high - mean, mean - low)
        if compat:
            return share * std / furthest
        return share * torch.where(furthest > 0, std / torch.where(furthest > 0, furthest, 1.0), 1.0)

    def update(
        updates: PyTree, state: ScoutState, params: MaybeParams = None, **extra: Any
    ) -> tuple[PyTree, ScoutState]:
        need_params(params, "scout")
        updates, inner = tx.update(updates, state.inner, params, **extra)
        count, dtype = state.count + 1, scalar_dtype(updates)
        number = state.count % sync_period + 1  # of this update since the last sync
        first, now = number == 1, number == sync_period
        fresh, share = tree.hoist((~first).to(dtype)), tree.hoist(1 / number.to(dtype))
        old = tree.elementwise(lambda m: fresh * m, state.mean)
        mean = tree.elementwise(lambda u, m: m + share * (tree.wide(u) - m), updates, old)
        deviation = tree.elementwise(
            lambda u, d, m, n: fresh * d + (tree.wide(u) - m) * (tree.wide(u) - n), updates, state.deviation, old, mean
        )
        low = tree.elementwise(lambda u, x: torch.where(first, u, torch.minimum(u, x)).to(x.dtype), updates, state.low)
        high = tree.elementwise(
            lambda u, x: torch.where(first, u, torch.maximum(u, x)).to(x.dtype), updates, state.high
        )
        leaves = len(tree.paths(state.slow))
        weight = tree.elementwise(lambda n: 1 / (n * leaves), sizes(state.slow))
        coherence = tree.total(tree.elementwise(spread, deviation, mean, low, high, weight))
        rate = tree.hoist((1 - coherence).clamp_min(sync_rate).clamp_max(1.0))
        if compat:
            rate = tree.hoist(torch.where(coherence.isnan(), 0.0, rate))
        slow = synced(now, rate, state.slow, params, updates)
        updates = tree.elementwise(lambda u, s, p: torch.where(now, s - tree.wide(p), u), updates, slow, params)
        return updates, ScoutState(count, slow, inner, mean, deviation, low, high)

    return composed(init, update, tx, adds=(KeepsWeights,))


class _EmaParams(NamedTuple):
    count: Tensor  # type: ignore[assignment]
    average: PyTree
    inner: PyTree


class EmaParamsState(_EmaParams, KeepsWeights):
    """Updates so far, the average of the parameters, the state of the inner optimizer."""

    __slots__ = ()

    def averaged(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return by_path(self.average)


def ema_params(
    tx: GradientTransformation, decay: Scalar | Schedule = 0.9999, *, warmup: bool = False
) -> GradientTransformation:
    """Keep a moving average of the parameters: ``average = decay * average + (1 - decay) * p``, after each update.

    `eval_params` returns the average. It starts as the initial parameters.

    Args:
        tx: the optimizer whose parameters are averaged.
        decay: in [0, 1); a number, a 0-d tensor or a schedule.
        warmup: use ``min(decay, (1 + count) / (10 + count))``, so that a young average forgets faster.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> params = {"w": torch.zeros(1)}
        >>> tx = optim.ema_params(optim.sgd(1.0), decay=0.75)
        >>> updates, state = tx.update({"w": torch.ones(1)}, tx.init(params), params)
        >>> optim.eval_params(state, params)
        {'w': tensor([-0.2500])}
    """
    check_flags(warmup=warmup)
    check_transformation("tx", tx)
    check_decay(True, decay=decay)

    def init(params: Params) -> EmaParamsState:
        check_params(params, "ema_params")
        return EmaParamsState(zero_count(params), copies(params), tx.init(params))

    def update(
        updates: PyTree, state: EmaParamsState, params: MaybeParams = None, **extra: Any
    ) -> tuple[PyTree, EmaParamsState]:
        need_params(params, "ema_params")
        updates, inner = tx.update(updates, state.inner, params, **extra)
        now = value_at("decay", decay, state.count, updates)
        if warmup:
            count = state.count.to(torch.float64)
            now = tree.hoist(((1 + count) / (10 + count)).clamp_max(now).to(scalar_dtype(updates)))
        average = synced(torch.ones_like(state.count, dtype=torch.bool), 1 - now, state.average, params, updates)
        return updates, EmaParamsState(state.count + 1, average, inner)

    return composed(init, update, tx, adds=(KeepsWeights,))


class _ScheduleFree(NamedTuple):
    count: Tensor  # type: ignore[assignment]
    b1: Tensor
    weight_sum: Tensor
    max_rate: Tensor
    z: PyTree
    inner: PyTree


class ScheduleFreeState(_ScheduleFree, TiesWeights):
    """Updates so far, interpolation, sum of weights, greatest learning rate; the iterate ``z``; the inner state."""

    __slots__ = ()

    def averaged(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        z = by_path(self.z)
        return {path: average_of(tree.wide(params[path]), x, self.b1) for path, x in z.items()}


def average_of(y: Tensor, z: Tensor, b1: Scalar) -> Tensor:
    """The averaged iterate ``x``, from ``y = (1 - b1) * z + b1 * x``."""
    return z + (y - z) / b1


def schedule_free(
    tx: GradientTransformation, learning_rate: Scalar | Schedule, *, b1: Scalar = 0.9, weight_power: float = 2.0
) -> GradientTransformation:
    """Averaging in place of a learning-rate schedule. The parameters are ``y``, where gradients are taken:

        z = z + update of tx at y
        x = (1 - c) * x + c * z,  where c = weight / sum of weights and weight = (greatest learning_rate)**weight_power
        y = (1 - b1) * z + b1 * x

    `eval_params` returns ``x``, from ``y`` and ``z``: no third copy is kept.

    Args:
        tx: an optimizer without momentum of its own, e.g. `sgd`, or `adamw` with ``b1=0``. Wrappers that keep weights
            (`lookahead`, `ema_params`) or gather gradients (`multi_steps`) are refused inside.
        learning_rate: that of ``tx``: a constant, or a warm-up.
        b1: in (0, 1): how close to ``x`` gradients are taken.
        weight_power: power of the greatest learning rate so far by which iterates are weighed.

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
    check_transformation("tx", tx)
    check_inside("schedule_free", tx)
    check_nonnegative(True, learning_rate=learning_rate)
    check_nonnegative(weight_power=weight_power)
    check_decay(b1=b1)
    if (number := known(b1)) == 0:
        raise ValueError(f"b1 must be in (0, 1), got {number}")

    def init(params: Params) -> ScheduleFreeState:
        check_params(params, "schedule_free")
        count = zero_count(params)
        zero, inner = torch.zeros_like(count, dtype=scalar_dtype(params)), init_inside("schedule_free", tx, params)
        return ScheduleFreeState(count, zero + b1, zero, zero.clone(), copies(params), inner)

    def update(
        updates: PyTree, state: ScheduleFreeState, params: MaybeParams = None, **extra: Any
    ) -> tuple[PyTree, ScheduleFreeState]:
        need_params(params, "schedule_free")
        updates, inner = tx.update(updates, state.inner, params, **extra)
        rate = torch.zeros_like(state.max_rate) + value_at("learning_rate", learning_rate, state.count, updates)
        max_rate = torch.maximum(state.max_rate, rate.to(state.max_rate.dtype))
        weight = max_rate**weight_power
        total = state.weight_sum + weight
        c = torch.where(total > 0, weight / torch.where(total > 0, total, 1.0), 0.0)
        # y_new - y, with x = z + (y - z) / b1 put in
        keep = tree.hoist(1 - c)
        z = tree.elementwise(lambda u, z: z + tree.wide(u), updates, state.z)
        before = state.b1 if isinstance(b1, Tensor) else b1  # the parameters were made with that of the last update

        def step(y: Tensor, old: Tensor, new: Tensor) -> Tensor:
            y = tree.wide(y)
            x = new + keep * (average_of(y, old, before) - new)
            return new + b1 * (x - new) - y

        moved = tree.elementwise(step, params, state.z, z)
        now = torch.zeros_like(state.b1) + b1 if isinstance(b1, Tensor) else state.b1
        return moved, ScheduleFreeState(state.count + 1, now, total, max_rate, z, inner)

    return composed(init, update, tx, adds=(TiesWeights,))
