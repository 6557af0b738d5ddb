"""Sums and norms of each leaf and of whole trees, and the arithmetic that they need."""

import torch
from torch import Tensor

from holofunc.tree import traced
from holofunc.tree.maps import elementwise, map
from holofunc.tree.nodes import children, is_node
from holofunc.typing import PyTree

__all__ = [
    "all_finite",
    "global_norm",
    "leaf_norm",
    "leaf_sum",
    "leaf_values",
    "safe_sqrt",
    "total",
    "upcast",
]


def leaf_sum(tree: PyTree) -> PyTree:
    """The sum of each leaf's elements: a tree of 0-d tensors (accumulated in fp32 for half precision).

    Example:
        >>> import torch
        >>> from holofunc import tree
        >>> tree.leaf_sum({"w": torch.ones(3, 2)})
        {'w': tensor(6.)}
    """
    vectors = traced.aligned(tree)
    if vectors is not None:
        return vectors.leaf_sums(_accumulator)
    return map(lambda x: x.sum(dtype=_accumulator(x)), tree)


def leaf_norm(tree: PyTree) -> PyTree:
    """The Euclidean norm of each leaf: a tree of 0-d tensors. The gradient at zero is zero.

    Example:
        >>> import torch
        >>> from holofunc import tree
        >>> tree.leaf_norm({"w": torch.tensor([3.0, 4.0])})
        {'w': tensor(5.)}
    """
    return elementwise(safe_sqrt, leaf_sum(elementwise(lambda x: upcast(x).square(), tree)))


def leaf_values(values: PyTree, like: PyTree) -> PyTree:
    """Python numbers, one per leaf of ``like``, as 0-d tensors that `elementwise` accepts (fp32 for half precision).

    Example:
        >>> import torch
        >>> from holofunc import tree
        >>> params = {"w": torch.ones(2), "b": torch.ones(1)}
        >>> rates = tree.leaf_values({"w": 0.5, "b": 2.0}, params)
        >>> tree.elementwise(torch.mul, params, rates)
        {'w': tensor([0.5000, 0.5000]), 'b': tensor([2.])}
    """
    vectors = traced.aligned(like)
    if vectors is not None:
        return vectors.leaf_values(values, _accumulator)
    return map(lambda x, v: torch.tensor(v, dtype=_accumulator(x), device=x.device), like, values)


def total(tree: PyTree) -> Tensor:
    """The sum of all elements of ``tree``, a 0-d tensor (accumulated in fp32 for half precision; 0 without leaves).

    Example:
        >>> import torch
        >>> from holofunc import tree
        >>> tree.total({"a": torch.ones(3), "b": torch.tensor(4.0)})
        tensor(7.)
    """
    return _sum([upcast(x).sum() for x in _blocks(tree)])


def global_norm(tree: PyTree) -> Tensor:
    """The Euclidean norm of all elements of ``tree`` together, a 0-d tensor (0 for a tree without leaves).

    Example:
        >>> import torch
        >>> from holofunc import tree
        >>> tree.global_norm({"a": torch.tensor([3.0]), "b": torch.tensor(4.0)})
        tensor(5.)
    """
    return safe_sqrt(_sum([upcast(x).square().sum() for x in _blocks(tree)]))


def _sum(parts: list[Tensor]) -> Tensor:
    return torch.stack([p.to(parts[0]) for p in parts]).sum() if parts else torch.zeros(())


def all_finite(tree: PyTree) -> Tensor:
    """Whether all floating-point leaves are finite: a 0-d bool tensor.

    Example:
        >>> import torch
        >>> from holofunc import tree
        >>> tree.all_finite({"w": torch.ones(2), "b": torch.tensor([0.0, torch.nan])})
        tensor(False)
    """
    checks = [torch.isfinite(x).all() for x in _blocks(tree) if x.is_floating_point()]
    return torch.stack([c.to(checks[0].device) for c in checks]).all() if checks else torch.ones((), dtype=torch.bool)


def _blocks(tree: PyTree) -> list[Tensor]:
    """Tensors that together contain each element of ``tree`` once, and possibly zeros: flat vectors, or the leaves."""
    vectors = traced.aligned(tree)
    if vectors is not None:
        return vectors.filled()
    if not is_node(tree):
        return [tree]
    return [] if tree is None else [block for child in children(tree).values() for block in _blocks(child)]


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def upcast(x: Tensor) -> Tensor:
    """Half precision as fp32, other dtypes unchanged: for arithmetic that must not lose digits.

    Example:
        >>> import torch
        >>> from holofunc import tree
        >>> tree.upcast(torch.ones(2, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return x.to(_accumulator(x))


def safe_sqrt(x: Tensor) -> Tensor:
    """The square root, with gradient zero instead of infinity at zero.

    Example:
        >>> import torch
        >>> from holofunc import tree
        >>> torch.func.grad(tree.safe_sqrt)(torch.tensor(0.0))
        tensor(0.)
    """
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0 * x)  # 0 * x instead of 0 propagates NaN
