"""Maps over trees, reductions, stacking, and the same for arenas."""

import builtins
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optree
import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from holofunc import arena
from holofunc.arena import Arena
from holofunc.tree.nodes import (
    StructureError,
    children,
    is_node,
    leaves,
    leaves_with_path,
    paths,
    rebuild,
    structure_error,
    with_children,
)
from holofunc.typing import PyTree

__all__ = [
    "all_finite",
    "cast",
    "either",
    "elementwise",
    "global_norm",
    "hoist",
    "is_known",
    "lay_out",
    "leaf_norm",
    "leaf_sum",
    "leaf_values",
    "map",
    "map_flat",
    "map_shapes",
    "pack",
    "parted",
    "safe_sqrt",
    "size",
    "stack",
    "together",
    "total",
    "unpack",
    "unstack",
    "where",
    "wide",
    "zeros_like",
]

# --- leaf by leaf --------------------------------------------------------------------------------------------------


def map(fn: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """Apply ``fn`` to each leaf of ``tree`` (and to the leaves of ``rest`` in the same places).

    ``fn`` must be pure: eager and compiled code visit dict keys in different orders.

    Raises:
        StructureError: trees of different structures.

    Example:
        >>> import torch
        >>> from holofunc import tree
        >>> tree.map(lambda a, b: a + b, {"w": torch.ones(2)}, {"w": torch.ones(2)})
        {'w': tensor([2., 2.])}
    """
    trees = [unpack(t) for t in (tree, *rest)]
    if torch.compiler.is_compiling():
        return optree.tree_map(fn, *trees)
    try:
        return optree.tree_map(fn, *trees)
    except ValueError as error:
        for other in trees[1:]:
            if structure_error("trees", trees[0], other, "each other"):
                raise StructureError(trees[0], other) from error
        raise


def map_shapes(fn: Callable[[torch.Size], Any], tree: PyTree) -> PyTree:
    """``fn`` of the shape of each leaf. Arenas need not be cut for it.

    Example:
        >>> import torch
        >>> from holofunc import tree
        >>> tree.map_shapes(len, {"w": torch.ones(2, 3), "b": torch.ones(3)})
        {'w': 2, 'b': 1}
    """
    if isinstance(tree, Arena):
        return {slot.name: fn(torch.Size(slot.shape)) for slot in tree.layout.slots}
    if tree is None or not is_node(tree):
        return None if tree is None else fn(tree.shape)
    return with_children(tree, [map_shapes(fn, child) for child in children(tree).values()])


def size(tree: PyTree) -> int:
    """The number of elements in all leaves."""
    return sum(leaf.numel() for leaf in leaves(tree))


def cast(tree: PyTree, dtype: torch.dtype | None) -> PyTree:
    """Floating leaves in ``dtype`` (None: as they are); other leaves untouched."""
    if dtype is None:
        return tree
    return map(lambda x: x.to(dtype) if x.is_floating_point() else x, tree)


def stack(trees: Sequence[PyTree]) -> PyTree:
    """Trees of one structure as one tree whose leaves have a leading axis of ``len(trees)``.

    Example:
        >>> import torch
        >>> from holofunc import tree
        >>> tree.stack([{"w": torch.zeros(3)}, {"w": torch.ones(3)}])["w"].shape
        torch.Size([2, 3])
    """
    if not trees:
        raise ValueError("trees must hold at least one tree, got none")
    return map(lambda *xs: torch.stack(xs), *trees)


def unstack(tree: PyTree) -> list[PyTree]:
    """The inverse of `stack`: one tree per index of the leaves' leading axis."""
    count = leaves(tree)[0].shape[0]
    return [map(lambda x, i=i: x[i], tree) for i in range(count)]


# --- rules for all elements alike ---------------------------------------------------------------------------------


def elementwise(fn: Callable[..., Tensor], tree: PyTree, *rest: PyTree) -> PyTree:
    """`map` for a ``fn`` that treats each element on its own, whatever tensor the element belongs to.

    The permission to forget the cut into tensors is what lets this run on a whole arena at once. Trees of one number
    per leaf (`leaf_sum`, `leaf_norm`, `leaf_values`) broadcast over their leaf.

    Example:
        >>> import torch
        >>> from holofunc import tree
        >>> tree.elementwise(lambda p, g: p - 0.5 * g, {"w": torch.ones(2)}, {"w": torch.ones(2)})
        {'w': tensor([0.5000, 0.5000])}
    """
    layout = next((t.layout for t in (tree, *rest) if isinstance(t, Arena)), None)
    if layout is None or not all(isinstance(t, dict) and _names(t) == set(layout.names) for t in (tree, *rest)):
        return map(fn, tree, *rest)
    packed = [t if isinstance(t, Arena) and t.layout is layout else arena.gathered(t, layout) for t in (tree, *rest)]
    per_leaf = all(p.per_leaf for p in packed)
    vectors = [p.columns() if p.per_leaf and not per_leaf else p.vectors for p in packed]
    return Arena([fn(*group) for group in zip(*vectors, strict=True)], layout, per_leaf)


def _names(flat: Mapping[str, Tensor]) -> set[str]:
    return set(flat.layout.names if isinstance(flat, Arena) else flat)


def hoist(value: Any) -> Any:
    """A 0-d tensor that `elementwise` rules use, computed once: fused code would redo it for every element."""
    if isinstance(value, Tensor) and torch.compiler.is_compiling():
        return torch.as_strided(value, (), ())  # the compiler keeps what has strides in memory of its own
    return value


def leaf_sum(tree: PyTree) -> PyTree:
    """The sum of each leaf's elements: a tree of 0-d tensors (accumulated in fp32 for half precision).

    Example:
        >>> import torch
        >>> from holofunc import tree
        >>> tree.leaf_sum({"w": torch.ones(3, 2)})
        {'w': tensor(6.)}
    """
    if isinstance(tree, Arena):
        return tree.leaf_sums(_accumulator(tree.vectors[0]))
    return map(lambda x: x.sum(dtype=_accumulator(x)), tree)


def leaf_norm(tree: PyTree) -> PyTree:
    """The Euclidean norm of each leaf: a tree of 0-d tensors, with gradient zero at zero.

    Example:
        >>> import torch
        >>> from holofunc import tree
        >>> tree.leaf_norm({"w": torch.tensor([3.0, 4.0])})
        {'w': tensor(5.)}
    """
    return elementwise(safe_sqrt, leaf_sum(elementwise(lambda x: wide(x).square(), tree)))


def leaf_values(values: PyTree, like: PyTree) -> PyTree:
    """A Python number for each leaf of ``like``, as `elementwise` takes it: 0-d tensors, fp32 for half precision."""
    if not isinstance(like, Arena):
        return map(lambda x, v: torch.tensor(v, dtype=_accumulator(x), device=x.device), like, values)
    numbers = [[values[slot.name] for slot in group] for group in like.layout.groups]
    pairs = zip(numbers, like.vectors, strict=True)
    vectors = [torch.tensor(n, dtype=_accumulator(v), device=v.device) for n, v in pairs]
    return Arena(vectors, like.layout, per_leaf=True)


def total(tree: PyTree) -> Tensor:
    """The sum of all elements of ``tree``, a 0-d tensor (accumulated in fp32 for half precision; 0 without leaves).

    Example:
        >>> import torch
        >>> from holofunc import tree
        >>> tree.total({"a": torch.ones(3), "b": torch.tensor(4.0)})
        tensor(7.)
    """
    return _sum([_reduced(torch.sum, wide(x)) for x in _blocks(tree)])


def global_norm(tree: PyTree) -> Tensor:
    """The Euclidean norm of all elements of ``tree`` together, a 0-d tensor (0 for a tree without leaves).

    Example:
        >>> import torch
        >>> from holofunc import tree
        >>> tree.global_norm({"a": torch.tensor([3.0]), "b": torch.tensor(4.0)})
        tensor(5.)
    """
    return safe_sqrt(_sum([_reduced(torch.sum, wide(x).square()) for x in _blocks(tree)]))


def _sum(parts: list[Tensor]) -> Tensor:
    return torch.stack([p.to(parts[0]) for p in parts]).sum() if parts else torch.zeros(())


def all_finite(tree: PyTree) -> Tensor:
    """Whether no floating leaf holds a NaN or an infinity: a 0-d bool tensor."""
    checks = [_reduced(torch.all, torch.isfinite(x)) for x in _blocks(tree) if x.is_floating_point()]
    return torch.stack([c.to(checks[0].device) for c in checks]).all() if checks else torch.ones((), dtype=torch.bool)


def _blocks(tree: PyTree) -> list[Tensor]:
    """Tensors that together hold each element of ``tree`` once (and zeros): vectors of arenas, leaves otherwise."""
    if isinstance(tree, Arena) and not tree.per_leaf:
        return [tree.without_padding(g) for g in range(len(tree.vectors))]
    if not is_node(tree):
        return [tree]
    return [] if tree is None else [block for child in children(tree).values() for block in _blocks(child)]


def _reduced(reduce: Callable[..., Tensor], x: Tensor) -> Tensor:
    """All of ``x`` in one number, by way of its rows: these a compiled update can visit in blocks."""
    return reduce(reduce(x, 1)) if x.ndim == 2 else reduce(x)


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def wide(x: Tensor) -> Tensor:
    """``x``, in fp32 if it is of half precision: what arithmetic that must not lose digits starts with."""
    return x.to(_accumulator(x))


def safe_sqrt(x: Tensor) -> Tensor:
    """The square root, with gradient zero (not infinite) at zero."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), x)  # x, not 0: a NaN stays one


def zeros_like(tree: PyTree, dtype: torch.dtype | None = None) -> PyTree:
    """Zeros of the shapes, devices and memory formats of ``tree``, in ``dtype`` (None: each leaf's own)."""
    return elementwise(lambda x: torch.zeros_like(x, dtype=dtype), tree)


def where(condition: Tensor, a: PyTree, b: PyTree) -> PyTree:
    """``a`` if the 0-d ``condition`` holds, otherwise ``b``, leaf by leaf: a choice without a branch.

    Example:
        >>> import torch
        >>> from holofunc import tree
        >>> tree.where(torch.tensor(False), {"w": torch.ones(1)}, {"w": torch.zeros(1)})
        {'w': tensor([0.])}
    """
    if isinstance(a, Arena) or isinstance(b, Arena):
        return elementwise(lambda x, y: torch.where(condition, x, y), a, b)
    if not is_node(a):
        return torch.where(condition, a, b)
    if a is None:
        return None
    others = children(b)
    return with_children(a, [where(condition, x, others[name]) for name, x in children(a).items()])


def either(condition: Tensor, then: Callable[[], Tensor], otherwise: Callable[[], Tensor]) -> Tensor:
    """What one of the functions returns; both are called only where the 0-d ``condition`` is not known."""
    if is_known(condition):
        return then() if condition else otherwise()
    return torch.where(condition, then(), otherwise())


def is_known(x: Tensor) -> bool:
    """Whether a tensor has numbers of its own: not while a graph is traced, nor where a transformation made it."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if type(x) not in (Tensor, torch.nn.Parameter):
        return False
    return not (x.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(x))


# --- flat dicts as arenas ----------------------------------------------------------------------------------------


def unpack(tree: PyTree) -> PyTree:
    """``tree`` with every arena as the plain dict of its leaves."""
    if isinstance(tree, Arena):
        return tree.plain()
    if tree is None or not is_node(tree):
        return tree
    return with_children(tree, [unpack(v) for v in children(tree).values()])


def pack(tree: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> PyTree:
    """``tree`` as an arena of the layout of ``like`` if that is one, otherwise ``tree`` itself."""
    if not isinstance(like, Arena) or isinstance(tree, Arena):
        return tree
    return Arena(like.layout.join(tree), like.layout)


def parted(tree: PyTree, groups: Sequence[Sequence[str]]) -> list[dict[str, Tensor]]:
    """The leaves at the paths of each group, in this order, as a flat dict: of an arena an arena."""
    if isinstance(tree, Arena):
        return tree.parted(groups)
    flat = dict(leaves_with_path(tree))
    return [{path: flat[path] for path in group} for group in groups]


def together(parts: Sequence[Mapping[str, Tensor]], like: PyTree) -> PyTree:
    """The tree of the structure of ``like`` of which ``parts`` are the parts."""
    found = arena.together(parts, like.layout) if isinstance(like, Arena) else None
    if found is not None:
        return found
    flat = {path: leaf for part in parts for path, leaf in part.items()}
    return pack(rebuild(like, [flat[path] for path in paths(like)]), like)


def map_flat(fn: Callable[[dict[str, Tensor]], Any], node: PyTree) -> PyTree:
    """``node`` with ``fn`` applied to each plain dict of plain tensors in it."""
    if node is None or not is_node(node):
        return node
    if type(node) is dict and node and {Tensor, FakeTensor}.issuperset(builtins.map(type, node.values())):
        return fn(node)
    return with_children(node, [map_flat(fn, v) for v in children(node).values()])


def lay_out(state: PyTree, anew: bool = False) -> PyTree:
    """``state`` with its flat dicts moved into arenas: the same values, as views of one vector per dict and dtype.

    Dicts of the same names and shapes (parameters and their moments) get the same layout, dicts of some of them lie
    apart in it. Dicts that lie in arenas already stay where they are, unless all are to be laid out ``anew``.

    Example:
        >>> import torch
        >>> from holofunc import tree
        >>> moved = tree.lay_out({"w": torch.ones(2, 3), "b": torch.zeros(3)})
        >>> moved["b"]._base is moved["w"]._base
        True
    """
    families: dict[Any, list[dict[str, Tensor]]] = {}
    map_flat(lambda flat: families.setdefault(arena.family(flat), []).append(flat), state)
    if not anew and all(arena.parts(flat) for flats in families.values() for flat in flats):
        return state
    layouts = arena.layouts_of(families)
    return map_flat(lambda flat: arena.moved(flat, layouts[arena.family(flat)]), state)
