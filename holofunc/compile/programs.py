"""Functions of trees as graphs, one for each structure of the arguments."""

import contextlib
import functools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import DynamicOutputShapeException, FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException

from holofunc import random, tree
from holofunc.arena import Arena
from holofunc.compile.blocks import compile_by_blocks
from holofunc.compile.operations import Meta, apart, copied
from holofunc.compile.packing import Packed, flatten, rebuild, strip
from holofunc.compile.tracing import tracing
from holofunc.typing import PyTree

__all__ = ["Program", "compile_graph", "write_back"]


class Program:
    """``fn`` as one graph for each structure of its arguments, which may hold `Packed` nodes, as may its results.

    The function is traced by running it on tensors without values, as a JAX user would expect: what it does to Python
    objects is part of the trace, what it captured is read then.
    """

    def __init__(self, fn: Callable[..., Any], mode: str | None, donate: bool, gradient: bool = False) -> None:
        self._fn, self._mode, self._donate, self._gradient = fn, mode, donate, gradient
        self._graphs: dict[Any, _Graph] = {}

    def __call__(self, args: list[Any], kwargs: Mapping[str, Any]) -> Any:
        tensors: list[Tensor] = []
        spec = flatten((args, dict(kwargs)), tensors)
        kinds = tuple([(x.shape, x.stride(), x.dtype, x.device, x.requires_grad) for x in tensors])
        graph = self._graphs.get(key := (spec, kinds, _circumstances()))
        if graph is None:
            graph = self._graphs[key] = _Graph(self._fn, spec, tensors, self._mode, self._donate, self._gradient)
        return graph(tensors)


