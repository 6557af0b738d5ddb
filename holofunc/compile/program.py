"""Functions of trees as graphs, one for each structure of the arguments."""

import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from holofunc import tree
from holofunc.compile import torch_internals
from holofunc.compile.arguments import Flat, flatten, rebuild
from holofunc.compile.donation import own_memory, split_result, write_back, written
from holofunc.compile.lowering import lower
from holofunc.tree import flat
from holofunc.tree.traced import Trace
from holofunc.typing import PyTree

__all__ = ["Graph", "Program", "circumstances"]


_DATA_DEPENDENT = (
    "a compiled function must not depend on values of tensors: choose by torch.where instead of `if`, keep numbers in "
    "tensors instead of calling .item(), or allow breaks with fullgraph=False"
)


_tracing = threading.RLock()
"""One thread at a time: torch patches modules while it traces."""


class Program:
    """``fn`` as one graph for each structure of its arguments, which may hold `Flat` nodes, as may its results.

    The function is traced by running it once on tensors without values, as a JAX user would expect: what it does to
    Python objects is part of the trace, what it captured is read then.
    """

    def __init__(self, fn: Callable[..., Any], mode: str | None, donate: bool) -> None:
        self._fn, self._mode, self._donate = fn, mode, donate
        self._graphs: dict[Any, Graph] = {}

    def __len__(self) -> int:
        return len(self._graphs)

    def graph_of(self, arguments: PyTree) -> "tuple[Graph, list[Tensor]]":
        """The graph for ``arguments``, positional and by name, and its inputs."""
        tensors: list[Tensor] = []
        spec = flatten(arguments, tensors)
        key = (spec, circumstances(tensors))
        if key not in self._graphs:
            with _tracing:
                if key not in self._graphs:
                    self._graphs[key] = Graph(self._fn, spec, tensors, self._mode, self._donate)
        return self._graphs[key], tensors


def circumstances(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """What a graph depends on besides the structure of its arguments."""
    return (
        tuple([(type(x), x.shape, x.stride(), x.dtype, x.device, x.requires_grad) for x in tensors]),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")),
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
    )


class Graph:
    """``fn`` for arguments of one structure: traced, and compiled."""

    def __init__(
        self, fn: Callable[..., Any], spec: Any, tensors: list[Tensor], mode: str | None, donate: bool
    ) -> None:
        if kinds := {str(x.layout) for x in tensors if x.layout is not torch.strided}:
            raise TypeError(
                f"a compiled function takes dense tensors, got one of {', '.join(kinds)}: see Tensor.to_dense"
            )
        plain = all(x.device.type == "cpu" and not x.requires_grad for x in tensors)
        direct = mode is None and plain and torch_internals.reaches_compiler()
        vectors, leaf_of, layouts = _inputs_of(spec)
        self._trace = Trace(layouts)
        self._result: Any = None  # the structure of what ``fn`` returns
        self._written: list[int] = []  # inputs that the first results are copied to, if not in the graph

        def traced(*inputs: Tensor) -> list[Tensor]:
            with self._trace.active():
                return self._results(fn, spec, inputs, donate, direct)

        graph = _traced(traced, [_without_values(x) for x in tensors] if direct else tensors)
        self._constants = _lift_constants(graph)
        self._run = self._compiled(graph, vectors, leaf_of, mode, direct)

    def _results(
        self, fn: Callable[..., Any], spec: Any, inputs: Sequence[Tensor], donate: bool, direct: bool
    ) -> list[Tensor]:
        """The tensors that ``fn`` returns; a donated state is written here, or comes first and is written later."""
        args, kwargs = rebuild(spec, iter(inputs), self._opened)
        out = fn(*args, **kwargs)
        results: list[Tensor] = []
        if not donate:
            self._result = flatten(self._closed(out), results)
            return results
        new, out = split_result(args[0], out)
        state = rebuild(spec, iter(inputs))[0][0]
        pairs = list(written(self._trace, state, new))
        self._result = flatten(self._closed(out), results)
        if direct:
            old: list[Tensor] = []
            flatten(state, old)
            return write_back(pairs, old, results)
        positions = {id(x): i for i, x in enumerate(inputs)}
        self._written = [positions[id(before)] for before, _ in pairs]
        return [*(after for _, after in pairs), *results]

    def __call__(self, tensors: list[Tensor]) -> Any:
        results = list(self._run(*tensors, *self._constants))
        if self._written:
            old = [tensors[position] for position in self._written]
            with torch.no_grad():
                results = own_memory(results, tensors)
                for before, after in zip(old, results, strict=False):
                    before.copy_(after)
        return rebuild(self._result, iter(results[len(self._written) :]), _views)

    def _compiled(
        self, graph: fx.GraphModule, vectors: set[int], leaf_of: Any, mode: str | None, direct: bool
    ) -> Callable[..., Sequence[Any]]:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):  # casts are in the graph
            if direct:
                inputs = [n.meta["val"] for n in graph.graph.nodes if n.op == "placeholder"]
                return lower(graph, inputs, vectors, leaf_of)
        return torch.compile(graph, fullgraph=True, dynamic=False, mode=mode)

    def _opened(self, found: Flat) -> dict[str, Tensor]:
        """An ordinary dict; the trace knows where its tensors lie."""
        leaves = dict(zip(found.names, found.leaves, strict=False))
        for group, vector in zip(found.groups, found.vectors, strict=True):
            if not found.leaves:
                leaves.update(zip(group.names, flat.cut(vector, group.layout), strict=True))
            self._trace.place(vector, group.layout, [leaves[name] for name in group.names])
        return {name: leaves[name] for name in found.names}

    def _closed(self, node: PyTree) -> PyTree:
        """``node`` with `Flat` nodes for dicts whose tensors lie in vectors."""
        if type(node) is dict and (found := self._trace.placed(node)) is not None:
            groups, vectors = found
            return Flat(tuple(node), groups, vectors, ())
        if node is None or not tree.is_node(node):
            return node
        return tree.with_children(node, [self._closed(child) for child in tree.children(node).values()])


