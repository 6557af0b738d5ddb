"""Models made from other models: another module around the same start."""

from collections.abc import Callable

import torch
from torch import nn

from holofunc.model import Model
from holofunc.typing import Buffers, Key, Params

__all__ = ["Derived"]


def _same(params: Params, buffers: Buffers) -> tuple[Params, Buffers]:
    return params, buffers


class Derived(Model):
    """A model whose module is a changed copy of another's, and whose start is that of the other, converted.

    Args:
        base: the other model.
        change: ``change(module) -> module``; may change its argument, which is built for it.
        convert: ``convert(params, buffers) -> (params, buffers)``, on any device, the meta device included.
        name: shown in messages.
    """

    def __init__(
        self,
        base: Model,
        *,
        change: Callable[[nn.Module], nn.Module] = lambda module: module,
        convert: Callable[[Params, Buffers], tuple[Params, Buffers]] = _same,
        name: str | None = None,
    ) -> None:
        super().__init__(lambda: change(base._build()), name=name or base.name)
        self._base, self._convert = base, convert

    def init(
        self, key: Key, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Params, Buffers]:
        return self._convert(*self._base.init(key, device=device, dtype=dtype))

    def around(self, base: Model) -> Model:
        """``base`` with what this model can do beside `apply`; a detector detects."""
        return base
