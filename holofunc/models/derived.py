"""Models derived from other models: a changed module with converted initial values."""

from collections.abc import Callable

import torch
from torch import nn

from holofunc.model import Model
from holofunc.typing import Buffers, Key, Params

__all__ = ["Derived"]


def _same(params: Params, buffers: Buffers) -> tuple[Params, Buffers]:
    return params, buffers


class Derived(Model):
    """A model whose module is a changed copy of another model's, and whose initial values are the converted ones.

    Args:
        base: the other model.
        change: ``change(module) -> module``; may modify its argument, which is a new module.
        convert: ``convert(params, buffers) -> (params, buffers)``, on any device, including the meta device.
        name: used in messages.
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
        """``base`` with the methods of this model beyond `apply`, such as those of a detector."""
        return base
