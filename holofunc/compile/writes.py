"""What a graph writes into its inputs: nothing that is there already, and nothing that has still to be read."""

import operator
from collections.abc import Callable

import torch
from torch import fx

from holofunc.compile.graphs import args_of, inputs_of, is_write, output_of, value_of

__all__ = ["changes_nothing", "copied_after", "settle"]

aten = torch.ops.aten

COPIES = (aten.clone.default, aten._to_copy.default, torch.ops.prims.convert_element_type.default)
NEUTRAL = {aten.add.Tensor: 0, aten.sub.Tensor: 0, aten.mul.Tensor: 1, aten.div.Tensor: 1}
"""Operations, with the number for which they change nothing."""


def settle(graph: fx.GraphModule) -> None:
    """Erase writes that change nothing, and have copied, before the first write, what is read after it.

    The latter are views of an input that is written to, where they are written elsewhere or returned. Inductor (torch
    2.14) makes views, too, of copies and of sums with zero, as if reading could always wait.
    """
    for write in [node for node in graph.graph.nodes if is_write(node) and changes_nothing(node)]:
        graph.graph.erase_node(write)
    writes = [node for node in graph.graph.nodes if is_write(node)]
    written = {args_of(write)[0] for write in writes}
    ends = [(write, args_of(write)[1], args_of(write)[0]) for write in writes]
    ends += [(output_of(graph), node, None) for node in output_of(graph).all_input_nodes]
    for end, value, to in ends:
        source, moved = _source(value)
        if source in written and value is not to and (moved or source is not to):
            end.replace_input_with(value, copied_after(graph, value))


def copied_after(graph: fx.GraphModule, value: fx.Node) -> fx.Node:
    """A copy of a value, made as soon as there is one."""
    last = inputs_of(graph)[-1] if value.op == "placeholder" else value
    with graph.graph.inserting_after(last), value_of(value).fake_mode:
        copy = graph.graph.call_function(torch.ops.holofunc.copied.default, (value,))
        copy.meta["val"] = torch.empty_like(value_of(value))
    return copy


def changes_nothing(write: fx.Node, chosen: Callable[[fx.Node], fx.Node] = lambda node: node) -> bool:
    """Whether a vector becomes itself, or itself plus zeros, as parameters do that are frozen; with ``chosen(node)`` in
    the place of a node.
    """
    to, value = args_of(write)[0], chosen(args_of(write)[1])
    if value is to:
        return True
    zeros = args_of(value)[1] if value.target is aten.add.Tensor and args_of(value)[0] is to else None
    zeros = chosen(zeros) if isinstance(zeros, fx.Node) else None
    return zeros is not None and zeros.target is aten.full.default and args_of(zeros)[1] == 0


def _source(node: fx.Node) -> tuple[fx.Node, bool]:
    """What a value is the same as, perhaps with its elements in other places: whether this is so."""
    moved = False
    while True:
        target = node.target
        if target is operator.getitem or getattr(target, "is_view", False):
            moved = True
        elif target not in COPIES and (target not in NEUTRAL or args_of(node)[1] != NEUTRAL[target]):
            return node, moved
        node = node.all_input_nodes[0]
