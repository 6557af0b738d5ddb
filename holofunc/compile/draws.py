"""Random draws in graphs: each is the operation `philox` instead of the formula, hundreds of operations."""

import torch
import torch.nn.functional as F
from torch import Tensor

from holofunc import random
from holofunc.compile.programs import compile_graph

__all__ = ["philox"]

torch.library.define(
    "holofunc::philox", "(Tensor key, Tensor counter) -> Tensor", tags=(torch.Tag.needs_exact_strides,)
)

CHUNKS = 2**10, 2**16
"""Blocks computed at a time, in small draws and in large ones: the formula is compiled for these numbers only."""


class _Formula(torch.nn.Module):
    def forward(self, key: Tensor, counter: Tensor) -> tuple[Tensor]:
        return (random.philox(key, counter),)


_programs = {chunk: compile_graph(_Formula()) for chunk in CHUNKS}


@torch.library.register_fake("holofunc::philox")
def _shape(key: Tensor, counter: Tensor) -> Tensor:
    return counter.new_empty(*counter.shape, 4)


@torch.library.impl("holofunc::philox", "CompositeExplicitAutograd")
def _run(key: Tensor, counter: Tensor) -> Tensor:
    out = counter.new_empty(len(counter), 4)
    chunk = CHUNKS[len(counter) > CHUNKS[1] // 4]
    for part, blocks in zip(counter.split(chunk), out.split(chunk), strict=True):
        whole = part if len(part) == chunk else F.pad(part, (0, chunk - len(part)))
        blocks.copy_(_programs[chunk](key, whole)[0][: len(part)])
    return out


philox = torch.ops.holofunc.philox
