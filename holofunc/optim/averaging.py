"""Averages of parameters: EMA, LAWA, tail averages; EMA-Nesterov; target networks."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from holofunc import tree
from holofunc.optim.base import (
    GradientTransformation,
    MaybeParams,
    as_transformation,
    chain,
    composed,
    inside,
)
from holofunc.optim.capabilities import KeepsBuffers, KeepsWeights
from holofunc.optim.checks import need_params
from holofunc.optim.deprecation import renamed
from holofunc.optim.lookahead import by_path, synced
from holofunc.optim.numerics import ABSENT, copies, scalar_dtype
from holofunc.optim.ranges import check_count, check_decay, check_flags, check_fraction
from holofunc.optim.scalars import value_at, zero_count
from holofunc.optim.transforms import scale, trace
from holofunc.typing import Buffers, Params, PyTree, Scalar, Schedule

__all__ = [
    "EmaParamsState", "LawaState", "average_tail", "ema_params", "incremental_update", "lawa", "nesterov_updates",
    "periodic_update",
]  # fmt: skip


# --- EMA ---------------------------------------------------------------------------------------------------------


class _EmaParams(NamedTuple):
    step: Tensor
    average: PyTree
    inner: PyTree
    buffers: PyTree = ABSENT


class EmaParamsState(_EmaParams, KeepsWeights, KeepsBuffers):
    """Updates so far, the average of the parameters, the inner state; the average of buffers, if asked for."""

    __slots__ = ()

    def averaged(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return by_path(self.average)

    def averaged_buffers(self, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {} if self.buffers == ABSENT else self.buffers


def ema_params(
    tx: GradientTransformation,
    decay: Scalar | Schedule = 0.9999,
    *,
    warmup: bool = False,
    buffers: Buffers | None = None,
) -> GradientTransformation:
    """Keep a moving average of the parameters: ``average = decay * average + (1 - decay) * p``, after each update.

    `eval_params` returns the average. It starts as the initial parameters.

    Args:
        tx: the optimizer whose parameters are averaged.
        decay: in [0, 1); a number, a 0-d tensor or a schedule.
        warmup: use ``min(decay, (1 + step) / (10 + step))``, so that a young average forgets faster.
        buffers: of the model, as they are at first: they are averaged too, and `eval_buffers` returns the average.
            ``update`` needs ``buffers=``, the new ones, which `holofunc.train.make_train_step` passes. What is no
            floating tensor is copied. None leaves buffers to the caller, who evaluates with the latest.

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
    tx = as_transformation("tx", tx)
    if buffers is not None and not isinstance(buffers, Mapping):
        raise TypeError(f"buffers must be a dict of tensors by name, got {type(buffers).__name__}")
    check_decay(True, decay=decay)

    def init(params: Params) -> EmaParamsState:
        held = ABSENT if buffers is None else tree.map(torch.clone, dict(buffers))
        return EmaParamsState(zero_count(params), copies(params), tx.init(params), held)

    def update(
        updates: PyTree, state: EmaParamsState, params: MaybeParams = None, **extra: Any
    ) -> tuple[PyTree, EmaParamsState]:
        need_params(params, "ema_params")
        updates, inner = tx.update(updates, state.inner, params, **extra)
        now = value_at("decay", decay, state.step, updates)
        if warmup:
            step = state.step.to(torch.float64)
            now = tree.hoist(((1 + step) / (10 + step)).clamp_max(now).to(scalar_dtype(updates)))
        average = synced(torch.ones_like(state.step, dtype=torch.bool), 1 - now, state.average, params, updates)
        held = ABSENT if buffers is None else _buffers_average(state.buffers, extra.get("buffers"), now)
        return updates, EmaParamsState(state.step + 1, average, inner, held)

    return composed(init, update, tx, adds=(KeepsWeights,))


def _buffers_average(average: Buffers, new: Buffers | None, decay: Scalar) -> Buffers:
    if new is None:
        raise TypeError("ema_params that averages buffers needs the new ones: call update(..., buffers=...)")

    def rule(a: Tensor, b: Tensor) -> Tensor:
        return (tree.upcast(b) + decay * (tree.upcast(a) - tree.upcast(b))).to(a.dtype) if a.is_floating_point() else b

    return {name: rule(a, new[name]) for name, a in average.items()}


# --- of checkpoints ----------------------------------------------------------------------------------------------


class _Lawa(NamedTuple):
    step: Tensor
    latest: PyTree
    inner: PyTree


