"""Functions of trees as graphs, one for each structure of the arguments."""

import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from holofunc import tree
from holofunc.arena import Arena
from holofunc.compile.blocks import compile_by_blocks
from holofunc.compile.packing import Packed, flatten, rebuild, strip
from holofunc.compile.tracing import tracing
from holofunc.typing import PyTree

__all__ = ["Program", "compile_graph", "new_state", "write_back"]


class Program:
    """``fn`` as one graph for each structure of its arguments, which may hold `Packed` nodes, as may its results.

    The function is traced by running it, once, on tensors without values, as a JAX user would expect: what it does to
    Python objects is part of the trace, what it captured is read then. `torch.compile` sees a single operation.
    """

    def __init__(self, fn: Callable[..., Any], mode: str | None, donate: bool, gradient: bool = False) -> None:
        self._fn, self._mode, self._donate, self._gradient = fn, mode, donate, gradient
        self._graphs: dict[Any, _Graph] = {}

    def __call__(self, args: list[Any], kwargs: Mapping[str, Any]) -> Any:
        tensors: list[Tensor] = []
        spec = flatten((args, dict(kwargs)), tensors)
        graph = self._graphs.get(spec)
        if graph is None:
            graph = self._graphs[spec] = _Graph(self._fn, spec, self._mode, self._donate, self._gradient)
        return graph(tensors)


class _Graph:
    def __init__(self, fn: Callable[..., Any], spec: Any, mode: str | None, donate: bool, gradient: bool) -> None:
        self._error: Exception | None = None
        self._result: Any = None  # structure of what ``fn`` returns, known once it was traced

        def traced(*tensors: Tensor) -> tuple[Tensor, ...]:
            args, kwargs = rebuild(spec, iter(tensors))
            try:
                _captured_tensors_become_constants()
                tracing.active, tracing.gradient = True, gradient
                out = fn(*args, **kwargs)
                if donate:
                    new, out = new_state(args[0], out)
                    write_back("state", args[0], new)
            except (TypeError, ValueError) as error:
                self._error = error
                raise
            finally:
                tracing.active = tracing.gradient = False
            results: list[Tensor] = []
            self._result = flatten(strip(out), results)
            return tuple(results)

        operation = torch.compiler.allow_in_graph(traced)

        def program(tensors: list[Tensor]) -> tuple[Tensor, ...]:
            return operation(*tensors)

        name = f"jit_{getattr(fn, '__name__', type(fn).__name__)}"
        own = program.__code__.replace(co_name=name)  # Dynamo counts graphs, against its limit, per code object
        program = types.FunctionType(own, globals(), name, None, program.__closure__)
        how: dict[str, Any] = {"backend": compile_by_blocks} if mode is None else {"mode": mode}
        self._run = torch.compile(program, fullgraph=True, dynamic=False, **how)

    def __call__(self, tensors: list[Tensor]) -> Any:
        try:
            results = self._run(tensors)
        except torch._dynamo.exc.TorchDynamoException:
            if self._error is None:
                raise
        else:
            return rebuild(self._result, iter(results), wrap=Packed)
        error, self._error = self._error, None
        raise error  # what the caller did wrong, as eager code says it


def compile_graph(graph: torch.fx.GraphModule) -> Callable[..., Any]:
    """A graph of operations on tensors, as what was traced already, compiled when it first runs."""
    program: Callable[..., Any] | None = None

    def run(*inputs: Tensor) -> Any:
        nonlocal program
        if program is None:  # not by `torch.compile`, which guards what is known here, at each call
            program = compile_by_blocks(graph, inputs)
        return program(*inputs)

    return run


def _captured_tensors_become_constants() -> None:
    """Let tensors with values, which a function has captured, meet those without on which it is being traced."""
    fake = torch._guards.detect_fake_mode()
    if fake is not None:
        fake.allow_non_fake_inputs = True


# --- the new state in the place of the old ------------------------------------------------------------------------


def new_state(old: PyTree, out: Any) -> tuple[PyTree, tuple[Any, ...] | None]:
    """The new state in what a function returned, and the rest: the state is alone, or first in a tuple."""
    if type(out) is not tuple or tree.paths(out) == tree.paths(old):
        return out, None
    return out[0], tuple(out[1:])


def write_back(path: str, old: Any, new: Any) -> None:
    """Copy ``new`` into the memory of ``old``, in the graph."""
    if isinstance(old, Tensor):
        if not isinstance(new, Tensor) or new.shape != old.shape or new.dtype != old.dtype:
            raise ValueError(f"donate=True: {path} was {_kind(old)}, the new state has {_kind(new)}")
        if new is not old:
            old.copy_(new)
    elif old is None or not tree.is_node(old):
        if old != new:
            raise ValueError(f"donate=True: {path} was {old!r}, which is no tensor and cannot become {new!r}")
    elif isinstance(old, Arena) and isinstance(new, Arena) and old.layout is new.layout:
        for before, after in zip(old.vectors, new.vectors, strict=True):
            write_back(path, before, after)
    else:
        olds, news = tree.children(old), tree.children(new) if new is not None and tree.is_node(new) else {}
        if list(olds) != list(news):
            raise ValueError(f"donate=True: {path} held {list(olds)}, the new state has {list(news) or _kind(new)}")
        for name, value in olds.items():
            write_back(f"{path}/{name}", value, news[name])


def _kind(x: Any) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
