"""Lookahead and Scout: slow weights that follow the fast ones."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from holofunc import tree
from holofunc.optim.base import GradientTransformation, MaybeParams, composed, inside
from holofunc.optim.capabilities import KeepsCopies, KeepsProgress, KeepsWeights
from holofunc.optim.checks import check_state, need_params
from holofunc.optim.deprecation import moved_to_holocron
from holofunc.optim.numerics import ABSENT, bounded, copies, scalar_dtype, sizes, zeros
from holofunc.optim.ranges import check_flags, check_fraction
from holofunc.optim.scalars import zero_count
from holofunc.typing import Params, PyTree, Scalar

__all__ = ["LookaheadState", "ScoutState", "lookahead", "scout"]


# --- Lookahead ---------------------------------------------------------------------------------------------------


class _Lookahead(NamedTuple):
    step: Tensor
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
    tx = inside("lookahead", tx)
    _check_sync(sync_rate, sync_period, at_least=1)
    if inner_state not in ("keep", "reset", "pullback"):
        raise ValueError(f"inner_state must be 'keep', 'reset' or 'pullback', got {inner_state!r}")

    def init(params: Params) -> LookaheadState:
        inner = tx.init(params)
        check_state("lookahead", inner)
        held = tree.map(torch.clone, inner) if inner_state == "pullback" else ABSENT
        return LookaheadState(zero_count(params), copies(params), inner, held)

    def update(
        updates: PyTree, state: LookaheadState, params: MaybeParams = None, **extra: Any
    ) -> tuple[PyTree, LookaheadState]:
        need_params(params, "lookahead")
        updates, inner = tx.update(updates, state.inner, params, **extra)
        step = state.step + 1
        now = step % sync_period == 0
        slow = synced(now, sync_rate, state.slow, params, updates)
        updates = tree.elementwise(lambda u, s, p: torch.where(now, s - tree.upcast(p), u), updates, slow, params)
        held = state.inner_slow
        if inner_state == "reset":
            inner = tree.where(now, _with_progress(tx.init(params), inner), inner)
        elif inner_state == "pullback":
            held = tree.where(now, tree.map(lambda a, b: _mixed(a, b, sync_rate), held, inner), held)
            inner = tree.where(now, _with_progress(held, inner), inner)
        return updates, LookaheadState(step, slow, inner, held)

    return composed(init, update, tx, adds=(KeepsWeights,))


def _with_progress(state: PyTree, now: PyTree) -> PyTree:
    """Restore an old ``state``, but keep its progress (the fields that `KeepsProgress` lists) as it is ``now``."""
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
        lambda s, p, u: torch.where(now, s + rate * (tree.upcast(p) + tree.upcast(u) - s), s), slow, params, updates
    )


def by_path(values: PyTree) -> dict[str, Tensor]:
    return dict(tree.leaves_with_path(values))


# --- Scout -------------------------------------------------------------------------------------------------------


class _Scout(NamedTuple):
    step: Tensor
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


@moved_to_holocron(compat=False)
def scout(tx: GradientTransformation, sync_rate: Scalar = 0.5, sync_period: int = 6) -> GradientTransformation:
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

    Source: Holocron 0.3.0, whose memory of all updates is replaced by running sums.

    Example:
        >>> from holofunc import optim
        >>> tx = optim.scout(optim.adam(1e-3), sync_period=20)
    """
    return scout_of(tx, sync_rate, sync_period)


def scout_of(
    tx: GradientTransformation, sync_rate: Scalar, sync_period: int, *, compat: bool = False
) -> GradientTransformation:
    """`scout`; ``compat`` keeps the raw statistic, in which equal updates make NaN, and NaN throws the weights back."""
    check_flags(compat=compat)
    tx = inside("scout", tx)
    _check_sync(sync_rate, sync_period, at_least=3)

    def init(params: Params) -> ScoutState:
        sums = [zeros(params) for _ in range(4)]
        return ScoutState(zero_count(params), copies(params), tx.init(params), *sums)

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
        step, dtype = state.step + 1, scalar_dtype(updates)
        number = state.step % sync_period + 1  # of this update since the last sync
        first, now = number == 1, number == sync_period
        fresh, share = tree.hoist((~first).to(dtype)), tree.hoist(1 / number.to(dtype))
        old = tree.elementwise(lambda m: fresh * m, state.mean)
        mean = tree.elementwise(lambda u, m: m + share * (tree.upcast(u) - m), updates, old)
        deviation = tree.elementwise(
            lambda u, d, m, n: fresh * d + (tree.upcast(u) - m) * (tree.upcast(u) - n),
            updates,
            state.deviation,
            old,
            mean,
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
        updates = tree.elementwise(lambda u, s, p: torch.where(now, s - tree.upcast(p), u), updates, slow, params)
        return updates, ScoutState(step, slow, inner, mean, deviation, low, high)

    return composed(init, update, tx, adds=(KeepsWeights,))
