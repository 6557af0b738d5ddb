"""Setting train and eval mode, which must not change a module otherwise."""

from typing import Any

import torch
from torch import nn

from holofunc.model.passes import Overwritten, Pass
from holofunc.model.references import named

__all__ = ["set_mode"]


class _Switch(Pass):
    """Intercepts a change of the mode, which may freeze parameters."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in FLAGS:
            return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


FLAGS = (torch.Tensor.requires_grad_, torch.Tensor.requires_grad.__set__)  # type: ignore[attr-defined]


def set_mode(module: nn.Module, train: bool, name: str) -> nn.Module:
    """``module`` in train or in eval mode.

    Raises:
        ValueError: it does more than that, such as merging weights, which would have to be done to values.
    """
    before = dict(named(module))
    try:
        with _Switch(name, None, {"": 0}, {}, before):
            module.train(train)
    except (Overwritten, RuntimeError, ValueError) as error:
        what = f"writes into {sorted(error.names)[0]}" if isinstance(error, Overwritten) else f"fails ({error})"
    else:
        after = dict(named(module))
        changed = sorted(n for n in before.keys() | after.keys() if before.get(n) is not after.get(n))
        if not changed:
            return module
        what = f"replaces {changed[0]}"
    raise ValueError(
        f"{name} {what} when its mode is set to {'train' if train else 'eval'}, and a mode here is a way to compute, "
        "not a change of the values: switch that off (LoRA's merge_weights=False, say), or have train() set the mode "
        "and nothing else"
    )
