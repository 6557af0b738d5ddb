"""Modules on the meta device: building, copying, and filling them with values."""

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
        """Raise for invalid inputs, without reading values."""
        raise NotImplementedError


class Built(NamedTuple):
    """The result of running a constructor."""

    body: nn.Module
    """The module on the meta device. Tensors in plain attributes have become non-persistent buffers."""
    constants: dict[str, Tensor]
    """Values of non-persistent buffers, such as filters, grids and tables, which are part of the architecture."""
    shared: dict[str, Tensor]
    """Values of submodules that existed before, which belong to the caller."""
    placed: frozenset[str]
    """Names of tensors that the constructor did not create on the meta device; they may share the caller's memory."""


def built(build: Callable[[], nn.Module]) -> Built:
    """Run a constructor on the meta device, or on the CPU if it reads tensor values.

    Raises:
        TypeError: the result is not a module, is TorchScript, or cannot be copied. ValueError: a submodule has values
            without a name or a shape.
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
    """The names of tensor attributes."""
    return [n for n, x in attributes(module) if isinstance(x, Tensor)]


def _outlived(named: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors that outlive their module, because the caller refers to them too."""
    if any(ref() is not None for ref in named.values()):
        gc.collect()  # for modules in reference cycles
    return {n: x.detach().clone() for n, ref in named.items() if (x := ref()) is not None}


def _cheaply(build: Callable[[], nn.Module]) -> nn.Module:
    """Build the module with as little storage as possible. Errors of the constructor are those of the last attempt."""
    try:
        with kept(), torch.device("meta"):
            return build()
    except Exception:  # it reads values, for instance of small tables that determine sizes
        with contextlib.suppress(Exception):
            return seeded(build, 0, _LayersOnMeta())
    return seeded(build, 0)


class _LayersOnMeta(TorchFunctionMode):
    """Allocates tensors of layers on the meta device, but computed tables on the CPU."""

    ALLOCATE = frozenset({torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.ALLOCATE and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def seeded(build: Callable[[], nn.Module], seed: int, place: TorchFunctionMode | None = None) -> nn.Module:
    """Build the module with the global generators seeded, and restore them."""
    with kept(seed), place or torch.device("cpu"):
        return build()


def copied(module: nn.Module, put: Callable[[Tensor], Tensor] = Tensor.clone) -> nn.Module:
    """A copy with ``put(tensor)`` for each tensor. Shared tensors stay shared, and functions refer to the copy.

    Raises:
        TypeError: part of the module cannot be copied.
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
    """A copy on the meta device, including tensors in attributes."""
    return copied(module, lambda x: x.to("meta"))


def _uncopied(module: nn.Module, memo: Mapping[int, Any]) -> str:
    """The attribute or submodule that cannot be copied."""
    for path, part in reversed(list(module.named_modules())):
        for leaf, value in (*vars(part).items(), (None, part)):
            try:
                copy.deepcopy(value, dict(memo))
            except Exception:
                name = ".".join(filter(None, (path, leaf)))
                return f"{name or 'the module'}, a {type(value).__name__},"
    return "the module"


def filled(body: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """Replace the tensors of ``body`` by copies of values, by name. Shared tensors stay shared."""
    new: dict[int, Tensor] = {}
    for name, x in named(body):
        value = values[name].detach().clone()
        new[id(x)] = nn.Parameter(value, x.requires_grad) if isinstance(x, nn.Parameter) else value
    for part in body.modules():
        for kind in (part._parameters, part._buffers):
            kind.update({leaf: new[id(x)] for leaf, x in kind.items() if x is not None})  # type: ignore[misc]
    return body


def cumulative(module: nn.Module) -> nn.Module:
    """``module`` with BatchNorms of ``momentum=None`` computed without reading the number of batches."""
    for part in module.modules():
        plain = type(part) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        if plain and part.momentum is None and part.track_running_stats:
            part.forward = partial(_average, part)
    return module


def _average(norm: Any, x: Tensor) -> Tensor:
    """BatchNorm in train mode whose statistics are means over all batches."""
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
