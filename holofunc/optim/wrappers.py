"""Transformations around transformations that keep a second set of parameters: slow weights, averages."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from holofunc import tree
from holofunc.optim.base import GradientTransformation, check_params, check_transformation, need_params
from holofunc.optim.scalars import check_decay, value_at, zero_count
from holofunc.typing import Params, PyTree, Scalar, Schedule

__all__ = ["EmaParamsState", "LookaheadState", "ema_params", "lookahead"]


def copies(params: Params) -> PyTree:
    """The parameters in memory of their own, in fp32 for half precision."""
    return tree.elementwise(lambda p: tree.wide(p).clone(), params)


def by_path(values: PyTree) -> dict[str, Tensor]:
    return dict(tree.leaves_with_path(values))


class LookaheadState(NamedTuple):
    """Fast updates so far, the slow weights, the state of the inner optimizer, and what it was at the last sync."""

    count: Tensor
    slow: PyTree
    inner: PyTree
    inner_slow: PyTree = None

    def averaged(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return by_path(self.slow)


def lookahead(
    tx: GradientTransformation, sync_rate: Scalar = 0.5, sync_period: int = 6, *, inner_state: str = "keep"
) -> GradientTransformation:
    """Every ``sync_period`` updates of ``tx``, move slow weights towards the fast ones, and the fast ones there:

        slow = slow + sync_rate * (p - slow);  p = slow

    The slow weights are kept in fp32 at least. A parameter moves by adding ``slow - p`` to it, which may miss ``slow`` by
    one rounding; the next sync starts from the exact slow weights again. `eval_params` returns the slow weights.

    Args:
        tx: the inner optimizer.
        sync_rate: in (0, 1].
        sync_period: fast updates between syncs, at least 1.
        inner_state: what a sync does to the state of ``tx``: ``"keep"`` it, ``"reset"`` it, or ``"pullback"``: move it
            back towards the last sync as the weights (the paper's three variants).

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
    _check_sync(sync_rate, sync_period, at_least=1)
    if inner_state not in ("keep", "reset", "pullback"):
        raise ValueError(f"inner_state must be 'keep', 'reset' or 'pullback', got {inner_state!r}")

    def init(params: Params) -> LookaheadState:
        check_params(params, "lookahead")
        inner = tx.init(params)
        held = tree.map(torch.clone, inner) if inner_state == "pullback" else None
        return LookaheadState(zero_count(params), copies(params), inner, held)

    def update(
        updates: PyTree, state: LookaheadState, params: Params | None = None, **extra: Any
    ) -> tuple[PyTree, LookaheadState]:
        need_params(params, "lookahead")
        updates, inner = tx.update(updates, state.inner, params, **extra)
        count = state.count + 1
        now = count % sync_period == 0
        slow = synced(now, sync_rate, state.slow, params, updates)
        updates = tree.elementwise(lambda u, s, p: torch.where(now, s - tree.wide(p), u), updates, slow, params)
        held = state.inner_slow
        if inner_state == "reset":
            inner = tree.where(now, tx.init(params), inner)
        elif inner_state == "pullback":
            held = tree.where(now, tree.map(lambda a, b: _mixed(a, b, sync_rate), held, inner), held)
            inner = tree.where(now, held, inner)
        return updates, LookaheadState(count, slow, inner, held)

    return GradientTransformation(init, update)


def _check_sync(sync_rate: Scalar, sync_period: int, at_least: int) -> None:
    if not isinstance(sync_rate, Tensor) and not 0 < sync_rate <= 1:
        raise ValueError(f"sync_rate must be in (0, 1], got {sync_rate}")
    if isinstance(sync_period, bool) or not isinstance(sync_period, int) or sync_period < at_least:
        raise ValueError(f"sync_period must be an int of at least {at_least}, got {sync_period!r}")


def _mixed(old: Tensor, new: Tensor, rate: Scalar) -> Tensor:
    return old + rate * (new - old) if old.is_floating_point() else new


def synced(now: Tensor, rate: Scalar, slow: PyTree, params: Params, updates: PyTree) -> PyTree:
    """The slow weights: moved towards ``params + updates`` by ``rate`` where ``now`` holds."""
    return tree.elementwise(
        lambda s, p, u: torch.where(now, s + rate * (tree.wide(p) + tree.wide(u) - s), s), slow, params, updates
    )


class EmaParamsState(NamedTuple):
    """Updates so far, the average of the parameters, the state of the inner optimizer."""

    count: Tensor
    average: PyTree
    inner: PyTree

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
    check_transformation("tx", tx)
    check_decay(decay=decay)

    def init(params: Params) -> EmaParamsState:
        check_params(params, "ema_params")
        return EmaParamsState(zero_count(params), copies(params), tx.init(params))

    def update(
        updates: PyTree, state: EmaParamsState, params: Params | None = None, **extra: Any
    ) -> tuple[PyTree, EmaParamsState]:
        need_params(params, "ema_params")
        updates, inner = tx.update(updates, state.inner, params, **extra)
        now = value_at(decay, state.count, "decay")
        if warmup:
            count = state.count.to(torch.float64)
            now = tree.hoist(((1 + count) / (10 + count)).clamp_max(now))
        average = synced(torch.ones_like(state.count, dtype=torch.bool), 1 - now, state.average, params, updates)
        return updates, EmaParamsState(state.count + 1, average, inner)

    return GradientTransformation(init, update)
