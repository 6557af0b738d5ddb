"""Dropout in all its forms as a function of a key, and keys for layers that draw."""

import torch
from torch import Tensor, nn

from holofunc import random
from holofunc.typing import Key, Scalar

__all__ = ["WORDS", "Drop", "drop", "site_key"]

WORDS = -(2**63), 2**63 - 1
"""The bounds of the words of a key."""


def drop(x: Tensor, p: Scalar, *, key: Key, shared: int | None = None) -> Tensor:
    """Zero elements, channels or samples with probability ``p`` and scale the rest by ``1 / (1 - p)``.

    Args:
        p: in [0, 1]; a 0-d tensor if it follows a schedule.
        key: of `holofunc.random`.
        shared: the first axis over which a draw is shared: ``None`` draws per element (dropout), 2 per channel
            (spatial dropout), 1 per sample (stochastic depth), 0 once for the batch.
    """
    shape = [n if shared is None or d < shared else 1 for d, n in enumerate(x.shape)]
    kept = random.uniform(key, shape).to(x.device) >= p
    rate = 1.0 - p
    least = 2.0**-24  # below it nothing is kept
    rate = rate.clamp_min(least).to(x.dtype) if isinstance(rate, Tensor) else max(rate, least)
    return torch.where(kept, x / rate, 0.0)


class Drop(nn.Module):
    """`drop` in train mode, with a `site_key`; the identity in eval mode."""

    def __init__(self, p: float, shared: int | None = None) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"p must be in [0, 1], got {p}")
        self.p, self.shared = p, shared

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        return drop(x, self.p, key=site_key(), shared=self.shared)

    def extra_repr(self) -> str:
        return f"p={self.p}, shared={self.shared}"


def site_key() -> Key:
    """The key of a call, for modules that draw with `holofunc.random` in their forward pass.

    In `Model.apply` it is the caller's key, folded with the path of the module and the index of the call. In an
    ordinary module it comes from torch's global generator.

    Example:
        >>> import torch
        >>> from holofunc import lift, random
        >>> from holofunc.model import site_key
        >>> class Noise(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x + random.normal(site_key(), x.shape)
        >>> out, _ = lift(Noise).apply({}, {}, torch.zeros(2), train=True, key=random.key(1))
        >>> out
        tensor([0.9233, 0.5897])
    """
    return torch.randint(*WORDS, (2,))
