"""`opaque`: a function as a single operation of a graph, for rules that treat leaves as matrices."""

import contextlib
import hashlib
import threading
import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from holofunc.compile import torch_internals
from holofunc.compile.arguments import flatten, rebuild
from holofunc.tree.flat import is_plain
from holofunc.tree.traced import current_trace
from holofunc.typing import PyTree

__all__ = ["asks_for_shapes", "opaque"]


class _Meta(NamedTuple):
    """A tensor without its elements."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, x: Tensor, device: torch.device | None = None) -> "_Meta":
        return cls(tuple(x.shape), tuple(x.stride()), x.dtype, device or x.device)

    def empty(self, device: torch.device | None = None) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device or self.device)


class _Operation:
    """A function of tensors, and what its results look like."""

    def __init__(self, run: Callable[..., Sequence[Tensor]], outputs: Sequence[_Meta], fn: Callable[..., Any]) -> None:
        self.run, self.outputs, self.fn = run, outputs, fn


_operations: "weakref.WeakValueDictionary[str, _Operation]" = weakref.WeakValueDictionary()
"""By name; each lives as long as a graph that it is part of."""


def opaque(fn: Callable[..., PyTree], *args: PyTree) -> PyTree:
    """Call ``fn(*args)``; in a jitted function, as one operation that runs eagerly and is not fused.

    For what treats every leaf by its shape, such as decompositions of matrices: compiled with the rest, each leaf would
    get code of its own, which takes minutes. Under a transformation of `torch.func`, and outside of `jit`, it is a
    call.

    Args:
        fn: a pure function of trees of tensors and numbers to such trees. It must not capture tensors.
        args: trees of tensors and hashable values.

    Example:
        >>> import torch
        >>> from holofunc import compile
        >>> compile.opaque(lambda x: {"inverse": x.inverse()}, torch.eye(2) * 2)["inverse"]
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])
    """
    trace = current_trace()
    if trace is None:
        return fn(*args)
    tensors: list[Tensor] = []
    spec = flatten(args, tensors)
    plain = all(is_plain(x) and not x.requires_grad for x in tensors)
    if not tensors or not plain or torch_internals.transforming():
        return fn(*args)

    def run(*inputs: Tensor) -> tuple[Any, list[Tensor]]:
        results: list[Tensor] = []
        return flatten(fn(*rebuild(spec, iter(inputs))), results), results

    metas = [_Meta.of(x) for x in tensors]

    def shapes() -> tuple[Any, list[_Meta]]:
        nowhere = torch.device("meta")
        with nowhere, torch.no_grad():
            structure, results = run(*(meta.empty(nowhere) for meta in metas))
        return structure, [_Meta.of(x, metas[0].device) for x in results]

    structure, outputs = _in_own_thread(shapes)
    name = _name(fn, spec, metas)
    operation = _operations.get(name) or _Operation(lambda *inputs: run(*inputs)[1], outputs, fn)
    _operations[name] = operation
    trace.keep(operation)
    return rebuild(structure, iter(torch.ops.holofunc.opaque(name, tensors)))


def _name(fn: Callable[..., PyTree], spec: Any, metas: Sequence[_Meta]) -> str:
    """A name by which a graph cached on disk finds a function of a module in another process."""
    name = f"{fn.__module__}.{fn.__qualname__}" if hasattr(fn, "__qualname__") else ""
    if not name or "<" in name or getattr(fn, "__closure__", None) or hasattr(fn, "__self__"):
        return uuid.uuid4().hex
    name = hashlib.sha256(repr((name, spec, metas)).encode()).hexdigest()[:32]
    taken = _operations.get(name)
    return name if taken is None or taken.fn is fn else uuid.uuid4().hex


_here = threading.local()


def asks_for_shapes() -> bool:
    """Whether this runs for the shapes of what an operation returns, while another thread traces."""
    return getattr(_here, "asks_for_shapes", False)


def _in_own_thread(task: Callable[[], Any]) -> Any:
    """The result of ``task``, run where no tracing is under way."""

    def run() -> Any:
        _here.asks_for_shapes = True
        return task()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(run).result()


torch.library.define(
    "holofunc::opaque",
    "(str name, Tensor[] inputs) -> Tensor[]",
    # it may look at a value, which no CUDA graph can record
    tags=(torch.Tag.needs_exact_strides, torch.Tag.cudagraph_unsafe),
)


@torch.library.impl("holofunc::opaque", "CompositeExplicitAutograd")
def _run(name: str, inputs: list[Tensor]) -> list[Tensor]:
    operation = _operations[name]
    with _without_autocast_and_grad(inputs[0].device.type):
        return _as_declared(operation.run(*inputs), inputs, operation.outputs)


@torch.library.register_fake("holofunc::opaque")
def _shapes(name: str, inputs: list[Tensor]) -> list[Tensor]:
    return [meta.empty() for meta in _operations[name].outputs]


@contextlib.contextmanager
def _without_autocast_and_grad(device: str) -> Iterator[None]:
    """Without autocast, whose casts were traced, and without gradients."""
    with torch.no_grad(), torch.autocast(device, enabled=False):
        yield


def _as_declared(results: Sequence[Tensor], inputs: Sequence[Tensor], metas: Sequence[_Meta]) -> list[Tensor]:
    """``results`` with the declared strides, each in memory of its own, as an operation of a graph must return them."""
    taken, own = {x.untyped_storage().data_ptr() for x in inputs}, []
    for x, meta in zip(results, metas, strict=True):
        memory = x.untyped_storage().data_ptr()
        if x.stride() != meta.stride:
            x = meta.empty().copy_(x)
        elif memory in taken:
            x = x.clone()
        taken.add(memory)
        own.append(x)
    return own
