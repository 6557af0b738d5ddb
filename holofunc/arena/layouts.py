"""How leaves lie in vectors: rows, blocks, the leaves' places, and layouts that dicts of the same leaves share."""

import functools
import itertools
import operator
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "BLOCK",
    "WIDTHS",
    "Layout",
    "Slot",
    "block_count",
    "family",
    "layout_of",
    "layouts_of",
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

    def unit_sums(self, group: int, by_row: Tensor, counts: Sequence[int]) -> Tensor:
        """The sum over each unit of a vector (`Arena.need_whole_units`), from a number for each row.

        The leaves have ``counts`` units, in the order in which they lie.
        """
        runs = self._runs(group, counts)
        parts = by_row.split([count * rows for count, rows in runs])
        return torch.cat([x.view(run).sum(1) for x, run in zip(parts, runs[:-1], strict=False)])

    def unit_column(self, group: int, values: Tensor, counts: Sequence[int]) -> Tensor:
        """A number for each unit as a column, of shape (rows, 1); zero for rows that pad the vector."""
        *runs, (_, padding) = self._runs(group, counts)
        parts = zip(values.split([count for count, _ in runs]), runs, strict=True)
        columns = [x[:, None].expand(run).reshape(-1) for x, run in parts]
        return torch.cat([*columns, values.new_zeros(padding)])[:, None]

    def _runs(self, group: int, counts: Sequence[int]) -> list[tuple[int, int]]:
        """How many units of how many rows follow each other; at the end, one of the rows that pad the vector."""
        rows = [-(-slot.numel // self.width) // count for slot, count in zip(self.groups[group], counts, strict=True)]
        alike = itertools.groupby(zip(counts, rows, strict=True), key=operator.itemgetter(1))
        runs = [(sum(count for count, _ in units), rows) for rows, units in alike]
        return [*runs, (1, self.rows[group] - sum(count * rows for count, rows in runs))]

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
"""Names and shapes."""


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
