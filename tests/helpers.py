"""What many tests need."""

import torch
from torch import Tensor

from holofunc import tree


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal draws that depend on the seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def assert_trees_close(got: object, expected: object, **tolerance: float) -> None:
    """The same paths and dtypes, and values within a tolerance: none given is bit for bit."""
    assert tree.paths(got) == tree.paths(expected)
    for (path, x), y in zip(tree.leaves_with_path(got), tree.leaves(expected), strict=True):
        torch.testing.assert_close(
            x, y, msg=lambda message, path=path: f"{path}: {message}", **(tolerance or {"rtol": 0, "atol": 0})
        )
