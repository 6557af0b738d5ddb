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
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx
from torch._functorch.compile_utils import fx_graph_cse
from torch._guards import TracingContext, detect_fake_mode, tracing

from holofunc.compile.branches import condition_of, selected
from holofunc.compile.gathering import Gathering
from holofunc.compile.graphs import (
    SIZED,
    args_of,
    between,
    extract,
    inputs_of,
    is_gather,
    is_write,
    output_of,
    rows_of,
    shape_of,
    starts,
    value_of,
)
from holofunc.compile.kernels import inductor
from holofunc.compile.leafwise import Leafwise
from holofunc.compile.operations import leafwise_of
from holofunc.compile.passes import Gathered, Goal, Values, run_over_rows
from holofunc.compile.writes import settle

__all__ = ["compile_by_blocks"]

aten = torch.ops.aten

# --- the compiler ------------------------------------------------------------------------------------------------


def compile_by_blocks(graph: torch.nn.Module, inputs: Sequence[Tensor], mode: str | None = None) -> Callable[..., Any]:
    """A backend for `torch.compile`: Inductor's, on graphs that gather cut into blocks of rows."""
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    options = list_mode_options(mode) if mode else None
    return cast(Any, compile_fx)(graph, inputs, inner_compile=_lower, config_patches=options)


