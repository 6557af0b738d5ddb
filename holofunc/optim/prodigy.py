"""Rules that find the size of a step themselves: Prodigy, distance over gradients, Polyak, plateaus."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from holofunc import tree
from holofunc.optim.adam import root, squares_average
from holofunc.optim.base import GradientTransformation, MaybeParams, check_params, composed, need_params, stateless
from holofunc.optim.capabilities import Descends, KeepsProgress, KeepsStart
from holofunc.optim.checks import need_loss
from holofunc.optim.labels import Mask, check_labels, mask_values
from holofunc.optim.numerics import (
    ABSENT,
    bias_correction,
    check_bound,
    check_count,
    check_decay,
    check_finite,
    check_flags,
    check_nonnegative,
    check_positive,
    copies,
    scalar_dtype,
    value_at,
    zero_count,
    zeros,
)
from holofunc.optim.transforms import moving_average
from holofunc.typing import Params, PyTree, Scalar, Schedule

__all__ = [
    "DogState",
    "PlateauState",
    "ProdigyState",
    "reduce_on_plateau",
    "scale_by_distance_over_gradients",
    "scale_by_polyak",
    "scale_by_prodigy",
]


class ProdigyState(NamedTuple):
    """Updates so far; the estimate of the distance to the solution and its numerator; averages, initial parameters; the
    largest estimate, where ``growth_rate`` holds the one in use back.
    """

    count: Tensor  # type: ignore[assignment]
    distance: Tensor
    numerator: Tensor
    mu: PyTree
    nu: PyTree
    total: PyTree
    start: PyTree
    largest: PyTree = ABSENT


def scale_by_prodigy(
    learning_rate: Scalar | Schedule = 1.0,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    b3: Scalar | None = None,
    eps: Scalar = 1e-8,
    d0: float = 1e-6,
    d_coef: Scalar = 1.0,
    growth_rate: float | None = None,
    bias_corrected: bool = False,
    safeguard_warmup: bool = False,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    """Adam whose step size is an estimate ``d`` of the distance to the solution; returns the descent itself:

        mu = b1 * mu + (1 - b1) * d * g
        nu = b2 * nu + (1 - b2) * (d * g)**2
        numerator = b3 * numerator + (1 - b3) * rate * d**2 * <g, start - p>
        total = b3 * total + (1 - b3) * rate * d**2 * g
        p = p - rate * d * (mu / (sqrt(nu) + d * eps) + weight_decay * p)
        d = max(d, d_coef * numerator / norm1(total))

    Args:
        learning_rate: ``rate``: leave it at 1, or a schedule that ends at 0.
        b1, b2: in [0, 1).
        b3: None is ``sqrt(b2)``.
        eps: added outside of the root, times ``d``.
        d0: the first ``d``. Used in ``init`` alone.
        d_coef: factor of the estimate.
        growth_rate: greatest factor by which ``d`` grows in one update towards the largest estimate so far, once it has
            left ``d0``; None is any. The authors name 1.02.
        bias_corrected: multiply ``rate`` by ``sqrt(1 - b2**count) / (1 - b1**count)``.
        safeguard_warmup: leave ``rate`` out of ``total``.
        weight_decay: decoupled.
        mask: True where weights decay; None is everywhere.

    Source: Mishchenko and Defazio, "Prodigy" (arXiv 2306.06101), algorithm 4.
    """
    check_flags(bias_corrected=bias_corrected, safeguard_warmup=safeguard_warmup)
    check_decay(b1=b1, b2=b2)
    b3 = b2**0.5 if b3 is None else b3
    check_decay(b3=b3)
    check_nonnegative(True, learning_rate=learning_rate, weight_decay=weight_decay)
    check_nonnegative(eps=eps, d_coef=d_coef)
    check_positive(d0=d0)
    if growth_rate is not None:
        check_bound(growth_rate=growth_rate)

    def init(params: Params) -> ProdigyState:
        check_params(params, "scale_by_prodigy")
        if mask is not None:
            check_labels("mask", mask, params, bool)
        count = zero_count(params)
        zero = torch.zeros_like(count, dtype=scalar_dtype(params))
        largest = ABSENT if growth_rate is None else zero + d0
        mu, nu, total = (zeros(params) for _ in range(3))
        return ProdigyState(count, zero + d0, zero, mu, nu, total, copies(params), largest)

    def update(
        updates: PyTree, state: ProdigyState, params: MaybeParams = None, **extra: Any
    ) -> tuple[PyTree, ProdigyState]:
        need_params(params, "scale_by_prodigy")
        count, d, dtype = state.count + 1, state.distance, scalar_dtype(updates)
        rate = value_at("learning_rate", learning_rate, state.count, updates)
        if bias_corrected:
            rate = rate * bias_correction(b2, count, dtype).sqrt() / bias_correction(b1, count, dtype)
        decay = value_at("weight_decay", weight_decay, state.count, updates)
        scaled = tree.elementwise(lambda g: d * tree.wide(g), updates)
        mu, nu = moving_average(scaled, state.mu, b1), squares_average(scaled, state.nu, b2)
        gained = tree.total(tree.elementwise(lambda g, x, p: g * (x - tree.wide(p)), scaled, state.start, params))
        numerator = b3 * state.numerator + (1 - b3) * rate * d * gained
        weight = tree.hoist((1 - b3) * d * (1.0 if safeguard_warmup else rate))
        total = tree.elementwise(lambda g, s: b3 * s + weight * g, scaled, state.total)
        norm1 = tree.total(tree.elementwise(torch.abs, total))
        estimate = torch.where(norm1 > 0, d_coef * numerator / torch.where(norm1 > 0, norm1, 1.0), 0.0)
        new, largest = torch.maximum(d, estimate), state.largest
        if growth_rate is not None:
            largest = torch.maximum(largest, estimate)
            new = torch.minimum(largest, torch.where(d <= d0, new, d) * growth_rate)
        step = tree.hoist(-rate * d)
        out = tree.elementwise(
            lambda m, v, p, w: step * (m / (root(v) + d * eps) + decay * w * tree.wide(p)),
            mu,
            nu,
            params,
            mask_values(mask, params),
        )
        return out, ProdigyState(count, new.to(d.dtype), numerator.to(d.dtype), mu, nu, total, state.start, largest)

    return composed(init, update, adds=(Descends, KeepsStart))


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
        check_params(params, "scale_by_distance_over_gradients")
        norm = tree.global_norm(params)
        return DogState(reps_rel * (1 + norm), torch.zeros_like(norm), copies(params))

    def update(updates: PyTree, state: DogState, params: MaybeParams = None, **extra: Any) -> tuple[PyTree, DogState]:
        need_params(params, "scale_by_distance_over_gradients")
        moved = tree.global_norm(tree.elementwise(lambda p, x: tree.wide(p) - x, params, state.start))
        distance = torch.maximum(state.distance, moved)
        total = state.total + tree.global_norm(updates).square()
        factor = tree.hoist(distance * (total + eps).rsqrt())
        return tree.elementwise(lambda g: factor * tree.wide(g), updates), DogState(distance, total, state.start)

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
    init = stateless(lambda updates, params: updates, "scale_by_polyak").init

    def update(
        updates: PyTree, state: PyTree, params: MaybeParams = None, *, loss: Any = None, **extra: Any
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
        return tree.elementwise(lambda g: step * tree.wide(g), updates), state

    return GradientTransformation(init, update)


class _Plateau(NamedTuple):
    scale: Tensor
    best: Tensor
    stale: Tensor
    cooldown: Tensor
    total: Tensor
    seen: Tensor


class PlateauState(_Plateau, KeepsProgress):
    """The factor; the best loss; windows without progress, windows left to wait; losses in this window, their sum."""

    __slots__ = ()

    @property
    def progress(self) -> tuple[str, ...]:
        return self._fields


def reduce_on_plateau(
    factor: Scalar = 0.1,
    *,
    patience: int = 10,
    rtol: Scalar = 1e-4,
    atol: Scalar = 0.0,
    cooldown: int = 0,
    window: int = 1,
    min_scale: Scalar = 0.0,
) -> GradientTransformation:
    """Multiply updates by a scale that falls by ``factor`` when the loss stops falling; needs ``loss=`` in ``update``.

    Stands at the end of a chain. Progress is a mean loss below ``best - rtol * abs(best) - atol``; the scale
    falls with the look after ``patience`` others in a row without it, as in torch.

    Args:
        factor: in [0, 1).
        patience: windows without progress before the scale falls.
        rtol, atol: what counts as progress.
        cooldown: windows to wait after a fall.
        window: updates whose losses are averaged into one look: an epoch, say.
        min_scale: the scale does not fall below.
    """
    check_decay(factor=factor)
    check_nonnegative(rtol=rtol, atol=atol, min_scale=min_scale)
    check_count(0, patience=patience, cooldown=cooldown)
    check_count(window=window)

    def init(params: Params) -> PlateauState:
        check_params(params, "reduce_on_plateau")
        count = zero_count(params)
        zero = torch.zeros_like(count, dtype=scalar_dtype(params))
        return PlateauState(zero + 1, zero + torch.finfo(zero.dtype).max, count, count.clone(), zero, count.clone())

    def update(
        updates: PyTree, state: PlateauState, params: MaybeParams = None, *, loss: Any = None, **extra: Any
    ) -> tuple[PyTree, PlateauState]:
        need_loss(loss, "reduce_on_plateau")
        total, seen = (state.total + loss).to(state.total.dtype), state.seen + 1
        look = seen == window
        mean = total / seen
        better = mean < state.best - rtol * state.best.abs() - atol
        waiting = state.cooldown > 0
        stale = torch.where(better | waiting, torch.zeros_like(state.stale), state.stale + 1)
        fall = look & (stale > patience)
        scale = torch.where(fall, (state.scale * factor).clamp_min(min_scale), state.scale)
        rest = torch.where(fall, torch.full_like(state.cooldown, cooldown), (state.cooldown - 1).clamp_min(0))
        new = PlateauState(
            scale,
            torch.where(look & better, mean, state.best),
            torch.where(look, torch.where(fall, torch.zeros_like(stale), stale), state.stale),
            torch.where(look, rest, state.cooldown),
            torch.where(look, torch.zeros_like(total), total),
            torch.where(look, torch.zeros_like(seen), seen),
        )
        return tree.elementwise(lambda u: scale * tree.wide(u), updates), new

    return GradientTransformation(init, update)
