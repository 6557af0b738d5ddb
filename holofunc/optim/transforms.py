"""The pieces optimizers are chained from: ``scale_by_<rule>``, decay, clipping, momentum."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from holofunc import tree
from holofunc.optim.base import EmptyState, GradientTransformation, check_params, value_at, zero_count
from holofunc.typing import Params, PyTree, Scalar, Schedule

__all__ = ["AdamState", "ScheduleState", "add_decayed_weights", "scale_by_adam", "scale_by_learning_rate"]


class AdamState(NamedTuple):
    count: Tensor
    mu: PyTree
    nu: PyTree


def debias(decay: Any, count: Tensor, dtype: torch.dtype) -> Tensor:
    """``1 - decay**count``, as ``-expm1(count * log(decay))``: fp32 loses four digits to cancellation otherwise."""
    log = torch.log(decay) if isinstance(decay, Tensor) else math.log(decay) if decay > 0 else -math.inf
    return -torch.expm1(count.to(dtype) * log)


def scale_by_adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> GradientTransformation:
    def init(params: Params) -> AdamState:
        check_params(params, "scale_by_adam")
        return AdamState(zero_count(params), tree.zeros_like(params), tree.zeros_like(params))

    def update(
        updates: PyTree, state: AdamState, params: Params | None = None, **extra: Any
    ) -> tuple[PyTree, AdamState]:
        count = state.count + 1
        mu = tree.elementwise(lambda g, m: m + (1 - b1) * (g - m), updates, state.mu)
        nu = tree.elementwise(lambda g, v: v + (1 - b2) * (g * g - v), updates, state.nu)
        c1 = tree.hoist(1 / debias(b1, count, torch.float32))
        c2 = tree.hoist(1 / debias(b2, count, torch.float32).sqrt())
        out = tree.elementwise(lambda m, v: (m * c1) / (torch.sqrt(v) * c2 + eps), mu, nu)
        return out, AdamState(count, mu, nu)

    return GradientTransformation(init, update)


class ScheduleState(NamedTuple):
    count: Tensor


def scale_by_learning_rate(learning_rate: Scalar | Schedule) -> GradientTransformation:
    def init(params: Params) -> ScheduleState:
        return ScheduleState(zero_count(params))

    def update(
        updates: PyTree, state: ScheduleState, params: Params | None = None, **extra: Any
    ) -> tuple[PyTree, ScheduleState]:
        rate = tree.hoist(value_at(learning_rate, state.count))
        return tree.elementwise(lambda u: -rate * u, updates), ScheduleState(state.count + 1)

    return GradientTransformation(init, update)


def add_decayed_weights(weight_decay: Scalar | Schedule, mask: Any = None) -> GradientTransformation:
    def init(params: Params) -> EmptyState:
        return EmptyState()

    def update(
        updates: PyTree, state: EmptyState, params: Params | None = None, **extra: Any
    ) -> tuple[PyTree, EmptyState]:
        return tree.elementwise(lambda u, p: u + weight_decay * p, updates, params), state

    return GradientTransformation(init, update)
