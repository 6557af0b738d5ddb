"""Where a function is called in a forward pass, as the rules for such calls see it.

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
    """The place in a forward pass where a function is called."""

    def key(self) -> Key:
        """A key that no other call gets."""

    def write(self, target: Tensor, value: Tensor) -> Tensor:
        """Put ``value`` into ``target``, which is returned; the caller's own tensors are not touched."""

    def writes(self, *targets: Any) -> None:
        """Say that the function about to be called writes into these."""

    def alias(self, new: Tensor, old: Tensor) -> Tensor:
        """Say that ``new``, which is returned, has the memory of ``old``."""

    def refuse(self, what: str, way_out: str) -> Any:
        """Raise an error that names the module."""
