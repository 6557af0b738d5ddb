"""Graphs of operations on tensors: what is asked of their nodes, and parts of them."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

__all__ = [
    "SIZED",
    "args_of",
    "between",
    "extract",
    "inputs_of",
    "is_gather",
    "is_write",
    "output_of",
    "rows_of",
    "shape_of",
    "starts",
    "value_of",
]

aten = torch.ops.aten

SIZED = (aten.full.default, aten.expand.default, aten.view.default)
"""Operations whose arguments hold the shape of the result."""


def value_of(node: fx.Node) -> Any:
    """What is known of a node's value: a tensor without elements."""
    return node.meta.get("val")


def args_of(node: fx.Node) -> Any:
    return node.args


def shape_of(node: fx.Node) -> tuple[int, ...]:
    value = value_of(node)
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def rows_of(node: fx.Node) -> int | None:
    return next(iter(shape_of(node)), None)


def is_gather(node: fx.Node) -> bool:
    return node.target is torch.ops.holofunc.gather.default


def is_write(node: fx.Node) -> bool:
    return node.target is aten.copy_.default


def inputs_of(graph: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if node.op == "placeholder"]


def output_of(graph: fx.GraphModule) -> fx.Node:
    return next(node for node in graph.graph.nodes if node.op == "output")


def between(inputs: Collection[fx.Node], outputs: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes that ``outputs`` are computed with, back to ``inputs``, which are among them."""
    found: set[fx.Node] = set()
    waiting = list(outputs)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += [] if node in inputs else node.all_input_nodes
    return found


def starts(known: Sequence[fx.Node], outputs: Iterable[fx.Node]) -> list[fx.Node]:
    """Those of the values known that computing ``outputs`` starts from."""
    found = between(set(known), outputs)
    return [node for node in known if node in found]


def extract(
    graph: fx.GraphModule,
    inputs: Sequence[fx.Node],
    outputs: Sequence[Any],
    writes: Sequence[fx.Node] = (),
    sizes: Mapping[int, int] = MappingProxyType({}),
) -> fx.GraphModule:
    """The part of a graph that computes ``outputs`` from ``inputs`` and makes ``writes``; ``sizes`` change."""
    part, copies = fx.Graph(), {}
    for node in inputs:
        copies[node] = part.placeholder(node.name)
    needed = between(set(inputs), [*(n for n in outputs if isinstance(n, fx.Node)), *writes])
    for node in graph.graph.nodes:
        if node in needed and node not in copies:
            copies[node] = part.node_copy(node, copies.__getitem__)
            if node.target in SIZED:
                new = [[sizes.get(n, n) for n in arg] if isinstance(arg, list) else arg for arg in copies[node].args]
                copies[node].args = tuple(new)
    part.output([copies[node] if isinstance(node, fx.Node) else node for node in outputs])
    return fx.GraphModule(graph, part)
