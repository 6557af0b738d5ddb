"""Bringing leaves that lie apart into the order of an arena: the operation `gather`, and how it is done in blocks."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
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
    return Arena(vectors, layout)


@torch.library.register_fake("holofunc::gather")
def _gathered_shape(leaves: list[Tensor], starts: list[int], axes: list[int], rows: int, width: int) -> Tensor:
    return leaves[0].new_empty(rows, width)


@torch.library.impl("holofunc::gather", "CompositeExplicitAutograd")
def _gathered(leaves: list[Tensor], starts: list[int], axes: list[int], rows: int, width: int) -> Tensor:
    return next(Gathering(leaves, starts, axes, rows, width).blocks(leaves))


class _Piece(NamedTuple):
    """``number`` elements of a leaf from element ``first`` on; of no leaf (-1): zeros."""

    leaf: int
    first: int
    number: int


class Gathering:
    """A vector that consists of pieces of leaves, and of zeros where these end before a row does, in blocks."""

    def __init__(
        self, leaves: Sequence[Tensor], starts: list[int], axes: list[int], rows: int, width: int, count: int = 1
    ) -> None:
        self.shape = (rows // count, width)
        remaining = iter(axes)
        self._orders = [tuple(itertools.islice(remaining, leaf.ndim)) for leaf in leaves]
        self._dense = [leaf.permute(order).is_contiguous() for leaf, order in zip(leaves, self._orders, strict=True)]
        self._blocks: list[list[_Piece]] = [[] for _ in range(count)]
        at = 0
        for i, (leaf, start) in enumerate(zip(leaves, starts, strict=True)):
            self._append(-1, start * width - at, at)
            self._append(i, leaf.numel(), start * width)
            at = start * width + leaf.numel()
        self._append(-1, rows * width - at, at)
        self._pads: dict[int, Tensor] = {}

    @classmethod
    def of(cls, node: fx.Node, count: int = 1) -> "Gathering":
        """That of a node of a graph."""
        leaves, starts, axes, rows, width = cast(Any, node.args)
        return cls([leaf.meta["val"] for leaf in leaves], starts, axes, rows, width, count)

    def _append(self, leaf: int, number: int, at: int) -> None:
        """``number`` elements of a leaf, from element ``at`` of the vector on."""
        done, size = 0, self.shape[0] * self.shape[1]
        while done < number:
            piece = min(number - done, size - (at + done) % size)
            self._blocks[(at + done) // size].append(_Piece(leaf, 0 if leaf < 0 else done, piece))
            done += piece

    def blocks(self, leaves: Sequence[Tensor], memory: Tensor | None = None, keep: bool = False) -> Iterator[Tensor]:
        """One block after the other: part of a leaf, where it lies, or pieces brought together in ``memory``.

        The next block overwrites that, or else memory of the iterator's own; with ``keep`` each gets its own.
        """
        copied = functools.cache(lambda i: leaves[i].permute(self._orders[i]).reshape(-1))
        for block in self._blocks:
            leaf, first, n = block[0]
            if len(block) > 1 or leaf < 0 or len(self._blocks) == 1:  # a whole vector may outlive the call
                memory = leaves[0].new_empty(self.shape) if memory is None or keep else memory
                torch.cat([self._piece(piece, leaves, copied) for piece in block], out=memory.view(-1))
                yield memory
            elif self._dense[leaf]:
                x = leaves[leaf]
                yield x.as_strided(self.shape, (self.shape[1], 1), x.storage_offset() + first)
            else:
                yield copied(leaf).narrow(0, first, n).view(self.shape)

    def _piece(self, piece: _Piece, leaves: Sequence[Tensor], copied: Callable[[int], Tensor]) -> Tensor:
        """Its elements in the order in which they lie in memory. Called for each leaf at each update: kept short."""
        i, first, n = piece
        if i < 0:
            if n not in self._pads:
                self._pads[n] = leaves[0].new_zeros(n)
            return self._pads[n]
        leaf = leaves[i]
        if not self._dense[i]:
            return copied(i).narrow(0, first, n)
        whole = leaf.ndim == 1 and n == len(leaf)
        return leaf if whole else leaf.as_strided((n,), (1,), leaf.storage_offset() + first)
