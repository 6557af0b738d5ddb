"""Arithmetic with finite values and gradients in edge cases."""

import torch
from torch import Tensor

from holofunc import tree

__all__ = ["safe_divide", "upcast"]


def upcast(x: Tensor) -> Tensor:
    """Half precision and integers as float32; float32 and float64 as they are.

    Args:
        x: any shape, a real dtype.

    Returns:
        The same values.

    Example:
        >>> import torch
        >>> upcast(torch.ones(2, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return tree.upcast(x) if x.is_floating_point() else x.float()


def safe_divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient; 0 with gradient 0 where the denominator is 0.

    Args:
        numerator: any shape, floating point.
        denominator: a shape that broadcasts with it.

    Returns:
        The quotient.

    Example:
        >>> import torch
        >>> safe_divide(torch.tensor([1.0, 0.0]), torch.tensor([2.0, 0.0]))
        tensor([0.5000, 0.0000])
    """
    nonzero = denominator != 0
    return torch.where(nonzero, numerator, 0) / torch.where(nonzero, denominator, 1)