def _traced(fn: Callable[..., list[Tensor]], examples: Sequence[Tensor]) -> fx.GraphModule:
    """``fn`` as a graph, if it asks for no value."""
    try:
        graph = make_fx(fn, tracing_mode="fake", _allow_non_fake_inputs=True)(*examples)
    except torch_internals.data_dependent_errors() as error:
        raise RuntimeError(_DATA_DEPENDENT) from error
    if any(node.target is torch.ops.aten._local_scalar_dense.default for node in graph.graph.nodes):
        raise RuntimeError(_DATA_DEPENDENT)
    return graph


def _views(found: Flat) -> dict[str, Tensor]:
    """A dict of the leaves of the vectors."""
    leaves: dict[str, Tensor] = {}
    for group, vector in zip(found.groups, found.vectors, strict=True):
        leaves.update(flat.views(vector, group))
    return {name: leaves[name] for name in found.names}


def _inputs_of(spec: Any) -> tuple[set[int], dict[int, tuple[int, flat.Slot]], dict[Any, tuple[flat.Group, ...]]]:
    """Which inputs are vectors, which are leaves of these, and how dicts lie in them."""
    numbered = rebuild(spec, cast(Any, itertools.count()))
    vectors: set[int] = set()
    leaf_of: dict[int, tuple[int, flat.Slot]] = {}
    layouts: dict[Any, tuple[flat.Group, ...]] = {}

    def visit(node: PyTree) -> None:
        if isinstance(node, Flat):
            vectors.update(cast(Any, node.vectors))
            by_name = dict(zip(node.names, node.leaves, strict=False))
            shapes = {}
            for group, vector in zip(node.groups, node.vectors, strict=True):
                for name, slot in zip(group.names, group.layout.slots, strict=True):
                    shapes[name] = slot.shape
                    if node.leaves:
                        leaf_of[cast(Any, by_name[name])] = cast(Any, vector), slot
            layouts[tuple((name, shapes[name]) for name in node.names)] = node.groups
        elif node is not None and tree.is_node(node):
            for child in tree.children(node).values():
                visit(child)

    visit(numbered)
    return vectors, leaf_of, layouts


def _without_values(x: Tensor) -> Tensor:
    """An uninitialized tensor like ``x``: tracing must not see that leaves share the memory of a vector."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


def _lift_constants(graph: fx.GraphModule) -> list[Tensor]:
    """Make inputs of the tensors that a function has captured. Returns copies of them, as they are now."""
    last = [node for node in graph.graph.nodes if node.op == "placeholder"][-1:]
    lifted: dict[str, fx.Node] = {}
    values: list[Tensor] = []
    for node in [node for node in graph.graph.nodes if node.op == "get_attr"]:
        name = str(node.target)
        if isinstance(getattr(graph, name, None), nn.Module):  # a branch, the body of a loop
            continue
        if name not in lifted:
            value = getattr(graph, name).detach().clone()
            with graph.graph.inserting_after(last[-1]) if last else graph.graph.inserting_before():
                lifted[name] = graph.graph.placeholder(f"captured_{len(values)}")
            lifted[name].meta["val"] = _fake_like(graph, value)
            last = [lifted[name]]
            values.append(value)
        node.replace_all_uses_with(lifted[name])
        graph.graph.erase_node(node)
    for name in lifted:
        delattr(graph, name)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return values


def _fake_like(graph: fx.GraphModule, value: Tensor) -> Tensor:
    for node in graph.graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is not None:
            return mode.from_tensor(value)
    return value
