"""Nodes and paths: walking, rebuilding and selecting, and errors that say how two trees differ."""

import copy
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import optree
from torch import Tensor

from holofunc.typing import PyTree

__all__ = [
    "StructureError",
    "alike",
    "children",
    "is_node",
    "leaves",
    "leaves_with_path",
    "matches",
    "metadata",
    "paths",
    "rebuild",
    "select",
    "structure_error",
    "with_children",
]

NAMESPACE = "holofunc"
"""The `optree` namespace in which other classes can be registered as nodes."""


class StructureError(ValueError):
    """Trees have different structures; ``left`` and ``right`` are these trees."""

    def __init__(self, left: PyTree, right: PyTree) -> None:
        super().__init__(structure_error("each tree", right, left, "the first"))
        self.left, self.right = left, right


def leaves(tree: PyTree) -> list[Any]:
    """The leaves of ``tree``, with dict keys in insertion order.

    Example:
        >>> from holofunc import tree
        >>> tree.leaves({"b": 1, "a": (2, None, 3)})
        [1, 2, 3]
    """
    return [leaf for _, leaf in _walk(tree, "")]


def leaves_with_path(tree: PyTree) -> list[tuple[str, Any]]:
    """``(path, leaf)`` of each leaf; a path joins dict keys, NamedTuple fields and positions with ``/``.

    Example:
        >>> from holofunc import tree
        >>> tree.leaves_with_path({"adam": {"mu": {"layer1.0.weight": 1}}, "counts": (2, 3)})
        [('adam/mu/layer1.0.weight', 1), ('counts/0', 2), ('counts/1', 3)]
    """
    return list(_walk(tree, ""))


def paths(tree: PyTree) -> list[str]:
    """The paths of the leaves, in the order of `leaves`.

    Example:
        >>> from holofunc import tree
        >>> tree.paths({"adam": {"mu": {"w": 1}}, "counts": (2, 3)})
        ['adam/mu/w', 'counts/0', 'counts/1']
    """
    return [path for path, _ in _walk(tree, "")]


def children(node: PyTree) -> dict[str, PyTree]:
    """The children of a node by name: keys of a dict, fields of a NamedTuple, positions of a list.

    Example:
        >>> from holofunc import tree
        >>> tree.children({"w": 1, "b": (2, 3)}), tree.children((2, 3))
        ({'w': 1, 'b': (2, 3)}, {'0': 2, '1': 3})
    """
    if isinstance(node, Mapping):
        return {str(k): v for k, v in node.items()}
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return dict(zip(node._fields, node, strict=True))
    if isinstance(node, (tuple, list)):
        return {str(i): v for i, v in enumerate(node)}
    values, _, names, _ = optree.tree_flatten_one_level(node, namespace=NAMESPACE)
    return {str(k): v for k, v in zip(names, values, strict=True)}


def with_children(node: PyTree, values: Iterable[PyTree]) -> PyTree:
    """A node of the type of ``node`` with other children, in the same order.

    Example:
        >>> from holofunc import tree
        >>> tree.with_children({"w": 1, "b": 2}, [3, 4])
        {'w': 3, 'b': 4}
    """
    if isinstance(node, Mapping):
        return _mapping(node, values)
    if isinstance(node, (tuple, list)):
        return type(node)(*values) if hasattr(node, "_fields") else type(node)(values)
    _, metadata, _, made_of = optree.tree_flatten_one_level(node, namespace=NAMESPACE)
    return made_of(metadata, list(values))


def _mapping(node: Mapping[Any, PyTree], values: Iterable[PyTree]) -> PyTree:
    pairs = zip(node, values, strict=True)
    if type(node) is dict or not isinstance(node, MutableMapping):
        return dict(pairs)
    new = copy.copy(node)
    for key, value in pairs:
        new[key] = value
    return new


def metadata(node: PyTree) -> Any:
    """The hashable metadata of a node of a registered class, None for other nodes."""
    plain = node is None or isinstance(node, (Mapping, tuple, list))
    return None if plain else optree.tree_flatten_one_level(node, namespace=NAMESPACE)[1]


def is_node(x: PyTree) -> bool:
    """Whether ``x`` is a node; None is a node without children.

    Example:
        >>> import torch
        >>> from holofunc import tree
        >>> tree.is_node({}), tree.is_node(None), tree.is_node(torch.ones(2)), tree.is_node("name")
        (True, True, False, False)
    """
    if isinstance(x, Tensor):
        return False
    if x is None or isinstance(x, (dict, tuple, list, Mapping)):
        return True
    return not optree.tree_is_leaf(x, namespace=NAMESPACE)


