"""Type aliases for plain data, and the classes and Protocols that connect the packages of the library.

Code that depends on what another package or a user passes in tests for these types with `isinstance`, never for the
name of an attribute.
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
"""State of a forward pass without gradients (BatchNorm statistics), by state-dict name."""

Key: TypeAlias = Tensor
"""A random key of `holofunc.random`: int64 of shape (2,)."""

Batch: TypeAlias = Any
"""One minibatch, usually ``(images, targets)`` with images of shape (N, C, H, W)."""

Metrics: TypeAlias = Mapping[str, Tensor]
"""0-d tensors by name; reading a value synchronizes with the device."""

Scalar: TypeAlias = float | Tensor
"""A Python number or a 0-d tensor."""

Schedule: TypeAlias = Callable[[Any], Any]
"""``schedule(step) -> value``: step 0-based, a number or a 0-d integer tensor; the value is of the same kind."""

Aux: TypeAlias = Any
"""The second result of an objective: ``Aux(buffers, metrics, outputs)`` of `holofunc.train`."""


class Objective(Protocol):
    """``objective(params, buffers, batch, key) -> (loss, aux)``, differentiated with respect to ``params``."""

    def __call__(self, params: Params, buffers: Buffers, batch: Batch, key: Key, /) -> tuple[Tensor, Aux]: ...


class Step(Protocol):
    """A pure function ``step(state, batch) -> (state, metrics)``."""

    def __call__(self, state: Any, batch: Batch, /) -> tuple[Any, dict[str, Tensor]]: ...


class EvalStep(ABC):
    """The evaluation of one batch, for `holofunc.train.evaluate`. Derive from it for your own evaluation.

    Attributes:
        metrics: `holofunc.metrics.Metric` by name, which merge the states of batches and compute the results.
    """

    metrics: Mapping[str, Any]

    @abstractmethod
    def __call__(self, state: Any, batch: Batch, weights: Tensor | None = None) -> dict[str, PyTree]:
        """The state of each metric after ``batch`` alone; ``weights`` (N,) are zero for padding."""

    def check(self, batch: Batch) -> None:  # noqa: B027
        """Raise if a batch cannot be evaluated. Runs outside graphs and may read values."""


@runtime_checkable
class EpochData(Protocol):
    """Batches in an order that depends on the epoch, with access to any position."""

    def __len__(self) -> int:
        """The number of batches in an epoch."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from index ``start`` on."""


@runtime_checkable
class Fingerprinted(Protocol):
    """Data with a fingerprint, by which a resumed run detects a change."""

    def fingerprint(self) -> dict[str, Any]:
        """Everything that batches depend on, by name, as JSON values."""


@runtime_checkable
class ChecksTargets(Protocol):
    """A model with its own loss and its own check of targets, such as a detector."""

    loss: Callable[..., Any]

    def check_targets(self, targets: Any, /) -> None:
        """Raise if the targets are invalid; reads values."""
