"""Reduce on plateau: a step size that falls when the loss stops falling."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from holofunc import tree
from holofunc.optim.base import GradientTransformation, MaybeParams
from holofunc.optim.capabilities import KeepsProgress
from holofunc.optim.checks import need_loss
from holofunc.optim.deprecation import renamed
from holofunc.optim.ranges import check_count, check_decay, check_nonnegative
from holofunc.optim.scalars import zero_count, zero_scalar
from holofunc.typing import Params, PyTree, Scalar

__all__ = ["PlateauState", "reduce_on_plateau"]


class _Plateau(NamedTuple):
    scale: Tensor
    best: Tensor
    stale: Tensor
    cooldown: Tensor
    total: Tensor
    seen: Tensor


class PlateauState(_Plateau, KeepsProgress):
    """The factor; the best loss; looks without progress, looks left to wait; losses since the last look, their sum."""

    __slots__ = ()

    @property
    def progress(self) -> tuple[str, ...]:
        return self._fields


@renamed(window="every")
def reduce_on_plateau(
    factor: Scalar = 0.1,
    *,
    patience: int = 10,
    rtol: Scalar = 1e-4,
    atol: Scalar = 0.0,
    cooldown: int = 0,
    every: int = 1,
    min_scale: Scalar = 0.0,
) -> GradientTransformation:
    """Multiply updates by a scale that falls by ``factor`` when the loss stops falling; needs ``loss=`` in ``update``.

    Stands at the end of a chain. Progress is a mean loss below ``best - rtol * abs(best) - atol``; the scale
    falls with the look after ``patience`` others in a row without it, as in torch.

    Args:
        factor: in [0, 1).
        patience: looks without progress before the scale falls.
        rtol, atol: what counts as progress.
        cooldown: looks to wait after a fall.
        every: updates whose losses are averaged into one look: an epoch, say.
        min_scale: the scale does not fall below.
    """
    check_decay(factor=factor)
    check_nonnegative(rtol=rtol, atol=atol, min_scale=min_scale)
    check_count(0, patience=patience, cooldown=cooldown)
    check_count(every=every)

    def init(params: Params) -> PlateauState:
        count, zero = zero_count(params), zero_scalar(params)
        return PlateauState(zero + 1, zero + torch.finfo(zero.dtype).max, count, count.clone(), zero, count.clone())

    def update(
        updates: PyTree, state: PlateauState, params: MaybeParams = None, *, loss: Any = None, flush: bool = False
    ) -> tuple[PyTree, PlateauState]:
        if flush and loss is None:  # of losses that it has seen
            return tree.elementwise(lambda u: state.scale * tree.upcast(u), updates), state
        need_loss(loss, "reduce_on_plateau")
        total, seen = (state.total + loss).to(state.total.dtype), state.seen + 1
        look = seen == every
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
        return tree.elementwise(lambda u: scale * tree.upcast(u), updates), new

    return GradientTransformation(init, update)
