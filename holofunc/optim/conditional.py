"""Transformations of plain functions, and transformations that act when a condition holds."""

from collections.abc import Callable
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
    stateless,
)
from holofunc.optim.capabilities import KeepsProgress
from holofunc.optim.numerics import zero_count
from holofunc.typing import Params, PyTree

__all__ = [
    "ConditionState",
    "conditionally_mask",
    "conditionally_transform",
    "stateless_with_tree_map",
    "with_extra_args_support",
]

# --- of functions --------------------------------------------------------------------------------------------------


def stateless_with_tree_map(fn: Callable[[Tensor, Tensor | None], Tensor]) -> GradientTransformation:
    """The transformation without state that ``fn(update, param) -> update`` describes, tensor by tensor.

    Args:
        fn: a pure function of an update and its parameter, or None if ``update`` is called without parameters.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx = optim.stateless_with_tree_map(lambda u, p: u - u.mean())
        >>> tx.update({"w": torch.tensor([1.0, 3.0])}, tx.init({"w": torch.zeros(2)}))[0]
        {'w': tensor([-1.,  1.])}
    """

    def of_all(updates: PyTree, params: MaybeParams) -> PyTree:
        return tree.map(lambda u: fn(u, None), updates) if params is None else tree.map(fn, updates, params)

    return stateless(of_all, "stateless_with_tree_map")


def with_extra_args_support(tx: GradientTransformation) -> GradientTransformation:
    """A pair of functions, optax's for instance, as a `GradientTransformation`.

    Its ``update`` gets of the extra arguments those that it names, and no others.

    Args:
        tx: a pair ``(init, update)`` with these names, for instance of ``update(updates, state, params=None)``.

    Example:
        >>> import collections
        >>> import torch
        >>> from holofunc import optim
        >>> def update(updates, state, params=None):
        ...     return updates, state
        >>> pair = collections.namedtuple("Pair", ("init", "update"))(lambda params: (), update)
        >>> tx = optim.with_extra_args_support(pair)
        >>> tx.update({"w": torch.ones(1)}, (), loss=torch.tensor(2.0))[0]
        {'w': tensor([1.])}
    """
    check_transformation("tx", tx)
    return tx if isinstance(tx, GradientTransformation) else GradientTransformation(*tx)


# --- when a condition holds ------------------------------------------------------------------------------------------


class _Condition(NamedTuple):
    count: Tensor  # type: ignore[assignment]
    inner: PyTree


class ConditionState(_Condition, KeepsProgress):
    """Updates so far, whether the condition held or not; the inner state."""

    __slots__ = ()

    @property
    def progress(self) -> tuple[str, ...]:
        return ("count",)


def conditionally_transform(tx: GradientTransformation, condition: Callable[..., Tensor]) -> GradientTransformation:
    """Apply ``tx`` when ``condition(count, **extra)`` holds; otherwise updates pass through, and its state stays.

    Args:
        tx: computed in every update, and used when the condition holds: a branch would not be pure.
        condition: of the number of updates before this one and of the extra arguments of ``update``; returns a 0-d bool
            tensor.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx = optim.conditionally_transform(optim.scale(0.5), lambda count, **extra: count >= 1)
        >>> grads = torch.ones(1)
        >>> first, state = tx.update(grads, tx.init(grads))
        >>> first, tx.update(grads, state)[0]
        (tensor([1.]), tensor([0.5000]))
    """
    return _conditional(tx, condition, "conditionally_transform", lambda g: g)


def conditionally_mask(tx: GradientTransformation, condition: Callable[..., Tensor]) -> GradientTransformation:
    """Apply ``tx`` when ``condition(count, **extra)`` holds; otherwise updates are zero, and its state stays.

    Args:
        tx: computed in every update, and used when the condition holds.
        condition: as for `conditionally_transform`. `apply_if` asks the gradients instead, and counts refusals.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, grads = optim.conditionally_mask(optim.sgd(1.0), lambda count, loss, **extra: loss < 1), torch.ones(1)
        >>> tx.update(grads, tx.init(grads), loss=torch.tensor(2.0))[0]
        tensor([0.])
    """
    return _conditional(tx, condition, "conditionally_mask", torch.zeros_like)


def _conditional(
    tx: GradientTransformation, condition: Callable[..., Tensor], name: str, otherwise: Callable[[Tensor], Tensor]
) -> GradientTransformation:
    check_transformation("tx", tx)
    if not callable(condition):
        raise TypeError(f"condition must be a function of the number of updates, got {condition!r}")

    def init(params: Params) -> ConditionState:
        check_params(params, name)
        return ConditionState(zero_count(params), tx.init(params))

    def update(
        updates: PyTree, state: ConditionState, params: MaybeParams = None, **extra: Any
    ) -> tuple[PyTree, ConditionState]:
        holds = condition(state.count, **extra)
        if not isinstance(holds, Tensor) or holds.dtype != torch.bool or holds.ndim:
            raise TypeError(f"{name}: condition must return a 0-d bool tensor, got {holds!r}")
        holds = tree.hoist(holds)
        new, inner = tx.update(updates, state.inner, params, **extra)
        out = tree.elementwise(lambda g, u: torch.where(holds, u, otherwise(tree.wide(g).to(u.dtype))), updates, new)
        return out, ConditionState(state.count + 1, tree.where(holds, inner, state.inner))

    return composed(init, update, tx)
