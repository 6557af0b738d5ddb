"""Trees as graphs take them: arenas as vectors, all tensors in one list, the rest as a key."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor

from holofunc import arena, tree
from holofunc.arena import Arena, Layout
from holofunc.compile.gathering import gather
from holofunc.typing import PyTree

__all__ = [
    "Loose",
    "Packed",
    "adopt",
    "arenas_in",
    "flatten",
    "packed_alike",
    "packed_like",
    "rebuild",
    "strip",
    "unpacked",
]


class Packed(NamedTuple):
    """An arena as it crosses the border of a graph."""

    vectors: tuple[Tensor, ...]
    layout: Layout


class Loose(NamedTuple):
    """Leaves that lie apart, as an arena's: they are gathered inside the graph."""

    leaves: tuple[Tensor, ...]
    layout: Layout


def packed_alike(node: PyTree) -> PyTree:
    """``node`` with dicts of the same names and shapes (parameters, moments, gradients), or of some of them, as `Loose`
    leaves of one layout. Those that lie in arenas already are no exception: the graph is the same for them.
    """
    families: dict[Any, list[dict[str, Tensor]]] = {}
    tree.map_flat(lambda flat: families.setdefault(arena.family(flat), []).append(flat), node)
    related = [
        family
        for whole, parts in arena.wholes(tuple(families)).items()
        if parts or len(families[whole]) > 1
        for family in (whole, *parts)
    ]
    layouts = arena.layouts_of({family: families[family] for family in related})
    return tree.map_flat(lambda flat: _loose(flat, layouts.get(arena.family(flat))), node)


def packed_like(packed: PyTree, node: PyTree) -> PyTree:
    """``node`` with the dicts (gradients, say) that have a counterpart in a packed state brought into its layout."""
    layouts = {layout.family: layout for layout in arenas_in(packed)}
    return tree.map_flat(lambda flat: _loose(flat, layouts.get(arena.family(flat))), node)


def _loose(flat: dict[str, Tensor], layout: Layout | None) -> PyTree:
    if layout is None or not layout.fits(flat) or any(x.requires_grad for x in flat.values()):
        return flat
    return Loose(tuple(flat.values()), layout)


def arenas_in(node: PyTree) -> Iterator[Layout]:
    """The layouts of the arenas, packed or not."""
    if isinstance(node, (Packed, Arena)):
        yield node.layout
    elif node is not None and tree.is_node(node):
        for child in tree.children(node).values():
            yield from arenas_in(child)


def adopt(state: PyTree, anew: bool = False) -> tuple[PyTree, PyTree]:
    """A donated state and its packed form; what does not lie in arenas yet, or all of it anew, is moved there."""
    if anew:
        return adopt(tree.lay_out(state, anew=True))
    apart: list[Any] = []

    def pack(flat: dict[str, Tensor]) -> PyTree:
        parts = arena.parts(flat)
        return Packed(*parts) if parts else apart.append(flat)

    packed = tree.map_flat(pack, state)
    return adopt(tree.lay_out(state)) if apart else (state, packed)


def unpacked(node: PyTree) -> PyTree:
    if isinstance(node, Packed):
        return arena.views(node.vectors, node.layout)
    if node is None or not tree.is_node(node):
        return node
    return tree.with_children(node, [unpacked(v) for v in tree.children(node).values()])


# --- trees as lists of tensors -----------------------------------------------------------------------------------


def flatten(node: Any, tensors: list[Tensor]) -> Any:
    """Append the tensors in ``node`` to ``tensors`` and return the rest of it, hashable."""
    if isinstance(node, Tensor):
        tensors.append(node)
        return Tensor
    if isinstance(node, Packed):
        tensors.extend(node.vectors)
        return (Packed, node.layout, len(node.vectors))
    if isinstance(node, Loose):
        tensors.extend(node.leaves)
        return (Loose, node.layout, len(node.leaves))
    if isinstance(node, dict):
        return (dict, tuple(node), tuple([flatten(v, tensors) for v in node.values()]))
    if isinstance(node, (tuple, list)):
        return (type(node), None, tuple([flatten(v, tensors) for v in node]))
    return (None, type(node), node)


def rebuild(spec: Any, tensors: Iterator[Tensor], wrap: Callable[..., Any] = Arena) -> Any:
    if spec is Tensor:
        return next(tensors)
    kind, names, children = spec
    if kind is None:
        return children
    if kind is Packed:
        return wrap(tuple([next(tensors) for _ in range(children)]), names)
    if kind is Loose:
        return gather([next(tensors) for _ in range(children)], names)
    parts = [rebuild(child, tensors, wrap) for child in children]
    if kind is dict:
        return dict(zip(names, parts, strict=True))
    return kind(*parts) if hasattr(kind, "_fields") else kind(parts)


def strip(node: Any) -> Any:
    """``node`` with its arenas as `Packed`."""
    if isinstance(node, Arena):
        return dict(node) if node.per_leaf else Packed(node.vectors, node.layout)
    if node is None or not tree.is_node(node):
        return node
    return tree.with_children(node, [strip(v) for v in tree.children(node).values()])
