"""Parts of updates that treat every leaf by its shape: `alone`, and how such a part runs on some leaves at a time."""

import hashlib
import itertools
import types
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from holofunc import random, tree
from holofunc.arena import Arena, Layout, Slot, family
from holofunc.arena.layouts import Family
from holofunc.compile.operations import Meta, operation, register, undisturbed
from holofunc.compile.packing import Packed, arenas_in, flatten, rebuild, strip
from holofunc.compile.tracing import gradient_being_traced, update_being_traced
from holofunc.typing import PyTree

__all__ = ["Leafwise", "alone"]


def alone(fn: Callable[..., PyTree], *args: PyTree, by_leaf: bool = False) -> PyTree:
    """``fn(*args)``, which in a jitted update becomes one operation that runs as it is.

    For what treats every leaf by its shape: compiled with the rest, each would get code of its own, in minutes.
    Flat dicts in the result that have the names and shapes of an arena among ``args`` become arenas. In the gradient of
    a jitted training step, too, where nothing is differentiated: for small things that a network computes many times.

    Args:
        fn: a pure function of trees of tensors and numbers to such trees. Tensors must not be captured: while it is
            being traced, none has values. A function of a module finds its graphs again on disk, a closure or a method
            does not.
        by_leaf: whether ``fn`` treats the leaves of the flat dict ``args[0]`` one by one: what the result has by the
            name of a leaf, or by a name ``"leaf/..."``, depends on what ``args`` have by such names, on single tensors
            and on numbers. Then an update may call it with a few leaves at a time, and needs memory for these only.
    """
    traced = update_being_traced() or gradient_being_traced()
    if not traced and next(arenas_in(args), None) is None:  # nothing to take apart or to put together
        return fn(*args)
    by_leaf = by_leaf and traced and isinstance(args[0], Arena) and _is_separable(args, args[0].layout.names)
    if by_leaf and len(vectors := args[0].layout.groups) > 1:
        owned = [[slot.name for slot in slots] for slots in vectors]
        return _united([alone(fn, *_owned(args, names), by_leaf=True) for names in owned], args)
    tensors: list[Tensor] = []
    spec = flatten(tuple([_as_given(arg) for arg in args]), tensors)
    layouts = {layout.family: layout for layout in arenas_in(args)}

    def run(*inputs: Tensor) -> tuple[Any, list[Tensor]]:
        out = fn(*rebuild(spec, iter(inputs), wrap=lambda vectors, layout: layout.cut(vectors)))
        results: list[Tensor] = []
        return flatten(tree.map_flat(lambda flat: _joined(flat, layouts), out), results), results

    if not tensors or not traced or any(x.requires_grad for x in tensors):
        structure, results = run(*tensors)
        return rebuild(structure, iter(results))
    metas = [Meta.of(x) for x in tensors]
    devices = {meta.device for meta in metas}

    def trial() -> tuple[Any, list[Meta]]:
        if len(devices) > 1:
            with FakeTensorMode(), torch.no_grad():
                structure, results = run(*(meta.empty() for meta in metas))
                return structure, [Meta.of(x) for x in results]
        nowhere = torch.device("meta")  # knows no devices, and is ten times as fast
        with nowhere, torch.no_grad():
            structure, results = run(*(meta._replace(device=nowhere).empty() for meta in metas))
            return structure, [Meta.of(x)._replace(device=metas[0].device) for x in results]

    structure, outputs = undisturbed(trial)
    drawing = random.drawing()

    def compute(*inputs: Tensor) -> list[Tensor]:
        with random.drawing_by(drawing):
            return run(*inputs)[1]

    name = uuid.uuid4().hex if layouts else _name(fn, spec, metas)
    leafwise = Leafwise.of(fn, spec, structure, args[0].layout) if by_leaf else None
    register(name, compute, outputs, leafwise)
    return rebuild(structure, iter(operation(name, tensors)))


def _owned(node: PyTree, names: Collection[str]) -> PyTree:
    """What of an argument belongs to leaves of the names."""
    if _is_flat(node):
        keys = [key for key in node if _owner(key, names)]
        part = node.part(keys) if isinstance(node, Arena) else None
        return {key: node[key] for key in keys} if part is None else part
    if node is None or not tree.is_node(node):
        return node
    return tree.with_children(node, [_owned(child, names) for child in tree.children(node).values()])


