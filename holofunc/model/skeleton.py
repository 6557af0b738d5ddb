"""Modules without storage: built on the meta device, copied, and filled with values again."""

import contextlib
import copy
import gc
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["Built", "ChecksInput", "built", "copied", "cumulative", "filled", "seeded", "state_buffers", "tensors"]


class ChecksInput(nn.Module):
    """A module that looks at its inputs before `holofunc.Model.apply` runs it."""

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


def built(build: Callable[[], nn.Module]) -> Built:
    """The module without storage. Constructors that read tensor values run on the CPU.

    Raises:
        TypeError: no module, or one of TorchScript. ValueError: a part whose values have no name or no shape.
    """
    module = _cheaply(build)
    _check(module)
    if any(x.is_meta for _, value in _hidden(module) for x in tensors(dict(vars(value)))):
        module = seeded(build, 0)  # objects of any kind are copied as they are
    constants, lists = _constants(module), _lists(module)
    held = tensors([getattr(*_place(module, name)) for name in (*constants, *lists)])
    real = seeded(build, 0) if any(x.is_meta for x in held) else module
    body = copied(module, lambda x: x.to("meta"))
    for name in constants:
        part, leaf = _place(body, name)
        if leaf in vars(part):
            part.register_buffer(leaf, vars(part).pop(leaf), persistent=False)
    values = {n: getattr(*_place(real, n)).detach().clone() for n in constants}
    for name in lists:
        setattr(*_place(body, name), _each(getattr(*_place(real, name)), lambda x: x.detach().clone()))
    named = {n: weakref.ref(x) for n, x in _named(module) if not x.is_meta}
    del module, real
    return Built(body, values, _outlived(named))


def _outlived(named: Mapping[str, Any]) -> dict[str, Tensor]:
    """What is alive although the module that it was built into is not: somebody else has it too."""
    if any(ref() is not None for ref in named.values()):
        gc.collect()  # of modules that refer to themselves
    return {n: x.detach().clone() for n, ref in named.items() if (x := ref()) is not None}


def _cheaply(build: Callable[[], nn.Module]) -> nn.Module:
    """The module with as little storage as the constructor allows: what it has to say, it says of the last try."""
    try:
        with torch.device("meta"):
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
    """The module with the values its constructor draws from ``seed``; the global generator is put back."""
    generator = torch.default_generator
    before = generator.get_state()
    try:
        generator.manual_seed(seed)
        with place or torch.device("cpu"):
            return build()
    finally:
        generator.set_state(before)


def copied(module: nn.Module, put: Callable[[Tensor], Tensor] = Tensor.clone) -> nn.Module:
    """A copy whose tensors are ``put(tensor)``; what shared a tensor shares it again."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        for x in tensors(list(vars(part).values())):
            if id(x) not in memo:
                new = put(x.detach())
                memo[id(x)] = nn.Parameter(new, x.requires_grad) if isinstance(x, nn.Parameter) else new
    return copy.deepcopy(module, memo)


def filled(body: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """The body with copies of values in the place of its tensors, by name; what shared a tensor shares it again."""
    new: dict[int, Tensor] = {}
    for name, x in _named(body):
        value = values[name].detach().clone()
        new[id(x)] = nn.Parameter(value, x.requires_grad) if isinstance(x, nn.Parameter) else value
    for part in body.modules():
        for kind in (part._parameters, part._buffers):
            kind.update({leaf: new[id(x)] for leaf, x in kind.items() if x is not None})  # type: ignore[misc]
    return body


def state_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that are in the state dict, each once, by its first name."""
    return {
        name: x
        for name, x in module.named_buffers()
        if _place(module, name)[1] not in _place(module, name)[0]._non_persistent_buffers_set
    }


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
    norm.running_mean.lerp_(mean, share)
    norm.running_var.lerp_(var, share)
    return out


# --- parts -------------------------------------------------------------------------------------------------------

OWN = frozenset(vars(nn.Module()))
"""Attributes that every module has."""


def _check(module: Any) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"build must return a torch.nn.Module, got {type(module).__name__}")
    for path, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise TypeError(
                f"{path or 'the module'} is TorchScript, which has no functional form: lift what it was made of"
            )
        if isinstance(part, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            raise TypeError(
                f"{path or 'the module'} is {type(part).__name__}, which copies what is inside of it: lift its "
                ".module, and use holofunc.distributed"
            )
        for leaf, x in (*part._parameters.items(), *part._buffers.items()):
            if x is not None and nn.parameter.is_lazy(x):
                raise ValueError(
                    f"{path or 'the module'} is a lazy layer, whose {leaf} has no shape yet: give it its sizes, or run "
                    "one batch through the module and use from_module"
                )
    parameters = {id(p): n for n, p in module.named_parameters()}
    for name in _lists(module):
        part, leaf = _place(module, name)
        if hidden := [parameters[id(x)] for x in tensors(vars(part)[leaf]) if id(x) in parameters]:
            raise ValueError(
                f"{name} hides {hidden[0]} in a {type(vars(part)[leaf]).__name__}, where values handed to apply do not "
                "reach it: refer to the module that has it, or use nn.ParameterList"
            )
    for name, value in _hidden(module):
        if isinstance(value, nn.Module) and any(p.is_meta for p in value.parameters()):
            raise ValueError(
                f"{name} hides a {type(value).__name__} that is no part of the module, so that its parameters have no "
                "names: use nn.ModuleList or nn.ModuleDict, or, if it shall not be trained, build it before and refer "
                "to it"
            )


def _hidden(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Modules that are no parts, and objects, which attributes refer to; by the attribute's name."""
    seen = {id(part) for part in module.modules()}
    left = [
        (f"{path}.{leaf}" if path else leaf, value)
        for path, part in module.named_modules()
        if not type(part).__module__.startswith("torch.nn.modules.")
        for leaf, value in vars(part).items()
        if leaf not in OWN
    ]
    while left:
        name, value = left.pop()
        if id(value) in seen or isinstance(value, (Tensor, type, ModuleType)) or inspect.isroutine(value):
            continue
        seen.add(id(value))
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple, set)) else ()
        if hasattr(value, "__dict__"):
            yield name, value
            inside = (*inside, *vars(value).values())
        left.extend((name, x) for x in inside)


def _constants(module: nn.Module) -> list[str]:
    """The names of tensors that are in no state dict: buffers that are not persistent, and plain attributes."""
    state = state_buffers(module)
    buffers = [n for n, _ in module.named_buffers() if n not in state]
    return [*buffers, *(n for n, value in _all_attributes(module) if isinstance(value, Tensor))]


def _lists(module: nn.Module) -> list[str]:
    """The names of attributes that are lists, tuples or dicts with tensors in them."""
    return [n for n, value in _all_attributes(module) if not isinstance(value, Tensor)]


def _all_attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, part in module.named_modules():
        for leaf, value in _attributes(part).items():
            yield (f"{path}.{leaf}" if path else leaf), value


def _attributes(part: nn.Module) -> dict[str, Any]:
    """The attributes with tensors in them that are neither parameters nor buffers."""
    if type(part).__module__.startswith("torch.nn.modules."):  # recurrent networks list their parameters
        return {}
    return {n: x for n, x in vars(part).items() if n not in OWN and tensors(x)}


def tensors(value: Any) -> list[Tensor]:
    """The tensors in nested lists, tuples and dicts, in their order."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [x for part in parts for x in tensors(part)]


def _each(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, dict):
        return type(value)((n, _each(x, fn)) for n, x in value.items())
    return type(value)(_each(x, fn) for x in value) if type(value) in (list, tuple) else value


def _named(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _place(module: Any, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf
