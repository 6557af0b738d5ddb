"""The contents of a tree as a table."""

import html
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from holofunc.tree.nodes import children, is_node, leaves
from holofunc.typing import PyTree

__all__ = ["Printed", "Summary", "SummaryRow", "summary"]


class Printed(ABC):
    """A table: text when printed, HTML in notebooks. Columns after the first ``words`` are numbers."""

    name: str
    head: ClassVar[tuple[str, ...]]
    words: ClassVar[int]

    @abstractmethod
    def cells(self) -> list[tuple[str, ...]]:
        """The rows below the header."""

    def __repr__(self) -> str:
        lines = [self.head, *self.cells()]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.head))]
        padded = [
            [x.ljust(w) if i < self.words else x.rjust(w) for i, (x, w) in enumerate(zip(line, widths, strict=True))]
            for line in lines
        ]
        return "\n".join("  ".join(line).rstrip() for line in padded)

    def _repr_html_(self) -> str:
        def line(cells: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(x)}</{tag}>" for x in cells) + "</tr>"

        body = "\n".join(line(cells, "td") for cells in self.cells())
        return f"<table><caption>{html.escape(self.name)}</caption>\n{line(self.head, 'th')}\n{body}\n</table>"


class SummaryRow(NamedTuple):
    """One node of a tree: the number of its tensors, of their elements and of their bytes."""

    path: str
    type: str
    tensors: int
    numbers: int
    bytes: int


class Summary(Printed):
    """The table of `summary`."""

    head = ("path", "type", "tensors", "numbers", "bytes")
    words = 2

    def __init__(self, name: str, rows: list[SummaryRow]) -> None:
        self.name, self.rows = name, rows

    def cells(self) -> list[tuple[str, ...]]:
        return [(row.path, row.type, f"{row.tensors:,}", f"{row.numbers:,}", f"{row.bytes:,}") for row in self.rows]


def summary(tree: PyTree, *, depth: int | None = 2) -> Summary:
    """A table of the nodes of a tree, such as a training state: type, tensors, elements, bytes. The root comes first.

    Args:
        tree: any tree of tensors.
        depth: how far below the root to go; None includes every tensor.

    Raises:
        ValueError: ``depth`` is negative.

    Example:
        >>> import torch
        >>> from holofunc import lift, optim, random, train, tree
        >>> state = train.create_state(lift(torch.nn.Linear, 3, 2), optim.adam(0.1), random.key(0))
        >>> tree.summary(state, depth=1)
        path       type        tensors  numbers  bytes
                   TrainState       11       30    140
        step       int64 ()          1        1      8
        params     dict              2        8     32
        buffers    dict              0        0      0
        opt_state  dict              7       19     84
        key        int64 (2,)        1        2     16
    """
    if depth is not None and depth < 0:
        raise ValueError(f"depth must not be negative, got {depth}")
    return Summary(type(tree).__name__, _rows(tree, "", depth))


def _rows(node: PyTree, path: str, depth: int | None) -> list[SummaryRow]:
    found = [x for x in leaves(node) if isinstance(x, Tensor)]
    sizes = sum(x.numel() for x in found), sum(x.numel() * x.element_size() for x in found)
    rows = [SummaryRow(path, _kind(node), len(found), *sizes)]
    if depth == 0 or node is None or not is_node(node):
        return rows
    below = None if depth is None else depth - 1
    for name, child in children(node).items():
        rows += _rows(child, f"{path}/{name}" if path else name, below)
    return rows


def _kind(node: Any) -> str:
    if not isinstance(node, Tensor):
        return type(node).__name__
    return f"{str(node.dtype).removeprefix('torch.')} {tuple(node.shape)}"
