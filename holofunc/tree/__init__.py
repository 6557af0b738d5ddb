"""Pytrees of tensors: map, paths, selection, norms, stacking.

A tree is any nesting of dicts, lists, tuples and NamedTuples with tensors as leaves; ``None`` is a node without
leaves. A leaf is named by its path, the keys and fields joined with ``/``: ``opt_state/adam/mu/layer1.0.weight``.

In functions compiled by `holofunc.jit`, `elementwise` and the reductions run once for all tensors of a state instead of
once per tensor, with the same result.
"""

from holofunc.tree.maps import (
    cast,
    clone,
    combine,
    either,
    elementwise,
    hoist,
    is_known,
    map,
    map_shapes,
    partition,
    size,
    stack,
    unstack,
    where,
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
from holofunc.tree.reductions import (
    all_finite,
    global_norm,
    leaf_norm,
    leaf_sum,
    leaf_values,
    safe_sqrt,
    total,
    upcast,
)
from holofunc.tree.states import (
    get,
    get_all_with_path,
    map_params,
    set,
)
from holofunc.tree.summaries import Summary, SummaryRow, summary

__all__ = [
    "StructureError",
    "Summary",
    "SummaryRow",
    "all_finite",
    "cast",
    "children",
    "clone",
    "combine",
    "either",
    "elementwise",
    "get",
    "get_all_with_path",
    "global_norm",
    "hoist",
    "is_known",
    "is_node",
    "leaf_norm",
    "leaf_sum",
    "leaf_values",
    "leaves",
    "leaves_with_path",
    "map",
    "map_params",
    "map_shapes",
    "matches",
    "partition",
    "paths",
    "rebuild",
    "safe_sqrt",
    "select",
    "set",
    "size",
    "stack",
    "structure_error",
    "summary",
    "total",
    "unstack",
    "upcast",
    "where",
    "with_children",
    "zeros_like",
]
