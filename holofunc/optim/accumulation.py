"""Wrappers that decide when an update happens: accumulation over micro-batches, refusal of bad updates."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from holofunc import tree
from holofunc.optim.base import GradientTransformation, MaybeParams, check_params, check_transformation, composed
from holofunc.optim.capabilities import Accumulates, CanSkip, KeepsProgress
from holofunc.optim.nesting import check_inside, init_inside
from holofunc.optim.numerics import check_at_least, check_bound, check_count, scalar_dtype, value_at, zero_count, zeros
from holofunc.typing import Params, PyTree, Scalar, Schedule

__all__ = ["ApplyIfState", "MultiStepsState", "apply_if", "apply_if_finite", "multi_steps", "skip_large_updates"]

# --- accumulation ------------------------------------------------------------------------------------------------


class _MultiSteps(NamedTuple):
    window: Tensor
    weight: Tensor
    loss: Tensor
    total: PyTree
    count: Tensor  # type: ignore[assignment]
    inner: PyTree


class MultiStepsState(_MultiSteps, Accumulates, KeepsProgress):
    """The open window: micro-batches, their weight, sums of losses and gradients; updates so far; the inner state."""

    __slots__ = ()

    @property
    def is_open(self) -> Tensor:
        return self.window > 0

    @property
    def progress(self) -> tuple[str, ...]:
        return ("window", "weight", "loss", "total", "count")


def multi_steps(tx: GradientTransformation, every: int | Schedule) -> GradientTransformation:
    """Update once per ``every`` micro-batches, with the mean gradient of their samples.

    Calls in between return zeros and leave the state of ``tx`` as it is: its schedules count updates. The gradients are
    weighted by the extra argument ``weight`` (the number of samples; 1 if it is not given), so that uneven
    micro-batches give exactly what one large batch would give. ``tx`` receives the window's ``loss`` and ``weight``
    too, and ``due``: whether the window closes, so that what comes of this call is used. `flush` closes one early.

    A micro-batch with a NaN spoils its window: ``multi_steps(apply_if_finite(tx), n)`` skips the window,
    ``apply_if_finite(multi_steps(tx, n))`` drops the micro-batch alone, and keeps its buffers out.

    Args:
        tx: the optimizer. What counts updates stands inside, `sam` outside; windows in windows are refused.
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
    check_transformation("tx", tx)
    check_inside("multi_steps", tx)
    if callable(every):
        check_at_least(1, True, every=every)
    elif isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every must be an int of at least 1 or a schedule, got {every!r}")

    def init(params: Params) -> MultiStepsState:
        check_params(params, "multi_steps")
        count = zero_count(params)
        zero, inner = torch.zeros_like(count, dtype=scalar_dtype(params)), init_inside("multi_steps", tx, params)
        return MultiStepsState(count, zero, zero.clone(), zeros(params), count.clone(), inner)

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
        window, weight_sum, loss_sum, total = state.window, state.weight, state.loss, state.total
        if not flush:
            window, weight_sum = window + 1, weight_sum + weight
            loss_sum = loss_sum if loss is None else loss_sum + weight * loss
            total = tree.elementwise(lambda g, s: s + weight * tree.wide(g), updates, total)
        due = window > 0 if flush else window >= value_at("every", every, state.count, updates)
        share = tree.hoist(1 / torch.where(weight_sum > 0, weight_sum, 1.0))
        mean = tree.elementwise(lambda s: s * share, total)
        seen = {} if loss is None and not flush else {"loss": loss_sum * share}
        updates, inner = tx.update(mean, state.inner, params, weight=weight_sum, due=due, **seen, **extra)
        due = tree.hoist(due)
        open_ = MultiStepsState(window, weight_sum, loss_sum, total, state.count, state.inner)
        closed = MultiStepsState(
            torch.zeros_like(window),
            torch.zeros_like(weight_sum),
            torch.zeros_like(loss_sum),
            tree.elementwise(torch.zeros_like, total),
            state.count + 1,
            inner,
        )
        return tree.elementwise(lambda u: torch.where(due, u, torch.zeros_like(u)), updates), tree.where(
            due, closed, open_
        )

    return composed(init, update, tx, adds=(Accumulates,))


# --- refusal -----------------------------------------------------------------------------------------------------


class _ApplyIf(NamedTuple):
    skipped: Tensor
    consecutive: Tensor
    total: Tensor
    limit: Tensor
    inner: PyTree


