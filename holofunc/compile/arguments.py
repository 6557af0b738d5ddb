"""Arguments and results of compiled functions: trees as lists of tensors, the rest as a hashable structure."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor

from holofunc.tree.flat import Group
from holofunc.typing import PyTree

__all__ = ["Flat", "flatten", "rebuild"]


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


def flatten(node: PyTree, tensors: list[Tensor]) -> Any:
    """Append the tensors in ``node`` to ``tensors`` and return the rest of it, hashable."""
    if isinstance(node, Tensor):
        tensors.append(node)
        return Tensor
    if isinstance(node, Flat):
        tensors.extend(node.vectors)
        tensors.extend(node.leaves)
        return _FlatSpec(node.names, node.groups, len(node.leaves))
    if isinstance(node, dict):
        return (type(node), tuple(node), tuple([flatten(x, tensors) for x in node.values()]))
    if isinstance(node, (tuple, list)):
        return (type(node), None, tuple([flatten(x, tensors) for x in node]))
    return (None, type(node), node)


def rebuild(spec: Any, tensors: Iterator[Tensor], flat: Callable[[Flat], PyTree] = lambda found: found) -> PyTree:
    """The tree of which `flatten` made ``spec``, with other tensors; ``flat`` makes a dict of each `Flat`."""
    if spec is Tensor:
        return next(tensors)
    if isinstance(spec, _FlatSpec):
        vectors = tuple([next(tensors) for _ in spec.groups])
        return flat(Flat(spec.names, spec.groups, vectors, tuple([next(tensors) for _ in range(spec.leaves)])))
    kind, names, children = spec
    if kind is None:
        return children
    parts = [rebuild(child, tensors, flat) for child in children]
    if names is not None:
        return dict(zip(names, parts, strict=True)) if kind is dict else kind(zip(names, parts, strict=True))
    return kind(*parts) if hasattr(kind, "_fields") else kind(parts)