def _circumstances() -> tuple[Any, ...]:
    """What a graph depends on besides its arguments."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")),
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
    )


class _Graph:
    def __init__(
        self, fn: Callable[..., Any], spec: Any, tensors: list[Tensor], mode: str | None, donate: bool, gradient: bool
    ) -> None:
        self._result: Any = None  # structure of what ``fn`` returns, known once it was traced

        def traced(*tensors: Tensor) -> tuple[Tensor, ...]:
            args, kwargs = rebuild(spec, iter(tensors))
            with _tracing(gradient):
                out = fn(*args, **kwargs)
                if donate:
                    out = write_back(args[0], out)
            results: list[Tensor] = []
            self._result = flatten(strip(out), results)
            return tuple(apart(results, tensors) if gradient else results)  # the next stage writes there

        if mode is None and all(x.device.type == "cpu" for x in tensors):
            self._run = _compiled_directly(traced, tensors)
        else:
            self._run = _compiled_by_dynamo(traced, mode)

    def __call__(self, tensors: list[Tensor]) -> Any:
        results = self._run(*tensors)  # may be what traces the function
        return rebuild(self._result, iter(results), wrap=Packed)


def _compiled_directly(traced: Callable[..., tuple[Tensor, ...]], tensors: Sequence[Tensor]) -> Callable[..., Any]:
    """Without Dynamo, which would run the function once more and check at each call what `Program` has seen already."""
    with FakeTensorMode(static_shapes=True):
        inputs = [Meta.of(x).empty().requires_grad_(x.requires_grad) for x in tensors]
    try:
        with random.drawing_by(torch.ops.holofunc.philox):
            compiled = compile_by_blocks(_Traced(traced), inputs)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise torch._dynamo.exc.UserError(
            torch._dynamo.exc.UserErrorType.DYNAMIC_CONTROL_FLOW,
            f"a compiled function must not depend on values of tensors ({error.func}): choose by torch.where instead "
            "of `if`, keep numbers in tensors, or allow breaks with fullgraph=False",
        ) from error
    torch._dynamo.utils.counters["stats"]["unique_graphs"] += 1  # where torch counts its own
    return compiled


class _Traced(torch.nn.Module):
    """A function in the form in which the compiler takes it."""

    def __init__(self, fn: Callable[..., tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.forward = fn


def _compiled_by_dynamo(traced: Callable[..., tuple[Tensor, ...]], mode: str | None) -> Callable[..., Any]:
    """By `torch.compile`, which then sees a single operation."""
    error: list[Exception] = []  # what the caller did wrong, as eager code says it

    def remember(*tensors: Tensor) -> tuple[Tensor, ...]:
        try:
            return traced(*tensors)
        except (TypeError, ValueError) as e:
            error.append(e)
            raise

    operation = torch.compiler.allow_in_graph(remember)

    def program(tensors: list[Tensor]) -> tuple[Tensor, ...]:
        return operation(*tensors)

    own = program.__code__.replace()  # Dynamo counts graphs, against its limit, per code object
    program = types.FunctionType(own, globals(), "program", None, program.__closure__)
    backend = functools.partial(compile_by_blocks, mode=mode)
    compiled = torch.compile(program, fullgraph=True, dynamic=False, backend=backend)

    def run(*tensors: Tensor) -> Any:
        try:
            return compiled(list(tensors))
        except torch._dynamo.exc.TorchDynamoException:
            if not error:
                raise
        raise error.pop()

    return run


def compile_graph(graph: torch.nn.Module) -> Callable[..., Any]:
    """A module of tensors, of one shape each, to a tuple of tensors, compiled at its first call.

    It is part of other graphs: nothing is counted, and nothing about its arguments checked.
    """
    program: Callable[..., Any] | None = None

    def run(*inputs: Tensor) -> Any:
        nonlocal program
        if program is None:  # not by `torch.compile`, which guards what is known here, at each call
            program = compile_by_blocks(graph, inputs)
        return program(*inputs)

    return run


@contextlib.contextmanager
def _tracing(gradient: bool) -> Iterator[None]:
    """While a function runs on tensors without values."""
    fake = torch._guards.detect_fake_mode()
    if fake is not None:  # tensors with values, which the function has captured, become constants
        fake.allow_non_fake_inputs = True
    before = torch.compiler._is_compiling_flag
    tracing.active, tracing.gradient, torch.compiler._is_compiling_flag = True, gradient, True
    try:
        yield
    finally:
        tracing.active, tracing.gradient, torch.compiler._is_compiling_flag = False, False, before


# --- the new state in the place of the old ------------------------------------------------------------------------


def write_back(old: PyTree, out: Any) -> tuple[Any, ...] | None:
    """Copy the new state in what a function returned into the memory of the old one; the rest of what it returned.

    The state is alone, or first in a tuple. What else is there of the old state is read before.
    """
    state_alone = type(out) is not tuple or tree.paths(out) == tree.paths(old)
    new, rest = (out, None) if state_alone else (out[0], out[1:])
    pairs = list(_pairs("state", old, new))
    memory = {x.untyped_storage()._cdata for x, _ in pairs}

    def apart(x: Any) -> Any:
        return copied(x) if isinstance(x, Tensor) and x.untyped_storage()._cdata in memory else x

    rest = None if rest is None else _map(apart, rest)
    for before, after in [(x, y if y is x else apart(y)) for x, y in pairs]:
        if after is not before:
            before.copy_(after)
    return rest


def _map(fn: Callable[[Any], Any], node: Any) -> Any:
    """``fn`` of the leaves, and of the vectors of arenas."""
    if isinstance(node, Arena):
        return Arena([fn(x) for x in node.vectors], node.layout, node.per_leaf)
    if node is None or not tree.is_node(node):
        return fn(node)
    return tree.with_children(node, [_map(fn, child) for child in tree.children(node).values()])


def _pairs(path: str, old: Any, new: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """The tensors, or vectors of tensors, of a state with those to be written there."""
    if isinstance(old, Tensor):
        if not isinstance(new, Tensor) or new.shape != old.shape or new.dtype != old.dtype:
            raise ValueError(f"donate=True: {path} was {_kind(old)}, the new state has {_kind(new)}")
        yield old, new
    elif old is None or not tree.is_node(old):
        if old != new:
            raise ValueError(f"donate=True: {path} was {old!r}, which is no tensor and cannot become {new!r}")
    elif isinstance(old, Arena) and isinstance(new, Arena) and old.layout is new.layout:
        for before, after in zip(old.vectors, new.vectors, strict=True):
            yield from _pairs(path, before, after)
    else:
        olds, news = tree.children(old), tree.children(new) if new is not None and tree.is_node(new) else {}
        if list(olds) != list(news):
            raise ValueError(f"donate=True: {path} held {list(olds)}, the new state has {list(news) or _kind(new)}")
        pairs = [pair for name, value in olds.items() for pair in _pairs(f"{path}/{name}", value, news[name])]
        if isinstance(old, Arena):  # a vector as a whole: written leaf by leaf, it would be computed anew for each
            unchanged = all(before is after for before, after in pairs)
            pairs = list(zip(old.vectors, old.vectors if unchanged else old.layout.join(news), strict=True))
        yield from pairs


def _kind(x: Any) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