class ApplyIfState(_ApplyIf, CanSkip, KeepsProgress):
    """Whether the latest update was refused, how many were in a row and in all, how many in a row are too many."""

    __slots__ = ()

    @property
    def exhausted(self) -> Tensor:
        return self.consecutive >= self.limit

    @property
    def progress(self) -> tuple[str, ...]:
        return ("skipped", "consecutive", "total", "limit")


def apply_if_finite(tx: GradientTransformation, max_consecutive: int = 5) -> GradientTransformation:
    """Refuse updates with a NaN or an infinity in them: zeros in their place, and the state of ``tx`` as it was.

    Looked at are the gradients, what ``tx`` makes of them, its new state, and the extra arguments ``loss`` and
    ``buffers``. No bad update is ever applied. `skipped` says whether the latest one was refused (the training step
    then keeps its buffers too), `gave_up` whether ``max_consecutive`` in a row were: `holofunc.train.fit` looks at it
    when it logs, and ends.

    Stand it outside of `lookahead`, `ema_params` and the like: around it, they count a refused update as one of zeros.

    Args:
        tx: the optimizer.
        max_consecutive: at least 1.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.apply_if_finite(optim.adam(0.1)), {"w": torch.zeros(1)}
        >>> updates, state = tx.update({"w": torch.tensor([float("nan")])}, tx.init(params), params)
        >>> updates, optim.skipped(state), state.total
        ({'w': tensor([0.])}, tensor(True), tensor(1))
    """

    def is_fine(updates: PyTree, new: PyTree, inner: PyTree, extra: dict[str, Any]) -> Tensor:
        looked_at = (updates, new, inner, extra.get("loss"), extra.get("buffers"))
        fine = [tree.all_finite(x) for x in looked_at]
        return torch.stack([x.to(fine[0].device) for x in fine]).all()

    return _guarded(tx, is_fine, max_consecutive)


def apply_if(
    tx: GradientTransformation, condition: Callable[..., Tensor], max_consecutive: int | None = None
) -> GradientTransformation:
    """Refuse updates for which ``condition(updates, **extra)``, a 0-d bool tensor, is False, as `apply_if_finite` does.

    Args:
        tx: the optimizer.
        condition: sees the gradients and the extra arguments of ``update``.
        max_consecutive: refusals in a row that are too many; None is no such number.

    Example:
        >>> from holofunc import optim, tree
        >>> tx = optim.apply_if(optim.sgd(0.1), lambda updates, **extra: tree.global_norm(updates) < 100)
    """
    return _guarded(tx, lambda updates, new, inner, extra: condition(updates, **extra), max_consecutive)


def skip_large_updates(tx: GradientTransformation, max_norm: Scalar) -> GradientTransformation:
    """Refuse gradients of a norm above ``max_norm``, or of none, as `apply_if_finite` does."""
    check_bound(max_norm=max_norm)
    return apply_if(tx, lambda updates, **extra: tree.global_norm(updates) <= max_norm)


def _guarded(
    tx: GradientTransformation, is_fine: Callable[..., Tensor], max_consecutive: int | None
) -> GradientTransformation:
    check_transformation("tx", tx)
    if max_consecutive is not None:
        check_count(max_consecutive=max_consecutive)

    def init(params: Params) -> ApplyIfState:
        check_params(params, "apply_if_finite")
        count = zero_count(params)
        limit = torch.full_like(count, torch.iinfo(count.dtype).max if max_consecutive is None else max_consecutive)
        skipped = torch.zeros_like(count, dtype=torch.bool)
        return ApplyIfState(skipped, count, count.clone(), limit, tx.init(params))

    def update(
        updates: PyTree, state: ApplyIfState, params: MaybeParams = None, **extra: Any
    ) -> tuple[PyTree, ApplyIfState]:
        new, inner = tx.update(updates, state.inner, params, **extra)
        fine = tree.hoist(is_fine(updates, new, inner, extra))
        consecutive = torch.where(fine, torch.zeros_like(state.consecutive), state.consecutive + 1)
        inner = tree.where(fine, inner, state.inner)
        new = tree.elementwise(lambda u: torch.where(fine, u, torch.zeros_like(u)), new)
        return new, ApplyIfState(~fine, consecutive, state.total + (~fine).to(state.total.dtype), state.limit, inner)

    return composed(init, update, tx)
