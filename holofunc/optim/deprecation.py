"""Deprecated spellings: arguments by their old names, and options that `holofunc.optim.holocron` has now.

They work for one version, with a DeprecationWarning that names what to write instead.
"""

import functools
import inspect
import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

__all__ = ["moved_to_holocron", "renamed"]

F = TypeVar("F", bound=Callable[..., Any])
Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def renamed(*, first: str = "", **names: str) -> Callable[[F], F]:
    """Let a function take arguments by their old names: ``renamed(old="new")``.

    Args:
        first: an argument by keyword that was the first one by position, a key.
        names: the new name of each old one.

    Example:
        >>> import warnings
        >>> from holofunc.optim.deprecation import renamed
        >>> @renamed(window="every")
        ... def look(*, every):
        ...     return every
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     print(look(window=3), caught[0].message)
        3 look: window= is called every= now, the old name goes with the next version
    """

    def decorate(fn: F) -> F:
        def translate(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
            given = dict(kwargs)
            if first and args and isinstance(args[0], Tensor) and args[0].dtype == torch.int64:
                _warn(fn, f"{first} is given by keyword now, {first}=, the old way goes with the next version")
                given[first], args = args[0], args[1:]
            for old in names.keys() & kwargs.keys():
                new = names[old]
                if new in kwargs:
                    raise TypeError(f"{fn.__name__}: {old}= is the old name of {new}=, got both")
                _warn(fn, f"{old}= is called {new}= now, the old name goes with the next version")
                given[new] = given.pop(old)
            return fn, args, given

        return _translating(fn, translate)

    return decorate


def moved_to_holocron(**defaults: Any) -> Callable[[F], F]:
    """Let a builder take options that the function of its name in `holofunc.optim.holocron` has now.

    Args:
        defaults: their values in the authors' rule.
    """

    def decorate(fn: F) -> F:
        def translate(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
            moved = [name for name in defaults if name in kwargs]
            if not moved:
                return fn, args, dict(kwargs)
            options = ", ".join(f"{name}=" for name in moved)
            _warn(fn, f"optim.holocron.{fn.__name__} has {options} now, the old place goes with the next version")
            own = inspect.signature(fn).bind(*args, **{n: x for n, x in kwargs.items() if n not in moved})
            own.apply_defaults()
            from holofunc.optim import holocron  # which imports us

            there = getattr(holocron, fn.__name__)
            return there, own.args, {**own.kwargs, **defaults, **{name: kwargs[name] for name in moved}}

        return _translating(fn, translate)

    return decorate


def _translating(fn: F, translate: Callable[[tuple[Any, ...], Mapping[str, Any]], Call]) -> F:
    """``fn``, called as ``translate`` says; with the globals of ``fn``, by which doctest finds its example."""

    def outer(*args: Any, **kwargs: Any) -> Any:
        called, args, kwargs = translate(args, kwargs)
        return called(*args, **kwargs)

    same_globals = types.FunctionType(outer.__code__, fn.__globals__, fn.__name__, None, outer.__closure__)
    return cast(F, functools.wraps(fn)(same_globals))


def _warn(fn: Callable[..., Any], message: str) -> None:
    if not torch.compiler.is_compiling():  # `inject_hyperparams` builds in the graph, and has been told
        warnings.warn(f"{fn.__name__}: {message}", DeprecationWarning, stacklevel=4)
