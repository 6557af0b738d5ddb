"""DoG, Polyak's step, mechanic: step sizes that are found along the way."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from holofunc import tree
from holofunc.optim.base import GradientTransformation, MaybeParams, composed, inside, stateless
from holofunc.optim.capabilities import KeepsStart
from holofunc.optim.checks import need_loss, need_params
from holofunc.optim.numerics import bounded, copies, divisor, zeros
from holofunc.optim.ranges import check_bound, check_decay, check_finite, check_nonnegative, check_positive
from holofunc.optim.scalars import zero_scalar
from holofunc.typing import Params, PyTree, Scalar

__all__ = ["DogState", "MechanicState", "mechanic", "scale_by_distance_over_gradients", "scale_by_polyak"]


# --- steps of gradients ------------------------------------------------------------------------------------------


class DogState(NamedTuple):
    """The greatest distance from the initial parameters so far, the sum of squared gradient norms, those parameters."""

    distance: Tensor
    total: Tensor
    start: PyTree


def scale_by_distance_over_gradients(reps_rel: float = 1e-6, eps: Scalar = 1e-8) -> GradientTransformation:
    """``distance / sqrt(total + eps) * g``: the greatest distance travelled, over the root of all squared gradients.

    Args:
        reps_rel: the first distance is ``reps_rel * (1 + norm(p))``.
        eps: added to the sum.

    Source: Ivgi et al., "DoG is SGD's best friend" (arXiv 2302.12022).
    """
    check_nonnegative(reps_rel=reps_rel, eps=eps)

    def init(params: Params) -> DogState:
        norm = tree.global_norm(params)
        return DogState(reps_rel * (1 + norm), torch.zeros_like(norm), copies(params))

    def update(updates: PyTree, state: DogState, params: MaybeParams = None) -> tuple[PyTree, DogState]:
        need_params(params, "scale_by_distance_over_gradients")
        moved = tree.global_norm(tree.elementwise(lambda p, x: tree.upcast(p) - x, params, state.start))
        distance = torch.maximum(state.distance, moved)
        total = state.total + tree.global_norm(updates).square()
        factor = tree.hoist(distance * divisor(total, eps).rsqrt())
        return tree.elementwise(lambda g: factor * tree.upcast(g), updates), DogState(distance, total, state.start)

    return composed(init, update, adds=(KeepsStart,))


def scale_by_polyak(
    f_min: Scalar = 0.0, *, max_learning_rate: Scalar = 1.0, eps: Scalar = 0.0
) -> GradientTransformation:
    """``clamp((loss - f_min) / (norm(g)**2 + eps), 0, max_learning_rate) * g``; needs ``loss=`` in ``update``.

    Args:
        f_min: the least value of the loss.
        max_learning_rate: upper bound of the step size.
        eps: added to the squared norm.

    Source: Loizou et al., "Stochastic Polyak step-size for SGD" (arXiv 2002.10542).
    """
    check_finite(f_min=f_min)
    check_nonnegative(eps=eps)
    check_bound(max_learning_rate=max_learning_rate)
    init = stateless(lambda updates, params: updates).init

    def update(
        updates: PyTree, state: PyTree, params: MaybeParams = None, *, loss: Any = None
    ) -> tuple[PyTree, PyTree]:
        need_loss(loss, "scale_by_polyak")
        square = tree.global_norm(updates).square() + eps
        gap = loss - f_min
        step = (
            torch.where(square > 0, gap / torch.where(square > 0, square, 1.0), 0.0)
            .clamp_min(0)
            .clamp_max(max_learning_rate)
        )
        step = tree.hoist(step)
        return tree.elementwise(lambda g: step * tree.upcast(g), updates), state

    return GradientTransformation(init, update)


# --- Mechanic ----------------------------------------------------------------------------------------------------


class MechanicState(NamedTuple):
    """The initial parameters, the sum of the inner updates; for each decay, reward, greatest product, sum of squared
    products, and share of the scale; the inner state.
    """

    start: PyTree
    total: PyTree
    reward: Tensor
    most: Tensor
    squares: Tensor
    shares: Tensor
    inner: PyTree


def mechanic(
    tx: GradientTransformation,
    *,
    decays: tuple[float, ...] = (0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999),
    s_init: float = 1e-6,
    weight_decay: Scalar = 0.01,
    eps: Scalar = 1e-8,
) -> GradientTransformation:
    """Learn the scale ``s`` of all updates of ``tx`` together: parameters are ``start + s * total``, where ``total`` is
    the sum of the inner updates. For each decay, with ``h = -<g + weight_decay * s * norm(g) / norm(p) * p, total>``:

        most = max(decay * most, abs(h));  squares = decay**2 * squares + h**2
        reward = max(0, decay * reward + share * h)
        share = (s_init / len(decays) * most + reward) / (sqrt(squares) + eps)

    and ``s`` is the sum of the shares.

    Args:
        tx: an optimizer with its schedule; the size of its learning rate does not matter.
        decays: how fast each share forgets.
        s_init: the first scale.
        weight_decay: of the products, at least 0.
        eps: added outside of the root.

    Source: Cutkosky et al., "Mechanic: a learning rate tuner" (arXiv 2306.00144), algorithm 1.

    Example:
        >>> from holofunc import optim
        >>> tx = optim.mechanic(optim.adamw(optim.schedules.cosine(1e-3, 100)))
    """
    tx = inside("mechanic", tx)
    if not isinstance(decays, (tuple, list)) or not decays:
        raise ValueError(f"decays must be a tuple of numbers, got {decays!r}")
    check_decay(**{f"decays[{i}]": b for i, b in enumerate(decays)})
    check_positive(s_init=s_init)
    check_nonnegative(weight_decay=weight_decay, eps=eps)

    def init(params: Params) -> MechanicState:
        def sums() -> Tensor:
            return zero_scalar(params).repeat(len(decays))

        return MechanicState(copies(params), zeros(params), sums(), sums(), sums(), sums(), tx.init(params))

    def update(
        updates: PyTree, state: MechanicState, params: MaybeParams = None, **extra: Any
    ) -> tuple[PyTree, MechanicState]:
        need_params(params, "mechanic")
        steps, inner = tx.update(updates, state.inner, params, **extra)
        decay = state.shares.new_tensor(decays)
        s = state.shares.sum()
        norm = tree.global_norm(params)
        pull = weight_decay * s * bounded(tree.global_norm(updates)) / torch.where(norm > 0, norm, 1.0)
        pull = tree.hoist(pull)
        h = -tree.total(
            tree.elementwise(lambda g, p, t: (tree.upcast(g) + pull * tree.upcast(p)) * t, updates, params, state.total)
        )
        most_h = 1e-3 * torch.finfo(h.dtype).max ** 0.5  # whose square is far from overflowing
        h = h.clamp(-most_h, most_h)
        most = torch.maximum(decay * state.most, h.abs())
        squares = decay.square() * state.squares + h.square()
        reward = (decay * state.reward + state.shares * h).clamp_min(0)
        shares = (s_init / len(decays) * most + reward) / (tree.safe_sqrt(squares) + torch.where(squares > 0, eps, 1.0))
        total = tree.elementwise(lambda t, u: t + tree.upcast(u), state.total, steps)
        scale = tree.hoist(shares.sum())
        out = tree.elementwise(lambda x, t, p: x + scale * t - tree.upcast(p), state.start, total, params)
        reward, most, squares, shares = (x.to(state.shares.dtype) for x in (reward, most, squares, shares))
        return out, MechanicState(state.start, total, reward, most, squares, shares, inner)

    return composed(init, update, tx, adds=(KeepsStart,))
