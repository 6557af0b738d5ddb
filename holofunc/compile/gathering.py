"""Bringing leaves that lie apart into the order of an arena: the operation `gather`, and how it is done in blocks."""

import itertools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from holofunc.arena import Arena, Layout

__all__ = ["Gathering", "gather"]

torch.library.define("holofunc::gather", "(Tensor[] leaves, int[] starts, int[] axes, int rows, int width) -> Tensor")


def gather(leaves: Sequence[Tensor], layout: Layout) -> Arena:
    """An arena with copies of ``leaves``, given in the order of its names."""
    named = dict(zip(layout.names, leaves, strict=True))
    vectors = []
    for slots, rows in zip(layout.groups, layout.rows, strict=True):
        starts, axes = [s.start for s in slots], [d for s in slots for d in s.order]
        vectors.append(torch.ops.holofunc.gather([named[s.name] for s in slots], starts, axes, rows, layout.width))
    return Arena(vectors, layout)


@torch.library.register_fake("holofunc::gather")
def _gathered_shape(leaves: list[Tensor], starts: list[int], axes: list[int], rows: int, width: int) -> Tensor:
    return leaves[0].new_empty(rows, width)


@torch.library.impl("holofunc::gather", "CompositeExplicitAutograd")
def _gathered(leaves: list[Tensor], starts: list[int], axes: list[int], rows: int, width: int) -> Tensor:
    whole = Gathering(leaves, starts, axes, rows, width)
    return whole.joined(whole.pieces(leaves)[0], leaves[0].new_empty(rows, width))


class Gathering:
    """A vector that consists of pieces of leaves, and of zeros where these end before a row does, in blocks."""

    def __init__(
        self, leaves: Sequence[Tensor], starts: list[int], axes: list[int], rows: int, width: int, count: int = 1
    ) -> None:
        self.shape = (rows // count, width)
        remaining = iter(axes)
        self._orders = [tuple(itertools.islice(remaining, leaf.ndim)) for leaf in leaves]
        self._dense = [leaf.permute(order).is_contiguous() for leaf, order in zip(leaves, self._orders, strict=True)]
        size = rows * width // count
        self._blocks: list[list[tuple[int, int, int]]] = [[] for _ in range(count)]  # leaf or -1, element, number
        at = 0
        for i, (leaf, start) in enumerate(zip(leaves, starts, strict=True)):
            self._append(-1, start * width - at, at, size)
            self._append(i, leaf.numel(), start * width, size)
            at = start * width + leaf.numel()
        self._append(-1, rows * width - at, at, size)
        self._lacking = {n for block in self._blocks for i, _, n in block if i < 0}
        self._longest = max(self._lacking, default=0)

    @classmethod
    def of(cls, node: fx.Node, count: int = 1) -> "Gathering":
        """That of a node of a graph."""
        leaves, starts, axes, rows, width = cast(Any, node.args)
        return cls([leaf.meta["val"] for leaf in leaves], starts, axes, rows, width, count)

    def _append(self, leaf: int, number: int, at: int, size: int) -> None:
        """``number`` elements of a leaf, from element ``at`` of the vector on."""
        done = 0
        while done < number:
            piece = min(number - done, size - (at + done) % size)
            self._blocks[(at + done) // size].append((leaf, 0 if leaf < 0 else done, piece))
            done += piece

    def pieces(self, leaves: Sequence[Tensor]) -> list[list[Tensor]]:
        """What each block consists of: vectors, views where possible."""
        flat = [
            leaf.as_strided((leaf.numel(),), (1,)) if dense else leaf.permute(order).reshape(-1)
            for leaf, order, dense in zip(leaves, self._orders, self._dense, strict=True)
        ]
        zeros = flat[0].new_zeros(self._longest)
        pads = {n: zeros[:n] for n in self._lacking}
        return [
            [
                pads[n] if i < 0 else flat[i] if n == flat[i].numel() else flat[i][first : first + n]
                for i, first, n in block
            ]
            for block in self._blocks
        ]

    def joined(self, pieces: list[Tensor], memory: Tensor) -> Tensor:
        """A block: its only piece, or all of them in ``memory``."""
        if len(pieces) == 1 and len(self._blocks) > 1:
            return pieces[0].view(self.shape)
        return torch.cat(pieces, out=memory.view(-1)).view(self.shape)
