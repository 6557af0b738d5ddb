"""Sharpness-aware minimization (SAM, ASAM): the gradient a little uphill."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from holofunc import tree
from holofunc.optim.base import GradientTransformation, MaybeParams, composed, inside
from holofunc.optim.capabilities import TakesSecondGradient
from holofunc.optim.checks import SECOND, check_updates, need_params
from holofunc.optim.numerics import far_norm
from holofunc.optim.ranges import check_flags, check_nonnegative
from holofunc.typing import Params, PyTree, Scalar

__all__ = ["SamState", "sam"]


class _Sam(NamedTuple):
    inner: PyTree


class SamState(_Sam, TakesSecondGradient):
    """The state of the optimizer, marked as one whose updates take a second gradient (`looks_twice`)."""

    __slots__ = ()


def sam(tx: GradientTransformation, rho: Scalar = 0.05, *, adaptive: bool = False) -> GradientTransformation:
    """Sharpness-aware minimization: ``tx`` sees the gradient at ``params + rho * g / norm(g)``.

    ``update`` needs one more argument, ``grad_fn(params) -> gradients``, which it calls once; steps of
    `holofunc.train.make_train_step` pass one that evaluates the same batch with the same key. Accumulation goes inside:
    ``sam(multi_steps(tx, n))``.

    Args:
        tx: the optimizer.
        rho: distance of the second gradient, at least 0.
        adaptive: measure distances in units of ``abs(p)``: ``rho * p**2 * g / norm(abs(p) * g)``.

    Source: Foret et al. (arXiv 2010.01412); adaptive: Kwon et al., ASAM (arXiv 2102.11600).

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> grad_fn = torch.func.grad(lambda params: (params["w"] ** 2).sum())
        >>> tx, params = optim.sam(optim.sgd(0.5), rho=0.5), {"w": torch.ones(1)}
        >>> tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)[0]
        {'w': tensor([-1.5000])}
    """
    check_flags(adaptive=adaptive)
    tx = inside("sam", tx)
    check_nonnegative(rho=rho)

    def update(
        updates: PyTree,
        state: SamState,
        params: MaybeParams = None,
        *,
        grad_fn: Callable[[Params], PyTree] | None = None,
        flush: bool = False,
        **extra: Any,
    ) -> tuple[PyTree, SamState]:
        need_params(params, "sam")
        if flush:  # of gradients that are second ones already
            updates, inner = tx.update(updates, state.inner, params, flush=True, **extra)
            return updates, SamState(inner)
        if grad_fn is None:
            raise TypeError("sam needs a second gradient: call update(updates, state, params, grad_fn=...)")
        weights = tree.elementwise(lambda p: p.abs() if adaptive else torch.ones_like(p), params)
        norm = far_norm(tree.global_norm, tree.elementwise(lambda g, w: tree.upcast(g) * w, updates, weights))
        factor = tree.hoist(torch.where(norm > 0, rho / torch.where(norm > 0, norm, 1.0), 0.0))
        looked_at = tree.elementwise(
            lambda p, g, w: (tree.upcast(p) + factor * w * w * tree.upcast(g)).to(p.dtype), params, updates, weights
        )
        grads = grad_fn(looked_at)
        check_updates(grads, params, SECOND)
        updates, inner = tx.update(grads, state.inner, params, **extra)
        return updates, SamState(inner)

    return composed(lambda params: SamState(tx.init(params)), update, tx, adds=(TakesSecondGradient,))
