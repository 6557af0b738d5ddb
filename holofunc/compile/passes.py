"""Runs over the rows of vectors: loops over blocks of rows, and between them programs that treat leaves one by one.

Where there is such a program the run goes by groups of whole leaves, so that what is computed for it, and what it
returns, is never needed for more than a group at a time.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, fx

from holofunc.arena import Layout, Slot, layouts
from holofunc.compile.graphs import args_of, between, extract, is_gather, is_write, rows_of, starts, value_of
from holofunc.compile.leafwise import Leafwise
from holofunc.compile.loops import Addresses, Loop, Sources
from holofunc.compile.operations import Meta, as_it_is

__all__ = ["Gathered", "Goal", "Values", "run_over_rows"]

Values = dict[Any, Any]
"""What is known while an update runs: the values of nodes, and where the blocks of vectors that are gathered lie."""

Gathered = set[tuple[fx.Node, int]]


class Goal(NamedTuple):
    """What a run over ``rows`` rows is for."""

    rows: int
    results: list[fx.Node]
    """What it leaves to later stages: a number for each row, or what a program for leaves returns."""
    writes: list[fx.Node]
    """``copy_`` into a vector of the state."""


class _Group(NamedTuple):
    """Blocks ``first`` to ``end`` of the rows, and the leaves that lie there."""

    first: int
    end: int
    slots: Sequence[Slot]


GROUP = 2**20
"""Elements in a group, unless a single leaf has more: what a processor's cache holds, enough for all threads."""


def run_over_rows(
    graph: fx.GraphModule,
    rowwise: Collection[fx.Node],
    programs: Mapping[fx.Node, Leafwise],
    known: Sequence[fx.Node],
    goal: Goal,
    gathered: Gathered,
) -> Callable[[Values], None] | None:
    """Compute and write what ``goal`` says; None if a loop cannot do it.

    Args:
        graph: what is computed.
        rowwise: what of it is computed row by row.
        programs: and leaf by leaf.
        known: the values that are there.
        goal: what is to be there.
        gathered: the vectors that runs before this one gather, into how many blocks; those of this one are added.
    """
    rows = goal.rows
    there = [n for n in known if n not in programs]
    there += [n for n in rowwise if is_gather(n) and rows_of(n) == rows]
    needed = between(set(there), [*goal.results, *goal.writes])
    due = [n for n in graph.graph.nodes if n in programs and n in needed]
    if len({programs[n].layout for n in due}) > 1:  # of vectors that happen to be of one shape
        return None
    kept = [n for n in goal.results if n not in due]  # whole
    by_loop = [n for n in kept if not any(a in due for a in n.all_input_nodes)]
    widest = max(value_of(n)[0].numel() for n in rowwise if n not in programs and rows_of(n) == rows)
    count = rows if due else layouts.block_count(rows, widest)
    groups = _groups(programs[due[0]].layout) if due else [_Group(0, count, ())]
    rounds = _Rounds(
        rows, np.concatenate([np.arange(end - first) for first, end, _ in groups]), layouts.BLOCK // widest
    )

    passing: list[fx.Node] = []  # vectors of which there is a group at a time
    steps: list[_Segment | _Leaves] = []
    for node in (*due, None):
        results, writes = by_loop, goal.writes
        if node is not None:
            taken = [args_of(node)[1][i] for i in programs[node].inputs]
            results, writes = list(dict.fromkeys(n for n in taken if n not in there)), []
            passing += results
        else:
            placed = {n for part in steps if isinstance(part, _Leaves) for n in part.vectors.values()}
            writes = [write for write in writes if args_of(write)[0] not in placed]
        if results or writes:
            segment = _Segment.of(graph, there, results, writes, passing, rounds, gathered)
            if segment is None:
                return None
            steps.append(segment)
        if node is not None:
            leaves = _Leaves.of(node, programs[node], rowwise, goal.writes)
            steps.append(leaves)
            given = [n for n in leaves.vectors.values() if n not in there]
            passing += [n for n in given if n not in kept]
            there += [*results, *given]
    metas = {n: Meta.of(value_of(n)) for n in (*passing, *kept)}
    most = max(end - first for first, end, _ in groups)

    def step(values: Values) -> None:
        values.update((n, metas[n].empty()) for n in kept)
        here = values | {n: metas[n].cut(most).empty() for n in passing}
        runs = [part.begin(values, here) for part in steps]
        for group in groups:
            for run in runs:
                run(group)

    return step


class _Rounds(NamedTuple):
    """How a run proceeds."""

    rows: int
    within: Addresses
    """For each block, which of its group it is."""
    at_once: int
    """Rows for a thread to take at a time."""


def _groups(layout: Layout) -> list[_Group]:
    """Of leaves that follow each other, each with the blocks of a row that they take."""
    groups: list[list[Slot]] = [[]]
    for slot in layout.groups[0]:
        if groups[-1] and sum(s.rows for s in (*groups[-1], slot)) * layout.width > GROUP:
            groups.append([])
        groups[-1].append(slot)
    return [_Group(slots[0].start, slots[-1].start + slots[-1].rows, slots) for slots in groups]


