"""What is known, while a function runs, of the tracing that is under way."""

import threading
from typing import Any

import torch

__all__ = ["being_inlined", "being_traced", "gradient_being_traced", "tracing", "update_being_traced"]

tracing = threading.local()


def being_traced() -> bool:
    """Whether this is on its way into a graph: by `torch.compile`, or by `jit`, which torch 2.11 does not tell."""
    return torch.compiler.is_compiling() or getattr(tracing, "active", False)


def being_inlined() -> bool:
    """Whether a jitted function that is called here is part of another one, or of a `torch.func` transformation."""
    return being_traced() or bool(_transformations())


def gradient_being_traced() -> bool:
    """Whether this is the first stage of a `Staged` function on its way into a graph, under one plain `grad`."""
    if not getattr(tracing, "gradient", False):
        return False
    return [t.key() for t in _transformations()] == [torch._C._functorch.TransformType.Grad]


def update_being_traced() -> bool:
    """Whether `jit` traces this outside of every transformation, so that no derivative or batch of it is asked for."""
    return getattr(tracing, "active", False) and not _transformations()


def _transformations() -> list[Any]:
    return torch._C._functorch.get_interpreter_stack() or []
