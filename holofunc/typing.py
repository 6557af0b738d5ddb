"""The names of the things that flow through the library, and the seams between its rooms, defined once.

Aliases for plain data (tensors, dicts and tuples of tensors), and the classes and Protocols by which one room knows
what another, or a user, hands to it: `isinstance` asks for them, never the name of an attribute.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

__all__ = [
    "Aux",
    "Batch",
    "Buffers",
    "ChecksTargets",
    "EpochData",
    "EvalStep",
    "Fingerprinted",
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


class Objective(Protocol):
    """What is differentiated, with respect to ``params``: ``objective(params, buffers, batch, key) -> (loss, aux)``."""

    def __call__(self, params: Params, buffers: Buffers, batch: Batch, key: Key, /) -> tuple[Tensor, Aux]: ...


class Step(Protocol):
    """``step(state, batch) -> (state, metrics)``: pure."""

    def __call__(self, state: Any, batch: Batch, /) -> tuple[Any, dict[str, Tensor]]: ...


class EvalStep(ABC):
    """What `holofunc.train.evaluate` does with each batch. Derive from it for an evaluation of your own.

    Attributes:
        metrics: `holofunc.metrics.Metric` by name: ``merge`` joins the states of two batches, ``compute`` makes the
            results.
    """

    metrics: Mapping[str, Any]

    @abstractmethod
    def __call__(self, state: Any, batch: Batch, weights: Tensor | None = None) -> dict[str, PyTree]:
        """The state of each metric after ``batch`` alone; ``weights`` (N,) are zero for rows that are padding."""

    def check(self, batch: Batch) -> None:  # noqa: B027
        """Refuse a batch that cannot be evaluated; it may read values, and runs outside of graphs."""


@runtime_checkable
class EpochData(Protocol):
    """Batches in an order that depends on the epoch, and that can be entered at any position."""

    def __len__(self) -> int:
        """Batches in an epoch."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from number ``start`` on."""


@runtime_checkable
class Fingerprinted(Protocol):
    """Data that can say what they are, so that a resumed run notices others."""

    def fingerprint(self) -> dict[str, Any]:
        """What batches depend on, by name, as JSON holds it."""


@runtime_checkable
class ChecksTargets(Protocol):
    """A model with a loss of its own that knows what its targets look like: a detector."""

    loss: Callable[..., Any]

    def check_targets(self, targets: Any, /) -> None:
        """Raise what there is to say of targets that the model cannot learn; reads values."""
