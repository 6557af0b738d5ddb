"""Arguments and results of compiled functions: trees as lists of tensors, the rest as a hashable structure."""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from holofunc.tree.flat import Group
from holofunc.tree.nodes import children, is_node, leaves_with_path, metadata, with_children
from holofunc.typing import PyTree

__all__ = ["Flat", "flatten", "rebuild", "unhashable"]


class Flat(NamedTuple):
    """A dict whose tensors lie in vectors, as it crosses the border of a graph."""

    names: tuple[str, ...]
    groups: tuple[Group, ...]
    vectors: tuple[Tensor, ...]
    leaves: tuple[Tensor, ...]
    """In the order of the names; none where the graph is to cut them out of the vectors."""


class _FlatSpec(NamedTuple):
    names: tuple[str, ...]
    groups: tuple[Group, ...]
    leaves: int


@dataclass(frozen=True)
class _Kind:
    """A node that is no plain dict, list or tuple, without its children."""

    type: type
    rest: Hashable
    empty: PyTree = field(compare=False)

    @classmethod
    def of(cls, node: PyTree) -> "_Kind":
        names = tuple(children(node))
        return cls(type(node), (names, metadata(node)), with_children(node, [None] * len(names)))


def unhashable(node: PyTree) -> str | None:
    """What to say of an argument that is neither a tensor nor hashable, if there is one."""
    for path, leaf in leaves_with_path(node):
        try:
            hash(leaf)
        except TypeError:
            return (
                f"the arguments of a compiled function must be trees of tensors and hashable values, got a "
                f"{type(leaf).__name__} at {path!r}: make a tensor of it, or a class of nodes (`holofunc.tree.map` "
                "says how)"
            )
    return None


def flatten(node: PyTree, tensors: list[Tensor]) -> Any:
    """Append the tensors in ``node`` to ``tensors`` and return the rest of it, hashable."""
    if isinstance(node, Tensor):
        tensors.append(node)
        return Tensor
    if isinstance(node, Flat):
        tensors.extend(node.vectors)
        tensors.extend(node.leaves)
        return _FlatSpec(node.names, node.groups, len(node.leaves))
    if type(node) is dict:
        return (dict, tuple(node), tuple([flatten(x, tensors) for x in node.values()]))
    if isinstance(node, (tuple, list)):
        return (type(node), None, tuple([flatten(x, tensors) for x in node]))
    if node is not None and is_node(node):
        return (_Kind.of(node), None, tuple([flatten(x, tensors) for x in children(node).values()]))
    return (None, float, node.hex()) if type(node) is float else (None, type(node), node)  # 0.0 is not -0.0


def rebuild(spec: Any, tensors: Iterator[Tensor], flat: Callable[[Flat], PyTree] = lambda found: found) -> PyTree:
    """The tree of which `flatten` made ``spec``, with other tensors; ``flat`` makes a dict of each `Flat`."""
    if spec is Tensor:
        return next(tensors)
    if isinstance(spec, _FlatSpec):
        vectors = tuple([next(tensors) for _ in spec.groups])
        return flat(Flat(spec.names, spec.groups, vectors, tuple([next(tensors) for _ in range(spec.leaves)])))
    kind, names, inner = spec
    if kind is None:
        return float.fromhex(inner) if names is float else inner
    parts = [rebuild(child, tensors, flat) for child in inner]
    if kind is dict:
        return dict(zip(names, parts, strict=True))
    if isinstance(kind, _Kind):
        return with_children(kind.empty, parts)
    return kind(*parts) if hasattr(kind, "_fields") else kind(parts)