class _Segment(NamedTuple):
    """A loop, and where each block finds what it takes and puts what it returns."""

    loop: Loop
    passed: Sequence[fx.Node]
    """What it takes, and after the first ``num_given`` what it returns; vectors that are gathered come apart."""
    num_given: int
    metas: Sequence[Meta]
    offsets: Addresses
    gathers: Sequence[fx.Node]
    fresh: Mapping[tuple[fx.Node, int], Sources]
    """Of ``gathers``, into so many blocks, those that no segment before this one has found."""
    order: Addresses
    bounds: Addresses
    at_once: int

    @classmethod
    def of(
        cls,
        graph: fx.GraphModule,
        there: Sequence[fx.Node],
        results: Sequence[fx.Node],
        writes: Sequence[fx.Node],
        passing: Collection[fx.Node],
        rounds: _Rounds,
        gathered: Gathered,
    ) -> "_Segment | None":
        rows, count = rounds.rows, len(rounds.within)
        used = starts(there, [*results, *writes])
        gathers, given = [n for n in used if is_gather(n)], [n for n in used if not is_gather(n)]
        inputs, size = [*given, *gathers], rows // count
        block = [value_of(n)[:size] if rows_of(n) == rows else value_of(n) for n in inputs]
        loop = Loop.of(extract(graph, inputs, results, writes, {rows: size}), block)
        if loop is None:
            return None
        fresh = {(n, count): Sources.of(n, count) for n in gathers if (n, count) not in gathered}
        gathered.update(fresh)
        passed = [*given, *results]
        metas = [Meta.of(value_of(n)) for n in passed]
        index = {n: rounds.within if n in passing else np.arange(count) for n in passed}
        strides = [
            m.stride[0] * m.dtype.itemsize if rows_of(n) == rows else 0 for n, m in zip(passed, metas, strict=True)
        ]
        offsets = np.stack([index[n] * size * stride for n, stride in zip(passed, strides, strict=True)], 1)
        order, bounds = _by_block([source.block for source in fresh.values()], count)
        at_once = max(1, rounds.at_once // size)
        return cls(loop, passed, len(given), metas, offsets, gathers, fresh, order, bounds, at_once)

    def begin(self, values: Values, here: Values) -> Callable[[_Group], None]:
        """``run(group)``; ``here`` are the values of a pass, those of a group among them."""
        for key, source in self.fresh.items():
            values[key] = source.at([values[leaf] for leaf in args_of(key[0])[0]])
        tensors = [_laid_out(here[n], meta) for n, meta in zip(self.passed, self.metas, strict=True)]
        places = np.array([x.data_ptr() for x in tensors]) + self.offsets
        given, returned = places[:, : self.num_given], places[:, self.num_given :]
        addresses = np.column_stack(
            [given, *(values[n, len(self.offsets)].blocks for n in self.gathers), returned, self.bounds]
        )
        copies = np.concatenate([np.empty((0, 3), np.int64), *(values[key].copies for key in self.fresh)])[self.order]

        def run(group: _Group, held: Sequence[Tensor] = tensors) -> None:  # held: they must not be freed before
            self.loop(addresses[group.first : group.end], copies, self.at_once)

        return run


def _by_block(blocks: Sequence[Addresses], count: int) -> tuple[Addresses, Addresses]:
    """The order that sorts copies by the blocks they are for, and which of them each block needs: from, to."""
    together = np.concatenate([np.empty(0, np.int64), *blocks])
    order = np.argsort(together, kind="stable")
    bounds = np.searchsorted(together[order], np.arange(count + 1))
    return order, np.stack([bounds[:-1], bounds[1:]], 1)


def _laid_out(x: Tensor, meta: Meta) -> Tensor:
    """A value that was computed eagerly, as the compiler expects it."""
    return x if x.stride() == meta.stride else meta.empty().copy_(x)


class _Leaves(NamedTuple):
    """A program that treats leaves one by one.

    By position, the vectors that its results are put in, and what else of the state results take the place of. A vector
    of the state that nothing else reads takes them itself.
    """

    node: fx.Node
    program: Leafwise
    vectors: Mapping[int, fx.Node]
    replaced: Mapping[int, fx.Node]

    @classmethod
    def of(
        cls, node: fx.Node, program: Leafwise, rowwise: Collection[fx.Node], writes: Collection[fx.Node]
    ) -> "_Leaves":
        inputs = args_of(node)[1]
        vectors, replaced = dict[int, fx.Node](), dict[int, fx.Node]()
        for given in node.users:
            position, write = args_of(given)[1], next(iter(given.users), given)
            to = args_of(write)[0] if len(given.users) == 1 and is_write(write) else given
            only_here = to in inputs and {node, write}.issuperset(to.users)
            if given in rowwise:
                vectors[position] = to if only_here and write in writes else given
            elif only_here and program.is_successor(position, inputs.index(to)):
                replaced[position] = to
        return cls(node, program, vectors, replaced)

    def begin(self, values: Values, here: Values) -> Callable[[_Group], None]:
        """As of a segment; results that are no vectors become a value of the whole update."""
        inputs, layout = args_of(self.node)[1], self.program.layout
        vectors, replaced = self.program.outputs, self.replaced
        outputs = [
            None if i in vectors else values[replaced[i]] if i in replaced else Meta.of(x).empty()
            for i, x in enumerate(value_of(self.node))
        ]
        values[self.node] = outputs
        compute = self.program.begin([here[n] for n in inputs], outputs)

        def run(group: _Group) -> None:
            part, rows = slice(group.first, group.end), slice(group.end - group.first)
            taken = {i: values[n][part] if (n := inputs[i]) in values else here[n][rows] for i in self.program.inputs}
            given = {i: values[n][part] if n in values else here[n][rows] for i, n in self.vectors.items()}
            with as_it_is("cpu"):
                compute(group.slots, group.first, taken, given)
                for vector in given.values():
                    layout.pad(vector, group.slots, group.first)

        return run
