"""The names of the things that flow through the library, defined once.

Everything here is an alias for plain data: tensors, dicts and tuples of tensors, and functions of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

__all__ = [
    "Aux",
    "Batch",
    "Buffers",
    "Checked",
    "Key",
    "Metrics",
    "Objective",
    "Params",
    "PyTree",
    "Scalar",
    "Schedule",
    "Step",
]

PyTree: TypeAlias = Any
"""Nested dicts, lists, tuples and NamedTuples with tensors as leaves."""

Params: TypeAlias = dict[str, Tensor]
"""Parameters by state-dict name, e.g. ``{"head.weight": (K, C), "head.bias": (K,)}``."""

Buffers: TypeAlias = dict[str, Tensor]
"""What a forward pass reads and renews without a gradient (BatchNorm statistics), by state-dict name."""

Key: TypeAlias = Tensor
"""A random key: int64 of shape (2,), the words (seed, offset) of `holofunc.random`."""

Batch: TypeAlias = Any
"""One minibatch, usually ``(images, targets)`` with images of shape (N, C, H, W)."""

Metrics: TypeAlias = Mapping[str, Tensor]
"""0-d tensors by name; reading one on the host synchronizes with the device."""

Scalar: TypeAlias = float | Tensor
"""A Python number or a 0-d tensor."""

Schedule: TypeAlias = Callable[[Any], Any]
"""``schedule(step) -> value``: step 0-based, a number or a 0-d integer tensor; the value is of the same kind."""

Aux: TypeAlias = Any
"""What an objective returns beside the loss: ``Aux(buffers, metrics, outputs)`` of `holofunc.train`."""

Objective: TypeAlias = Callable[[Params, Buffers, Batch, Key], tuple[Tensor, Aux]]
"""``objective(params, buffers, batch, key) -> (loss, aux)``: what is differentiated, with respect to ``params``."""

Step: TypeAlias = Callable[[Any, Batch], tuple[Any, dict[str, Tensor]]]
"""``step(state, batch) -> (state, metrics)``."""


class Checked(ABC):
    """A function of a state and inputs that looks at values of its inputs first, outside of any graph."""

    @abstractmethod
    def check(self, *inputs: PyTree) -> None:
        """Raise on inputs that `run` cannot take."""

    @abstractmethod
    def run(self, state: PyTree, *inputs: PyTree) -> Any:
        """The function itself, without the check."""

    def __call__(self, state: PyTree, *inputs: PyTree) -> Any:
        if not torch.compiler.is_compiling():
            self.check(*inputs)
        return self.run(state, *inputs)
