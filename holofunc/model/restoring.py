"""Restoring modules after a forward pass: attributes that it sets and entries that it adds are removed."""

import contextlib
import inspect
import operator
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from holofunc.model.references import TORCH, reached

__all__ = ["containers", "restored"]


@contextlib.contextmanager
def restored(modules: Iterable[nn.Module], contents: Iterable[tuple[Any, Any]] = ()) -> Iterator[list[nn.Module]]:
    """Restore attributes of modules and the contents of containers on exit.

    Yields a list that then contains the modules whose attributes were changed.
    """
    before = [(module, vars(module), dict(vars(module))) for module in modules]
    changed: list[nn.Module] = []
    try:
        yield changed
    finally:
        for module, now, kept in before:
            if _differ(now, kept):
                changed.append(module)
                now.clear()
                now.update(kept)
        for container, kept in contents:
            if _differ(container, kept):
                container.clear()
                (container.extend if isinstance(container, (list, deque)) else container.update)(kept)


def containers(module: nn.Module) -> Iterator[Any]:
    """The lists, dicts, sets, objects and hooks of modules, which a forward pass may modify."""
    for part in module.modules():
        yield from (part._forward_hooks, part._forward_pre_hooks)
        if not type(part).__module__.startswith(TORCH):
            yield from (part._parameters, part._buffers, part._modules)
    for _, value in reached(module):
        if isinstance(value, (list, dict, set, deque)):
            yield value
        elif hasattr(value, "__dict__") and not _is_fixed(value):
            yield vars(value)


def _is_fixed(value: Any) -> bool:
    """Whether an object is of a kind that a forward pass does not modify."""
    ours = type(value).__module__.startswith(("torch.", "holofunc."))
    return ours or isinstance(value, (Tensor, nn.Module)) or inspect.isroutine(value)


def _differ(now: Any, kept: Any) -> bool:
    return len(now) != len(kept) or any(map(operator.is_not, _values(now), _values(kept)))


def _values(container: Any) -> Iterable[Any]:
    return container.values() if isinstance(container, dict) else container
