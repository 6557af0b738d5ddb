"""Donation: the new state written into the old one's memory."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from holofunc import tree
from holofunc.compile.arguments import Flat
from holofunc.compile.copies import copied
from holofunc.tree.traced import Trace
from holofunc.typing import PyTree

__all__ = ["own_memory", "split_result", "write_back", "written"]


def split_result(old: PyTree, out: Any) -> tuple[PyTree, tuple[Any, ...] | None]:
    """The new state in what a function returned, and the rest: the state is alone, or first in a tuple."""
    if type(out) is not tuple or tree.structure_error("state", out, old, "the state") is None:
        return out, None
    return out[0], tuple(out[1:])


def written(trace: Trace, old: PyTree, new: PyTree, path: str = "state") -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of tensors or vectors of the old state, which holds `Flat` nodes, and what replaces them.

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
            raise ValueError(f"donate=True: {path} was {old!r}, which is not a tensor and cannot become {new!r}")
    else:
        olds, news = tree.children(old), tree.children(new) if new is not None and tree.is_node(new) else {}
        if olds.keys() != news.keys():
            raise ValueError(f"donate=True: {path} held {list(olds)}, the new state has {list(news) or _kind(new)}")
        for name, value in olds.items():
            yield from written(trace, value, news[name], f"{path}/{name}")


def _kind(x: Any) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def write_back(pairs: list[tuple[Tensor, Tensor]], old: list[Tensor], results: list[Tensor]) -> list[Tensor]:
    """Write the new state over the old one, in a graph. Returns ``results``, copied where they would be overwritten."""
    values = own_memory([after for _, after in pairs], old)
    results = own_memory(results, old)
    for (before, _), value in zip(pairs, values, strict=True):
        before.copy_(value)
    return results


def own_memory(values: list[Any], old: list[Tensor]) -> list[Any]:
    """``values``, copied where they share memory with tensors of the old state."""
    memory = {x.untyped_storage()._cdata for x in old}
    shares = [isinstance(x, Tensor) and x.untyped_storage()._cdata in memory for x in values]
    return [copied(x) if shared else x for x, shared in zip(values, shares, strict=True)]
