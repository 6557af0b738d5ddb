"""The inputs of a forward pass: copies of those that it writes into, and names for the others."""

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Collection
from types import ModuleType
from typing import Any

from torch import Tensor, nn

__all__ = ["copied_inputs", "each"]


def copied_inputs(given: Any, copies: Collection[str], of: str = "") -> tuple[Any, dict[str, Tensor]]:
    """``given`` with copies of the tensors of these names, and the other tensors by name.

    Containers and objects are copied too, so that a forward pass may change them; an object that occurs twice is copied
    once.

    Args:
        of: suffix of the names.
    """
    done: dict[int, Any] = {}
    guarded: dict[str, Tensor] = {}

    def take(x: Tensor) -> Tensor:
        if id(x) not in done:
            name = f"input {len(done)}{of}"
            done[id(x)] = x.clone() if name in copies else x
            if name not in copies:
                guarded[name] = x
        return done[id(x)]

    return each(take, given, {}), guarded


def each(fn: Callable[[Tensor], Tensor], given: Any, objects: dict[int, Any] | None = None) -> Any:
    """``given`` with ``fn`` applied to the tensors in its tuples, lists and dicts.

    Args:
        objects: if given, all other objects are copied too; it holds the copies by id.
    """
    if isinstance(given, Tensor):
        return fn(given)
    if type(given) in (tuple, list):
        return type(given)([each(fn, x, objects) for x in given])
    if isinstance(given, tuple) and hasattr(given, "_make"):
        return given._make([each(fn, x, objects) for x in given])
    if type(given) in (dict, OrderedDict):
        return type(given)([(name, each(fn, x, objects)) for name, x in given.items()])
    return given if objects is None else _object(fn, given, objects)


def _object(fn: Callable[[Tensor], Tensor], given: Any, objects: dict[int, Any]) -> Any:
    fixed = isinstance(given, (nn.Module, type, ModuleType)) or inspect.isroutine(given)
    if id(given) in objects or fixed or not (isinstance(given, (dict, list)) or hasattr(given, "__dict__")):
        return objects.get(id(given), given)
    try:
        new = copy.copy(given)
    except Exception:  # not copyable
        return given
    objects[id(given)] = new
    if new is given:  # a singleton
        return given
    for store in (new, getattr(new, "__dict__", None)):
        if isinstance(store, (dict, list)):
            for key, x in list(store.items() if isinstance(store, dict) else enumerate(store)):
                store[key] = each(fn, x, objects)
    return new