def _united(parts: Sequence[PyTree], args: PyTree) -> PyTree:
    """The result for all leaves, from those for some; flat dicts lie, and are ordered, as those of ``args`` are."""
    first = parts[0]
    if _is_flat(first):
        kind = dict(itertools.chain.from_iterable(map(_family, parts)))
        like = next((flat for flat in _flats(args) if dict(_family(flat)) == kind), None)
        return tree.together(parts, dict(zip(kind, kind, strict=True)) if like is None else like)
    if first is None or not tree.is_node(first):
        return first
    children = zip(*(tree.children(part).values() for part in parts), strict=True)
    return tree.with_children(first, [_united(child, args) for child in children])


def _family(flat: Mapping[str, Tensor]) -> Family:
    return flat.layout.family if isinstance(flat, Arena) else family(flat)


def _flats(node: PyTree) -> Iterator[Mapping[str, Tensor]]:
    """The flat dicts of tensors."""
    if isinstance(node, Arena) or (_is_flat(node) and all(isinstance(x, Tensor) for x in node.values())):
        yield node
    elif node is not None and tree.is_node(node):
        for child in tree.children(node).values():
            yield from _flats(child)


def _name(fn: Callable[..., PyTree], spec: Any, metas: Sequence[Meta]) -> str:
    """One by which a graph that is kept on disk finds this program in another process, and no other program."""
    plain = isinstance(fn, types.FunctionType) and not fn.__closure__ and "<" not in fn.__qualname__
    if not plain or _NAMED.setdefault((fn.__module__, fn.__qualname__), fn) is not fn:
        return uuid.uuid4().hex
    return hashlib.sha256(repr((fn.__module__, fn.__qualname__, spec, metas)).encode()).hexdigest()[:32]


_NAMED: dict[tuple[str, str], Callable[..., PyTree]] = {}
"""The functions that gave programs their names: one defined anew, in a notebook, must not take the old one's place."""


def _as_given(arg: PyTree) -> PyTree:
    """Gathered arenas as the leaves they were gathered from, other arenas as `Packed`."""
    if isinstance(arg, Arena) and arg.gathered_from is not None:
        return dict(zip(arg.layout.names, arg.gathered_from, strict=True))
    return strip(arg)


def _joined(flat: Mapping[str, Tensor], layouts: Mapping[Any, Layout]) -> PyTree:
    layout = layouts.get(family(flat))
    return Packed(layout.join(flat), layout) if layout is not None and layout.fits(flat) else flat


# --- some leaves at a time -----------------------------------------------------------------------------------------


class _At(NamedTuple):
    """A tensor, by its position among all of a program's."""

    position: int


class _Vector(NamedTuple):
    """The vector of the arena whose leaves are treated one by one, by its position."""

    position: int


class _Others(NamedTuple):
    """Other arenas, by the positions of their vectors."""

    vectors: tuple[_At, ...]
    layout: Layout


class _ByLeaf(NamedTuple):
    """Tensors and numbers by the name of the leaf that they belong to, then by their own."""

    leaves: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, flat: Mapping[str, Any], names: Collection[str]) -> "_ByLeaf":
        found: dict[str, dict[str, Any]] = {}
        for key, x in flat.items():
            found.setdefault(str(_owner(key, names)), {})[key] = x
        return cls(found)


Rows = Mapping[int, Tensor]
"""Of vectors, by their position, the rows of some leaves."""


