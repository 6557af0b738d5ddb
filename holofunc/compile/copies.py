"""Copies inserted into a graph where Inductor would compute something else."""

import operator
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["copied", "is_write", "keep_reads_before_writes", "keep_results", "keep_whole_rows", "last_placeholder"]

torch.library.define("holofunc::copied", "(Tensor x) -> Tensor")


def copied(x: Tensor) -> Tensor:
    """``x.clone()``, which in a graph is an operation of its own.

    Inductor drops clones of what is overwritten later, and fuses with the write what reads other elements than the one
    being written (torch 2.11 to 2.15).
    """
    return torch.ops.holofunc.copied(x)


torch.library.impl("holofunc::copied", "CompositeExplicitAutograd", torch.clone)


@torch.library.register_fake("holofunc::copied")
def _copied_shape(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def is_write(node: fx.Node) -> bool:
    return node.target is torch.ops.aten.copy_.default


def last_placeholder(graph: fx.Graph) -> fx.Node:
    return [node for node in graph.nodes if node.op == "placeholder"][-1]


def keep_reads_before_writes(graph: fx.Graph) -> None:
    """Compute everything that reads an input before that input is overwritten.

    Inductor ensures this, except where it fuses the read with the write of another element, and where it replaces the
    result of an operation that changes nothing by the input itself.
    """
    output, sources = next(node for node in graph.nodes if node.op == "output"), _sources(graph)
    written = {node.args[0] for node in graph.nodes if is_write(node)}
    in_place, moved = set(written), set[fx.Node]()  # what reads them element by element, and views
    for node in list(graph.nodes):
        read = [x for x in node.all_input_nodes if x in in_place or x in moved]
        if is_write(node) or node is output:
            for value in read:
                if value is not node.args[0] and (value in moved or sources.get(value) in written):
                    node.replace_input_with(value, _copied_after(graph, value))
        elif not read or str(node.target).startswith("holofunc."):  # operations of their own, never fused
            continue
        elif getattr(node.target, "is_view", False):
            moved.add(node)
        elif _is_pointwise(node) and all(x in in_place and _shape(x) == _shape(node) for x in read):
            in_place.add(node)
        elif isinstance(node.meta.get("val"), Tensor):
            copy = _copied_after(graph, node)
            node.replace_all_uses_with(copy, lambda user, copy=copy: user is not copy)
        else:
            in_place.add(node)  # several results, each of which is looked at


def keep_results(graph: fx.Graph, written: set[fx.Node]) -> None:
    """Copy results that may be the overwritten inputs, or views of them."""
    output, sources = next(node for node in graph.nodes if node.op == "output"), _sources(graph)
    for value in output.all_input_nodes:
        if sources[value] in written:
            output.replace_input_with(value, _copied_after(graph, value))


def _copied_after(graph: fx.Graph, node: fx.Node) -> fx.Node:
    with graph.inserting_after(last_placeholder(graph) if node.op == "placeholder" else node):
        copy = graph.call_function(torch.ops.holofunc.copied.default, (node,))
    with node.meta["val"].fake_mode:
        copy.meta["val"] = torch.empty_like(node.meta["val"])
    return copy


_COPIES = (
    torch.ops.aten.clone.default,
    torch.ops.aten.alias.default,
    torch.ops.aten._to_copy.default,
    torch.ops.prims.convert_element_type.default,
)
_NEUTRAL = {
    torch.ops.aten.add.Tensor: 0,
    torch.ops.aten.sub.Tensor: 0,
    torch.ops.aten.mul.Tensor: 1,
    torch.ops.aten.div.Tensor: 1,
}
"""Operations, with the number for which they change nothing."""


def _sources(graph: fx.Graph) -> dict[fx.Node, fx.Node | None]:
    """For each value, what Inductor may replace it by, as it drops operations that change nothing, or its base.

    None for constants, which it folds.
    """
    found: dict[fx.Node, fx.Node | None] = {}
    for node in graph.nodes:
        source: Any = node
        if node.op != "placeholder" and all(found[x] is None for x in node.all_input_nodes):
            source = None
        elif node.target in _COPIES or _is_part(node):
            source = found[node.args[0]]
        elif node.target in _NEUTRAL:
            operands = node.args[:2]
            computed = [found[x] for x in operands if isinstance(x, fx.Node) and found[x] is not None]
            neutral = all(x == _NEUTRAL[node.target] for x in operands if not isinstance(x, fx.Node))
            source = computed[0] if neutral and len(computed) == 1 else node
        found[node] = source
    return found


def _is_part(node: fx.Node) -> bool:
    """Whether a node is a view, or one of several results."""
    return node.target is operator.getitem or getattr(node.target, "is_view", False)


def _is_pointwise(node: fx.Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) or node.target in _COPIES


def _shape(node: fx.Node) -> Any:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else None


_CUTS = (
    torch.ops.aten.slice.Tensor,
    torch.ops.aten.split.Tensor,
    torch.ops.aten.split_with_sizes.default,
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_select.default,
    torch.ops.aten.gather.default,
)


def keep_whole_rows(graph: fx.Graph) -> None:
    """Compute what is flattened and then cut before the cut.

    Where they are fused, Inductor splits the loop over the elements by the length of the flattened rows, and omits the
    elements after the last whole row: ``(x / x.sum(1, keepdim=True)).flatten()[:100]`` for rows of 60 (torch 2.11 to
    2.15, on a CPU).
    """
    fused, flattened = set[fx.Node](), set[fx.Node]()
    for node in list(graph.nodes):
        read = node.all_input_nodes
        if node.target in _CUTS and read[0] in flattened:
            node.replace_input_with(read[0], _copied_after(graph, read[0]))
        elif node.target is torch.ops.aten.expand.default or _is_pointwise(node):
            fused.add(node)
        elif not _is_part(node):
            continue  # in memory
        elif read[0] in fused:
            fused.add(node)
            if _row(node) > _row(read[0]):
                flattened.add(node)
        if any(x in flattened for x in read):
            flattened.add(node)


def _row(node: fx.Node) -> int:
    return next((n for n in reversed(_shape(node) or ()) if n != 1), 1)
