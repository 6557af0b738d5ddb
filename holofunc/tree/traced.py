"""Which tensors belong to which flat vectors during tracing, and elementwise rules on these vectors.

Traced functions see ordinary dicts; `aligned` looks their tensors up in the `Trace` of this thread. Private to
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
    position: int
    per_leaf: bool
    """Whether the vector holds one scalar per leaf of the layout, in shape (leaves,), and this leaf is one of them."""


class Trace:
    """Which tensors belong to which vectors while a function is traced in this thread.

    Args:
        layouts: of families of dicts that are computed leaf by leaf, such as gradients.
    """

    def __init__(self, layouts: Mapping[Family, tuple[Group, ...]]) -> None:
        self._known = {frozenset(names): groups for names, groups in layouts.items()}
        self._places: dict[int, _Place] = {}
        self._made: dict[Any, tuple[Any, Tensor]] = {}
        self._joined: set[int] = set()
        self._kept: list[Any] = []

    def keep(self, thing: Any) -> None:
        """Keep ``thing`` alive as long as the graph."""
        self._kept.append(thing)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        before, _current.trace = current_trace(), self
        try:
            yield
        finally:
            _current.trace = before

    def place(self, vector: Tensor, layout: Layout, leaves: Sequence[Tensor], per_leaf: bool = False) -> None:
        """Record that ``leaves`` are the leaves of ``vector``."""
        for index, leaf in enumerate(leaves):
            self._places[id(leaf)] = _Place(leaf, vector, layout, index, per_leaf)

    def leaves_of(self, vector: Tensor, group: Group) -> dict[str, Tensor]:
        """The leaves of a computed vector."""
        plain = is_plain(vector)  # the operation has no derivative, which a transformation needs
        if vector.shape != (group.layout.rows, WIDTH):  # a constant, or one scalar per leaf
            vector = vector.expand(group.layout.rows, WIDTH).contiguous()
        leaves = torch.ops.holofunc.cut(vector, places(group.layout)) if plain else cut(vector, group.layout)
        self.place(vector, group.layout, leaves)
        return dict(zip(group.names, leaves, strict=True))

    def scalars_of(self, scalars: Tensor, group: Group) -> dict[str, Tensor]:
        """One scalar per leaf, from a tensor of shape (leaves,)."""
        leaves = scalars.unbind()
        self.place(scalars, group.layout, leaves, per_leaf=True)
        return dict(zip(group.names, leaves, strict=True))

    def groups_of(self, flat: Mapping[str, Tensor]) -> tuple[Group, ...] | None:
        """The layout of a dict's tensors, known or expected; None if there is none."""
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
            mine = sorted(names[key], key=lambda name: self._places[id(flat[name])].position)
            if len(mine) != len(place.layout.slots):
                return None
            groups.append(Group(tuple(mine), place.layout))
        return tuple(groups)

    def placed(self, flat: Mapping[str, Tensor]) -> tuple[tuple[Group, ...], tuple[Tensor, ...]] | None:
        """The vectors that contain all tensors of a dict; None if one of them is in no vector."""
        places = [self._places.get(id(leaf)) for leaf in flat.values()]
        if not places or any(place is None or place.per_leaf for place in places):
            return None
        groups = self.groups_of(flat)
        return None if groups is None else (groups, tuple(self.vector_of(flat, group)[0] for group in groups))

    def vector_of(self, flat: Mapping[str, Tensor], group: Group) -> tuple[Tensor, bool]:
        """The vector of a group of leaves, joined if it does not exist, and whether it holds one scalar per leaf."""
        leaves = [flat[name] for name in group.names]
        places = [self._places.get(id(leaf)) for leaf in leaves]
        first, layout = places[0], group.layout
        only_scalars = not any(slot.shape for slot in layout.slots)
        per_leaf = all(not x.ndim for x in leaves) and not only_scalars
        if first is not None and all(p is not None and p.vector is first.vector for p in places):
            order = [p.position for p in places if p is not None]
            whole = order == list(range(len(first.layout.slots)))
            if whole and first.layout == layout and not (first.per_leaf and only_scalars):
                return first.vector, first.per_leaf
            if only_scalars or per_leaf:
                key = (*map(id, leaves), per_leaf)
                return self.once(key, lambda: _scalars(first, None if whole else order, per_leaf), leaves), per_leaf
        make = (lambda: torch.stack(leaves)) if per_leaf else (lambda: join_in_graph(leaves, layout))
        vector = self.once((*map(id, leaves), layout), make, leaves)
        if not per_leaf and is_plain(vector):
            self._joined.add(id(vector))
        return vector, per_leaf

    def is_joined(self, vector: Tensor) -> bool:
        """Whether a vector was joined from its leaves, so that its padding is zero."""
        return id(vector) in self._joined

    def once(self, key: Any, make: Callable[[], Tensor], held: Any = None) -> Tensor:
        """``make()``, cached by ``key``, unless it was made under a transformation, which it must not outlive."""
        if key in self._made:
            return self._made[key][1]
        made = make()
        if is_plain(made):
            self._made[key] = (held, made)
        return made


