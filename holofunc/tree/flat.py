"""Flat vectors: the leaves of a dict as parts of one vector per dtype.

A rule that treats all elements alike then runs once on a vector instead of once per tensor, which is what makes a
compiled update quick to compile and as fast as memory. A vector is a matrix of rows of `WIDTH` elements; a leaf begins
on a row of its own, so that one number per leaf becomes a column that broadcasts over the leaf's rows.

How leaves lie follows from the state alone (`layouts_of`). Outside of graphs a dict is an ordinary one, whose tensors
happen to share the memory of vectors (`lay_out`, `found_in`). While a function is traced, dicts are ordinary ones, too;
which of their tensors lie in which vector is known to the `Trace` (`aligned`). Private to `holofunc.tree` and
`holofunc.compile`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from holofunc.tree.nodes import children, is_node, with_children
from holofunc.typing import PyTree

__all__ = [
    "WIDTH",
    "Family",
    "Group",
    "Layout",
    "Slot",
    "cut",
    "dicts_in",
    "family",
    "fits",
    "found_in",
    "is_plain",
    "join",
    "join_in_graph",
    "lay_out",
    "layouts_of",
    "map_dicts",
    "places",
    "places_of",
    "puts",
    "vector_at",
    "views",
]

WIDTH = 256
"""Elements in a row."""


class Slot(NamedTuple):
    """Where a leaf is in a vector: ``rows`` rows from row ``start``, axes in memory order ``order`` (slowest first)."""

    shape: tuple[int, ...]
    order: tuple[int, ...]
    start: int
    rows: int
    numel: int

    @property
    def strides(self) -> tuple[int, ...]:
        step, strides = 1, [0] * len(self.shape)
        for axis in reversed(self.order):
            strides[axis], step = step, step * max(self.shape[axis], 1)
        return tuple(strides)


class Layout(NamedTuple):
    """The slots of all leaves of one vector of ``rows`` rows."""

    slots: tuple[Slot, ...]
    rows: int


class Group(NamedTuple):
    """The leaves of a dict that share a vector: their names, in the order of the layout's slots."""

    names: tuple[str, ...]
    layout: Layout


# --- layouts: a function of the dicts of a state -------------------------------------------------------------------

Family = tuple[tuple[str, tuple[int, ...]], ...]
"""Names and shapes of a dict."""


def family(flat: Mapping[str, Tensor]) -> Family:
    return tuple([(name, tuple(leaf.shape)) for name, leaf in flat.items()])


def dicts_in(node: PyTree) -> Iterator[dict[str, Tensor]]:
    """The dicts in a tree that can be stored in vectors: flat dicts of at least two tensors."""
    if _is_flat(node):
        yield node
    elif node is not None and is_node(node):
        for child in children(node).values():
            yield from dicts_in(child)


def map_dicts(
    fn: Callable[[dict[str, Tensor]], Any], node: PyTree, other: Callable[[Any], Any] = lambda leaf: leaf
) -> PyTree:
    """``node`` with ``fn`` applied to each of its `dicts_in`, and ``other`` to the leaves beside them."""
    if _is_flat(node):
        return fn(node)
    if node is None:
        return None
    if not is_node(node):
        return other(node)
    return with_children(node, [map_dicts(fn, child, other) for child in children(node).values()])


def _is_flat(node: PyTree) -> bool:
    return (
        type(node) is dict
        and len(node) > 1
        and not torch.is_inference_mode_enabled()  # outside of which what is made there cannot be written
        and all(isinstance(x, Tensor) and not x.requires_grad and x.layout is torch.strided for x in node.values())
    )


def layouts_of(dicts: Sequence[Mapping[str, Tensor]], *, shared: bool = False) -> dict[Family, tuple[Group, ...]]:
    """The layout of the dicts of a state, by family.

    Dicts of one family (parameters, their moments) have the same layout. Two leaves share a vector if they have the
    same dtype and device in each of these dicts, and if every dict with a subset of the names (moments of parameters
    that are not frozen, say) has both of them or neither; so each subset has its own vectors. With ``shared``, dicts
    without another dict of their family or a subset of it are left out.
    """
    families: dict[Family, list[Mapping[str, Tensor]]] = {}
    for flat in dicts:
        families.setdefault(family(flat), []).append(flat)
    wholes: dict[Family, list[Family]] = {}
    for some in sorted(families, key=len, reverse=True):
        whole = next((other for other in wholes if set(some) < set(other)), None)
        wholes.setdefault(whole or some, []).extend([some] if whole else [])
    found: dict[Family, tuple[Group, ...]] = {}
    for whole, parts in wholes.items():
        alike = [flat for some in (whole, *parts) for flat in families[some]]
        if shared and len(alike) == 1:
            continue
        vectors: dict[Any, list[str]] = {}
        for name in alike[0]:
            kind = tuple((x.dtype, x.device) if (x := flat.get(name)) is not None else None for flat in alike)
            vectors.setdefault(kind, []).append(name)
        groups = [Group(tuple(names), _layout([alike[0][name] for name in names])) for names in vectors.values()]
        for some in (whole, *parts):
            names = {name for name, _ in some}
            found[some] = tuple(group for group in groups if names.issuperset(group.names))
    return found


