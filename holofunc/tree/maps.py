"""Maps over trees, stacking, and selection without branches."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from holofunc.tree import flat, traced
from holofunc.tree.nodes import (
    StructureError,
    alike,
    children,
    is_node,
    leaves,
    leaves_with_path,
    rebuild,
    with_children,
)
from holofunc.typing import PyTree

__all__ = [
    "cast",
    "clone",
    "combine",
    "either",
    "elementwise",
    "hoist",
    "is_known",
    "map",
    "map_shapes",
    "partition",
    "size",
    "stack",
    "unstack",
    "where",
    "zeros_like",
]

# --- leaf by leaf --------------------------------------------------------------------------------------------------


def map(fn: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """Apply ``fn`` to each leaf of ``tree`` (and to the leaves of ``rest`` in the same places).

    Nodes are dicts and other mappings, lists, tuples, NamedTuples, None, and classes registered with `optree` in the
    namespace ``"holofunc"`` (for instance by `optree.dataclasses.dataclass`); everything else is a leaf.

    Raises:
        StructureError: trees of different structures.

    Example:
        >>> import torch
        >>> from holofunc import tree
        >>> tree.map(lambda a, b: a + b, {"w": torch.ones(2)}, {"w": torch.ones(2)})
        {'w': tensor([2., 2.])}
    """
    return _mapped(fn, tree, rest, (tree, *rest))


def _mapped(fn: Callable[..., Any], node: PyTree, others: Sequence[PyTree], trees: Sequence[PyTree]) -> PyTree:
    if not is_node(node):
        return fn(node, *others)
    for i, other in enumerate(others):
        if not alike(node, other):
            raise StructureError(trees[0], trees[1 + i])
    if node is None:
        return None
    columns = [children(other) for other in others]
    pairs = children(node).items()
    return with_children(node, [_mapped(fn, x, [c[name] for c in columns], trees) for name, x in pairs])


def map_shapes(fn: Callable[[torch.Size], Any], tree: PyTree) -> PyTree:
    """``fn`` of the shape of each leaf.

    Example:
        >>> import torch
        >>> from holofunc import tree
        >>> tree.map_shapes(len, {"w": torch.ones(2, 3), "b": torch.ones(3)})
        {'w': 2, 'b': 1}
    """
    return map(lambda x: fn(x.shape), tree)


def size(tree: PyTree) -> int:
    """The number of elements in all leaves.

    Example:
        >>> import torch
        >>> from holofunc import tree
        >>> tree.size({"w": torch.ones(2, 3), "b": torch.ones(3)})
        9
    """
    return sum(leaf.numel() for leaf in leaves(tree))


def cast(tree: PyTree, dtype: torch.dtype | None) -> PyTree:
    """Cast floating-point leaves to ``dtype``, and leave others unchanged; None casts nothing.

    Example:
        >>> import torch
        >>> from holofunc import tree
        >>> tree.cast({"w": torch.ones(1), "step": torch.tensor(3)}, torch.bfloat16)
        {'w': tensor([1.], dtype=torch.bfloat16), 'step': tensor(3)}
    """
    if dtype is None:
        return tree
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype or None, got {dtype!r}")
    return map(lambda x: x.to(dtype) if x.is_floating_point() else x, tree)


def stack(trees: Sequence[PyTree]) -> PyTree:
    """Stack the leaves of trees of equal structure along a new leading axis of length ``len(trees)``.

    Example:
        >>> import torch
        >>> from holofunc import tree
        >>> tree.stack([{"w": torch.zeros(3)}, {"w": torch.ones(3)}])["w"].shape
        torch.Size([2, 3])
    """
    if not trees:
        raise ValueError("trees must hold at least one tree, got none")
    by_path = [dict(leaves_with_path(t)) for t in trees]
    for path, x in by_path[0].items():
        for other in (found[path] for found in by_path if path in found):
            if not isinstance(other, Tensor):
                raise TypeError(f"trees must hold tensors, got {type(other).__name__} at {path!r}")
            if other.shape != x.shape:
                raise ValueError(
                    f"trees must hold tensors of the same shapes, got {tuple(x.shape)} and {tuple(other.shape)} "
                    f"at {path!r}"
                )
    return map(lambda *xs: torch.stack(xs), *trees)


def unstack(tree: PyTree) -> list[PyTree]:
    """The inverse of `stack`: one tree per index of the leaves' leading axis.

    Raises:
        ValueError: the tree has no leaves, or their leading axes differ in length.

    Example:
        >>> import torch
        >>> from holofunc import tree
        >>> tree.unstack({"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]])})
        [{'w': tensor([1., 2.])}, {'w': tensor([3., 4.])}]
    """
    lengths = {path: x.shape[0] if x.ndim else None for path, x in leaves_with_path(tree)}
    count = next(iter(lengths.values()), None)
    if count is None or set(lengths.values()) != {count}:
        raise ValueError(f"tree must hold leaves with leading axes of equal length, got {lengths}")
    return [map(lambda x, i=i: x[i], tree) for i in range(count)]


# --- elementwise rules --------------------------------------------------------------------------------------------


def elementwise(fn: Callable[..., Tensor], tree: PyTree, *rest: PyTree) -> PyTree:
    """`map` for an elementwise ``fn``, whose result does not depend on which tensor an element belongs to.

    This is what allows `holofunc.jit` to run it once on all tensors of a state. Trees of one scalar per leaf
    (`leaf_sum`, `leaf_norm`, `leaf_values`) are broadcast over the elements of their leaf.

    Example:
        >>> import torch
        >>> from holofunc import tree
        >>> tree.elementwise(lambda p, g: p - 0.5 * g, {"w": torch.ones(2)}, {"w": torch.ones(2)})
        {'w': tensor([0.5000, 0.5000])}
    """
    vectors = traced.aligned(tree, *rest)
    return map(fn, tree, *rest) if vectors is None else vectors.map(fn)


def hoist(value: Any) -> Any:
    """Compute a 0-d tensor once instead of in every element of the fused kernel of an `elementwise` rule.

    Example:
        >>> import torch
        >>> from holofunc import tree
        >>> rate = torch.tensor(0.5)
        >>> tree.elementwise(lambda p: p - tree.hoist(rate.square()), {"w": torch.ones(2)})
        {'w': tensor([0.7500, 0.7500])}
    """
    if isinstance(value, Tensor) and traced.current_trace() is not None:
        return torch.as_strided(value, (), ())  # the compiler materializes tensors with explicit strides
    return value


def zeros_like(tree: PyTree, dtype: torch.dtype | None = None) -> PyTree:
    """Zeros with the shapes, devices and memory formats of ``tree``, in ``dtype`` (None keeps the dtype of each leaf).

    Example:
        >>> import torch
        >>> from holofunc import tree
        >>> tree.zeros_like({"w": torch.ones(2)}, torch.float64)
        {'w': tensor([0., 0.], dtype=torch.float64)}
    """
    return elementwise(lambda x: torch.zeros_like(x, dtype=dtype), tree)


def clone(tree: PyTree) -> PyTree:
    """A copy that shares no memory with ``tree``, and whose leaves share none with each other.

    The copy has the memory layout of flat vectors, so `holofunc.jit` with ``donate=True`` can use it in place.

    Example:
        >>> import torch
        >>> from holofunc import tree
        >>> params = {"w": torch.ones(2), "b": torch.zeros(1)}
        >>> copy = tree.clone(params)
        >>> params["w"].zero_(), copy["w"]
        (tensor([0., 0.]), tensor([1., 1.]))
    """
    in_graph = torch.compiler.is_compiling() or traced.current_trace() is not None
    if in_graph or not all(flat.is_plain(x) for x in leaves(tree)):
        return map(torch.clone, tree)
    return flat.lay_out(tree, copy=True)


def where(condition: Tensor, a: PyTree, b: PyTree) -> PyTree:
    """``a`` if the 0-d ``condition`` is True, otherwise ``b``, leaf by leaf and without a branch.

    Raises:
        TypeError: ``condition`` is not a 0-d bool tensor. StructureError: trees of different structures.

    Example:
        >>> import torch
        >>> from holofunc import tree
        >>> tree.where(torch.tensor(False), {"w": torch.ones(1)}, {"w": torch.zeros(1)})
        {'w': tensor([0.])}
    """
    if not isinstance(condition, Tensor) or condition.ndim or condition.dtype != torch.bool:
        raise TypeError(f"condition must be a 0-d bool tensor, got {condition!r}")
    return _where(condition, a, b)


def _where(condition: Tensor, a: PyTree, b: PyTree) -> PyTree:
    vectors = traced.aligned(a, b)
    if vectors is not None:
        return vectors.map(lambda x, y: torch.where(condition, x, y))
    if not is_node(a):
        return torch.where(condition, a, b)
    if not alike(a, b):
        raise StructureError(a, b)
    if a is None:
        return None
    others = children(b)
    return with_children(a, [_where(condition, x, others[name]) for name, x in children(a).items()])


def either(condition: Tensor, then: Callable[[], Tensor], otherwise: Callable[[], Tensor]) -> Tensor:
    """``then()`` if the 0-d ``condition`` is True, otherwise ``otherwise()``.

    Where the condition has no value (while tracing, or under a transformation), both are computed and one is selected.

    Example:
        >>> import torch
        >>> from holofunc import tree
        >>> tree.either(torch.tensor(True), lambda: torch.ones(2), lambda: torch.zeros(2))
        tensor([1., 1.])
    """
    if is_known(condition):
        return then() if condition else otherwise()
    return torch.where(condition, then(), otherwise())


def is_known(x: Tensor) -> bool:
    """Whether the value of a tensor can be read: not while tracing, and not under a transformation.

    Example:
        >>> import torch
        >>> from holofunc import tree
        >>> known = []
        >>> _ = torch.vmap(lambda x: known.append(tree.is_known(x)) or x)(torch.ones(2))
        >>> tree.is_known(torch.ones(2)), known
        (True, [False])
    """
    if torch.compiler.is_compiling() or traced.current_trace() is not None:
        return False
    return type(x) in (Tensor, torch.nn.Parameter) and not x.is_meta and flat.is_plain(x)


def partition(tree: PyTree, groups: Sequence[Sequence[str]]) -> list[dict[str, Tensor]]:
    """Split a tree into one flat dict per group of paths; `combine` is the inverse.

    Example:
        >>> from holofunc import tree
        >>> tree.partition({"a": {"w": 1}, "b": (2, 3)}, [["a/w", "b/1"], ["b/0"]])
        [{'a/w': 1, 'b/1': 3}, {'b/0': 2}]
    """
    by_path = dict(leaves_with_path(tree))
    return [{path: by_path[path] for path in group} for group in groups]


def combine(parts: Sequence[Mapping[str, Tensor]], like: PyTree) -> PyTree:
    """Merge the flat dicts of `partition` into a tree with the structure of ``like``.

    Example:
        >>> from holofunc import tree
        >>> tree.combine([{"a/w": 4, "b/1": 5}, {"b/0": 6}], like={"a": {"w": 1}, "b": (2, 3)})
        {'a': {'w': 4}, 'b': (6, 5)}
    """
    by_path = {path: leaf for part in parts for path, leaf in part.items()}
    return rebuild(like, [by_path[path] for path, _ in leaves_with_path(like)])
