"""Averages to evaluate with instead of a decaying rate: LAWA, tail averages, primal averaging; EMA-Nesterov."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from holofunc import tree
from holofunc.optim.base import (
    GradientTransformation,
    MaybeParams,
    chain,
    check_params,
    check_transformation,
    composed,
    need_params,
)
from holofunc.optim.capabilities import KeepsWeights, TiesWeights
from holofunc.optim.lookahead import EmaParamsState, average_of, by_path, synced
from holofunc.optim.nesting import check_inside, init_inside
from holofunc.optim.numerics import check_count, check_decay, check_fraction, copies, scalar_dtype, zero_count
from holofunc.optim.transforms import scale, trace
from holofunc.typing import Params, PyTree, Scalar

__all__ = [
    "LawaState",
    "PrimalAveragingState",
    "average_tail",
    "lawa",
    "nesterov_updates",
    "primal_averaging",
]


class _Lawa(NamedTuple):
    count: Tensor  # type: ignore[assignment]
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
    check_transformation("tx", tx)
    check_count(size=size, every=every)

    def init(params: Params) -> LawaState:
        check_params(params, "lawa")
        latest = tree.map(lambda p: torch.stack([tree.wide(p)] * size), params)
        return LawaState(zero_count(params), latest, tx.init(params))

    def update(updates: PyTree, state: LawaState, params: MaybeParams = None, **extra: Any) -> tuple[PyTree, LawaState]:
        need_params(params, "lawa")
        updates, inner = tx.update(updates, state.inner, params, **extra)
        count = state.count + 1
        due = count % every == 0
        place = torch.arange(size, device=count.device) == (count // every - 1) % size

        def kept(old: Tensor, p: Tensor, u: Tensor) -> Tensor:
            now = (tree.wide(p) + tree.wide(u)).to(old.dtype)
            return torch.where((due & place).view(-1, *[1] * p.ndim), now, old)

        return updates, LawaState(count, tree.map(kept, state.latest, params, updates), inner)

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
    check_transformation("tx", tx)
    check_count(0, start=start)

    def init(params: Params) -> EmaParamsState:
        check_params(params, "average_tail")
        return EmaParamsState(zero_count(params), copies(params), tx.init(params))

    def update(
        updates: PyTree, state: EmaParamsState, params: MaybeParams = None, **extra: Any
    ) -> tuple[PyTree, EmaParamsState]:
        need_params(params, "average_tail")
        updates, inner = tx.update(updates, state.inner, params, **extra)
        share = 1 / (state.count + 1 - start).clamp_min(1).to(scalar_dtype(updates))
        always = torch.ones_like(state.count, dtype=torch.bool)
        average = synced(always, tree.hoist(share), state.average, params, updates)
        return updates, EmaParamsState(state.count + 1, average, inner)

    return composed(init, update, tx, adds=(KeepsWeights,))


class _PrimalAveraging(NamedTuple):
    b1: Tensor
    z: PyTree
    inner: PyTree


class PrimalAveragingState(_PrimalAveraging, TiesWeights):
    """The share of the average in ``y``, the iterate ``z``, the inner state."""

    __slots__ = ()

    def averaged(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {path: average_of(tree.wide(params[path]), z, self.b1) for path, z in by_path(self.z).items()}


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
    check_transformation("tx", tx)
    check_inside("schedule_free", tx)
    check_fraction(b1=b1)
    check_decay(decay=decay)

    def init(params: Params) -> PrimalAveragingState:
        check_params(params, "primal_averaging")
        zero = torch.zeros_like(zero_count(params), dtype=scalar_dtype(params))
        return PrimalAveragingState(zero + b1, copies(params), init_inside("schedule_free", tx, params))

    def update(
        updates: PyTree, state: PrimalAveragingState, params: MaybeParams = None, **extra: Any
    ) -> tuple[PyTree, PrimalAveragingState]:
        need_params(params, "primal_averaging")
        updates, inner = tx.update(updates, state.inner, params, **extra)
        z = tree.elementwise(lambda u, z: z + tree.wide(u), updates, state.z)
        before = state.b1 if isinstance(b1, Tensor) else b1

        def step(y: Tensor, old: Tensor, new: Tensor) -> Tensor:
            y = tree.wide(y)
            x = new + decay * (average_of(y, old, before) - new)
            return new + b1 * (x - new) - y

        now = torch.zeros_like(state.b1) + b1
        return tree.elementwise(step, params, state.z, z), PrimalAveragingState(now, z, inner)

    return composed(init, update, tx, adds=(TiesWeights,))


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
    check_decay(decay=decay)
    return chain(tx, trace(decay, nesterov=True), scale(1 - decay))
