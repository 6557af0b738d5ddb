"""Compiles a traced graph for a CPU: with Inductor, in two parts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from holofunc.compile import torch_internals
from holofunc.compile.copies import (
    is_write,
    keep_reads_before_writes,
    keep_results,
    keep_whole_rows,
    last_placeholder,
)
from holofunc.compile.kernels import shared_files
from holofunc.tree.flat import WIDTH, Slot, places_of, puts

__all__ = ["LeafOf", "lower"]

aten = torch.ops.aten

LeafOf = Mapping[int, tuple[int, Slot]]
"""By position, the inputs of a graph that are leaves: which input is their vector, and their slot in it.
"""


def lower(
    graph: fx.GraphModule, inputs: Sequence[Tensor], vectors: set[int], leaf_of: LeafOf
) -> Callable[..., Sequence[Any]]:
    """The graph compiled in two parts: what needs no vector, then the rest with all writes.

    Convolutions are slower, and slower to compile, on weights that the graph cuts out of a vector. So the first part,
    the gradient, reads leaves, and the second, the update, reads vectors. Neither graph knows that both are the same
    memory, and need not, because the first one writes nothing.
    """
    return torch_internals.compile_with(
        graph, inputs, lambda graph, inputs, **options: _in_two(graph, inputs, options, vectors, leaf_of)
    )


def _in_two(
    graph: fx.GraphModule, inputs: Sequence[Any], options: dict[str, Any], vectors: set[int], leaf_of: LeafOf
) -> Callable[[list[Any]], Any]:
    _resolve_cuts(graph.graph)
    keep_whole_rows(graph.graph)
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    output = next(node for node in graph.graph.nodes if node.op == "output")
    leaves = {placeholders[i]: (placeholders[v], slot) for i, (v, slot) in leaf_of.items()}
    writes = [node for node in graph.graph.nodes if is_write(node)]
    overwritten = {node.args[0] for node in writes}
    keep_results(graph.graph, overwritten | {leaf for leaf, (vector, _) in leaves.items() if vector in overwritten})
    later = {placeholders[i] for i in vectors}
    for node in graph.graph.nodes:
        above = node.all_input_nodes
        if is_write(node) or any(x in later or x.target is torch.ops.holofunc.join.default for x in above):
            later.add(node)
    for node in reversed(graph.graph.nodes):
        if _size(node) > sum(map(_size, node.all_input_nodes)) and later.issuperset({*node.users} - {output}):
            later.add(node)  # a fill, a mask: made where it is used
    first = [n for n in graph.graph.nodes if n.op not in ("placeholder", "output") and n not in later]
    if not vectors:
        first, later = [], set(graph.graph.nodes)
    needed = [n for n in graph.graph.nodes if n in later and n.op not in ("placeholder", "output")] + [output]
    early = set(first)
    handed = list(dict.fromkeys(x for n in needed for x in n.all_input_nodes if x in early))
    results = list(dict.fromkeys(x for x in output.all_input_nodes if x in later and x.op != "placeholder"))

    parts = []
    if first:
        parts.append(_Part(graph, placeholders, handed, []))
    parts.append(_Part(graph, [*placeholders, *handed], results, writes))
    for part in parts:
        part.compile(leaves, dict(zip(placeholders, inputs, strict=True)), options)
    wanted = output.args[0]

    def run(args: list[Any]) -> list[Any]:
        values = dict(zip(placeholders, args, strict=True))
        args.clear()
        for part in parts:
            part(values)
        return [values[node] if isinstance(node, fx.Node) else node for node in wanted]

    run._boxed_call = True  # type: ignore[attr-defined]  # torch: a function of the list of its arguments
    return run


def _size(node: fx.Node) -> int:
    value = node.meta.get("val")
    return sum(x.numel() for x in (value if isinstance(value, tuple | list) else [value]) if isinstance(x, Tensor))


def _resolve_cuts(graph: fx.Graph) -> None:
    """Replace leaves that are used by views of their vector, and remove the others."""
    for node in list(graph.nodes):
        if node.target is torch.ops.holofunc.cut.default:
            vector, places = node.args
            for leaf in list(node.users):
                shape, strides, start = places_of(places)[leaf.args[1]]
                leaf.replace_all_uses_with(_view_of(graph, leaf, vector, shape, strides, start))
    graph.eliminate_dead_code()


def _view_of(graph: fx.Graph, before: fx.Node, vector: fx.Node, shape: Any, strides: Any, start: int) -> fx.Node:
    with graph.inserting_before(before):
        view = graph.call_function(aten.as_strided.default, (vector, list(shape), list(strides), start))
    value = vector.meta["val"]
    with value.fake_mode:
        view.meta["val"] = value.new_empty_strided(shape, strides)
    return view


LARGE = 2**20
"""Elements of a vector from which on memory counts, and not the number of operations."""


def _join_leaf_by_leaf(graph: fx.Graph) -> None:
    """Copy each leaf into its vector as soon as it is computed, instead of all of them at the end."""
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if node.target is torch.ops.holofunc.join.default and value.numel() >= LARGE:
            leaves, places, rows = node.args
            with graph.inserting_after(last_placeholder(graph)):
                vector = graph.call_function(
                    aten.empty.memory_format, (list(value.shape),), {"dtype": value.dtype, "device": value.device}
                )
            vector.meta["val"] = value
            for leaf, place, end in puts(leaves, places, rows):
                with graph.inserting_before(node):
                    put = graph.call_function(torch.ops.holofunc.put.default, (vector, leaf, *place, end))
                    put.meta["val"] = None
                if leaf.op != "placeholder":
                    leaf.append(put)
            node.replace_all_uses_with(vector)
            graph.erase_node(node)


class _Part:
    """Some operations of a graph: those that ``results`` and ``writes`` need from what is known already."""

    def __init__(
        self, graph: fx.GraphModule, known: Sequence[fx.Node], results: Sequence[fx.Node], writes: Sequence[fx.Node]
    ) -> None:
        needed: set[fx.Node] = set()
        waiting: list[fx.Node] = [*results, *writes]
        while waiting:
            node = waiting.pop()
            if node not in needed:
                needed.add(node)
                waiting += [] if node in known else node.all_input_nodes
        self.graph, self.results, self.writes, self.needed = graph, list(results), list(writes), needed
        self.inputs = [node for node in known if node in needed]
        self._run: Callable[[list[Any]], Any] | None = None

    def compile(
        self, leaves: Mapping[fx.Node, tuple[fx.Node, Slot]], given: Mapping[fx.Node, Any], options: dict[str, Any]
    ) -> None:
        written = {node.args[0] for node in self.writes}
        seen_through = [node for node in self.inputs if node in leaves and leaves[node][0] in written]
        vectors = dict.fromkeys(
            [*(n for n in self.inputs if n not in seen_through), *(leaves[n][0] for n in seen_through)]
        )
        self.inputs = list(vectors)
        part, copies = fx.Graph(), {}
        for node in self.inputs:
            copies[node] = part.placeholder(node.name)
            copies[node].meta = dict(node.meta)
        for node in seen_through:
            vector, slot = leaves[node]
            view = part.call_function(
                aten.as_strided.default, (copies[vector], list(slot.shape), list(slot.strides), slot.start * WIDTH)
            )
            view.meta["val"] = node.meta["val"]
            copies[node] = view
        for node in self.graph.graph.nodes:
            if node in self.needed and node not in copies:
                copies[node] = part.node_copy(node, copies.__getitem__)
        end = part.output([copies[node] for node in self.results])
        strides = [x.stride() if isinstance(x := node.meta["val"], Tensor) else None for node in self.results]
        # Inductor lays out what is computed as it likes, but for what somebody else reads
        end.meta.update(user_visible_output_idxs=list(range(len(strides))), original_output_strides=strides)
        keep_reads_before_writes(part)
        _join_leaf_by_leaf(part)
        module = fx.GraphModule(self.graph, part)
        examples = [given.get(node, node.meta["val"]) for node in self.inputs]
        with shared_files():
            self._run = torch_internals.compile_inner(module, examples, options)

    def __call__(self, values: dict[fx.Node, Any]) -> None:
        assert self._run is not None
        values.update(zip(self.results, self._run([values[node] for node in self.inputs]), strict=True))
