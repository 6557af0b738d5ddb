"""Bringing leaves that lie apart into the order of an arena: the operation `gather`, and how it is done in blocks."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

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
    found = Arena(vectors, layout)
    found.gathered_from = tuple(leaves)
    return found


@torch.library.register_fake("holofunc::gather")
def _gathered_shape(leaves: list[Tensor], starts: list[int], axes: list[int], rows: int, width: int) -> Tensor:
    return leaves[0].new_empty(rows, width)


@torch.library.impl("holofunc::gather", "CompositeExplicitAutograd")
def _gathered(leaves: list[Tensor], starts: list[int], axes: list[int], rows: int, width: int) -> Tensor:
    return Gathering(leaves, starts, axes, rows, width).whole(leaves)


class _Piece(NamedTuple):
    """``number`` elements of a leaf from element ``first`` on, at element ``at`` of a block; of no leaf (-1): zeros."""

    leaf: int
    first: int
    number: int
    at: int


class Gathering:
    """A vector that consists of pieces of leaves, and of zeros where these end before a row does, in blocks."""

    def __init__(
        self, leaves: Sequence[Tensor], starts: list[int], axes: list[int], rows: int, width: int, count: int = 1
    ) -> None:
        self.shape = (rows // count, width)
        self.size = self.shape[0] * width  # of a block
        remaining = iter(axes)
        self._orders = [tuple(itertools.islice(remaining, leaf.ndim)) for leaf in leaves]
        self._starts = [start * width * leaves[0].itemsize for start in starts]
        self._dense = [leaf.permute(order).is_contiguous() for leaf, order in zip(leaves, self._orders, strict=True)]
        self.blocks: list[list[_Piece]] = [[] for _ in range(count)]
        at = 0
        for i, (leaf, start) in enumerate(zip(leaves, starts, strict=True)):
            self._append(-1, start * width - at, at)
            self._append(i, leaf.numel(), start * width)
            at = start * width + leaf.numel()
        self._append(-1, rows * width - at, at)

    @classmethod
    def of(cls, node: fx.Node, count: int = 1) -> "Gathering":
        """That of a node of a graph."""
        leaves, starts, axes, rows, width = cast(Any, node.args)
        return cls([leaf.meta["val"] for leaf in leaves], starts, axes, rows, width, count)

    def _append(self, leaf: int, number: int, at: int) -> None:
        """``number`` elements of a leaf, from element ``at`` of the vector on."""
        done = 0
        while done < number:
            block, within = divmod(at + done, self.size)
            piece = min(number - done, self.size - within)
            self.blocks[block].append(_Piece(leaf, 0 if leaf < 0 else done, piece, within))
            done += piece

    def flat(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        """The leaves with their elements in the order in which the vector has them: themselves where they lie so."""
        return [
            leaf if dense else leaf.permute(order).contiguous()
            for leaf, dense, order in zip(leaves, self._dense, self._orders, strict=True)
        ]

    def lying(self, leaves: Sequence[Tensor]) -> Tensor | None:
        """The vector that the leaves are views of, if there is one in which they lie as in this."""
        storage = leaves[0].untyped_storage()
        start = leaves[0].data_ptr() - self._starts[0]
        together = all(
            leaf.data_ptr() == start + at and leaf.untyped_storage()._cdata == storage._cdata
            for leaf, at in zip(leaves, self._starts, strict=True)
        )
        end = storage.data_ptr() + storage.nbytes()
        size = self.size * len(self.blocks) * leaves[0].itemsize
        if not (together and all(self._dense) and storage.data_ptr() <= start and start + size <= end):
            return None
        offset = (start - storage.data_ptr()) // leaves[0].itemsize
        return leaves[0].as_strided((self.shape[0] * len(self.blocks), self.shape[1]), (self.shape[1], 1), offset)

    def whole(self, leaves: Sequence[Tensor], memory: Tensor | None = None) -> Tensor:
        """The vector, in ``memory`` or memory of its own."""
        memory = leaves[0].new_empty(self.shape) if memory is None else memory
        flat, (pieces,) = self.flat(leaves), self.blocks
        torch.cat(
            [
                leaves[0].new_zeros(p.number) if p.leaf < 0 else flat[p.leaf].as_strided((p.number,), (1,))
                for p in pieces
            ],
            out=memory.view(-1),
        )
        return memory
