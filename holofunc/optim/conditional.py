"""Conditional updates: bad ones skipped (not finite, too large), transformations that act when a condition holds."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from holofunc import tree
from holofunc.optim.base import GradientTransformation, MaybeParams, as_transformation, composed
from holofunc.optim.capabilities import CanSkip, KeepsProgress
from holofunc.optim.checks import check_condition, check_function, check_state
from holofunc.optim.numerics import far_norm
from holofunc.optim.ranges import check_bound, check_count
from holofunc.optim.scalars import zero_count
from holofunc.typing import Params, PyTree, Scalar

__all__ = [
    "ApplyIfState", "ConditionState", "apply_if", "apply_if_finite", "conditionally_mask", "conditionally_transform",
    "skip_large_updates",
]  # fmt: skip


# --- skipped updates ---------------------------------------------------------------------------------------------


class _ApplyIf(NamedTuple):
    skipped: Tensor
    consecutive: Tensor
    total: Tensor
    limit: Tensor
    inner: PyTree


class ApplyIfState(_ApplyIf, CanSkip, KeepsProgress):
    """Whether the latest update was skipped, how many were in a row and in all, how many in a row are too many."""

    __slots__ = ()

    @property
    def exhausted(self) -> Tensor:
        return self.consecutive >= self.limit

    @property
    def progress(self) -> tuple[str, ...]:
        return ("skipped", "consecutive", "total", "limit")


def apply_if_finite(tx: GradientTransformation, max_consecutive: int = 5) -> GradientTransformation:
    """Skip updates with a NaN or an infinity in them: zeros in their place, and the state of ``tx`` as it was.

    Looked at are the gradients, what ``tx`` makes of them, its new state, and the extra arguments ``loss`` and
    ``buffers``. No bad update is ever applied. `skipped` says whether the latest one was skipped (the training step
    then keeps its buffers too), `gave_up` whether ``max_consecutive`` in a row were: `holofunc.train.fit` looks at it
    when it logs, and ends.

    Stand it outside of `lookahead`, `ema_params` and the like: around it, they count a skipped update as one of zeros.

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
        loss = extra.get("loss")
        loss = loss if loss is None else torch.as_tensor(loss)
        fine = [tree.all_finite(x) for x in (updates, new, inner, loss, extra.get("buffers"))]
        return torch.stack([x.to(fine[0].device) for x in fine]).all()

    return _guarded(tx, is_fine, max_consecutive)


def apply_if(
    tx: GradientTransformation, condition: Callable[..., Tensor], max_consecutive: int | None = None
) -> GradientTransformation:
    """Skip updates for which ``condition(updates, **extra)``, a 0-d bool tensor, is False, as `apply_if_finite` does.

    Args:
        tx: the optimizer.
        condition: sees the gradients and the extra arguments of ``update``.
        max_consecutive: skipped updates in a row that are too many; None is any number.

    Example:
        >>> from holofunc import optim, tree
        >>> tx = optim.apply_if(optim.sgd(0.1), lambda updates, **extra: tree.global_norm(updates) < 100)
    """
    check_function(condition=condition)

    def is_fine(updates: PyTree, new: PyTree, inner: PyTree, extra: dict[str, Any]) -> Tensor:
        return check_condition("apply_if", condition(updates, **extra))

    return _guarded(tx, is_fine, max_consecutive)


def skip_large_updates(tx: GradientTransformation, max_norm: Scalar) -> GradientTransformation:
    """Skip updates whose gradient norm exceeds ``max_norm`` or is NaN; they are counted as by `apply_if_finite`.

    Args:
        tx: the optimizer.
        max_norm: at least 0, of all gradients together.
    """
    check_bound(max_norm=max_norm)
    return apply_if(tx, lambda updates, **extra: far_norm(tree.global_norm, updates) <= max_norm)


