"""Sophia, and Hutchinson's estimate of the Hessian's diagonal that it divides by."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from holofunc import random, tree
from holofunc.optim.base import GradientTransformation, MaybeParams, composed
from holofunc.optim.capabilities import KeepsProgress, TakesHessianProduct
from holofunc.optim.checks import SECOND, check_updates
from holofunc.optim.deprecation import renamed
from holofunc.optim.labels import Mask
from holofunc.optim.numerics import in_shapes_of, zeros
from holofunc.optim.ranges import check_bound, check_count, check_decay, check_nonnegative, check_positive
from holofunc.optim.scalars import own_key, zero_count
from holofunc.optim.transforms import descend, moving_average
from holofunc.typing import Key, Params, PyTree, Scalar, Schedule

__all__ = ["HutchinsonState", "SophiaState", "hutchinson_estimator", "scale_by_sophia", "sophia"]


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
    draws = in_shapes_of(1.0 - 2.0 * random.bernoulli(key, (tree.size(at),), 0.5), at)
    signs = tree.map(lambda z, p: z.to(p.dtype), draws, at)
    grads, pull = torch.func.vjp(grad_fn, at)[:2]
    check_updates(grads, params, SECOND)
    product = pull(tree.map(lambda g, z: z.to(g.dtype), grads, signs))[0]  # in the order of the dicts of grads
    return tree.map(lambda z, h: tree.upcast(z) * tree.upcast(h), signs, product)


class _Hutchinson(NamedTuple):
    step: Tensor
    key: Key


class HutchinsonState(_Hutchinson, TakesHessianProduct, KeepsProgress):
    """Updates so far, and the key that the signs of all updates derive from."""

    __slots__ = ()


@renamed(first="key")
def hutchinson_estimator(*, key: Key) -> GradientTransformation:
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
        >>> tx, params = optim.hutchinson_estimator(key=random.key(0)), {"w": torch.tensor([1.0, 2.0])}
        >>> tx.update(params, tx.init(params), params, grad_fn=grad_fn)[0]
        {'w': tensor([ 6., 12.])}
    """

    random.check_key(key)

    def init(params: Params) -> HutchinsonState:
        return HutchinsonState(zero_count(params), own_key(key, params))

    def update(
        updates: PyTree, state: HutchinsonState, params: MaybeParams = None, *, grad_fn: GradFn | None = None
    ) -> tuple[PyTree, HutchinsonState]:
        draw = random.fold_in(state.key, state.step)
        out = _hessian_diagonal("hutchinson_estimator", grad_fn, params, draw)
        return out, HutchinsonState(state.step + 1, state.key)

    return composed(init, update, adds=(TakesHessianProduct,))


class _Sophia(NamedTuple):
    step: Tensor
    key: Key
    mu: PyTree
    hessian: PyTree


class SophiaState(_Sophia, TakesHessianProduct):
    """Updates so far, the key of the signs, moving averages of gradients and of the Hessian's diagonal."""

    __slots__ = ()


@renamed(first="key", clip_threshold="threshold", update_every="every")
def scale_by_sophia(
    b1: Scalar = 0.96,
    b2: Scalar = 0.99,
    eps: Scalar = 1e-12,
    *,
    key: Key,
    gamma: Scalar = 0.01,
    threshold: Scalar = 1.0,
    every: int = 10,
) -> GradientTransformation:
    """Momentum over curvature, clipped: a Newton step where the Hessian says so, a sign where it does not.

        mu = b1 * mu + (1 - b1) * g
        hessian = b2 * hessian + (1 - b2) * z * (H @ z)                     # every so many updates
        u = mu / max(gamma * hessian, eps),  clipped to [-threshold, threshold]

    ``update`` needs ``grad_fn``, as that of `hutchinson_estimator` does.

    Args:
        key: of the random signs ``z``.
        b1, b2: in [0, 1).
        eps: least curvature to divide by, above 0; also what negative curvature becomes.
        gamma: factor of the curvature: the larger, the fewer elements are clipped.
        threshold: infinity does not clip.
        every: updates between new estimates. The product is computed in every update, and used when it is time:
            a branch would not be pure. So an update costs up to three gradients.

    Source: Liu et al., "Sophia: a scalable stochastic second-order optimizer for language model pre-training" (arXiv
    2305.14342), algorithm 3 with the estimator of algorithm 1, of signs in place of its normal draws.
    """
    check_decay(b1=b1, b2=b2)
    random.check_key(key)
    check_positive(eps=eps)
    check_nonnegative(gamma=gamma)
    check_bound(threshold=threshold)
    check_count(every=every)

    def init(params: Params) -> SophiaState:
        return SophiaState(zero_count(params), own_key(key, params), zeros(params), zeros(params))

    def update(
        updates: PyTree, state: SophiaState, params: MaybeParams = None, *, grad_fn: GradFn | None = None
    ) -> tuple[PyTree, SophiaState]:
        draw = random.fold_in(state.key, state.step)
        estimate = _hessian_diagonal("scale_by_sophia", grad_fn, params, draw)
        due = tree.hoist(state.step % every == 0)
        mu = moving_average(updates, state.mu, b1)
        hessian = tree.elementwise(
            lambda new, h: torch.where(due, h + (1 - b2) * (new - h), h), estimate, state.hessian
        )

        def rule(m: Tensor, h: Tensor) -> Tensor:
            u = m / (gamma * h).clamp_min(eps)
            return u.clamp_min(-threshold).clamp_max(threshold)

        return tree.elementwise(rule, mu, hessian), SophiaState(state.step + 1, state.key, mu, hessian)

    return composed(init, update, adds=(TakesHessianProduct,))


@renamed(clip_threshold="threshold", update_every="every")
def sophia(
    learning_rate: Scalar | Schedule,
    *,
    key: Key,
    b1: Scalar = 0.96,
    b2: Scalar = 0.99,
    eps: Scalar = 1e-12,
    gamma: Scalar = 0.01,
    threshold: Scalar = 1.0,
    every: int = 10,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    """Momentum over the diagonal of the Hessian, clipped: ``p - learning_rate * (u + weight_decay * p)``, with ``u`` of
    `scale_by_sophia`; ``update`` needs ``grad_fn=``.

    Args:
        learning_rate: a number, a 0-d tensor or a schedule; no element moves further than ``threshold`` times it.
        key, b1, b2, eps, gamma, threshold, every: as `scale_by_sophia`.
        weight_decay, mask: as `add_decayed_weights`, decoupled.

    Source: Liu et al. (arXiv 2305.14342).

    Example:
        >>> import torch
        >>> from holofunc import optim, random
        >>> grad_fn = torch.func.grad(lambda params: (params["w"] ** 2).sum())
        >>> tx, params = optim.sophia(0.1, key=random.key(0)), {"w": torch.ones(1)}
        >>> updates, state = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
        >>> updates, state["sophia"].hessian
        ({'w': tensor([-0.1000])}, {'w': tensor([0.0200])})
    """
    rule = scale_by_sophia(b1, b2, eps, key=key, gamma=gamma, threshold=threshold, every=every)
    return descend(learning_rate, weight_decay, mask, decoupled=True, sophia=rule)
