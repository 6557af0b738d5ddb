"""Flat dicts as views of vectors, inside of graphs and outside."""

import contextlib
import operator
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch.utils import _pytree as torch_pytree

from holofunc.arena.layouts import Layout

__all__ = ["Arena", "InseparableError", "gathered", "moved", "parts", "together", "views"]


class InseparableError(ValueError):
    """Leaves were asked for that lie in one vector with others."""


class Arena(dict[str, Tensor]):
    """A flat dict of tensors that are views of ``vectors``, one per dtype, each of shape (rows, width).

    With ``per_leaf=True`` it holds one number per leaf: ``vectors`` have shape (leaves of the group,). The views are
    cut when the first is asked for; rules that use only vectors and names never pay for them.
    """

    def __init__(self, vectors: Sequence[Tensor], layout: Layout, per_leaf: bool = False) -> None:
        super().__init__()
        self.vectors = tuple(vectors)
        self.layout = layout
        self.per_leaf = per_leaf
        self.gathered_from: tuple[Tensor, ...] | None = None  # where the leaves lie apart, in the order of the names
        self.level = _functorch_level()

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout.names)

    def __len__(self) -> int:
        return len(self.layout.names)

    def __contains__(self, name: object) -> bool:
        return name in self.layout.names

    def keys(self) -> Any:
        return dict.fromkeys(self.layout.names).keys()

    def plain(self) -> dict[str, Tensor]:
        """The same as an ordinary dict."""
        return self.layout.numbers(self.vectors) if self.per_leaf else self.layout.cut(self.vectors)

    def parted(self, groups: Sequence[Sequence[str]]) -> "list[dict[str, Tensor]]":
        """The leaves of each group of names as an arena.

        Raises:
            InseparableError: they do not lie in vectors of their own. They will in arenas that are laid out hereafter.
        """
        parts: list[dict[str, Tensor] | None] = [self.part(names) if names else {} for names in groups]
        lacking = [names for names, part in zip(groups, parts, strict=True) if part is None]
        for names in lacking:
            self.layout.wish(names)
        if lacking:
            raise InseparableError(f"these leaves must lie apart from the others, and do not: {lacking}")
        return [part for part in parts if part is not None]

    def part(self, names: Sequence[str]) -> "Arena | None":
        """The leaves of these names as an arena, if they have vectors of their own."""
        if (found := self.layout.apart(names)) is None:
            return None
        groups, layout = found
        part = Arena([self.vectors[g] for g in groups], layout, self.per_leaf)
        if self.gathered_from is not None:
            leaves = dict(zip(self.layout.names, self.gathered_from, strict=True))
            part.gathered_from = tuple([leaves[name] for name in names])
        return part

    def need_whole_units(self, counts: Mapping[str, int], width: int) -> None:
        """Raise unless each of the equal parts (units) of each of these leaves, so many as there are, fills whole rows.

        It does where rows are of ``width`` elements; a leaf that is one unit may end within a row.

        Raises:
            InseparableError: one does not. It will, with the leaves apart, in arenas that are laid out hereafter.
        """
        slots = [(s, counts[s.name]) for s in self.layout.slots if s.name in counts]
        if any(count > 1 and s.numel // count % self.layout.width for s, count in slots):
            self.layout.narrow(width)
            self.layout.wish(list(counts))
            raise InseparableError(f"these leaves must lie apart from the others, in narrow rows: {list(counts)}")

    def columns(self) -> list[Tensor]:
        """For numbers per leaf: a column per vector, of shape (rows, 1), with each leaf's number on its rows."""
        return [v[self.leaf_of_row(g)][:, None] for g, v in enumerate(self.vectors)]

    def leaf_of_row(self, group: int) -> Tensor:
        """For each row of a vector, the position of its leaf: int64 of shape (rows,)."""
        return torch.tensor(self.layout.leaf_of_row[group], device=self.vectors[group].device)

    def without_padding(self, group: int) -> Tensor:
        """A vector with zeros where a leaf is padded to whole rows, whatever a rule left there (0/0, say)."""
        vector = self.vectors[group]
        if not self.layout.padded[group]:
            return vector
        filled = torch.tensor(self.layout.filled[group], dtype=torch.float32, device=vector.device)[:, None]
        inside = torch.arange(self.layout.width, dtype=torch.float32, device=vector.device) < filled  # int64 is slower
        return torch.where(inside, vector, torch.zeros((), dtype=vector.dtype, device=vector.device))

    def leaf_sums(self, dtype: torch.dtype) -> "Arena":
        """The sum of each leaf's elements, accumulated in ``dtype``."""
        sums = []
        for group, slots in enumerate(self.layout.groups):
            by_row = self.without_padding(group).sum(1, dtype=dtype)
            sums.append(by_row.new_zeros(len(slots)).index_add(0, self.leaf_of_row(group), by_row))
        return Arena(sums, self.layout, per_leaf=True)


def gathered(leaves: Mapping[str, Tensor], layout: Layout) -> Arena:
    """An arena of this layout with copies of ``leaves``: tensors of the slots' shapes, or one number for each."""
    if all(leaves[s.name].shape == s.shape for s in layout.slots):
        return Arena(layout.join(leaves), layout)
    numbers = [torch.stack([leaves[s.name].reshape(()) for s in group]) for group in layout.groups]
    return Arena(numbers, layout, per_leaf=True)


def together(flats: Iterable[Mapping[str, Tensor]], layout: Layout) -> Arena | None:
    """The arena of which ``flats`` are the parts; None if they are not in vectors of their own."""
    vectors: dict[int, Tensor] = {}
    for flat in flats:
        if flat:
            found = layout.apart(list(flat))
            if found is None:
                return None
            groups, own = found
            here = flat.vectors if isinstance(flat, Arena) and flat.layout is own else own.join(flat)
            vectors.update(zip(groups, here, strict=True))
    return Arena([vectors[g] for g in range(len(layout.groups))], layout)


def _functorch_level() -> int:
    return torch._C._functorch.maybe_current_level() or 0


@contextlib.contextmanager
def _outside_of_transforms(level: int) -> Iterator[None]:
    """Leave the torch.func transforms entered since ``level``: views cut inside of one would die with it."""
    with contextlib.ExitStack() as stack:
        while _functorch_level() > level:
            stack.enter_context(temporarily_pop_interpreter_stack())
        yield


def _cutting_first(name: str) -> Any:
    read = getattr(dict, name)

    def method(self: Arena, *args: Any) -> Any:
        if dict.__len__(self) == 0:
            with _outside_of_transforms(self.level):
                dict.update(self, self.plain())
        return read(self, *args)

    return method


for _name in ("__eq__", "__getitem__", "__or__", "__repr__", "copy", "get", "items", "values"):
    setattr(Arena, _name, _cutting_first(_name))

torch_pytree.register_pytree_node(  # torch.func sees the leaves, and hands back plain dicts
    Arena,
    lambda arena: (list(arena.values()), list(arena)),
    lambda values, names: dict(zip(names, values, strict=True)),
)


# --- outside of graphs -------------------------------------------------------------------------------------------


class _Mark(NamedTuple):
    """What a vector that leaves were cut from knows of them, as an attribute."""

    layout: Layout
    group: int
    leaves: tuple[Callable[[], Tensor | None], ...]
    """Weak references to the leaves of all vectors, in the order of the names."""


def views(vectors: Sequence[Tensor], layout: Layout) -> dict[str, Tensor]:
    """The leaves as a plain dict; the vectors are marked, so that `parts` finds them again."""
    flat = layout.cut(vectors)
    leaves = tuple(map(weakref.ref, flat.values()))
    for group, vector in enumerate(vectors):
        vector.arena = _Mark(layout, group, leaves)  # type: ignore[attr-defined]
    return flat


def parts(flat: Mapping[str, Tensor]) -> tuple[tuple[Tensor, ...], Layout] | None:
    """``(vectors, layout)`` of a plain dict whose tensors are exactly the leaves of an arena; otherwise None."""
    leaves = list(flat.values())
    mark = getattr(leaves[0]._base, "arena", None)
    if mark is None or tuple(flat) != mark.layout.names:
        return None
    layout = mark.layout
    vectors: tuple[Any, ...] = tuple([leaves[first]._base for first in layout.firsts])
    if all(map(operator.is_, [leaf() for leaf in mark.leaves], leaves)):
        return vectors, layout
    marks = [getattr(vector, "arena", None) for vector in vectors]
    if [mark[:2] if mark else None for mark in marks] != [(layout, group) for group in range(len(vectors))]:
        return None
    if [(leaf.storage_offset(), leaf.shape, leaf.stride()) for leaf in leaves] != layout.places:
        return None
    if not all(leaf._base is vectors[slot.group] for leaf, slot in zip(leaves, layout.slots, strict=True)):
        return None
    return vectors, layout


def moved(flat: dict[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """``flat`` in an arena of this layout: itself if it lies there already, otherwise a copy."""
    found = parts(flat)
    if found is not None and found[1] is layout:
        return flat
    with torch.no_grad():
        return views(layout.join(flat), layout)
