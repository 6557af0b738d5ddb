"""Rules that look at the diagonal of the Hessian: Sophia, and the estimate that it takes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from holofunc import random, tree
from holofunc.optim.base import GradientTransformation, MaybeParams, check_params, check_updates, composed
from holofunc.optim.capabilities import KeepsProgress, TakesHessianProduct
from holofunc.optim.checks import SECOND
from holofunc.optim.numerics import (
    check_bound,
    check_count,
    check_decay,
    check_nonnegative,
    check_positive,
    zero_count,
    zeros,
)
from holofunc.optim.transforms import cut_draws, moving_average
from holofunc.typing import Key, Params, PyTree, Scalar

__all__ = ["HutchinsonState", "SophiaState", "hutchinson_estimator", "scale_by_sophia"]


GradFn = Callable[[Params], PyTree]


def _hessian_diagonal(name: str, grad_fn: GradFn | None, params: MaybeParams, key: Key) -> PyTree:
    """``z * (H @ z)`` for a ``z`` of random signs, in fp32 for half precision.

    By the reverse of ``grad_fn``, as ``H`` is symmetric: more operations have one than have a forward derivative.
    """
    if params is None:
        raise ValueError(f"{name} needs the parameters: call update(updates, state, params)")
    if grad_fn is None:
        raise TypeError(f"{name} needs the gradient's derivative: call update(updates, state, params, grad_fn=...)")
    at = params
    if not tree.leaves(at):
        return params
    draws = cut_draws(1.0 - 2.0 * random.bernoulli(key, (tree.size(at),), 0.5), at)
    signs = tree.map(lambda z, p: z.to(p.dtype), draws, at)
    grads, pull = torch.func.vjp(grad_fn, at)[:2]
    check_updates(grads, params, SECOND)
    product = pull(tree.map(lambda z, g: z.to(g.dtype), signs, grads))[0]
    return tree.map(lambda z, h: tree.wide(z) * tree.wide(h), signs, product)


class _Hutchinson(NamedTuple):
    count: Tensor  # type: ignore[assignment]
    key: Key


class HutchinsonState(_Hutchinson, TakesHessianProduct, KeepsProgress):
    """Updates so far, and the key that the signs of all updates derive from."""

    __slots__ = ()

    @property
    def progress(self) -> tuple[str, ...]:
        return ("count",)


def hutchinson_estimator(key: Key) -> GradientTransformation:
    """An estimate of the Hessian's diagonal in place of the updates: ``z * (H @ z)``, ``z`` of random signs.

    Its mean over keys is the diagonal, which is exact at once where the Hessian is diagonal. ``update`` needs one more
    argument, ``grad_fn(params) -> gradients``, and takes one product with its derivative; steps of
    `holofunc.train.make_train_step` pass one of the same batch.

    Args:
        key: the signs are a function of it, of the number of the update and of the paths.

    Source: Hutchinson, "A stochastic estimator of the trace of the influence matrix" (1989); Bekas et al., "An
    estimator for the diagonal of a matrix" (2007).

    Example:
        >>> import torch
        >>> from holofunc import optim, random
        >>> grad_fn = torch.func.grad(lambda params: (params["w"] ** 3).sum())
        >>> tx, params = optim.hutchinson_estimator(random.key(0)), {"w": torch.tensor([1.0, 2.0])}
        >>> tx.update(params, tx.init(params), params, grad_fn=grad_fn)[0]
        {'w': tensor([ 6., 12.])}
    """

    random.check_key(key)

    def init(params: Params) -> HutchinsonState:
        check_params(params, "hutchinson_estimator")
        return HutchinsonState(zero_count(params), key.clone())

    def update(
        updates: PyTree,
        state: HutchinsonState,
        params: MaybeParams = None,
        *,
        grad_fn: GradFn | None = None,
        **extra: Any,
    ) -> tuple[PyTree, HutchinsonState]:
        draw = random.fold_in(state.key, state.count)
        out = _hessian_diagonal("hutchinson_estimator", grad_fn, params, draw)
        return out, HutchinsonState(state.count + 1, state.key)

    return composed(init, update, adds=(TakesHessianProduct,))


class _Sophia(NamedTuple):
    count: Tensor  # type: ignore[assignment]
    key: Key
    mu: PyTree
    hessian: PyTree


class SophiaState(_Sophia, TakesHessianProduct):
    """Updates so far, the key of the signs, moving averages of gradients and of the Hessian's diagonal."""

    __slots__ = ()


def scale_by_sophia(
    key: Key,
    b1: Scalar = 0.96,
    b2: Scalar = 0.99,
    eps: Scalar = 1e-12,
    *,
    gamma: Scalar = 0.01,
    clip_threshold: Scalar = 1.0,
    update_every: int = 10,
) -> GradientTransformation:
    """Momentum over curvature, clipped: a Newton step where the Hessian says so, a sign where it does not.

        mu = b1 * mu + (1 - b1) * g
        hessian = b2 * hessian + (1 - b2) * z * (H @ z)                     # every update_every updates
        u = mu / max(gamma * hessian, eps),  clipped to [-clip_threshold, clip_threshold]

    ``update`` needs ``grad_fn``, as that of `hutchinson_estimator` does.

    Args:
        key: of the random signs ``z``.
        b1, b2: in [0, 1).
        eps: least curvature to divide by, above 0; also what negative curvature becomes.
        gamma: factor of the curvature: the larger, the fewer elements are clipped.
        clip_threshold: infinity does not clip.
        update_every: updates between new estimates. The product is computed in every update, and used when it is time:
            a branch would not be pure. So an update costs up to three gradients.

    Source: Liu et al., "Sophia: a scalable stochastic second-order optimizer for language model pre-training" (arXiv
    2305.14342), algorithm 3 with the estimator of algorithm 1, of signs in place of its normal draws.
    """
    check_decay(b1=b1, b2=b2)
    random.check_key(key)
    check_positive(eps=eps)
    check_nonnegative(gamma=gamma)
    check_bound(clip_threshold=clip_threshold)
    check_count(update_every=update_every)

    def init(params: Params) -> SophiaState:
        check_params(params, "scale_by_sophia")
        return SophiaState(zero_count(params), key.clone(), zeros(params), zeros(params))

    def update(
        updates: PyTree,
        state: SophiaState,
        params: MaybeParams = None,
        *,
        grad_fn: GradFn | None = None,
        **extra: Any,
    ) -> tuple[PyTree, SophiaState]:
        draw = random.fold_in(state.key, state.count)
        estimate = _hessian_diagonal("scale_by_sophia", grad_fn, params, draw)
        due = tree.hoist(state.count % update_every == 0)
        mu = moving_average(updates, state.mu, b1)
        hessian = tree.elementwise(
            lambda new, h: torch.where(due, h + (1 - b2) * (new - h), h), estimate, state.hessian
        )

        def rule(m: Tensor, h: Tensor) -> Tensor:
            u = m / (gamma * h).clamp_min(eps)
            return u.clamp_min(-clip_threshold).clamp_max(clip_threshold)

        return tree.elementwise(rule, mu, hessian), SophiaState(state.count + 1, state.key, mu, hessian)

    return composed(init, update, adds=(TakesHessianProduct,))