def _lower(graph: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
    if any(x.device.type != "cpu" for x in inputs if isinstance(x, Tensor)):
        settle(graph)
        return inductor(graph, inputs, **options)
    condition = condition_of(graph)
    if condition is None:
        return _by_rows(graph, inputs, options)
    runs = []
    for outcome in (False, True):
        with tracing(TracingContext(detect_fake_mode(inputs))):  # in which Inductor notes things for one graph
            runs.append(_by_rows(selected(graph, condition, outcome), inputs, options))
    return _boxed(_choosing(graph, condition, runs))


def _choosing(
    graph: fx.GraphModule, condition: fx.Node, runs: Sequence[Callable[[list[Any]], Any]]
) -> Callable[[list[Any]], Any]:
    """The program for the outcome that the condition has."""
    given = inputs_of(graph)
    find = _stage(graph, given, [condition])

    def run(args: list[Any]) -> Any:
        values: Values = dict(zip(given, args, strict=True))
        find(values)
        return runs[bool(values[condition])](args)

    return run


def _by_rows(graph: fx.GraphModule, inputs: Sequence[Any], options: dict[str, Any]) -> Callable[[list[Any]], Any]:
    settle(graph)
    gathers = [
        node for node in graph.graph.nodes if is_gather(node) and all(x.op == "placeholder" for x in args_of(node)[0])
    ]
    if not gathers and not any(leafwise_of(node) for node in graph.graph.nodes):
        return inductor(graph, inputs, **options)
    cut = _Cut.of(graph, gathers)
    return _boxed((cut and cut.program()) or _gathered_first(graph, gathers, inputs, options))


def _boxed(run: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    """Marked as a function of the list of its inputs."""
    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def _gathered_first(
    graph: fx.GraphModule, gathers: Sequence[fx.Node], inputs: Sequence[Any], options: dict[str, Any]
) -> Callable[[list[Any]], Any]:
    """Inductor's program for the whole graph, run on vectors that are gathered before."""
    placeholders, output = inputs_of(graph), output_of(graph)
    part = extract(graph, [*placeholders, *gathers], args_of(output)[0], [n for n in graph.graph.nodes if is_write(n)])
    program = inductor(part, [*inputs, *map(value_of, gathers)], **options)
    gatherings = [Gathering.of(node) for node in gathers]
    leaves = [[placeholders.index(leaf) for leaf in args_of(node)[0]] for node in gathers]
    memory: list[Tensor | None] = [None] * len(gathers)  # fresh pages for large vectors cost more than filling them

    def run(args: list[Any]) -> Any:
        parts = [[args[leaf] for leaf in inputs] for inputs in leaves]
        lying = [gathering.lying(part) for gathering, part in zip(gatherings, parts, strict=True)]
        vectors = [
            gathering.whole(part, whole) if vector is None else vector
            for gathering, part, vector, whole in zip(gatherings, parts, lying, memory, strict=True)
        ]
        results = program([*args, *vectors])
        others = {x.untyped_storage().data_ptr() for x in (*lying, *results) if isinstance(x, Tensor)}
        # what is the caller's, or is from now on, must not be written to by the next call
        memory[:] = [None if v.untyped_storage().data_ptr() in others else v for v in vectors]
        return results

    return run


# --- cutting a graph ---------------------------------------------------------------------------------------------

ALONG_ROWS = (aten.sum.dim_IntList, aten.mean.dim, aten.any.dim, aten.amax.default, aten.amin.default)
"""Reductions, which may run along the second axis: ``(x, axes, ...)``."""
COPIES = (aten.clone.default, aten.alias.default, torch.ops.prims.convert_element_type.default)


class _Cut(NamedTuple):
    """A graph as stages, which compute what concerns all rows, each followed by passes over the rows.

    A pass computes anew what it needs of earlier ones, but for their results, and all writing is left to the last
    passes: so each reads the state as it was.
    """

    graph: fx.GraphModule
    rowwise: set[fx.Node]
    programs: dict[fx.Node, Leafwise]
    """Of ``rowwise``, what is computed leaf by leaf."""
    constants: list[fx.Node]
    stages: list[list[fx.Node]]
    passes: list[list[Goal]]

    @classmethod
    def of(cls, graph: fx.GraphModule, gathers: Sequence[fx.Node]) -> "_Cut | None":
        """None if something is neither computed row by row, nor leaf by leaf, nor from a number for each row."""
        found = {node: program for node in graph.graph.nodes if (program := leafwise_of(node))}
        wide = {shape_of(node) for node in gathers} | {program.shape for program in found.values()}
        rowwise: set[fx.Node] = set()
        programs: dict[fx.Node, Leafwise] = {}
        nodes = [node for node in graph.graph.nodes if node.op != "output" and not is_write(node)]
        for node in nodes:
            above = node.all_input_nodes
            given = node in gathers or node.op == "placeholder"
            if node in found and _is_of_rows(node, found[node], rowwise):
                rowwise.add(node)
                programs[node] = found[node]
            elif (shape_of(node) in wide) if given else _is_rowwise(node, rowwise, wide, programs):
                rowwise.add(node)
            elif shape_of(node) in wide or any(a in rowwise and shape_of(a) in wide for a in above):
                return None
        writes = [node for node in graph.graph.nodes if is_write(node)]
        for write in writes:
            to, value = args_of(write)[:2]
            if to in rowwise:
                if value not in rowwise or shape_of(value) != shape_of(to):
                    return None
                rowwise.add(write)
            elif value in rowwise and shape_of(value) in wide:
                return None
        if any(node in rowwise and shape_of(node) in wide for node in output_of(graph).all_input_nodes):
            return None

        computed = [node for node in nodes if node.op != "placeholder" and node not in gathers]
        results = [n for n in computed if n in rowwise and not rowwise.issuperset(n.users)]
        by_row = [write for write in writes if write in rowwise]
        level = _levels(nodes, rowwise)
        last = max([0, *(level[n] for n in results), *(level[args_of(write)[1]] for write in by_row)])
        early = between((), {a for n in rowwise for a in n.all_input_nodes if a not in rowwise})
        level = _levels(nodes, rowwise, {n: last for n in programs if n not in early})

        def needed(k: int) -> list[fx.Node]:
            """Of the values that concern all rows and are known after ``k`` rounds, those that something else uses."""
            mine = [n for n in computed if n not in rowwise and level[n] == k]
            mine = [n for n in mine if n.target is not aten.full.default or any(user in programs for user in n.users)]
            return [n for n in mine if not set(mine).issuperset(n.users)]

        passes: list[list[Goal]] = []
        for k in range(last + 1):
            passes.append([])
            heights = [programs[n].shape[0] if n in programs else shape_of(n)[0] for n in results]
            for rows in dict.fromkeys([*heights, *(shape_of(args_of(write)[0])[0] for write in by_row)]):
                left = [n for n, height in zip(results, heights, strict=True) if level[n] == k and height == rows]
                due = [write for write in by_row if k == last and shape_of(args_of(write)[0])[0] == rows]
                before_due = between((), due)
                with_due = [n for n in left if n in programs and n in before_due]
                if alone := [n for n in left if n not in with_due]:
                    # apart from writing, next to which Inductor (torch 2.14) fails on some sums
                    passes[-1].append(Goal(rows, alone, []))
                if due:
                    passes[-1].append(Goal(rows, with_due, due))
        _keep_what_is_needed_again([goal for goals in passes for goal in goals], nodes, rowwise, programs)
        return cls(graph, rowwise, programs, needed(-1), [needed(k) for k in range(last + 2)], passes)

    def program(self) -> Callable[[list[Any]], Any] | None:
        """None if a pass needs more than kernels and programs for leaves."""
        graph, placeholders = self.graph, inputs_of(self.graph)
        given = [*placeholders, *self.constants]
        constants = functools.cache(extract(graph, [], self.constants).forward)
        known, gathered = list(given), Gathered()
        steps: list[Callable[[Values], None]] = []
        for stage, passes in itertools.zip_longest(self.stages, self.passes, fillvalue=()):
            steps.append(_stage(graph, known, stage))
            known += stage
            for goal in passes:
                step = run_over_rows(graph, self.rowwise, self.programs, known, goal, gathered)
                if step is None:
                    return None
                steps.append(step)
            known += [n for goal in passes for n in goal.results]
        writes = [node for node in graph.graph.nodes if is_write(node) and node not in self.rowwise]
        outputs = args_of(output_of(graph))[0]

        def run(args: list[Any]) -> list[Any]:
            values = dict(zip(given, [*args, *constants()], strict=True))
            for step in steps:
                step(values)
            for write in writes:
                values[args_of(write)[0]].copy_(values[args_of(write)[1]])
            return [values[node] if isinstance(node, fx.Node) else node for node in outputs]

        return run


def _levels(
    nodes: Sequence[fx.Node], rowwise: Collection[fx.Node], at_least: Mapping[fx.Node, int] = MappingProxyType({})
) -> dict[fx.Node, int]:
    """How many rounds of passes must be over before a value is computed; -1 for constants."""
    level: dict[fx.Node, int] = {}
    for node in nodes:
        if node in rowwise or node.op == "placeholder":
            level[node] = max([at_least.get(node, 0), *(level[a] for a in node.all_input_nodes)])
        else:
            level[node] = max([-1, *(level[a] + (a in rowwise) for a in node.all_input_nodes)])
    return level


def _stage(graph: fx.GraphModule, known: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> Callable[[Values], None]:
    """Compute ``outputs`` from values known: numbers, and columns of them, for which no compiler is needed."""
    inputs = starts(known, outputs)
    part = extract(graph, inputs, outputs)
    for node in part.graph.nodes:
        if node.target is torch.ops.prims.convert_element_type.default:  # a Python function, ten times as slow
            node.target, node.args, node.kwargs = aten._to_copy.default, node.args[:1], {"dtype": node.args[1]}
        elif node.target is aten.as_strided.default and not node.args[1]:  # `tree.hoist`, for Inductor
            node.replace_all_uses_with(node.args[0])
    run = fx.GraphModule(part, fx_graph_cse(part.graph)).forward

    def step(values: Values) -> None:
        values.update(zip(outputs, run(*[values[n] for n in inputs]), strict=True))

    return step


def _keep_what_is_needed_again(
    goals: Sequence[Goal], nodes: Sequence[fx.Node], rowwise: Collection[fx.Node], programs: Collection[fx.Node]
) -> None:
    """Make whole vectors that a program for leaves returns a result of the pass that runs it, if others use them."""
    runs: dict[fx.Node, Goal] = {}
    there = {n for n in nodes if n not in rowwise}
    for goal in goals:
        for n in between(there, [*goal.results, *goal.writes]):
            if n in programs:
                runs.setdefault(n, goal)
            elif (above := n.all_input_nodes[:1]) and above[0] in runs and runs[above[0]] is not goal:
                runs[above[0]].results.append(n)
                there.add(n)
        there.update(n for n in goal.results if n not in programs)


def _is_of_rows(node: fx.Node, program: Leafwise, rowwise: Collection[fx.Node]) -> bool:
    """Whether a program for leaves takes whole rows of vectors as its arena's, and nothing else that has rows."""
    taken = enumerate(args_of(node)[1])
    return all(shape_of(a) == program.shape if i in program.inputs else a not in rowwise for i, a in taken)


def _is_rowwise(
    node: fx.Node,
    rowwise: Collection[fx.Node],
    wide: Collection[tuple[int, ...]],
    programs: Mapping[fx.Node, Leafwise],
) -> bool:
    """Whether each row of a value is computed from the same row of those of its arguments that have as many."""
    above, shape = node.all_input_nodes, shape_of(node)
    if above and above[0] in programs:
        return args_of(node)[1] in programs[above[0]].outputs
    if not any(a in rowwise for a in above) and shape not in wide:
        return False
    rows, along = rows_of(node), [a for a in above if rows_of(a) == rows_of(node)]
    if not all(a in along for a in above if a in rowwise) or len(shape) not in (1, 2):
        return False
    if node.target in ALONG_ROWS:
        return shape[1:] in ((), (1,)) and args_of(node)[1] in (1, -1, [1], [-1]) and len(along) == 1
    if node.target is aten.view.default:
        return len(along) == 1 and rows == rows_of(along[0])
    if node.target is aten.unsqueeze.default:
        return args_of(node)[1] in (1, -1) and len(along) == 1
    if node.target in (*SIZED, *COPIES) or torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return all(len(shape_of(a)) == len(shape) for a in along)
    return False
