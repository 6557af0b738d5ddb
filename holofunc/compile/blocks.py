"""Updates run block by block: how a graph over the vectors of arenas is lowered on a CPU.

An update reads each gradient once, and the gradients lie where they were computed. Bringing them into one vector first
would cost a third of the update's time: it is nothing but memory traffic. So a graph that treats rows alike runs over
blocks of rows (`holofunc.compile.loops`): the rule, compiled for one block, reads gradients where they lie, brought
together only where a block holds pieces of several. What depends on all rows (a norm, say) is computed between two
such passes.

Gradients enter a graph by the operation `gather` (`holofunc.compile.gathering`). Where a graph cannot be cut into rows,
they are gathered whole.
"""

import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, fx
from torch._functorch.compile_utils import fx_graph_cse

from holofunc.arena import block_count
from holofunc.compile.gathering import Gathering
from holofunc.compile.kernels import inductor
from holofunc.compile.loops import Loop, Sources
from holofunc.compile.operations import Meta

__all__ = ["compile_by_blocks"]

aten = torch.ops.aten

# --- the compiler ------------------------------------------------------------------------------------------------


def compile_by_blocks(graph: torch.nn.Module, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """A backend for `torch.compile`: Inductor's, on graphs that gather cut into blocks of rows."""
    from torch._inductor.compile_fx import compile_fx

    return cast(Any, compile_fx)(graph, inputs, inner_compile=_lower)


def _lower(graph: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
    gathers = [
        node for node in graph.graph.nodes if _is_gather(node) and all(x.op == "placeholder" for x in _args(node)[0])
    ]
    if not gathers or any(_value(node).device.type != "cpu" for node in gathers):
        return inductor(graph, inputs, **options)
    cut = _Cut.of(graph, gathers)
    run = (cut and cut.program()) or _gathered_first(graph, gathers, inputs, options)
    run._boxed_call = True  # type: ignore[attr-defined]  # it takes the list of its inputs
    return run


def _gathered_first(
    graph: fx.GraphModule, gathers: Sequence[fx.Node], inputs: Sequence[Any], options: dict[str, Any]
) -> Callable[[list[Any]], Any]:
    """Inductor's program for the whole graph, run on vectors that are gathered before."""
    placeholders, output = _placeholders(graph), _output(graph)
    part = _extract(graph, [*placeholders, *gathers], _args(output)[0], [n for n in graph.graph.nodes if _is_write(n)])
    program = inductor(part, [*inputs, *map(_value, gathers)], **options)
    gatherings = [Gathering.of(node) for node in gathers]
    leaves = [[placeholders.index(leaf) for leaf in _args(node)[0]] for node in gathers]
    memory: list[Tensor | None] = [None] * len(gathers)  # fresh pages for large vectors cost more than filling them

    def run(args: list[Any]) -> Any:
        vectors = [
            gathering.whole([args[leaf] for leaf in inputs], whole)
            for gathering, inputs, whole in zip(gatherings, leaves, memory, strict=True)
        ]
        results = program([*args, *vectors])
        held = {x.untyped_storage().data_ptr() for x in results if isinstance(x, Tensor)}
        memory[:] = [None if v.untyped_storage().data_ptr() in held else v for v in vectors]  # the caller's from now on
        return results

    return run


# --- cutting a graph ---------------------------------------------------------------------------------------------

ALONG_ROWS = (aten.sum.dim_IntList, aten.mean.dim, aten.any.dim, aten.amax.default, aten.amin.default)
"""Reductions, which may run along the second axis: ``(x, axes, ...)``."""
SIZED = (aten.full.default, aten.expand.default, aten.view.default)
"""Operations whose arguments hold the shape of the result."""
COPIES = (aten.clone.default, aten.alias.default, torch.ops.prims.convert_element_type.default)


class _Pass(NamedTuple):
    """One run over the rows of vectors, block by block."""

    rows: int
    results: list[fx.Node]
    """What it leaves to later stages: a number for each row."""
    writes: list[fx.Node]
    """``copy_`` into a vector of the state."""


class _Cut(NamedTuple):
    """A graph as stages, which compute what concerns all rows, each followed by passes over the rows.

    A pass computes anew what it needs of earlier ones, but for their results, and all writing is left to the last
    passes: so each reads the state as it was.
    """

    graph: fx.GraphModule
    rowwise: set[fx.Node]
    constants: list[fx.Node]
    stages: list[list[fx.Node]]
    passes: list[list[_Pass]]

    @classmethod
    def of(cls, graph: fx.GraphModule, gathers: Sequence[fx.Node]) -> "_Cut | None":
        """None if something is neither computed row by row nor from a number for each row."""
        wide = {_shape(node) for node in gathers}
        rowwise: set[fx.Node] = set()
        level: dict[fx.Node, int] = {}  # of a value: how many rounds of passes must be over before; -1 for constants
        nodes = [node for node in graph.graph.nodes if node.op != "output" and not _is_write(node)]
        for node in nodes:
            above = node.all_input_nodes
            given = node in gathers or node.op == "placeholder"
            if (_shape(node) in wide) if given else _is_rowwise(node, rowwise, wide):
                rowwise.add(node)
            elif _shape(node) in wide or any(a in rowwise and _shape(a) in wide for a in above):
                return None
            if node in rowwise or node.op == "placeholder":
                level[node] = max([0, *(level[a] for a in above)])
            else:
                level[node] = max([-1, *(level[a] + (a in rowwise) for a in above)])
        writes = [node for node in graph.graph.nodes if _is_write(node)]
        for write in writes:
            to, value = _args(write)[:2]
            if to in rowwise:
                if value not in rowwise or _shape(value) != _shape(to):
                    return None
                rowwise.add(write)
            elif value in rowwise and _shape(value) in wide:
                return None
        if any(node in rowwise and _shape(node) in wide for node in _output(graph).all_input_nodes):
            return None

        computed = [node for node in nodes if node.op != "placeholder" and node not in gathers]
        results = [n for n in computed if n in rowwise and not rowwise.issuperset(n.users)]
        by_row = [write for write in writes if write in rowwise]
        last = max([0, *(level[n] for n in results), *(level[_args(write)[1]] for write in by_row)])

        def needed(k: int) -> list[fx.Node]:
            """Of the values that concern all rows and are known after ``k`` rounds, those that something else uses."""
            mine = [n for n in computed if n not in rowwise and level[n] == k and n.target is not aten.full.default]
            return [n for n in mine if not set(mine).issuperset(n.users)]

        passes: list[list[_Pass]] = []
        for k in range(last + 1):
            passes.append([])
            for rows in dict.fromkeys(_shape(n)[0] for n in (*results, *(_args(write)[0] for write in by_row))):
                left = [n for n in results if level[n] == k and _shape(n)[0] == rows]
                due = [write for write in by_row if k == last and _shape(_args(write)[0])[0] == rows]
                if left:  # apart from writing, next to which Inductor (torch 2.14) fails on some sums
                    passes[-1].append(_Pass(rows, left, []))
                if due:
                    passes[-1].append(_Pass(rows, [], due))
        return cls(graph, rowwise, needed(-1), [needed(k) for k in range(last + 2)], passes)

    def program(self) -> Callable[[list[Any]], Any] | None:
        """None if a pass needs more than kernels."""
        graph, placeholders = self.graph, _placeholders(self.graph)
        given = [*placeholders, *self.constants]
        constants = functools.cache(_extract(graph, [], self.constants).forward)
        known, gathered = list(given), set[fx.Node]()
        steps: list[Callable[[dict[fx.Node, Any]], None]] = []
        for stage, passes in itertools.zip_longest(self.stages, self.passes, fillvalue=()):
            steps.append(_stage(graph, known, stage))
            known += stage
            for goal in passes:
                step = _pass(graph, self.rowwise, known, goal, gathered)
                if step is None:
                    return None
                steps.append(step)
            known += [n for goal in passes for n in goal.results]
        writes = [node for node in graph.graph.nodes if _is_write(node) and node not in self.rowwise]
        outputs = _args(_output(graph))[0]

        def run(args: list[Any]) -> list[Any]:
            values = dict(zip(given, [*args, *constants()], strict=True))
            for step in steps:
                step(values)
            for write in writes:
                values[_args(write)[0]].copy_(values[_args(write)[1]])
            return [values[node] if isinstance(node, fx.Node) else node for node in outputs]

        return run


def _stage(
    graph: fx.GraphModule, known: Sequence[fx.Node], outputs: Sequence[fx.Node]
) -> Callable[[dict[fx.Node, Any]], None]:
    """Compute ``outputs`` from values known: numbers, and columns of them, for which no compiler is needed."""
    inputs = _used(known, outputs)
    part = _extract(graph, inputs, outputs)
    for node in part.graph.nodes:
        if node.target is torch.ops.prims.convert_element_type.default:  # a Python function, ten times as slow
            node.target, node.args, node.kwargs = aten._to_copy.default, node.args[:1], {"dtype": node.args[1]}
        elif node.target is aten.as_strided.default and not node.args[1]:  # `tree.hoist`, for Inductor
            node.replace_all_uses_with(node.args[0])
    run = fx.GraphModule(part, fx_graph_cse(part.graph)).forward

    def step(values: dict[fx.Node, Any]) -> None:
        values.update(zip(outputs, run(*[values[n] for n in inputs]), strict=True))

    return step


def _pass(
    graph: fx.GraphModule, rowwise: set[fx.Node], known: Sequence[fx.Node], goal: _Pass, gathered: set[fx.Node]
) -> Callable[[dict[fx.Node, Any]], None] | None:
    """Compute and write what a pass is for, block by block; the vectors ``gathered`` were so by earlier passes."""
    rows, count = goal.rows, block_count(goal.rows, max(_value(n)[0].numel() for n in rowwise if _rows(n) == goal.rows))
    gathers = [n for n in rowwise if _is_gather(n) and _rows(n) == rows]
    used = _used([*known, *gathers], [*goal.results, *goal.writes])
    gathers = [n for n in used if n in gathers]
    given = [n for n in used if n not in gathers]
    inputs = [*given, *gathers]
    block = [_value(n)[: rows // count] if _rows(n) == rows else _value(n) for n in inputs]
    loop = Loop.of(_extract(graph, inputs, goal.results, goal.writes, {rows: rows // count}), block)
    if loop is None:
        return None
    sources = {n: Sources.of(n, count) for n in gathers}
    fresh = [n for n in gathers if n not in gathered]
    gathered.update(fresh)
    order, bounds = _by_block([sources[n].block for n in fresh], count)
    passed = [*given, *goal.results]
    metas = [Meta.of(_value(n)) for n in passed]
    strides = [m.stride[0] * m.dtype.itemsize if _rows(n) == rows else 0 for n, m in zip(passed, metas, strict=True)]
    offsets = np.arange(count)[:, None] * (rows // count) * np.array(strides)

    def step(values: dict[fx.Node, Any]) -> None:
        values.update((n, sources[n].at([values[leaf] for leaf in _args(n)[0]])) for n in fresh)
        values.update((n, meta.empty()) for n, meta in zip(goal.results, metas[len(given) :], strict=True))
        tensors = [_laid_out(values[n], meta) for n, meta in zip(passed, metas, strict=True)]
        starts = np.array([x.data_ptr() for x in tensors]) + offsets
        columns = [starts[:, : len(given)], *(values[n].blocks for n in gathers), starts[:, len(given) :], bounds]
        copies = np.concatenate([np.empty((0, 3), np.int64), *(values[n].copies for n in fresh)])
        loop(np.column_stack(columns), copies[order])

    return step


def _by_block(blocks: Sequence[Any], count: int) -> tuple[Any, Any]:
    """The order that sorts copies by the blocks they are for, and which of them each block needs: from, to."""
    together = np.concatenate([np.empty(0, np.int64), *blocks])
    order = np.argsort(together, kind="stable")
    bounds = np.searchsorted(together[order], np.arange(count + 1))
    return order, np.stack([bounds[:-1], bounds[1:]], 1)


def _laid_out(x: Tensor, meta: Meta) -> Tensor:
    """A value that was computed eagerly, as the compiler expects it."""
    return x if x.stride() == meta.stride else meta.empty().copy_(x)


def _is_rowwise(node: fx.Node, rowwise: Collection[fx.Node], wide: Collection[tuple[int, ...]]) -> bool:
    """Whether each row of a value is computed from the same row of those of its arguments that have as many."""
    above, shape = node.all_input_nodes, _shape(node)
    if not any(a in rowwise for a in above) and shape not in wide:
        return False
    rows, along = _rows(node), [a for a in above if _rows(a) == _rows(node)]
    if not all(a in along for a in above if a in rowwise) or len(shape) not in (1, 2):
        return False
    if node.target in ALONG_ROWS:
        return shape[1:] in ((), (1,)) and _args(node)[1] in (1, -1, [1], [-1]) and len(along) == 1
    if node.target is aten.view.default:
        return len(along) == 1 and rows == _rows(along[0])
    if node.target is aten.unsqueeze.default:
        return _args(node)[1] in (1, -1) and len(along) == 1
    if node.target in (*SIZED, *COPIES) or torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return all(len(_shape(a)) == len(shape) for a in along)
    return False


# --- graphs ------------------------------------------------------------------------------------------------------


def _value(node: fx.Node) -> Any:
    """What is known of a node's value: a tensor without elements."""
    return node.meta.get("val")


def _args(node: fx.Node) -> Any:
    return node.args


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = _value(node)
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _rows(node: fx.Node) -> int | None:
    return next(iter(_shape(node)), None)


def _is_gather(node: fx.Node) -> bool:
    return node.target is torch.ops.holofunc.gather.default


def _is_write(node: fx.Node) -> bool:
    return node.target is aten.copy_.default


def _placeholders(graph: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if node.op == "placeholder"]


def _output(graph: fx.GraphModule) -> fx.Node:
    return next(node for node in graph.graph.nodes if node.op == "output")


def _between(inputs: Collection[fx.Node], outputs: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes that ``outputs`` are computed with, back to ``inputs``, which are among them."""
    found: set[fx.Node] = set()
    waiting = list(outputs)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += [] if node in inputs else node.all_input_nodes
    return found


def _used(known: Sequence[fx.Node], outputs: Iterable[fx.Node]) -> list[fx.Node]:
    """Those of the values known that computing ``outputs`` starts from."""
    found = _between(set(known), outputs)
    return [node for node in known if node in found]


def _extract(
    graph: fx.GraphModule,
    inputs: Sequence[fx.Node],
    outputs: Sequence[Any],
    writes: Sequence[fx.Node] = (),
    sizes: Mapping[int, int] = MappingProxyType({}),
) -> fx.GraphModule:
    """The part of a graph that computes ``outputs`` from ``inputs`` and makes ``writes``; ``sizes`` change."""
    part, copies = fx.Graph(), {}
    for node in inputs:
        copies[node] = part.placeholder(node.name)
    needed = _between(set(inputs), [*(n for n in outputs if isinstance(n, fx.Node)), *writes])
    for node in graph.graph.nodes:
        if node in needed and node not in copies:
            copies[node] = part.node_copy(node, copies.__getitem__)
            if node.target in SIZED:
                new = [[sizes.get(n, n) for n in arg] if isinstance(arg, list) else arg for arg in copies[node].args]
                copies[node].args = tuple(new)
    part.output([copies[node] if isinstance(node, fx.Node) else node for node in outputs])
    return fx.GraphModule(graph, part)
