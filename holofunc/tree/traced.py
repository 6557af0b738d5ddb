"""Which tensors lie in which vectors while a function is traced, and rules for all elements that use it.

Dicts are ordinary ones there, whatever lies where: `aligned` asks the `Trace` of this thread. Private to
`holofunc.tree` and `holofunc.compile`.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from holofunc.tree.flat import WIDTH, Family, Group, Layout, cut, family, is_plain, join_in_graph, places
from holofunc.typing import PyTree

__all__ = ["Aligned", "Trace", "aligned", "current_trace"]


class _Place(NamedTuple):
    leaf: Tensor  # held, so that no other tensor gets its id
    vector: Tensor
    layout: Layout
    at: int
    number: bool
    """Whether the leaf is one number per leaf of the layout, and the vector of shape (leaves,)."""


class Trace:
    """Which tensors lie in which vectors while a function is traced in this thread.

    Args:
        layouts: how dicts of known families lie, such as gradients, which come leaf by leaf.
    """

    def __init__(self, layouts: Mapping[Family, tuple[Group, ...]]) -> None:
        self._known = {frozenset(names): groups for names, groups in layouts.items()}
        self._places: dict[int, _Place] = {}
        self._made: dict[Any, tuple[Any, Tensor]] = {}
        self._joined: set[int] = set()
        self._kept: list[Any] = []

    def keep(self, thing: Any) -> None:
        """Have ``thing`` live as long as the graph."""
        self._kept.append(thing)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        before, _current.trace = current_trace(), self
        try:
            yield
        finally:
            _current.trace = before

    def place(self, vector: Tensor, layout: Layout, leaves: Sequence[Tensor], number: bool = False) -> None:
        for index, leaf in enumerate(leaves):
            self._places[id(leaf)] = _Place(leaf, vector, layout, index, number)

    def leaves_of(self, vector: Tensor, group: Group) -> dict[str, Tensor]:
        """The leaves of a vector that was computed."""
        plain = is_plain(vector)  # a transformation needs the derivative of the cut, which the operation has not
        if vector.shape != (group.layout.rows, WIDTH):  # a constant, or one number for each leaf
            vector = vector.expand(group.layout.rows, WIDTH).contiguous()
        leaves = torch.ops.holofunc.cut(vector, places(group.layout)) if plain else cut(vector, group.layout)
        self.place(vector, group.layout, leaves)
        return dict(zip(group.names, leaves, strict=True))

    def numbers_of(self, numbers: Tensor, group: Group) -> dict[str, Tensor]:
        """One number per leaf, from a tensor of shape (leaves,)."""
        leaves = numbers.unbind()
        self.place(numbers, group.layout, leaves, number=True)
        return dict(zip(group.names, leaves, strict=True))

    def groups_of(self, flat: Mapping[str, Tensor]) -> tuple[Group, ...] | None:
        """How the tensors of a dict lie, or would."""
        names: dict[int, list[str]] = {}
        placed: dict[int, _Place] = {}
        for name, leaf in flat.items():
            place = self._places.get(id(leaf))
            if place is None:
                return self._known.get(frozenset(family(flat)))
            placed.setdefault(id(place.vector), place)
            names.setdefault(id(place.vector), []).append(name)
        groups = []
        for key, place in placed.items():
            mine = sorted(names[key], key=lambda name: self._places[id(flat[name])].at)
            if len(mine) != len(place.layout.slots):
                return None
            groups.append(Group(tuple(mine), place.layout))
        return tuple(groups)

    def placed(self, flat: Mapping[str, Tensor]) -> tuple[tuple[Group, ...], tuple[Tensor, ...]] | None:
        """The vectors that the tensors of a dict lie in; None if one of them does not."""
        places = [self._places.get(id(leaf)) for leaf in flat.values()]
        if not places or any(place is None or place.number for place in places):
            return None
        groups = self.groups_of(flat)
        return None if groups is None else (groups, tuple(self.vector_of(flat, group)[0] for group in groups))

    def vector_of(self, flat: Mapping[str, Tensor], group: Group) -> tuple[Tensor, bool]:
        """The vector of some leaves of a dict, and whether it holds one number for each; joined if they lie apart."""
        leaves = [flat[name] for name in group.names]
        places = [self._places.get(id(leaf)) for leaf in leaves]
        scalars, first = not any(slot.shape for slot in group.layout.slots), places[0]
        if first is not None and all(p is not None and p.vector is first.vector for p in places):
            vector, index = first.vector, [p.at for p in places if p is not None]
            whole = index == list(range(len(first.layout.slots)))
            if whole and first.layout == group.layout and not (first.number and scalars):
                return vector, first.number
            if scalars or all(not x.ndim for x in leaves):  # one number for each leaf, here or there

                def numbers() -> Tensor:
                    column = vector if first.number else vector[:, 0]
                    return column if whole else column[torch.tensor(index, device=column.device)]

                if scalars:
                    pad = torch.nn.functional.pad
                    return self.once(
                        (*map(id, leaves), 0), lambda: pad(numbers()[:, None], (0, WIDTH - 1)), leaves
                    ), False
                return self.once((*map(id, leaves), 1), numbers, leaves), True
        number = all(not x.ndim for x in leaves) and not scalars
        make = (lambda: torch.stack(leaves)) if number else (lambda: join_in_graph(leaves, group.layout))
        vector = self.once((*map(id, leaves), group.layout), make, leaves)
        if not number and is_plain(vector):
            self._joined.add(id(vector))
        return vector, number

    def is_joined(self, vector: Tensor) -> bool:
        """Whether a vector was joined from its leaves, with zeros where it holds no element."""
        return id(vector) in self._joined

    def once(self, key: Any, make: Callable[[], Tensor], held: Any = None) -> Tensor:
        """What ``make`` returned for the same key; under a transformation it is made anew, to live no longer than
        it.
        """
        if key in self._made:
            return self._made[key][1]
        made = make()
        if is_plain(made):
            self._made[key] = (held, made)
        return made


_current = threading.local()


def current_trace() -> Trace | None:
    return None if torch.compiler.is_compiling() else getattr(_current, "trace", None)  # Dynamo knows no threads


class Aligned(NamedTuple):
    """Dicts of the same names as vectors that lie alike."""

    trace: Trace
    names: tuple[str, ...]
    groups: tuple[Group, ...]
    vectors: list[list[tuple[Tensor, bool]]]
    """For each group, the vector of each dict, and whether it holds one number per leaf."""

    def map(self, fn: Callable[..., Tensor]) -> dict[str, Tensor]:
        """``fn`` of the vectors, numbers per leaf broadcast over the rows of their leaf."""
        done: dict[str, Tensor] = {}
        for group, vectors in zip(self.groups, self.vectors, strict=True):
            if all(number for _, number in vectors):
                done.update(self.trace.numbers_of(fn(*(x for x, _ in vectors)), group))
            else:
                columns = (self._column(x, group.layout) if number else x for x, number in vectors)
                out = fn(*columns)
                if len({x.dtype for x, _ in vectors}) > 1:
                    out = out.to(_dtype_of(fn, vectors))
                done.update(self.trace.leaves_of(out, group))
        return {name: done[name] for name in self.names}

    def leaf_sums(self, dtype: Callable[[Tensor], torch.dtype]) -> dict[str, Tensor]:
        """The sum of the elements of each leaf of the first dict."""
        done: dict[str, Tensor] = {}
        for group, x in zip(self.groups, self.filled(), strict=True):
            by_row = x.sum(1, dtype=dtype(x))
            rows = [slot.rows for slot in group.layout.slots]
            sums = torch.ops.holofunc.segment_sums(by_row, rows) if is_plain(by_row) else segment_sums(by_row, rows)
            done.update(self.trace.numbers_of(sums, group))
        return {name: done[name] for name in self.names}

    def leaf_values(self, values: Mapping[str, float], dtype: Callable[[Tensor], torch.dtype]) -> dict[str, Tensor]:
        """A number for each leaf."""
        done: dict[str, Tensor] = {}
        for group, vectors in zip(self.groups, self.vectors, strict=True):
            like, listed = vectors[0][0], [values[name] for name in group.names]
            done.update(self.trace.numbers_of(torch.tensor(listed, dtype=dtype(like), device=like.device), group))
        return {name: done[name] for name in self.names}

    def filled(self) -> list[Tensor]:
        """The vectors of the first dict with zeros where they hold no element, whatever a rule left there (0/0,
        say).
        """
        return [
            self._filled(vectors[0][0], group.layout) for group, vectors in zip(self.groups, self.vectors, strict=True)
        ]

    def _filled(self, x: Tensor, layout: Layout) -> Tensor:
        if self.trace.is_joined(x) or all(slot.numel == slot.rows * WIDTH for slot in layout.slots):
            return x
        counts = [max(0, min(WIDTH, s.numel - WIDTH * i)) for s in layout.slots for i in range(s.rows)]
        filled = self.trace.once(
            ("filled", layout, x.device), lambda: torch.tensor(counts, dtype=torch.int32, device=x.device)
        )
        return torch.where(torch.arange(WIDTH, dtype=torch.int32, device=x.device) < filled[:, None], x, 0)

    def _column(self, numbers: Tensor, layout: Layout) -> Tensor:
        """One number per row: that of its leaf."""
        owners = [i for i, slot in enumerate(layout.slots) for _ in range(slot.rows)]
        owner = self.trace.once(("owner", layout, numbers.device), lambda: torch.tensor(owners, device=numbers.device))
        column = numbers.index_select(0, owner)[:, None]
        if not is_plain(column):
            return column
        return column.as_strided(column.shape, column.stride())  # computed once, not for each element of a row


def _dtype_of(fn: Callable[..., Tensor], vectors: Sequence[tuple[Tensor, bool]]) -> torch.dtype:
    """The dtype of ``fn`` of leaves, where a number per leaf has no dimension, and so promotes nothing."""
    return fn(*(x.new_empty(()) if number else x.new_empty(1) for x, number in vectors)).dtype


def aligned(*trees: PyTree) -> Aligned | None:
    """The trees as vectors, if they are dicts of the same names that lie in some while a function is traced."""
    trace = current_trace()
    if trace is None or not all(_is_dict_of_tensors(t) and t.keys() == trees[0].keys() for t in trees):
        return None
    groups = next((groups for t in trees if (groups := trace.groups_of(t))), None)
    if not groups:
        return None
    vectors = [[trace.vector_of(t, group) for t in trees] for group in groups]
    return Aligned(trace, tuple(trees[0]), groups, vectors)


def _is_dict_of_tensors(node: PyTree) -> bool:
    return type(node) is dict and bool(node) and all(isinstance(x, Tensor) for x in node.values())


torch.library.define("holofunc::segment_sums", "(Tensor x, int[] lengths) -> Tensor")


def segment_sums(x: Tensor, lengths: list[int]) -> Tensor:
    """Sums of consecutive parts of a vector, always in the same order."""
    return torch.stack([part.sum() for part in x.split(lengths)])


torch.library.impl("holofunc::segment_sums", "CompositeExplicitAutograd", segment_sums)


@torch.library.register_fake("holofunc::segment_sums")
def _segment_sums_shape(x: Tensor, lengths: list[int]) -> Tensor:
    return x.new_empty(len(lengths))