class LawaState(_Lawa, KeepsWeights):
    """Updates so far, the latest checkpoints as ``(size, *shape)`` of each parameter, the inner state."""

    __slots__ = ()

    def averaged(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {path: x.mean(0) for path, x in by_path(self.latest).items()}


def lawa(tx: GradientTransformation, size: int = 5, every: int = 100) -> GradientTransformation:
    """Latest weight averaging: keep the parameters after every ``every`` updates, evaluate with the mean of ``size``.

    Costs ``size`` copies of the parameters. Until there are as many, the initial parameters stand in for them: wait for
    ``size * every`` updates.

    Args:
        tx: the optimizer, whose updates are left alone.
        size: checkpoints kept, at least 1.
        every: updates between them, at least 1.

    Source: Kaddour, "Stop wasting my time! Saving days of ImageNet and BERT training with latest weight averaging"
    (arXiv 2209.14981).

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.lawa(optim.sgd(1.0), size=2, every=1), {"w": torch.zeros(1)}
        >>> state = tx.init(params)
        >>> for _ in range(3):
        ...     updates, state = tx.update({"w": torch.ones(1)}, state, params)
        ...     params = optim.apply_updates(params, updates)
        >>> optim.eval_params(state, params)
        {'w': tensor([-2.5000])}
    """
    tx = as_transformation("tx", tx)
    check_count(size=size, every=every)

    def init(params: Params) -> LawaState:
        latest = tree.map(lambda p: torch.stack([tree.upcast(p)] * size), params)
        return LawaState(zero_count(params), latest, tx.init(params))

    def update(updates: PyTree, state: LawaState, params: MaybeParams = None, **extra: Any) -> tuple[PyTree, LawaState]:
        need_params(params, "lawa")
        updates, inner = tx.update(updates, state.inner, params, **extra)
        step = state.step + 1
        due = step % every == 0
        place = torch.arange(size, device=step.device) == (step // every - 1) % size

        def kept(old: Tensor, p: Tensor, u: Tensor) -> Tensor:
            now = (tree.upcast(p) + tree.upcast(u)).to(old.dtype)
            return torch.where((due & place).view(-1, *[1] * p.ndim), now, old)

        return updates, LawaState(step, tree.map(kept, state.latest, params, updates), inner)

    return composed(init, update, tx, adds=(KeepsWeights,))


def average_tail(tx: GradientTransformation, start: int) -> GradientTransformation:
    """Evaluate with the plain mean of the parameters after all updates from number ``start`` on: Polyak's average.

    Up to there `eval_params` returns the latest parameters.

    Args:
        tx: the optimizer, whose updates are left alone.
        start: updates that the mean leaves out, at least 0.

    Source: Polyak and Juditsky, "Acceleration of stochastic approximation by averaging" (1992), of a tail as in Jain et
    al. (arXiv 1610.03774).

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.average_tail(optim.sgd(1.0), start=1), {"w": torch.zeros(1)}
        >>> state = tx.init(params)
        >>> for _ in range(3):
        ...     updates, state = tx.update({"w": torch.ones(1)}, state, params)
        ...     params = optim.apply_updates(params, updates)
        >>> optim.eval_params(state, params)
        {'w': tensor([-2.5000])}
    """
    tx = as_transformation("tx", tx)
    check_count(0, start=start)

    def init(params: Params) -> EmaParamsState:
        return EmaParamsState(zero_count(params), copies(params), tx.init(params))

    def update(
        updates: PyTree, state: EmaParamsState, params: MaybeParams = None, **extra: Any
    ) -> tuple[PyTree, EmaParamsState]:
        need_params(params, "average_tail")
        updates, inner = tx.update(updates, state.inner, params, **extra)
        share = 1 / (state.step + 1 - start).clamp_min(1).to(scalar_dtype(updates))
        always = torch.ones_like(state.step, dtype=torch.bool)
        average = synced(always, tree.hoist(share), state.average, params, updates)
        return updates, EmaParamsState(state.step + 1, average, inner)

    return composed(init, update, tx, adds=(KeepsWeights,))


# --- of updates --------------------------------------------------------------------------------------------------


def nesterov_updates(tx: GradientTransformation, decay: Scalar = 0.9) -> GradientTransformation:
    """EMA-Nesterov: momentum around a whole optimizer, ``m = decay * m + (1 - decay) * u``, one step ahead:

        decay * m + (1 - decay) * u

    Args:
        tx: the optimizer, whose updates ``u`` are averaged.
        decay: in [0, 1).

    Source: the step-count records of modded-nanogpt (spring 2026), as a composition of `trace`.

    Example:
        >>> from holofunc import optim
        >>> tx = optim.nesterov_updates(optim.soap(3e-3), 0.6)
    """
    tx = inside("nesterov_updates", tx)
    check_decay(decay=decay)
    return chain(tx, trace(decay, nesterov=True), scale(1 - decay))


# --- target networks ---------------------------------------------------------------------------------------------


def incremental_update(new: Params, old: Params, step_size: Scalar) -> Params:
    """``step_size * new + (1 - step_size) * old``, in the dtype of ``old``; `ema_params` does it in every update.

    Args:
        new: parameters.
        old: what follows them: a tree of their structure.
        step_size: in (0, 1].

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> optim.incremental_update({"w": torch.ones(1)}, {"w": torch.zeros(1)}, 0.25)
        {'w': tensor([0.2500])}
    """
    check_fraction(step_size=step_size)
    return tree.elementwise(
        lambda n, o: (tree.upcast(o) + step_size * (tree.upcast(n) - tree.upcast(o))).to(o.dtype), new, old
    )


@renamed(count="step")
def periodic_update(new: Params, old: Params, step: Tensor | int, every: int) -> Params:
    """``new`` where ``step`` is a multiple of ``every``, otherwise ``old``, in the dtype of ``old``.

    Args:
        new: parameters.
        old: what follows them: a tree of their structure.
        step: an int or a 0-d tensor.
        every: at least 1.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> new, old = {"w": torch.ones(1)}, {"w": torch.zeros(1)}
        >>> [optim.periodic_update(new, old, torch.tensor(t), every=2)["w"].item() for t in range(4)]
        [1.0, 0.0, 1.0, 0.0]
    """
    check_count(every=every)
    due = tree.hoist(torch.as_tensor(step) % every == 0)
    return tree.elementwise(lambda n, o: torch.where(due, n.to(o.dtype), o), new, old)
