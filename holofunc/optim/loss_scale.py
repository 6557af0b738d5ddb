"""Dynamic loss scale: a factor that follows what fp16 can hold, so that small gradients do not vanish."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from holofunc.optim.base import GradientTransformation, MaybeParams, as_transformation, composed
from holofunc.optim.capabilities import KeepsProgress, ScalesLoss
from holofunc.optim.conditional import ApplyIfState, apply_if_finite
from holofunc.optim.ranges import check_count, check_positive
from holofunc.optim.scalars import zero_count
from holofunc.typing import Params, PyTree

__all__ = ["LossScaleState", "dynamic_loss_scale"]


class _LossScale(NamedTuple):
    scale: Tensor
    good: Tensor
    inner: ApplyIfState


class LossScaleState(_LossScale, ScalesLoss, KeepsProgress):
    """The factor, the updates since it last changed, and the state of `apply_if_finite`."""

    __slots__ = ()

    @property
    def loss_scale(self) -> Tensor:
        return self.scale

    @property
    def progress(self) -> tuple[str, ...]:
        return ("scale", "good")


def dynamic_loss_scale(
    tx: GradientTransformation,
    *,
    init_scale: float = 2.0**16,
    growth_factor: float = 2.0,
    backoff_factor: float = 0.5,
    growth_interval: int = 2000,
    max_consecutive: int | None = None,
) -> GradientTransformation:
    """Skip updates that are not finite, as `apply_if_finite` does, and keep a factor for the loss so that few are.

    The factor shrinks with each skipped update, and grows after ``growth_interval`` good ones in a row. It lives in the
    state, so it is saved and resumed. Steps of `holofunc.train.make_train_step` multiply the loss by it and divide the
    gradients, which arrive here in their true size: clipping inside sees those. With
    ``train.supervised(..., precision="fp16")`` it takes the place of the constant factor.

    Args:
        tx: the optimizer.
        init_scale: the factor to begin with; powers of two are exact.
        growth_factor: more than 1.
        backoff_factor: between 0 and 1.
        growth_interval: at least 1.
        max_consecutive: as for `apply_if_finite`; None is any number, since the factor needs some updates to be found.

    Source: the rule of `torch.amp.GradScaler`; pure, and without its reads by the host.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.dynamic_loss_scale(optim.sgd(0.1), init_scale=8.0), {"w": torch.zeros(1)}
        >>> updates, state = tx.update({"w": torch.tensor([float("inf")])}, tx.init(params), params)
        >>> updates, state.scale, optim.skipped(state)
        ({'w': tensor([0.])}, tensor(4.), tensor(True))
    """
    tx = as_transformation("tx", tx)
    check_count(growth_interval=growth_interval)
    check_positive(init_scale=init_scale, growth_factor=growth_factor, backoff_factor=backoff_factor)
    for name, value, fine in (
        ("growth_factor", growth_factor, growth_factor > 1),
        ("backoff_factor", backoff_factor, backoff_factor < 1),
    ):
        if not fine:
            raise ValueError(f"{name} must be {'below' if name == 'backoff_factor' else 'above'} 1, got {value!r}")
    guarded = apply_if_finite(tx, 2**31 - 1 if max_consecutive is None else max_consecutive)

    def init(params: Params) -> LossScaleState:
        step = zero_count(params)
        scale = torch.full_like(step, init_scale, dtype=torch.float32)
        return LossScaleState(scale, step, guarded.init(params))

    def update(
        updates: PyTree, state: LossScaleState, params: MaybeParams = None, **extra: Any
    ) -> tuple[PyTree, LossScaleState]:
        updates, inner = guarded.update(updates, state.inner, params, **extra)
        good = torch.where(inner.skipped, 0, state.good + 1)
        grows = good >= growth_interval
        larger = (state.scale * growth_factor).clamp_max(2.0**120)  # as an infinity could never shrink
        scale = torch.where(inner.skipped, state.scale * backoff_factor, torch.where(grows, larger, state.scale))
        return updates, LossScaleState(scale, torch.where(grows, 0, good), inner)

    return composed(init, update, guarded, adds=(ScalesLoss,))
