"""Modules without storage: built on the meta device, copied, and filled with values again."""

import contextlib
import copy
import gc
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from holofunc.model.checks import check
from holofunc.model.generators import kept
from holofunc.model.references import (
    attributes,
    constants,
    lists,
    named,
    place,
    reached,
    rebind,
    state_buffers,
    tensors,
)

__all__ = ["Built", "ChecksInput", "built", "copied", "cumulative", "filled", "on_meta", "seeded", "tensors"]


class ChecksInput(nn.Module):
    """A module with a check of its inputs, which `holofunc.Model.apply` calls first."""

    def check_input(self, *inputs: Any) -> None:
        """Raise what there is to say of inputs that the module cannot take; reads no values."""
        raise NotImplementedError


class Built(NamedTuple):
    """What a constructor makes."""

    body: nn.Module
    """Without storage. Tensors that were plain attributes are buffers in it that are in no state dict."""
    constants: dict[str, Tensor]
    """The values of the buffers that are in no state dict: filters, grids, tables. They belong to the architecture."""
    shared: dict[str, Tensor]
    """Values of parts that were there before, and belong to the caller."""
    placed: frozenset[str]
    """The names of tensors that the constructor puts somewhere itself: their memory may be the caller's."""


def built(build: Callable[[], nn.Module]) -> Built:
    """The module without storage. Constructors that read tensor values run on the CPU.

    Raises:
        TypeError: no module, or one of TorchScript, or one that cannot be copied. ValueError: a part whose values have
            no name or no shape.
    """
    module = _cheaply(build)
    check(module)
    placed = frozenset(n for n, x in named(module) if not x.is_meta)
    if _lacks_values(module):
        module = seeded(build, 0)
    fixed, listed = constants(module), lists(module)
    body = on_meta(module)
    for name in _attribute_names(module):
        part, leaf = place(body, name)
        part.register_buffer(leaf, vars(part).pop(leaf), persistent=False)
    values = {n: getattr(*place(module, n)).detach().clone() for n in fixed}
    for name in listed:
        setattr(*place(body, name), _each(getattr(*place(module, name)), lambda x: x.detach().clone()))
    before = {n: weakref.ref(x) for n, x in named(module) if not x.is_meta}
    del module
    return Built(body, values, _outlived(before), placed)


def _lacks_values(module: nn.Module) -> bool:
    """Whether tensors that belong to the architecture are on the meta device."""
    state = {id(x) for x in (*module.parameters(), *state_buffers(module).values())}
    held = [*module.buffers(), *(x for _, x in reached(module) if isinstance(x, Tensor))]
    return any(x.is_meta and id(x) not in state for x in held)


def _attribute_names(module: nn.Module) -> list[str]:
    """The names of attributes that are tensors."""
    return [n for n, x in attributes(module) if isinstance(x, Tensor)]


def _outlived(named: Mapping[str, Any]) -> dict[str, Tensor]:
    """What is alive although the module that it was built into is not: somebody else has it too."""
    if any(ref() is not None for ref in named.values()):
        gc.collect()  # of modules that refer to themselves
    return {n: x.detach().clone() for n, ref in named.items() if (x := ref()) is not None}


def _cheaply(build: Callable[[], nn.Module]) -> nn.Module:
    """The module with as little storage as the constructor allows: what it has to say, it says of the last try."""
    try:
        with kept(), torch.device("meta"):
            return build()
    except Exception:  # it reads values: of small tables, if they decide on sizes
        with contextlib.suppress(Exception):
            return seeded(build, 0, _LayersOnMeta())
    return seeded(build, 0)


class _LayersOnMeta(TorchFunctionMode):
    """Tensors as layers allocate them have no storage; tables, which are computed, have."""

    ALLOCATE = frozenset({torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.ALLOCATE and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def seeded(build: Callable[[], nn.Module], seed: int, place: TorchFunctionMode | None = None) -> nn.Module:
    """The module with the values its constructor draws from ``seed``; the global generators are put back."""
    with kept(seed), place or torch.device("cpu"):
        return build()


def copied(module: nn.Module, put: Callable[[Tensor], Tensor] = Tensor.clone) -> nn.Module:
    """A copy whose tensors are ``put(tensor)``; what shared a tensor shares it again, and functions refer to the copy.

    Raises:
        TypeError: something in it cannot be copied.
    """
    memo: dict[int, Any] = {}
    for part in module.modules():
        for x in tensors(list(vars(part).values())):
            if id(x) not in memo:
                copied_x = put(x.detach())
                memo[id(x)] = nn.Parameter(copied_x, x.requires_grad) if isinstance(x, nn.Parameter) else copied_x
    copies = dict(memo)
    try:
        new = copy.deepcopy(module, copies)
    except Exception as error:
        raise TypeError(
            f"{_uncopied(module, memo)} cannot be copied ({error}), and a model is a copy of the module: leave it out "
            "of the module, or give its class a __deepcopy__"
        ) from error
    rebind(new, copies)
    return new


def on_meta(module: nn.Module) -> nn.Module:
    """A copy of which no tensor that attributes lead to has values."""
    return copied(module, lambda x: x.to("meta"))


def _uncopied(module: nn.Module, memo: Mapping[int, Any]) -> str:
    """What it is in a module that cannot be copied: an attribute, or a part."""
    for path, part in reversed(list(module.named_modules())):
        for leaf, value in (*vars(part).items(), (None, part)):
            try:
                copy.deepcopy(value, dict(memo))
            except Exception:
                name = ".".join(filter(None, (path, leaf)))
                return f"{name or 'the module'}, a {type(value).__name__},"
    return "the module"


def filled(body: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """The body with copies of values in the place of its tensors, by name; what shared a tensor shares it again."""
    new: dict[int, Tensor] = {}
    for name, x in named(body):
        value = values[name].detach().clone()
        new[id(x)] = nn.Parameter(value, x.requires_grad) if isinstance(x, nn.Parameter) else value
    for part in body.modules():
        for kind in (part._parameters, part._buffers):
            kind.update({leaf: new[id(x)] for leaf, x in kind.items() if x is not None})  # type: ignore[misc]
    return body


def cumulative(module: nn.Module) -> nn.Module:
    """``module`` with BatchNorms whose ``momentum`` is None computed without reading how many batches there were."""
    for part in module.modules():
        plain = type(part) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        if plain and part.momentum is None and part.track_running_stats:
            part.forward = partial(_average, part)
    return module


def _average(norm: Any, x: Tensor) -> Tensor:
    """In train mode: the statistics are means over all batches."""
    norm._check_input_dim(x)
    mean, var = torch.zeros_like(norm.running_mean), torch.zeros_like(norm.running_var)
    out = F.batch_norm(x, mean, var, norm.weight, norm.bias, True, 1.0, norm.eps)
    norm.num_batches_tracked.add_(1)
    share = norm.num_batches_tracked.to(mean.dtype).reciprocal()
    norm.running_mean = norm.running_mean.lerp(mean, share)
    norm.running_var = norm.running_var.lerp(var, share)
    return out


def _each(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, dict):
        return type(value)((n, _each(x, fn)) for n, x in value.items())
    return type(value)(_each(x, fn) for x in value) if type(value) in (list, tuple) else value
