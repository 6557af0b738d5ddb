"""The interface through which rules for torch functions see a call in a forward pass.

A rule stands for a function of torch and is called as ``rule(site, *args, **kwargs)`` with that function's arguments.
`NotImplemented` says that there is nothing to do, and the function itself is called.
"""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from holofunc.typing import Key

__all__ = ["Rule", "Site"]

Rule = Callable[..., Any]


class Site(Protocol):
    """A call in a forward pass."""

    def key(self) -> Key:
        """The key of this call."""

    def write(self, target: Tensor, value: Tensor) -> Tensor:
        """Write ``value`` into ``target`` and return it, without changing the caller's tensors."""

    def writes(self, *targets: Any) -> None:
        """Announce that the function writes into these tensors."""

    def alias(self, new: Tensor, old: Tensor) -> Tensor:
        """Declare that ``new`` shares the memory of ``old``, and return it."""

    def refuse(self, what: str, way_out: str) -> Any:
        """Raise an error that names the module."""