class Leafwise:
    """A program of `alone` that treats the leaves of an arena one by one."""

    def __init__(self, fn: Callable[..., PyTree], args: PyTree, result: PyTree, layout: Layout) -> None:
        self._fn, self._args, self._result, self.layout = fn, args, result, layout
        self._names = frozenset(layout.names)
        self.shape = (layout.rows[0], layout.width)
        self.inputs, self.outputs = ([v.position for v in _vectors(node)] for node in (args, result))
        """The positions of the arena's vectors among what the program takes, and what it returns."""
        self._owners = [dict(_owners(node, self._names)) for node in (args, result)]

    @classmethod
    def of(cls, fn: Callable[..., PyTree], spec: Any, structure: Any, layout: Layout) -> "Leafwise | None":
        """That of an arena of one vector; None if results have other names than those of leaves."""

        def wrap(vectors: tuple[_At, ...], found: Layout) -> PyTree:
            return _Vector(*vectors[0]) if found is layout else _Others(vectors, found)

        args, result = (rebuild(s, cast(Any, map(_At, itertools.count())), wrap) for s in (spec, structure))
        return cls(fn, args, result, layout) if _is_separable(result, layout.names) else None

    def is_successor(self, output: int, input: int) -> bool:
        """Whether a result that is no vector of the arena belongs to the same leaves as what is taken there does."""
        taken, returned = self._owners
        return output in returned and returned[output] == taken.get(input)

    def begin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> Callable[[Sequence[Slot], int, Rows, Rows], None]:
        """``run(slots, first, taken, given)``, which computes the leaves in ``slots`` into ``outputs``.

        ``taken`` and ``given`` hold the arena's vectors from row ``first`` on; whatever else it takes and returns lies
        in ``inputs`` and ``outputs``, where a result may take the place of what it succeeds.
        """
        args, result = (_located(n, t, self._names) for n, t in ((self._args, inputs), (self._result, outputs)))

        def run(slots: Sequence[Slot], first: int, taken: Rows, given: Rows) -> None:
            names = [slot.name for slot in slots]
            mine, place = (
                {i: self.layout.part(vector, slots, first) for i, vector in rows.items()} for rows in (taken, given)
            )
            mine_of_args = [_some(arg, names, mine) for arg in args]
            pairs = list(_pairs(self._fn(*mine_of_args), _some(result, names, place)))
            written = {where.untyped_storage()._cdata for _, where in pairs}
            for x, where in [(x.clone() if x.untyped_storage()._cdata in written else x, where) for x, where in pairs]:
                where.copy_(x)

        return run


def _vectors(node: Any) -> Iterator[_Vector]:
    if isinstance(node, _Vector):
        yield node
    elif tree.is_node(node) and node is not None:
        for child in tree.children(node).values():
            yield from _vectors(child)


def _owners(node: Any, names: Collection[str]) -> Iterator[tuple[int, Any]]:
    """Tensors by their position, with the leaf, or the vector of leaves, that they belong to."""
    if isinstance(node, _Others):
        yield from ((vector.position, (node.layout, group)) for group, vector in enumerate(node.vectors))
    elif _is_flat(node):
        yield from ((x.position, _owner(key, names)) for key, x in node.items() if isinstance(x, _At))
    elif tree.is_node(node) and node is not None:
        for child in tree.children(node).values():
            yield from _owners(child, names)


def _owner(key: str, names: Collection[str]) -> str | None:
    """The leaf that a name belongs to."""
    return next((name for name in (key, key.rpartition("/")[0]) if name in names), None)


def _is_flat(node: Any) -> bool:
    """Whether this is a dict of tensors and numbers, by the names of leaves and what belongs to them."""
    return isinstance(node, Arena) or (
        isinstance(node, dict) and all(isinstance(x, _At) or not tree.is_node(x) for x in node.values())
    )


def _is_separable(node: Any, names: Collection[str]) -> bool:
    if isinstance(node, _Others):
        return all(_owner(key, names) for key in node.layout.names)
    if _is_flat(node):
        return all(_owner(key, names) for key in node)
    if node is None or not tree.is_node(node) or isinstance(node, (_At, _Vector)):
        return True
    return all(_is_separable(child, names) for child in tree.children(node).values())


def _located(node: Any, tensors: Sequence[Any], names: Collection[str]) -> Any:
    """``node`` with tensors in the place of positions, but for those of the arena itself."""
    if isinstance(node, _Vector):
        return node
    if isinstance(node, _At):
        return tensors[node.position]
    if isinstance(node, _Others):
        return _ByLeaf.of(node.layout.cut([tensors[vector.position] for vector in node.vectors]), names)
    if _is_flat(node):
        return _ByLeaf.of({key: tensors[x.position] if isinstance(x, _At) else x for key, x in node.items()}, names)
    if node is None or not tree.is_node(node):
        return node
    return tree.with_children(node, [_located(child, tensors, names) for child in tree.children(node).values()])


def _some(node: Any, names: Sequence[str], cut: Mapping[int, Mapping[str, Tensor]]) -> Any:
    """What of an argument belongs to leaves of the names."""
    if isinstance(node, _Vector):
        return cut.get(node.position)
    if isinstance(node, _ByLeaf):
        return {key: x for name in names for key, x in node.leaves.get(name, {}).items()}
    if node is None or not tree.is_node(node):
        return node
    return tree.with_children(node, [_some(child, names, cut) for child in tree.children(node).values()])


def _pairs(result: Any, place: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """What a program returned, with where it is to be."""
    if isinstance(place, Tensor):
        yield result, place
    elif place is not None and tree.is_node(place):
        for name, x in tree.children(place).items():
            yield from _pairs(tree.children(result)[name], x)
