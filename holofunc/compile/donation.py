"""Donation: the new state written into the old one's memory."""

import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from holofunc import tree
from holofunc.compile.arguments import Flat
from holofunc.tree.traced import Trace
from holofunc.typing import PyTree

__all__ = [
    "is_write",
    "keep_reads_before_writes",
    "keep_results",
    "own_memory",
    "split_result",
    "write_back",
    "written",
]


def split_result(old: PyTree, out: Any) -> tuple[PyTree, tuple[Any, ...] | None]:
    """The new state in what a function returned, and the rest: the state is alone, or first in a tuple."""
    if type(out) is not tuple or tree.structure_error("state", out, old, "the state") is None:
        return out, None
    return out[0], tuple(out[1:])


def written(trace: Trace, old: PyTree, new: PyTree, path: str = "state") -> Iterator[tuple[Tensor, Tensor]]:
    """The tensors, or vectors of tensors, of a state with those that take their place; ``old`` holds `Flat` nodes.

    Raises:
        ValueError: the new state is not of the old one's structure, shapes and dtypes.
    """
    if isinstance(old, Tensor):
        if not isinstance(new, Tensor) or new.shape != old.shape or new.dtype != old.dtype:
            raise ValueError(f"donate=True: {path} was {_kind(old)}, the new state has {_kind(new)}")
        if new is not old:
            yield old, new
    elif isinstance(old, Flat):
        names = list(new) if isinstance(new, Mapping) else _kind(new)
        if set(names) != set(old.names):
            raise ValueError(f"donate=True: {path} held {list(old.names)}, the new state has {names}")
        slots = {
            name: (slot, x)
            for g, x in zip(old.groups, old.vectors, strict=True)
            for name, slot in zip(g.names, g.layout.slots, strict=True)
        }
        for name, (slot, vector) in slots.items():
            x = new[name]
            if not isinstance(x, Tensor) or tuple(x.shape) != slot.shape or x.dtype != vector.dtype:
                was = f"{vector.dtype} of shape {slot.shape}"
                raise ValueError(f"donate=True: {path}/{name} was {was}, the new state has {_kind(x)}")
        for group, vector in zip(old.groups, old.vectors, strict=True):
            value, _ = trace.vector_of(new, group)
            if value is not vector:
                yield vector, value
    elif old is None or not tree.is_node(old):
        if old != new:
            raise ValueError(f"donate=True: {path} was {old!r}, which is no tensor and cannot become {new!r}")
    else:
        olds, news = tree.children(old), tree.children(new) if new is not None and tree.is_node(new) else {}
        if olds.keys() != news.keys():
            raise ValueError(f"donate=True: {path} held {list(olds)}, the new state has {list(news) or _kind(new)}")
        for name, value in olds.items():
            yield from written(trace, value, news[name], f"{path}/{name}")


def _kind(x: Any) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


# --- reads before writes -------------------------------------------------------------------------------------------

torch.library.define("holofunc::copied", "(Tensor x) -> Tensor")
"""``clone`` that Inductor does not look into: it drops clones of what is written to later, and fuses with the write
what reads other elements than the one being written (torch 2.11 to 2.15).
"""


@torch.library.impl("holofunc::copied", "CompositeExplicitAutograd")
def _copied(x: Tensor) -> Tensor:
    return x.clone()


@torch.library.register_fake("holofunc::copied")
def _copied_shape(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def write_back(pairs: list[tuple[Tensor, Tensor]], old: list[Tensor], results: list[Tensor]) -> list[Tensor]:
    """Write what takes the place of tensors of the old state, in a graph. Returns ``results`` as they were before."""
    values = own_memory([after for _, after in pairs], old)
    results = own_memory(results, old)
    for (before, _), value in zip(pairs, values, strict=True):
        before.copy_(value)
    return results


def own_memory(values: list[Any], old: list[Tensor]) -> list[Any]:
    """``values``, copied where they share memory with tensors of the old state."""
    memory = {x.untyped_storage()._cdata for x in old}
    shares = [isinstance(x, Tensor) and x.untyped_storage()._cdata in memory for x in values]
    return [torch.ops.holofunc.copied(x) if shared else x for x, shared in zip(values, shares, strict=True)]


def is_write(node: fx.Node) -> bool:
    return node.target is torch.ops.aten.copy_.default


def keep_reads_before_writes(graph: fx.Graph) -> None:
    """Have what reads inputs that are written to later computed before the writes.

    Inductor sees to that except where it fuses the reading with a write to another element, and where it takes a value
    that an operation leaves as it is for the input itself.
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
    """Have results own their memory that may be the inputs that are ``written``, or views of them."""
    output, sources = next(node for node in graph.nodes if node.op == "output"), _sources(graph)
    for value in output.all_input_nodes:
        if sources[value] in written:
            output.replace_input_with(value, _copied_after(graph, value))


def _copied_after(graph: fx.Graph, node: fx.Node) -> fx.Node:
    last = node
    while last.op == "placeholder" and last.next.op == "placeholder":
        last = last.next
    with graph.inserting_after(last):
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
    """What each value may be the same as, or a view of, to Inductor, which drops what changes nothing.

    None for constants, which it computes beforehand.
    """
    found: dict[fx.Node, fx.Node | None] = {}
    for node in graph.nodes:
        source: Any = node
        if node.op != "placeholder" and all(found[x] is None for x in node.all_input_nodes):
            source = None
        elif node.target in _COPIES or node.target is operator.getitem or getattr(node.target, "is_view", False):
            source = found[node.args[0]]
        elif node.target in _NEUTRAL:
            operands = node.args[:2]
            computed = [found[x] for x in operands if isinstance(x, fx.Node) and found[x] is not None]
            neutral = all(x == _NEUTRAL[node.target] for x in operands if not isinstance(x, fx.Node))
            source = computed[0] if neutral and len(computed) == 1 else node
        found[node] = source
    return found


def _is_pointwise(node: fx.Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) or node.target in _COPIES


def _shape(node: fx.Node) -> Any:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else None