def _layout(leaves: Sequence[Tensor]) -> Layout:
    slots, start = [], 0
    for leaf in leaves:
        rows = max(-(-leaf.numel() // WIDTH), 1)  # an empty leaf has a row too, which identifies it
        slots.append(Slot(tuple(leaf.shape), _memory_order(leaf), start, rows, leaf.numel()))
        start += rows
    return Layout(tuple(slots), start)


def _memory_order(leaf: Tensor) -> tuple[int, ...]:
    strides = leaf.stride()
    order = tuple(sorted(range(leaf.ndim), key=lambda axis: (-strides[axis], axis)))
    return order if leaf.permute(order).is_contiguous() else tuple(range(leaf.ndim))


# --- between leaves and vectors ------------------------------------------------------------------------------------


def join(leaves: Sequence[Tensor], layout: Layout) -> Tensor:
    """A vector of copies of the leaves, each padded with zeros to the end of its last row."""
    pieces = []
    for leaf, slot in zip(leaves, layout.slots, strict=True):
        pieces.append(leaf.permute(slot.order).reshape(-1))
        if lacking := slot.rows * WIDTH - slot.numel:
            pieces.append(leaf.new_zeros(lacking))
    return torch.cat(pieces).view(layout.rows, WIDTH)


def cut(vector: Tensor, layout: Layout) -> list[Tensor]:
    """The leaves of a vector, as views."""
    sizes = [size for s in layout.slots for size in (s.numel, s.rows * WIDTH - s.numel)]
    leaves = vector.reshape(-1).split(sizes)[::2]
    return [_shaped(leaf, slot) for leaf, slot in zip(leaves, layout.slots, strict=True)]


def _shaped(leaf: Tensor, slot: Slot) -> Tensor:
    in_memory = leaf.view([slot.shape[axis] for axis in slot.order])
    return in_memory if slot.order == tuple(sorted(slot.order)) else in_memory.permute(_inverse(slot.order))


def _inverse(order: tuple[int, ...]) -> list[int]:
    return [order.index(axis) for axis in range(len(order))]


# In a graph, the leaves of a vector are outputs of one operation instead of hundreds of views. Most rules never use
# single leaves of their results, and then the operation is removed as dead code.
torch.library.define("holofunc::cut", "(Tensor vector, int[] places) -> Tensor[]")


def places(layout: Layout) -> list[int]:
    return [i for s in layout.slots for i in (len(s.shape), *s.shape, *s.strides, s.start * WIDTH)]


def places_of(encoded: Sequence[int]) -> list[tuple[list[int], list[int], int]]:
    """Shape, strides and first element of each leaf, from the argument of the operation ``cut``."""
    found, at = [], 0
    while at < len(encoded):
        ndim = encoded[at]
        shape, strides = encoded[at + 1 : at + 1 + ndim], encoded[at + 1 + ndim : at + 1 + 2 * ndim]
        found.append((list(shape), list(strides), encoded[at + 1 + 2 * ndim]))
        at += 2 + 2 * ndim
    return found


def join_in_graph(leaves: Sequence[Tensor], layout: Layout) -> Tensor:
    """`join` as one operation of a graph, except under a transformation, which needs its derivative."""
    if (
        all(map(is_plain, leaves))
        and len({leaf.dtype for leaf in leaves}) == 1
        and not any(x.requires_grad for x in leaves)
    ):
        return torch.ops.holofunc.join(leaves, places(layout), layout.rows)
    return join(leaves, layout)


def is_plain(x: Tensor) -> bool:
    """Whether a tensor is no wrapper of a `torch.func` transformation."""
    return torch.func.debug_unwrap(x) is x


torch.library.define("holofunc::join", "(Tensor[] leaves, int[] places, int rows) -> Tensor")


@torch.library.impl("holofunc::join", "CompositeExplicitAutograd")
def _join(leaves: list[Tensor], places: list[int], rows: int) -> Tensor:
    pieces = []
    for leaf, (shape, strides, start), end in puts(leaves, places, rows):
        order = sorted(range(len(shape)), key=lambda axis: (-strides[axis], axis))
        pieces.append(leaf.permute(order).reshape(-1) if len(order) > 1 else leaf.reshape(-1))
        if lacking := end - start - leaf.numel():
            pieces.append(leaf.new_zeros(lacking))
    return torch.cat(pieces).view(rows, WIDTH)


def puts(leaves: Sequence[Any], places: list[int], rows: int) -> list[tuple[Any, tuple[Any, ...], int]]:
    """Each leaf of a ``join`` with its place and the offset at which its padding ends."""
    found = places_of(places)
    ends = [start for _, _, start in found[1:]] + [rows * WIDTH]
    return list(zip(leaves, found, ends, strict=True))


# Copies one leaf of a ``join``, so that the leaf can be freed before the next one is computed.
torch.library.define(
    "holofunc::put", "(Tensor(a!) vector, Tensor leaf, int[] shape, int[] strides, int start, int end) -> ()"
)


def _put(vector: Tensor, leaf: Tensor, shape: list[int], strides: list[int], start: int, end: int) -> None:
    vector.as_strided(shape, strides, start).copy_(leaf)
    vector.view(-1)[start + leaf.numel() : end].zero_()


torch.library.impl("holofunc::put", "CompositeExplicitAutograd", _put)


@torch.library.register_fake("holofunc::put")
def _put_shape(vector: Tensor, leaf: Tensor, shape: list[int], strides: list[int], start: int, end: int) -> None:
    return None


@torch.library.register_fake("holofunc::join")
def _join_shape(leaves: list[Tensor], places: list[int], rows: int) -> Tensor:
    return leaves[0].new_empty(rows, WIDTH)


@torch.library.impl("holofunc::cut", "CompositeExplicitAutograd")
def _cut(vector: Tensor, places: list[int]) -> list[Tensor]:
    return [vector.as_strided(*place).clone() for place in places_of(places)]


@torch.library.register_fake("holofunc::cut")
def _cut_shapes(vector: Tensor, places: list[int]) -> list[Tensor]:
    return [vector.new_empty_strided(shape, strides) for shape, strides, _ in places_of(places)]


# --- outside of graphs ---------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    vector: Tensor
    layout: Layout
    at: int
    """Which of the layout's slots it is."""


_places: Any = WeakTensorKeyDictionary()
"""The places of the leaves of vectors, valid while their addresses are those in the vector."""


def views(vector: Tensor, group: Group) -> dict[str, Tensor]:
    """The leaves of a vector, which `found_in` recognizes.

    On a CPU each has its own storage, which is a part of the vector's, so that `pickle` and `torch.save` write the leaf
    alone.
    """
    apart = type(vector) is Tensor and vector.device.type == "cpu" and not vector.requires_grad
    leaves = [_part(vector, slot) for slot in group.layout.slots] if apart else cut(vector, group.layout)
    for at, leaf in enumerate(leaves):
        _places[leaf] = _Place(vector, group.layout, at)
    return dict(zip(group.names, leaves, strict=True))


def _part(vector: Tensor, slot: Slot) -> Tensor:
    start, size = vector.storage_offset() + slot.start * WIDTH, vector.element_size()
    storage = vector.untyped_storage()[start * size : (start + slot.numel) * size]
    return vector.new_empty(0).set_(storage, 0, slot.shape, slot.strides)


def vector_at(leaves: Sequence[Tensor], layout: Layout) -> Tensor | None:
    """The vector that stores ``leaves``, of the shapes and strides of ``layout``, as it says; None if none does."""
    place = _places.get(leaves[0])
    if place is None or place.layout != layout or len(leaves) != len(layout.slots):
        return None
    start, row = place.vector.data_ptr(), WIDTH * place.vector.element_size()
    for leaf, slot in zip(leaves, layout.slots, strict=True):
        if slot.numel and leaf.data_ptr() != start + slot.start * row:  # an empty leaf has no address
            return None
    return place.vector


def found_in(flat: Mapping[str, Tensor]) -> list[tuple[Group, Tensor]] | None:
    """The vectors that the tensors of a dict lie in, if these hold nothing else; otherwise None."""
    known = {name: _places.get(leaf) for name, leaf in flat.items()}
    members: dict[int, list[str]] = {}
    for name, place in known.items():
        if place is None:
            return None
        members.setdefault(id(place.vector), []).append(name)
    found = []
    for names in members.values():
        names.sort(key=lambda name: known[name].at)
        layout, leaves = known[names[0]].layout, [flat[name] for name in names]
        vector = vector_at(leaves, layout)
        if vector is None or any(
            (x.shape, x.stride()) != (slot.shape, slot.strides) for x, slot in zip(leaves, layout.slots, strict=True)
        ):
            return None
        found.append((Group(tuple(names), layout), vector))
    return found


def fits(flat: Mapping[str, Tensor], group: Group) -> bool:
    """Whether the leaves of a group are of one dtype and device."""
    return len({(flat[name].dtype, flat[name].device) for name in group.names}) == 1


def lay_out(state: PyTree, *, copy: bool = False) -> PyTree:
    """``state`` with its dicts of tensors in vectors, as `layouts_of` says: those that do not lie so yet are copied,
    with ``copy`` all tensors.
    """
    layouts = layouts_of(list(dicts_in(state)))

    def moved(flat: dict[str, Tensor]) -> dict[str, Tensor]:
        groups, found = layouts[family(flat)], None if copy else found_in(flat)
        if found is not None and {group for group, _ in found} == set(groups):
            return flat
        with torch.no_grad():
            leaves = {}
            for group in groups:
                leaves.update(views(join([flat[name] for name in group.names], group.layout), group))
        return {name: leaves[name] for name in flat}

    return map_dicts(moved, state, torch.clone) if copy else map_dicts(moved, state)
