"""What a function is, as text: its name, and the options that it was made with."""

import functools
import hashlib
import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["described", "digest"]


def described(value: Any) -> str | None:
    """A function or an object with its options, as text that is the same in every process.

    Of a function that another one made, what it was made with counts, and so do the arguments of a `functools.partial`;
    of an object what its `repr` says, or its attributes. The code itself is not looked at.

    Example:
        >>> import functools
        >>> described(functools.partial(round, ndigits=2))
        'builtins.round(ndigits=2)'
        >>> described(None) is None
        True
    """
    return None if value is None else _text(value, ())


def digest(*tensors: Tensor) -> str:
    """The beginning of the SHA-256 of what tensors of any dtype hold.

    Example:
        >>> import torch
        >>> digest(torch.ones(2, dtype=torch.bfloat16))
        'db0405050689e5d3'
    """
    parts = [x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() for x in tensors]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def _text(value: Any, around: tuple[int, ...]) -> str:
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, type):
        return _name(value)
    if id(value) in around or len(around) > 12:  # a function that calls itself
        return "..."
    around = (*around, id(value))
    if isinstance(value, (Tensor, np.ndarray)):
        array = torch.as_tensor(value)
        return f"{array.dtype}{list(array.shape)}:{digest(array)}"
    if isinstance(value, (list, tuple, set, frozenset)):
        listed = [_text(each, around) for each in value]
        return f"({', '.join(sorted(listed) if isinstance(value, (set, frozenset)) else listed)})"
    if isinstance(value, Mapping):
        return _call("", value, around)
    if isinstance(value, functools.partial):
        positional = {str(i): each for i, each in enumerate(value.args)}
        return _call(_text(value.func, around), {**positional, **value.keywords}, around)
    if inspect.ismethod(value):
        return f"{_text(value.__self__, around)}.{value.__name__}"
    if hasattr(value, "__qualname__"):
        return _call(_name(value), _captured(value), around)
    shown = repr(value)
    if " at 0x" not in shown:
        return shown if len(shown) < 500 else f"{_name(type(value))}:{hashlib.sha256(shown.encode()).hexdigest()[:12]}"
    return _call(_name(type(value)), getattr(value, "__dict__", {}), around)


def _captured(function: Any) -> dict[str, Any]:
    """The variables that a function has from the one that made it."""
    names = function.__code__.co_freevars if inspect.isfunction(function) else ()
    cells = dict(zip(names, function.__closure__ or (), strict=True)) if names else {}
    return {name: cells[name].cell_contents for name in sorted(cells)}


def _call(name: str, options: Mapping[Any, Any], around: tuple[int, ...]) -> str:
    listed = ", ".join(f"{key}={_text(each, around)}" for key, each in options.items())
    return f"{name}({listed})" if listed or not name else name


def _name(value: Any) -> str:
    return f"{getattr(value, '__module__', '')}.{value.__qualname__}"
