"""A program for one block of rows, run over all blocks of long vectors.

The processor's threads take blocks in turn, and each computes its block alone: no thread waits for another before the
last block, and Python has a hand in the whole loop but not in its rounds. For that the program is taken apart: its
kernels are compiled for one thread, it is run once, on a block of nothing, to record which of them it calls on what,
and a loop in C++ (`holofunc.compile.kernels.LOOP`) makes the same calls with the addresses of each block.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from holofunc.compile.gathering import Gathering
from holofunc.compile.kernels import NotRecordedError, Run, inductor, recorded

__all__ = ["Loop", "Sources"]

Addresses = NDArray[np.int64]


class Loop:
    """A program of blocks, which are given by the addresses of what it takes, and of what it returns.

    ``loop(addresses, copies, at_once)``: ``addresses`` has a row for each block, with a column for each input, then one
    for each result, and two for which ``copies``, of rows (to, from, bytes), have to be made before; those from 0 are
    of zeros. A thread takes ``at_once`` blocks at a time.
    """

    def __init__(self, run: Run, plan: Sequence[int]) -> None:
        self._run, self._plan = run, plan

    @classmethod
    def of(cls, graph: fx.GraphModule, inputs: Sequence[Tensor]) -> "Loop | None":
        """None if the program does anything but call kernels that were compiled together.

        Args:
            graph: what a block needs; it may write into its inputs.
            inputs: those of one block, without values.
        """
        from torch._inductor import config

        if any(node.op == "get_attr" for node in graph.graph.nodes):  # memory that no call fills
            return None
        mode = detect_fake_mode(inputs)
        FakeTensorProp(graph, mode).propagate(*inputs)
        with tracing(TracingContext(mode)), config.patch({"cpp.threads": 1}):
            program: Any = inductor(graph, inputs, is_inference=True)
        program = getattr(program, "current_callable", program)  # without what is around it
        with _disable_current_modes(), _Operations() as others:
            block = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype) for x in inputs]
            try:
                with recorded() as calls:
                    results = program(list(block))
            except NotRecordedError:
                return None
        if others.found or len({call.run for call in calls}) != 1:
            return None
        places = {x.data_ptr(): i for i, x in enumerate([*block, *results])}
        scratch, steps = 0, []
        for _, which, args in calls:
            for x in args:
                if x.data_ptr() not in places:  # memory for what the next kernel takes
                    if x.storage_offset():
                        return None
                    places[x.data_ptr()] = -1 - scratch
                    scratch += -(-x.untyped_storage().nbytes() // _ALIGNED) * _ALIGNED
            steps += [which, len(args), *(places[x.data_ptr()] for x in args)]
        passed = {x.data_ptr() for _, _, args in calls for x in args}
        if len(places) < len(block) + len(results) or any(x.data_ptr() not in passed for x in results):
            return None
        return cls(calls[0].run, [len(block) + len(results) + 2, scratch, len(calls), *steps])

    def __call__(self, addresses: Addresses, copies: Addresses, at_once: int = 1) -> None:
        plan = torch.tensor([torch.get_num_threads(), len(addresses), at_once, *self._plan])
        self._run(-1, plan, torch.from_numpy(addresses), torch.from_numpy(copies))


_ALIGNED = 64


class _Operations(TorchDispatchMode):
    """Notes that operations were called, apart from making room."""

    found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found |= func is not torch.ops.aten.empty_strided.default
        return func(*args, **(kwargs or {}))


class Sources(NamedTuple):
    """Where a loop finds the blocks of a vector that is to be gathered: within leaves, or brought together before."""

    gathering: Gathering
    leaf: Addresses
    """For each block, which leaf has it; one more than there are leaves for those brought together."""
    first: Addresses
    """And from which byte on."""
    copies: Addresses
    """Rows (to, leaf, from, bytes), leaf -1 for zeros, from and to in bytes."""
    block: Addresses
    """For each copy, in which block."""
    size: int
    """Of what is brought together, in elements."""

    @classmethod
    def of(cls, node: fx.Node, count: int) -> "Sources":
        gathering, itemsize, num_leaves = Gathering.of(node, count), node.meta["val"].itemsize, len(_leaves(node))
        leaf, first, copies, block, size = [], [], [], [], 0
        for i, pieces in enumerate(gathering.blocks):
            if len(pieces) == 1 and pieces[0].leaf >= 0:
                leaf.append(pieces[0].leaf)
                first.append(pieces[0].first * itemsize)
                continue
            leaf.append(num_leaves)
            first.append(size * itemsize)
            for piece in pieces:
                elements = (size + piece.at, piece.leaf, piece.first, piece.number)
                copies.append([e if k == 1 else e * itemsize for k, e in enumerate(elements)])
                block.append(i)
            size += gathering.size
        whole = np.array(copies, np.int64).reshape(-1, 4)
        return cls(gathering, np.array(leaf), np.array(first), whole, np.array(block, np.int64), size)

    def at(self, leaves: Sequence[Tensor]) -> "Found":
        flat = [*self.gathering.flat(leaves), leaves[0].new_empty(self.size)]
        pointers = np.array([*(x.data_ptr() for x in flat), 0])
        to, leaf, first, number = self.copies.T
        copies = np.stack([pointers[-2] + to, pointers[leaf] + first, number], 1)
        return Found(flat, pointers[self.leaf] + self.first, copies)


class Found(NamedTuple):
    """Addresses of blocks, and copies to be made before they are read, in memory that ``held`` keeps."""

    held: list[Tensor]
    blocks: Addresses
    copies: Addresses


def _leaves(node: fx.Node) -> Any:
    return node.args[0]
