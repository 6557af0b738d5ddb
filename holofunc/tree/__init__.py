"""Pytrees of tensors: map, paths, selection, norms, stacking, and arenas.

A tree is any nesting of dicts, lists, tuples and NamedTuples with tensors as leaves; ``None`` is a node without
leaves. Leaves are named by their path, keys and fields joined with ``/``: ``opt_state/adam/mu/layer1.0.weight``.

Inside functions compiled by `holofunc.jit`, the flat dicts of a state are arenas (`holofunc.arena`): `elementwise` and
the reductions here then run once on a vector instead of once per tensor. The result is the same.
"""

from holofunc.arena import Arena
from holofunc.tree.maps import (
    all_finite,
    cast,
    elementwise,
    global_norm,
    hoist,
    lay_out,
    leaf_norm,
    leaf_sum,
    leaf_values,
    map,
    map_flat,
    map_shapes,
    pack,
    safe_sqrt,
    size,
    stack,
    total,
    unpack,
    unstack,
    where,
    wide,
    zeros_like,
)
from holofunc.tree.nodes import (
    StructureError,
    children,
    is_node,
    leaves,
    leaves_with_path,
    matches,
    paths,
    rebuild,
    select,
    structure_error,
    with_children,
)
from holofunc.tree.states import (
    get,
    get_all_with_path,
    map_params,
    set,
)

__all__ = [
    "Arena",
    "StructureError",
    "all_finite",
    "cast",
    "children",
    "elementwise",
    "get",
    "get_all_with_path",
    "global_norm",
    "hoist",
    "is_node",
    "lay_out",
    "leaf_norm",
    "leaf_sum",
    "leaf_values",
    "leaves",
    "leaves_with_path",
    "map",
    "map_flat",
    "map_params",
    "map_shapes",
    "matches",
    "pack",
    "paths",
    "rebuild",
    "safe_sqrt",
    "select",
    "set",
    "size",
    "stack",
    "structure_error",
    "total",
    "unpack",
    "unstack",
    "where",
    "wide",
    "with_children",
    "zeros_like",
]