def _scalars(place: _Place, order: Sequence[int] | None, per_leaf: bool) -> Tensor:
    """The scalars of a vector, in another order if one is given: of shape (leaves,), or each at the start of a row."""
    scalars = place.vector if place.per_leaf else place.vector[:, 0]
    if order is not None:
        scalars = scalars[torch.tensor(order, device=scalars.device)]
    return scalars if per_leaf else torch.nn.functional.pad(scalars[:, None], (0, WIDTH - 1))


_current = threading.local()


def current_trace() -> Trace | None:
    return None if torch.compiler.is_compiling() else getattr(_current, "trace", None)  # which Dynamo cannot trace


class Aligned(NamedTuple):
    """Dicts with the same names, as vectors of one layout."""

    trace: Trace
    names: tuple[str, ...]
    groups: tuple[Group, ...]
    vectors: list[list[tuple[Tensor, bool]]]
    """For each group, the vector of each dict, and whether it holds one scalar per leaf."""

    def map(self, fn: Callable[..., Tensor]) -> dict[str, Tensor]:
        """``fn`` of the vectors; scalars per leaf are broadcast over the rows of their leaf."""
        done: dict[str, Tensor] = {}
        for group, vectors in zip(self.groups, self.vectors, strict=True):
            if all(per_leaf for _, per_leaf in vectors):
                done.update(self.trace.scalars_of(fn(*(x for x, _ in vectors)), group))
            else:
                columns = (self._column(x, group.layout) if per_leaf else x for x, per_leaf in vectors)
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
            done.update(self.trace.scalars_of(sums, group))
        return {name: done[name] for name in self.names}

    def leaf_values(self, values: Mapping[str, float], dtype: Callable[[Tensor], torch.dtype]) -> dict[str, Tensor]:
        """A given scalar for each leaf."""
        done: dict[str, Tensor] = {}
        for group, vectors in zip(self.groups, self.vectors, strict=True):
            like, listed = vectors[0][0], [values[name] for name in group.names]
            done.update(self.trace.scalars_of(torch.tensor(listed, dtype=dtype(like), device=like.device), group))
        return {name: done[name] for name in self.names}

    def filled(self) -> list[Tensor]:
        """The vectors of the first dict with zeros as padding, where an elementwise rule may have left NaN (0/0)."""
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

    def _column(self, scalars: Tensor, layout: Layout) -> Tensor:
        """One scalar per row: that of its leaf."""
        owners = [i for i, slot in enumerate(layout.slots) for _ in range(slot.rows)]
        owner = self.trace.once(("owner", layout, scalars.device), lambda: torch.tensor(owners, device=scalars.device))
        column = scalars.index_select(0, owner)[:, None]
        if not is_plain(column):
            return column
        return column.as_strided(column.shape, column.stride())  # computed once, not for each element of a row


def _dtype_of(fn: Callable[..., Tensor], vectors: Sequence[tuple[Tensor, bool]]) -> torch.dtype:
    """The dtype of ``fn`` of leaves, where a scalar per leaf has no dimension and so promotes nothing."""
    return fn(*(x.new_empty(()) if per_leaf else x.new_empty(1) for x, per_leaf in vectors)).dtype


def aligned(*trees: PyTree) -> Aligned | None:
    """The trees as vectors, if a function is being traced and they are dicts of the same names stored in vectors."""
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
    """Sums of consecutive parts of a vector, in a fixed order."""
    return torch.stack([part.sum() for part in x.split(lengths)])


torch.library.impl("holofunc::segment_sums", "CompositeExplicitAutograd", segment_sums)


@torch.library.register_fake("holofunc::segment_sums")
def _segment_sums_shape(x: Tensor, lengths: list[int]) -> Tensor:
    return x.new_empty(len(lengths))
