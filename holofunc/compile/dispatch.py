"""The fast path for arguments of a known structure: from their tensors straight to the inputs of the graph."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from holofunc.compile.program import Graph
from holofunc.tree.flat import Layout, join, vector_at

__all__ = ["Dispatch", "Vector"]


class Vector(NamedTuple):
    """Tensors that lie in one vector, or are joined into one."""

    tensors: tuple[int, ...]
    layout: Layout
    joined: bool
    """Whether tensors that are stored elsewhere are copied; a donated state, which is written to, must not be."""


class Dispatch(NamedTuple):
    graph: Graph
    sources: tuple[int | Vector, ...]
    """For each input of the graph, the position of its tensor, or its vector."""

    def inputs(self, tensors: Sequence[Tensor]) -> list[Tensor] | None:
        """The inputs of the graph; None if a donated state is not stored in its vectors."""
        found = []
        for source in self.sources:
            if isinstance(source, int):
                found.append(tensors[source])
                continue
            leaves = [tensors[i] for i in source.tensors]
            vector = vector_at(leaves, source.layout)
            if vector is None and source.joined:
                with torch.no_grad():
                    vector = join(leaves, source.layout)
            if vector is None:
                return None
            found.append(vector)
        return found
