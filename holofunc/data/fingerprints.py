"""Fingerprints of functions: their names and options as text."""

import contextlib
import functools
import hashlib
import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["described", "digest"]

MOST = 2**14
"""The largest number of elements of a tensor, or items of a list, to include."""


def described(value: Any) -> str | None:
    """Describe a function or an object with its options, as text that is the same in every process.

    This includes the variables that a function has captured, the arguments of a `functools.partial`, and the `repr` or
    the attributes of an object, but not the code.

    Example:
        >>> import functools
        >>> described(functools.partial(round, ndigits=2))
        'builtins.round(ndigits=2)'
        >>> described(None) is None
        True
    """
    return None if value is None else _shortened(_text(value, ()))


def digest(*tensors: Tensor) -> str:
    """The first digits of the SHA-256 of the values of tensors; of large ones, only some elements count.

    Example:
        >>> import torch
        >>> digest(torch.ones(2, dtype=torch.bfloat16))
        'db0405050689e5d3'
    """
    some = [x.detach().flatten()[:: max(1, x.numel() // MOST)].contiguous() for x in tensors]
    parts = [x.cpu().view(torch.uint8).numpy().tobytes() for x in some]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def _text(value: Any, around: tuple[int, ...]) -> str:
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, type):
        return _name(value)
    if id(value) in around or len(around) > 12:  # a recursive function
        return "..."
    around = (*around, id(value))
    if isinstance(value, (Tensor, np.ndarray)):
        array = torch.as_tensor(value)
        return f"{array.dtype}{list(array.shape)}:{digest(array)}"
    if isinstance(value, (list, tuple, set, frozenset, Mapping)) and len(value) > MOST:
        return f"{len(value)} of {type(value).__name__}"
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
        return shown
    return _call(_name(type(value)), getattr(value, "__dict__", {}), around)


def _shortened(text: str) -> str:
    """Shorten a long text to its beginning and its hash."""
    return text if len(text) < 400 else f"{text[:300]}... {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _captured(function: Any) -> dict[str, Any]:
    """The captured variables of a function."""
    names = function.__code__.co_freevars if inspect.isfunction(function) else ()
    found = {}
    for name, cell in sorted(zip(names, function.__closure__ or (), strict=True) if names else ()):
        with contextlib.suppress(ValueError):  # not bound yet
            found[name] = cell.cell_contents
    return found


def _call(name: str, options: Mapping[Any, Any], around: tuple[int, ...]) -> str:
    listed = ", ".join(f"{key}={_text(each, around)}" for key, each in options.items())
    return f"{name}({listed})" if listed or not name else name


def _name(value: Any) -> str:
    return f"{getattr(value, '__module__', '')}.{value.__qualname__}"
