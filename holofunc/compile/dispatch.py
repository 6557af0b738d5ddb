"""From the tensors in the arguments of a call to the inputs of a graph, for arguments of a structure seen before."""

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
    """Whether the tensors may lie elsewhere; those of a donated state must not, because they are written to."""


class Dispatch(NamedTuple):
    graph: Graph
    sources: tuple[int | Vector, ...]
    """Of each input of the graph, the number of its tensor, or its vector."""

    def inputs(self, tensors: Sequence[Tensor]) -> list[Tensor] | None:
        """The inputs of the graph; None if tensors of a donated state do not lie in a vector."""
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
