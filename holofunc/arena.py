"""Arenas: flat dicts of tensors that are views of one vector per dtype.

What treats every element alike (most of an optimizer) can then run once on the vector instead of once per tensor,
which is what makes a compiled update quick to compile and as fast as memory. A leaf begins on a row of its own, so that
one number per leaf becomes a column that broadcasts over the leaf's rows.

Arenas appear inside functions compiled by `holofunc.jit`. Outside, the same dicts are plain ones, whose tensors happen
to lie in an arena (`lay_out`, `parts`).
"""

import contextlib
import functools
import operator
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch.utils import _pytree as torch_pytree

__all__ = [
    "Arena",
    "InseparableError",
    "Layout",
    "Slot",
    "family",
    "layout_of",
    "layouts_of",
    "moved",
    "parts",
    "together",
    "views",
    "wholes",
]

WIDTHS = (2048, 1024, 512, 256, 128, 64)
"""Elements in a row: the first width that pads by less than a hundredth. Sums and numbers per leaf cost by the row."""

BLOCK = 2**16
"""Elements, at most, of which a thread computes something at a time: a few such blocks fit into a processor's cache."""


def block_count(rows: int, width: int) -> int:
    """Into how many blocks of whole rows a vector is cut; layouts have rows for blocks of one size."""
    return max(1, -(-rows * width // BLOCK))


class Slot(NamedTuple):
    """Where a leaf lies: ``rows`` rows of vector ``group`` from row ``start``, its axes in memory order ``order``.

    ``order`` lists the axes from the slowest to the fastest, so a channels_last weight keeps its layout.
    """

    name: str
    shape: tuple[int, ...]
    order: tuple[int, ...]
    group: int
    start: int
    rows: int
    numel: int


class Layout:
    """How the leaves of an arena lie in its vectors. Made by `layout_of`: equal layouts are the same object.

    `cut` and `join` convert between vectors and leaves.
    """

    def __init__(self, slots: tuple[Slot, ...], width: int) -> None:
        self.slots = slots
        self.width = width  # of a row
        self.names = tuple(slot.name for slot in slots)
        self.family = tuple((slot.name, slot.shape) for slot in slots)
        num_groups = 1 + max(slot.group for slot in slots)
        in_memory = sorted(slots, key=lambda slot: slot.start)
        self.groups = tuple(tuple(s for s in in_memory if s.group == g) for g in range(num_groups))
        self.rows = tuple(sum(s.rows for s in group) for group in self.groups)
        self.leaf_of_row = tuple(np.repeat(np.arange(len(g)), [s.rows for s in g]) for g in self.groups)
        self.filled = tuple(np.concatenate([_filled(s, width) for s in g]) for g in self.groups)
        self.firsts = tuple(self.names.index(group[0].name) for group in self.groups)
        self.places = [(s.start * width, s.shape, _strides(s)) for s in slots]
        self.padded = tuple(any(s.numel < s.rows * width for s in group) for group in self.groups)
        self.wishes: set[tuple[str, ...]] = set()  # names that have been asked for `apart`, and do not lie so
        self.widest = max(WIDTHS)  # that rows have been asked to be
        self.whole: Layout | None = None  # what this is a part of

    def cut(self, vectors: Sequence[Tensor]) -> dict[str, Tensor]:
        """The leaves, as views of the vectors."""
        found = {}
        for group, vector in zip(self.groups, vectors, strict=True):
            for s, leaf in zip(group, vector.view(-1).split([s.rows * self.width for s in group]), strict=True):
                leaf = leaf[: s.numel].view([s.shape[d] for d in s.order])
                found[s.name] = (
                    leaf if _is_sorted(s.order) else leaf.permute([s.order.index(d) for d in range(leaf.ndim)])
                )
        return {name: found[name] for name in self.names}

    def part(self, vector: Tensor, slots: Sequence[Slot], first: int) -> dict[str, Tensor]:
        """Some leaves of a vector, as views of its rows from ``first`` on."""
        start = vector.storage_offset() - first * self.width
        return {s.name: vector.as_strided(s.shape, _strides(s), start + s.start * self.width) for s in slots}

    def apart(self, names: Sequence[str]) -> "tuple[list[int], Layout] | None":
        """The vectors that hold just the leaves of these names, and how these lie in them; None if there are others."""
        slots = {s.name: s for s in self.slots}
        groups = sorted({slots[name].group for name in names if name in slots})
        if not groups or {s.name for g in groups for s in self.groups[g]} != set(names):
            return None
        moved = [slots[name]._replace(group=groups.index(slots[name].group)) for name in names]
        part = _interned(tuple(moved), self.width)
        if len(names) < len(self.names):
            part.whole = self
        return groups, part

    def wish(self, names: Sequence[str]) -> None:
        """Have layouts that `layouts_of` makes from now on keep these leaves apart."""
        if unknown := set(names) - set(self.names):
            raise KeyError(*unknown)
        self.wishes.add(tuple(names))
        if self.whole is not None:
            self.whole.wish(names)

    def narrow(self, width: int) -> None:
        """Have layouts that `layouts_of` makes from now on rows of at most this width."""
        self.widest = min(self.widest, width)
        if self.whole is not None:
            self.whole.narrow(width)

    def unit_sums(self, group: int, by_row: Tensor) -> Tensor:
        """The sum over each unit of a vector (`Arena.need_whole_units`), from a number for each row."""
        slots = self.groups[group]
        parts = zip(slots, by_row.split([s.rows for s in slots]), strict=True)
        return torch.cat([x[: s.numel // self.width].view(s.shape[0], -1).sum(1) for s, x in parts])

    def unit_column(self, group: int, values: Tensor) -> Tensor:
        """A number for each unit as a column, of shape (rows, 1); zero for rows that pad the vector."""
        parts, slots = [], self.groups[group]
        for s, x in zip(slots, values.split([s.shape[0] for s in slots]), strict=True):
            filled = s.numel // self.width
            parts += [x[:, None].expand(-1, filled // len(x)).reshape(-1), x.new_zeros(s.rows - filled)]
        return torch.cat(parts)[:, None]

    def pad(self, vector: Tensor, slots: Sequence[Slot], first: int) -> None:
        """Write zeros behind these leaves, up to whole rows."""
        flat = vector.view(-1)
        for s in slots:
            start, end = s.start - first, s.start - first + s.rows
            if s.numel < s.rows * self.width:
                flat[start * self.width + s.numel : end * self.width] = 0

    def fits(self, leaves: Mapping[str, Tensor]) -> bool:
        """Whether each vector's leaves are of one dtype and device among ``leaves``."""
        parts = [[leaves[slot.name] for slot in group] for group in self.groups]
        return all(len(set(map(kind, part))) == 1 for part in parts for kind in _KIND)

    def join(self, leaves: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Vectors with copies of the leaves; what pads a leaf to whole rows is zero."""
        return tuple(torch.cat(rows) for rows in self._rows(leaves))

    def _rows(self, leaves: Mapping[str, Tensor]) -> list[list[Tensor]]:
        """What each vector consists of, in memory order: the full rows of a leaf, and the rest of it, padded."""
        rows: list[list[Tensor]] = []
        for group in self.groups:
            rows.append([])
            for s in group:
                leaf = leaves[s.name] if _is_sorted(s.order) else leaves[s.name].permute(s.order)
                flat, full = leaf.reshape(-1), s.numel - s.numel % self.width
                if full:
                    rows[-1].append(flat[:full].view(-1, self.width))
                if lacking := s.rows * self.width - s.numel:
                    rows[-1].append(torch.nn.functional.pad(flat[full:], (0, lacking)).view(-1, self.width))
        return rows

    def gathered(self, leaves: Mapping[str, Tensor]) -> "Arena":
        """An arena of this layout with copies of ``leaves``: tensors of the slots' shapes, or one number for each."""
        if all(leaves[s.name].shape == s.shape for s in self.slots):
            return Arena(self.join(leaves), self)
        numbers = [torch.stack([leaves[s.name].reshape(()) for s in group]) for group in self.groups]
        return Arena(numbers, self, per_leaf=True)

    def numbers(self, vectors: Sequence[Tensor]) -> dict[str, Tensor]:
        """One number per leaf, from vectors with an entry for each leaf of their group."""
        found = {}
        for vector, group in zip(vectors, self.groups, strict=True):
            found.update({s.name: number for s, number in zip(group, vector.unbind(), strict=True)})
        return {name: found[name] for name in self.names}


_KIND = operator.attrgetter("dtype"), operator.attrgetter("device")


def _filled(slot: Slot, width: int) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """For each row of a leaf, how many elements the leaf has there."""
    return np.clip(slot.numel - width * np.arange(slot.rows), 0, width)


def _strides(slot: Slot) -> tuple[int, ...]:
    step, strides = 1, [0] * len(slot.shape)
    for d in reversed(slot.order):
        strides[d], step = step, step * max(slot.shape[d], 1)
    return tuple(strides)


def _is_sorted(order: tuple[int, ...]) -> bool:
    return order == tuple(range(len(order)))


Family = tuple[tuple[str, tuple[int, ...]], ...]


def family(flat: Mapping[str, Tensor]) -> Family:
    """What flat dicts that can share a layout have in common: names and shapes."""
    return tuple([(name, leaf.shape) for name, leaf in flat.items()])


def layouts_of(families: Mapping[Family, Sequence[Mapping[str, Tensor]]]) -> dict[Family, Layout]:
    """A layout for each family.

    If all leaves of a family have a counterpart in a larger one (the moments of some of the parameters), they lie in
    the same order, in vectors that hold no other leaves: the part of an arena is an arena.
    """
    layouts: dict[Family, Layout] = {}
    for whole, parts in wholes(tuple(families)).items():
        wishes: list[tuple[str, ...]] = []
        widest = max(WIDTHS)
        while True:
            layout = layout_of(families[whole], [families[part] for part in parts], wishes, widest)
            layouts[whole] = layout
            for part in parts:
                _, layouts[part] = cast(Any, layout.apart([name for name, _ in part]))
            new = set().union(*(layouts[family].wishes for family in (whole, *parts))) - set(wishes)
            narrower = min(layouts[family].widest for family in (whole, *parts))
            if not new and narrower >= widest:
                break
            wishes, widest = wishes + sorted(new), min(widest, narrower)
    return layouts


@functools.lru_cache
def wholes(families: tuple[Family, ...]) -> dict[Family, list[Family]]:
    """The families all of whose leaves no other one has, each with those whose leaves it has all."""
    found: dict[Family, list[Family]] = {}
    sets = {family: set(family) for family in families}
    for family in sorted(families, key=len, reverse=True):
        whole = next((other for other in found if sets[family] <= sets[other]), None)
        found.setdefault(whole or family, []).extend([family] if whole else [])
    return found


def layout_of(
    family: Sequence[Mapping[str, Tensor]],
    parts: Sequence[Sequence[Mapping[str, Tensor]]] = (),
    apart: Sequence[Collection[str]] = (),
    widest: int = WIDTHS[0],
) -> Layout:
    """The common layout of flat dicts with the same names and shapes, and of others that have some of these.

    There is a vector for each combination of dtypes, and of those dicts and of names ``apart`` that the leaf is one of.
    Leaves whose size has the greatest power of two as a factor come first: most blocks then lie within one leaf.
    """
    dicts = [*family, *(flat for part in parts for flat in part)]
    kinds: list[tuple[torch.dtype | bool | None, ...]] = []
    rows: list[int] = []
    slots: dict[str, Slot] = {}
    width = min(widest, _width([leaf.numel() for leaf in family[0].values()]))
    for name, leaf in sorted(family[0].items(), key=lambda item: -_power_of_two(item[1].numel())):
        kind = (*(flat[name].dtype if name in flat else None for flat in dicts), *(name in names for names in apart))
        if kind not in kinds:
            kinds.append(kind)
            rows.append(0)
        group, count = kinds.index(kind), -(-leaf.numel() // width)
        slots[name] = Slot(name, tuple(leaf.shape), _memory_order(leaf), group, rows[group], count, leaf.numel())
        rows[group] += count
    for name in {slot.group: name for name, slot in slots.items()}.values():  # the last of each group
        lacking = _whole_blocks(rows[slots[name].group], width) - rows[slots[name].group]
        slots[name] = slots[name]._replace(rows=slots[name].rows + lacking)
    return _interned(tuple(slots[name] for name in family[0]), width)


def _power_of_two(n: int) -> int:
    """The greatest that divides ``n``; 0 for 0."""
    return n & -n


def _whole_blocks(rows: int, width: int) -> int:
    """``rows`` and what is lacking to blocks of one size: the largest, unless that pads by more than a hundredth."""
    whole = -(-rows * width // BLOCK) * BLOCK // width
    if 100 * (whole - rows) <= rows:
        return whole
    while rows % block_count(rows, width):
        rows += 1
    return rows


def _width(numels: Sequence[int]) -> int:
    total = sum(numels)
    return next((w for w in WIDTHS if 100 * sum(-n % w for n in numels) <= total), WIDTHS[-1])


_interned = functools.cache(Layout)


def _memory_order(leaf: Tensor) -> tuple[int, ...]:
    strides = leaf.stride()
    order = tuple(sorted(range(leaf.ndim), key=lambda d: (-strides[d], d)))
    return order if leaf.permute(order).is_contiguous() else tuple(range(leaf.ndim))


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

    def need_whole_units(self, names: Sequence[str]) -> None:
        """Raise unless each index of the first axis of each of these leaves (a unit) fills whole rows.

        Raises:
            InseparableError: it does not. It will, with the leaves apart, in arenas that are laid out hereafter.
        """
        wide = any((s.numel // s.shape[0]) % self.layout.width for s in self.layout.slots if s.name in set(names))
        if wide:
            self.layout.narrow(WIDTHS[-1])
            self.layout.wish(names)
            raise InseparableError(f"these leaves must lie apart from the others, in narrow rows: {names}")

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
