"""Gradient accumulation: one update for several micro-batches."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from holofunc import tree
from holofunc.optim.base import GradientTransformation, MaybeParams, composed, inside
from holofunc.optim.capabilities import Accumulates, KeepsProgress
from holofunc.optim.checks import check_one_number
from holofunc.optim.numerics import zeros
from holofunc.optim.ranges import check_at_least
from holofunc.optim.scalars import value_at, zero_count, zero_scalar
from holofunc.typing import Params, PyTree, Scalar, Schedule

__all__ = ["MultiStepsState", "multi_steps"]


class _MultiSteps(NamedTuple):
    mini_step: Tensor
    weight: Tensor
    loss: Tensor
    total: PyTree
    step: Tensor
    inner: PyTree


class MultiStepsState(_MultiSteps, Accumulates, KeepsProgress):
    """Micro-batches since the last update, their weight, sums of losses and gradients; updates; the inner state."""

    __slots__ = ()

    @property
    def is_open(self) -> Tensor:
        return self.mini_step > 0

    @property
    def progress(self) -> tuple[str, ...]:
        return ("mini_step", "weight", "loss", "total", "step")


def multi_steps(tx: GradientTransformation, every: int | Schedule) -> GradientTransformation:
    """Update once per ``every`` micro-batches, with the mean gradient of their samples.

    Calls in between return zeros and leave the state of ``tx`` as it is: its schedules count updates. The gradients are
    weighted by the extra argument ``weight`` (the number of samples; 1 if it is not given), so that uneven
    micro-batches give exactly what one large batch would give. ``tx`` receives the mean ``loss`` and the
    sum of ``weight`` too, and ``due``: whether this micro-batch completes an update. `flush` completes one early.

    A micro-batch with a NaN spoils its update: ``multi_steps(apply_if_finite(tx), n)`` skips the update,
    ``apply_if_finite(multi_steps(tx, n))`` only the micro-batch, with its buffers.

    Args:
        tx: the optimizer. What counts updates stands inside, `sam` outside; `multi_steps` inside is an error.
        every: micro-batches per update, at least 1; or a schedule of them, of the number of updates so far.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.multi_steps(optim.sgd(1.0), every=2), {"w": torch.zeros(1)}
        >>> state = tx.init(params)
        >>> updates, state = tx.update({"w": torch.tensor([1.0])}, state, params, weight=torch.tensor(3.0))
        >>> updates, state = tx.update({"w": torch.tensor([5.0])}, state, params, weight=torch.tensor(1.0))
        >>> updates
        {'w': tensor([-2.])}
    """
    tx = inside("multi_steps", tx)
    if callable(every):
        check_at_least(1, True, every=every)
    elif isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every must be an int of at least 1 or a schedule, got {every!r}")

    def init(params: Params) -> MultiStepsState:
        weight, loss, total = zero_scalar(params), zero_scalar(params), zeros(params)
        return MultiStepsState(zero_count(params), weight, loss, total, zero_count(params), tx.init(params))

    def update(
        updates: PyTree,
        state: MultiStepsState,
        params: MaybeParams = None,
        *,
        weight: Scalar = 1.0,
        loss: Any = None,
        flush: bool = False,
        **extra: Any,
    ) -> tuple[PyTree, MultiStepsState]:
        check_one_number(weight=weight, loss=loss)
        mini_step, weight_sum, loss_sum, total = state.mini_step, state.weight, state.loss, state.total
        if not flush:
            mini_step, weight_sum = mini_step + 1, weight_sum + weight
            loss_sum = loss_sum if loss is None else loss_sum + weight * loss
            total = tree.elementwise(lambda g, s: s + weight * tree.upcast(g), updates, total)
        due = mini_step > 0 if flush else mini_step >= value_at("every", every, state.step, updates)
        share = tree.hoist(1 / torch.where(weight_sum > 0, weight_sum, 1.0))
        mean = tree.elementwise(lambda s: s * share, total)
        seen = {} if loss is None and not flush else {"loss": loss_sum * share}
        updates, inner = tx.update(mean, state.inner, params, weight=weight_sum, due=due, **seen, **extra)
        due = tree.hoist(due)
        open_ = MultiStepsState(mini_step, weight_sum, loss_sum, total, state.step, state.inner)
        closed = MultiStepsState(
            torch.zeros_like(mini_step),
            torch.zeros_like(weight_sum),
            torch.zeros_like(loss_sum),
            tree.elementwise(torch.zeros_like, total),
            state.step + 1,
            inner,
        )
        return tree.elementwise(lambda u: torch.where(due, u, torch.zeros_like(u)), updates), tree.where(
            due, closed, open_
        )

    return composed(init, update, tx, adds=(Accumulates,))
