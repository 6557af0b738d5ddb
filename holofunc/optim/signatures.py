"""What arguments an update takes: all, or those that it names."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from holofunc.typing import PyTree

__all__ = ["taking_extra"]


def taking_extra(update: Callable[..., Any]) -> Callable[..., Any]:
    """``update``, if it takes all that an `UpdateFn` does; otherwise one that passes on what it takes."""
    has_params, names, takes_any = _arguments(update)
    if has_params and takes_any:
        return update

    @functools.wraps(update)
    def taking(updates: PyTree, state: PyTree, params: Any = None, **extra: Any) -> tuple[PyTree, PyTree]:
        given = extra if has_params else {"params": params, **extra}
        own = given if takes_any else {name: value for name, value in given.items() if name in names}
        return update(updates, state, params, **own) if has_params else update(updates, state, **own)

    return taking


def _arguments(update: Any) -> tuple[bool, tuple[str, ...], bool]:
    """Whether ``update`` takes a third argument by position, what it names, and whether it takes any other name."""
    code = getattr(update, "__code__", None)
    while code is not None and code.co_flags & inspect.CO_VARARGS and hasattr(update, "__wrapped__"):
        update = update.__wrapped__  # of a decorator that passes all on
        code = getattr(update, "__code__", None)
    if code is None:
        parameters = inspect.signature(update).parameters
        kinds = [p.kind.name for p in parameters.values()]
        has_params = "VAR_POSITIONAL" in kinds or sum(kind.startswith("POSITIONAL") for kind in kinds) > 2
        return has_params, tuple(parameters), "VAR_KEYWORD" in kinds
    # read here, and not by `inspect`: also of transformations built in graphs
    bound = int(hasattr(update, "__self__"))
    names = code.co_varnames[bound : code.co_argcount + code.co_kwonlyargcount]
    has_params = code.co_argcount - bound > 2 or bool(code.co_flags & inspect.CO_VARARGS)
    return has_params, names, bool(code.co_flags & inspect.CO_VARKEYWORDS)