def _guarded(
    tx: GradientTransformation, is_fine: Callable[..., Tensor], max_consecutive: int | None
) -> GradientTransformation:
    tx = as_transformation("tx", tx)
    if max_consecutive is not None:
        check_count(max_consecutive=max_consecutive)

    def init(params: Params) -> ApplyIfState:
        count = zero_count(params)
        limit = torch.full_like(count, torch.iinfo(count.dtype).max if max_consecutive is None else max_consecutive)
        skipped = torch.zeros_like(count, dtype=torch.bool)
        inner = tx.init(params)
        check_state("apply_if_finite", inner)
        return ApplyIfState(skipped, count, count.clone(), limit, inner)

    def update(
        updates: PyTree, state: ApplyIfState, params: MaybeParams = None, **extra: Any
    ) -> tuple[PyTree, ApplyIfState]:
        new, inner = tx.update(updates, state.inner, params, **extra)
        fine = tree.hoist(is_fine(updates, new, inner, extra))
        consecutive = torch.where(fine, torch.zeros_like(state.consecutive), state.consecutive + 1)
        inner = tree.where(fine, inner, state.inner)
        new = tree.elementwise(lambda u: torch.where(fine, u, torch.zeros_like(u)), new)
        return new, ApplyIfState(~fine, consecutive, state.total + (~fine).to(state.total.dtype), state.limit, inner)

    return composed(init, update, tx, adds=(CanSkip,))


# --- when a condition holds --------------------------------------------------------------------------------------


class _Condition(NamedTuple):
    step: Tensor
    inner: PyTree


class ConditionState(_Condition, KeepsProgress):
    """Updates so far, whether the condition held or not; the inner state."""

    __slots__ = ()


def conditionally_transform(tx: GradientTransformation, condition: Callable[..., Tensor]) -> GradientTransformation:
    """Apply ``tx`` when ``condition(step, **extra)`` holds; otherwise updates pass through, and its state stays.

    Args:
        tx: computed in every update, and used when the condition holds: a branch would not be pure.
        condition: of the number of updates before this one and of the extra arguments of ``update``; returns a 0-d bool
            tensor.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx = optim.conditionally_transform(optim.scale(0.5), lambda step, **extra: step >= 1)
        >>> grads = torch.ones(1)
        >>> first, state = tx.update(grads, tx.init(grads))
        >>> first, tx.update(grads, state)[0]
        (tensor([1.]), tensor([0.5000]))
    """
    return _conditional(tx, condition, "conditionally_transform", lambda g: g)


def conditionally_mask(tx: GradientTransformation, condition: Callable[..., Tensor]) -> GradientTransformation:
    """Apply ``tx`` when ``condition(step, **extra)`` holds; otherwise updates are zero, and its state stays.

    Args:
        tx: computed in every update, and used when the condition holds.
        condition: as for `conditionally_transform`. `apply_if` asks the gradients instead, and counts what it skips.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, grads = optim.conditionally_mask(optim.sgd(1.0), lambda step, loss, **extra: loss < 1), torch.ones(1)
        >>> tx.update(grads, tx.init(grads), loss=torch.tensor(2.0))[0]
        tensor([0.])
    """
    return _conditional(tx, condition, "conditionally_mask", torch.zeros_like)


def _conditional(
    tx: GradientTransformation, condition: Callable[..., Tensor], name: str, otherwise: Callable[[Tensor], Tensor]
) -> GradientTransformation:
    tx = as_transformation("tx", tx)
    check_function(condition=condition)

    def update(
        updates: PyTree, state: ConditionState, params: MaybeParams = None, **extra: Any
    ) -> tuple[PyTree, ConditionState]:
        holds = tree.hoist(check_condition(name, condition(state.step, **extra)))
        new, inner = tx.update(updates, state.inner, params, **extra)
        out = tree.elementwise(lambda g, u: torch.where(holds, u, otherwise(tree.upcast(g).to(u.dtype))), updates, new)
        return out, ConditionState(state.step + 1, tree.where(holds, inner, state.inner))

    return composed(lambda params: ConditionState(zero_count(params), tx.init(params)), update, tx)
