"""Graphs that select by a condition, as one graph for each of its outcomes.

What happens every few updates only (a synchronization of weights, the update at the end of a window of gradients) is
written as ``torch.where(now, new, old)``, which computes both, and moves both through memory. On a CPU the condition, a
number made of counters, can be looked at before. Then what is not selected is not computed, and what stays as it is, is
neither read nor written.
"""

import functools
from typing import Any

import torch
from torch import fx

from holofunc.compile.graphs import args_of, between, is_write, output_of, shape_of, value_of
from holofunc.compile.operations import leafwise_of
from holofunc.compile.writes import changes_nothing, copied_after

__all__ = ["condition_of", "selected"]

aten = torch.ops.aten

RANDOM = torch.Tag.nondeterministic_seeded

ENOUGH = 2**20
"""Elements of the state that stay as they are for one of the outcomes: fewer are in a cache anyway."""


def condition_of(graph: fx.GraphModule) -> fx.Node | None:
    """The condition by which most of what the graph writes to may stay as it is, if that is worth a second graph."""
    conditions = {_condition(node): None for node in graph.graph.nodes if _selects(node)}
    kept = {c: max(_kept(graph, c, outcome) for outcome in (False, True)) for c in conditions if _is_number(c)}
    most = max(kept, key=lambda c: kept[c], default=None)
    by_leaf = any(leafwise_of(node) for node in graph.graph.nodes)
    return most if most is not None and kept[most] >= (1 if by_leaf else ENOUGH) else None


def selected(graph: fx.GraphModule, condition: fx.Node, outcome: bool) -> fx.GraphModule:
    """The graph for one outcome of the condition."""
    part, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph.graph.nodes:
        chosen = _chosen(node, condition, outcome)
        copies[node] = part.node_copy(node, copies.__getitem__) if chosen is node else copies[chosen]
    result = fx.GraphModule(graph, part)
    _return_each_apart(result)
    part.eliminate_dead_code()
    return result


def _return_each_apart(graph: fx.GraphModule) -> None:
    """Have no result be what another one is, or what the graph takes."""
    end, own = output_of(graph), list[Any]()
    for value in args_of(end)[0]:
        shared = isinstance(value, fx.Node) and (value.op == "placeholder" or value in own)
        own.append(copied_after(graph, value) if shared else value)
    end.args = (own,)


def _selects(node: fx.Node) -> bool:
    """Whether, by a single condition, one of two values is the result as it is."""
    if node.target is not aten.where.self or not shape_of(node) or shape_of(args_of(node)[0]):
        return False
    result, both = value_of(node), map(value_of, args_of(node)[1:])
    return all((x.shape, x.dtype) == (result.shape, result.dtype) for x in both)


def _condition(where: fx.Node) -> fx.Node:
    node = args_of(where)[0]
    while node.target is aten.as_strided.default:  # `tree.hoist`
        node = args_of(node)[0]
    return node


def _is_number(condition: fx.Node) -> bool:
    """Whether a condition is a number that depends on numbers only, some of them given, and on no chance."""
    above = between((), [condition])
    return any(node.op == "placeholder" for node in above) and not any(
        getattr(value_of(node), "ndim", 1) or is_write(node) or RANDOM in getattr(node.target, "tags", ())
        for node in above
    )


def _chosen(node: fx.Node, condition: fx.Node, outcome: bool) -> fx.Node:
    while _selects(node) and _condition(node) is condition:
        node = args_of(node)[1 if outcome else 2]
    return node


def _kept(graph: fx.GraphModule, condition: fx.Node, outcome: bool) -> int:
    """How many elements of the state stay as they are."""
    chosen = functools.partial(_chosen, condition=condition, outcome=outcome)
    kept = [n for n in graph.graph.nodes if is_write(n) and changes_nothing(n, chosen) and not changes_nothing(n)]
    return sum(value_of(args_of(write)[0]).numel() for write in kept)
