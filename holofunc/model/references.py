"""The tensors of a module by name, and the objects that it refers to in attributes and hooks."""

import functools
import operator
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

__all__ = [
    *("TORCH", "Pure", "attributes", "constants", "lists", "named", "place", "reached", "rebind", "state_buffers"),
    "tensors",
]

OWN = frozenset(vars(nn.Module()))
"""Attributes that every module has."""
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
TORCH = "torch.nn.modules."


class Pure:
    """An immutable object, such as a model, whose contents need not be searched."""


def named(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, each once, by first name."""
    yield from module.named_parameters()
    yield from _buffers(module)


def _buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The buffers that are not also parameters."""
    parameters = {id(p) for p in module.parameters()}
    return [(name, x) for name, x in module.named_buffers() if id(x) not in parameters]


def place(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The submodule and the attribute of a dotted name."""
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


def state_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers in the state dict, each once, by first name."""
    return {n: x for n, x in _buffers(module) if place(module, n)[1] not in _volatile(module, n)}


def _volatile(module: nn.Module, name: str) -> set[str]:
    return place(module, name)[0]._non_persistent_buffers_set


def tensors(value: Any) -> list[Tensor]:
    """The tensors in nested lists, tuples and dicts, in their order."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [x for part in parts for x in tensors(part)]


# --- attributes --------------------------------------------------------------------------------------------------


def constants(module: nn.Module) -> list[str]:
    """The names of tensors outside the state dict, each once: non-persistent buffers and plain attributes."""
    found: dict[int, str] = {}
    for name, x in (*_buffers(module), *attributes(module)):
        if isinstance(x, Tensor):
            found.setdefault(id(x), name)
    state = {id(x) for x in (*module.parameters(), *state_buffers(module).values())}
    return [name for key, name in found.items() if key not in state]


def lists(module: nn.Module) -> list[str]:
    """The names of attributes that are lists, tuples or dicts of tensors."""
    return [n for n, value in attributes(module) if not isinstance(value, Tensor)]


def attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The attributes that are or contain tensors other than parameters and buffers, by dotted name."""
    for path, part in module.named_modules():
        for leaf, value in _plain(part):
            if tensors(value):
                yield (f"{path}.{leaf}" if path else leaf), value


def _plain(part: nn.Module) -> list[tuple[str, Any]]:
    """A module's own attributes, without the lists of parameters that recurrent networks keep up to date themselves."""
    if type(part).__module__.startswith(TORCH):
        return []
    listed = ("_flat_weights", "_flat_weight_refs") if isinstance(part, nn.RNNBase) else ()
    return [(leaf, value) for leaf, value in vars(part).items() if leaf not in OWN and leaf not in listed]


# --- objects reached from attributes and hooks -----------------------------------------------------------------------


def reached(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """All objects reached from attributes and hooks, except submodules, with the attribute or hook."""
    seen = {id(part) for part in module.modules()}
    left: list[tuple[str, Any]] = []
    for path, part in module.named_modules():
        left += [(f"{path}.{leaf}" if path else leaf, value) for leaf, value in _plain(part)]
        left += [(f"a hook of {path or 'the module'}", hook) for kind in HOOKS for hook in getattr(part, kind).values()]
    while left:
        name, value = left.pop()
        if id(value) not in seen and not isinstance(value, (type, ModuleType)):
            seen.add(id(value))
            yield name, value
            left.extend((name, x) for x in _inside(value))


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, (Tensor, Pure)):
        return ()
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return list(value)
    if isinstance(value, functools.partial):
        return (value.func, *value.args, *value.keywords.values())
    if isinstance(value, MethodType):
        return (value.__self__, value.__func__)
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
        return (*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
    return list(vars(value).values()) if hasattr(value, "__dict__") else ()


# --- functions of a copy -----------------------------------------------------------------------------------------


def rebind(module: nn.Module, copies: Mapping[int, Any]) -> None:
    """Make functions in attributes and hooks refer to ``copies``, given by the ids of the originals.

    `copy.deepcopy` does not copy functions, so closures and defaults still refer to the originals, often ``self``.
    """
    rebound = _Rebound(copies)
    for part in module.modules():
        for kind in HOOKS:
            rebound(getattr(part, kind))
        own = {leaf: value for leaf, value in vars(part).items() if leaf not in OWN}
        vars(part).update({leaf: rebound(value) for leaf, value in own.items()})


class _Rebound:
    """``rebound(value)`` makes the functions in a value refer to copies; lists and dicts are changed in place."""

    def __init__(self, copies: Mapping[int, Any]) -> None:
        self.copies = copies
        self.done: dict[int, tuple[Any, Any]] = {}

    def __call__(self, value: Any) -> Any:
        if not isinstance(value, (list, dict)):
            return self.other(value)
        if id(value) not in self.done:
            self.done[id(value)] = value, value
            for key, x in list(value.items() if isinstance(value, dict) else enumerate(value)):
                if (new := self(x)) is not x:
                    value[key] = new
        return value

    def other(self, value: Any) -> Any:
        """The replacement of an object that was not copied: a function, or an object that one refers to."""
        if id(value) in self.copies:
            return self.copies[id(value)]
        if not isinstance(value, (list, tuple, dict, FunctionType, MethodType, functools.partial)):
            return value
        if id(value) not in self.done:
            self.done[id(value)] = value, value  # for reference cycles
            self.done[id(value)] = value, self._remade(value)
        return self.done[id(value)][1]

    def _remade(self, value: Any) -> Any:
        parts = list(_inside(value))
        news = [self.other(x) for x in parts]
        if all(map(operator.is_, parts, news)):
            return value
        if isinstance(value, FunctionType):
            return _function(value, news)
        if isinstance(value, MethodType):
            return MethodType(news[1], news[0])
        if isinstance(value, functools.partial):
            count = 1 + len(value.args)
            return functools.partial(news[0], *news[1:count], **dict(zip(value.keywords, news[count:], strict=True)))
        if isinstance(value, dict):
            return type(value)(zip(value, news, strict=True))
        return value._make(news) if hasattr(value, "_make") else type(value)(news)


def _function(function: FunctionType, held: list[Any]) -> FunctionType:
    """The same code with other objects in its closure and defaults."""
    left = iter(held)
    cells = tuple([cell if cell == CellType() else CellType(next(left)) for cell in function.__closure__ or ()])
    defaults = tuple([next(left) for _ in function.__defaults__ or ()])
    new = FunctionType(function.__code__, function.__globals__, function.__name__, defaults or None, cells)
    new.__kwdefaults__ = dict(zip(function.__kwdefaults__ or {}, left, strict=True)) or None
    vars(new).update(vars(function))
    return new