def alike(a: PyTree, b: PyTree) -> bool:
    """Whether two nodes have the same type and names of children; all mappings count as one type."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys()
    return type(a) is type(b) and (a is None or children(a).keys() == children(b).keys())


def _walk(node: PyTree, prefix: str) -> Iterator[tuple[str, Any]]:
    if not is_node(node):
        yield prefix, node
        return
    for name, child in children(node).items() if node is not None else ():
        yield from _walk(child, f"{prefix}/{name}" if prefix else name)


def rebuild(like: PyTree, values: Iterable[Any]) -> PyTree:
    """A tree with the structure of ``like`` whose leaves are ``values``, in the order of `leaves`.

    Raises:
        ValueError: there are more or fewer values than leaves.

    Example:
        >>> from holofunc import tree
        >>> tree.rebuild({"b": 1, "a": (2, 3)}, [4, 5, 6])
        {'b': 4, 'a': (5, 6)}
    """
    left = iter(values)
    try:
        built = _rebuilt(like, left)
    except StopIteration:
        raise ValueError(f"values must be one per leaf, got fewer than {len(leaves(like))}") from None
    if next(left, left) is not left:
        raise ValueError(f"values must be one per leaf, got more than {len(leaves(like))}")
    return built


def _rebuilt(node: PyTree, values: Iterator[Any]) -> PyTree:  # a recursive closure would be a reference cycle
    if not is_node(node):
        return next(values)
    return None if node is None else with_children(node, [_rebuilt(v, values) for v in children(node).values()])


def structure_error(name: str, got: PyTree, expected: PyTree, what: str) -> str | None:
    """One sentence that says in which paths ``got`` differs from ``expected``, or None if it does not.

    All mappings count as one type; a list is not a tuple.

    Example:
        >>> from holofunc import tree
        >>> tree.structure_error("updates", {"v": 1}, {"w": 1}, "params")
        "updates must have the structure of params: missing ['w'], unexpected ['v']"
    """
    have, want = set(paths(got)), set(paths(expected))
    if have == want:
        types = _type_error(got, expected, "")
        return f"{name} must have the structure of {what}: {types}" if types else None
    missing, unexpected = shortened(want - have), shortened(have - want)
    return f"{name} must have the structure of {what}: missing {missing}, unexpected {unexpected}"


def _type_error(got: PyTree, expected: PyTree, path: str) -> str | None:
    if not is_node(expected) or expected is None:
        return None
    if not (isinstance(got, Mapping) and isinstance(expected, Mapping)) and type(got) is not type(expected):
        where = f" at {path!r}" if path else ""
        return f"expected a {type(expected).__name__}{where}, got a {type(got).__name__}"
    others = children(got)
    pairs = ((k, v) for k, v in children(expected).items() if k in others)  # an empty node may be missing
    found = (_type_error(others[k], v, f"{path}/{k}" if path else k) for k, v in pairs)
    return next((error for error in found if error), None)


def shortened(names: Iterable[str], limit: int = 8) -> str:
    """The first few names, sorted, for an error message."""
    names = sorted(names)
    return str(names[:limit])[:-1] + (f", ... {len(names) - limit} more]" if len(names) > limit else "]")


def select(tree: Mapping[str, Any], pattern: str | Sequence[str]) -> dict[str, Any]:
    """The entries of a flat dict whose names match one of the glob patterns.

    A pattern without wildcards names an entry or everything below it: ``layer1`` selects ``layer1.0.weight`` but not
    ``layer10.0.weight``.

    Raises:
        ValueError: a pattern matches nothing.

    Example:
        >>> from holofunc import tree
        >>> tree.select({"layer1.w": 1, "layer10.w": 2, "head.b": 3}, ["layer1", "*.b"])
        {'layer1.w': 1, 'head.b': 3}
    """
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    for p in patterns:
        if not any(matches(name, p) for name in tree):
            raise ValueError(f"pattern {p!r} matches none of the names {shortened(tree)}")
    return {name: leaf for name, leaf in tree.items() if any(matches(name, p) for p in patterns)}


def matches(name: str, pattern: str) -> bool:
    """Whether ``pattern``, a glob or the path of a module or subtree, matches ``name``.

    Example:
        >>> from holofunc import tree
        >>> [tree.matches("layer1.0.bias", pattern) for pattern in ("layer1", "*.bias", "layer")]
        [True, True, False]
    """
    return fnmatchcase(name, pattern) or name.startswith((pattern + ".", pattern + "/"))
