"""Monitoring: measurements of updates, kept in the state."""

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from holofunc.optim.base import GradientTransformation, MaybeParams
from holofunc.optim.capabilities import KeepsProgress
from holofunc.optim.checks import check_function
from holofunc.optim.ranges import check_decay
from holofunc.optim.scalars import zero_count, zero_scalar
from holofunc.typing import Params, PyTree, Scalar

__all__ = ["MonitorState", "monitor"]

Measure: TypeAlias = Callable[[PyTree, Params | None], Tensor]
"""``measure(updates, params)``, a 0-d tensor."""


class _Monitor(NamedTuple):
    step: Tensor
    values: dict[str, Tensor]


class MonitorState(_Monitor, KeepsProgress):
    """Updates so far, and the latest measurements, or their moving averages, by name."""

    __slots__ = ()

    @property
    def progress(self) -> tuple[str, ...]:
        return self._fields


def monitor(
    measures: Mapping[str, Measure] | None = None, /, *, decay: Scalar = 0.0, **named: Measure
) -> GradientTransformation:
    """Pass updates through, and keep ``measure(updates, params)`` of each measure in the state, to be read at leisure.

    Args:
        measures: functions that return a 0-d tensor, by name.
        decay: of a moving average of the measurements, in [0, 1); 0 keeps the latest.
        named: further measures, by keyword.

    Example:
        >>> import torch
        >>> from holofunc import optim, tree
        >>> tx = optim.named_chain(seen=optim.monitor(grad_norm=lambda u, p: tree.global_norm(u)), sgd=optim.sgd(0.1))
        >>> params = {"w": torch.tensor([3.0, 4.0])}
        >>> tx.update(params, tx.init(params))[1]["seen"].values
        {'grad_norm': tensor(5.)}
    """
    check_decay(decay=decay)
    chosen = {**(measures or {}), **named}
    check_function(**chosen)

    def init(params: Params) -> MonitorState:
        return MonitorState(zero_count(params), {name: zero_scalar(params) for name in chosen})

    def update(updates: PyTree, state: MonitorState, params: MaybeParams = None) -> tuple[PyTree, MonitorState]:
        values = {}
        for name, measure in chosen.items():
            old = state.values[name]
            now = torch.as_tensor(measure(updates, params), dtype=old.dtype, device=old.device)
            if now.ndim:
                raise ValueError(f"{name}: a measure must return a 0-d tensor, got shape {tuple(now.shape)}")
            values[name] = now + decay * (state.step > 0).to(old.dtype) * (old - now)
        return updates, MonitorState(state.step + 1, values)

    return GradientTransformation(init, update)
