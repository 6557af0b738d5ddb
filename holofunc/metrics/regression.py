"""Regression metrics: errors, explained variance, and correlations."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from holofunc.metrics.aggregation import mean
from holofunc.metrics.base import Metric, Rows, accurate, check_tensors, gathered, row_weights, zeros
from holofunc.metrics.ranking import tied_sums

__all__ = ["Moments", "mae", "mse", "pearson", "r2", "spearman"]


class Moments(NamedTuple):
    """The state of metrics of two moments: weight, means, sums of squared deviations and of their product; all 0-d.

    Deviations are taken from means, not from 0, so that nothing cancels; states merge as in Chan et al. (1979).
    """

    weight: Tensor
    output: Tensor
    target: Tensor
    outputs: Tensor
    targets: Tensor
    product: Tensor


def mse(*, root: bool = False) -> Metric:
    """The mean squared error over all elements.

    `update` takes outputs and targets of one shape (B, ...).

    Args:
        root: whether to take its square root.

    Returns:
        A metric that computes a 0-d tensor.

    Example:
        >>> import torch
        >>> from holofunc import metrics
        >>> metric = metrics.mse()
        >>> metric.compute(metric.update(metric.init(), torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))).item()
        2.0
    """
    metric = mean(lambda outputs, targets: _difference(outputs, targets) ** 2)
    return metric._replace(compute=lambda state: metric.compute(state).sqrt()) if root else metric


def mae() -> Metric:
    """The mean absolute error over all elements.

    `update` takes outputs and targets of one shape (B, ...).

    Returns:
        A metric that computes a 0-d tensor.

    Example:
        >>> import torch
        >>> from holofunc import metrics
        >>> metric = metrics.mae()
        >>> metric.compute(metric.update(metric.init(), torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))).item()
        1.0
    """
    return mean(lambda outputs, targets: _difference(outputs, targets).abs())


def r2() -> Metric:
    """The coefficient of determination: ``1 - sum (target - output)^2 / sum (target - mean target)^2``.

    `update` takes outputs and targets of one shape (B, ...).

    Returns:
        A metric that computes a 0-d tensor, at most 1; 0 for predicting the mean, `nan` where targets are constant.

    Example:
        >>> import torch
        >>> from holofunc import metrics
        >>> metric, targets = metrics.r2(), torch.tensor([1.0, 2.0, 3.0])
        >>> round(metric.compute(metric.update(metric.init(), torch.tensor([1.0, 2.0, 2.0]), targets)).item(), 6)
        0.5
    """

    def compute(m: Moments) -> Tensor:
        residual = m.outputs + m.targets - 2 * m.product + m.weight * (m.output - m.target) ** 2
        return 1 - residual / _spread(m.targets, m.target, m.weight)

    return _of_moments(compute)


def pearson() -> Metric:
    """Pearson's correlation coefficient over all elements.

    `update` takes outputs and targets of one shape (B, ...).

    Returns:
        A metric that computes a 0-d tensor in [-1, 1]; `nan` where one side is constant.

    Example:
        >>> import torch
        >>> from holofunc import metrics
        >>> metric = metrics.pearson()
        >>> x = torch.tensor([1.0, 2.0, 3.0])
        >>> round(metric.compute(metric.update(metric.init(), x, 7 - 2 * x)).item(), 6)
        -1.0
    """
    return _of_moments(_correlation)


def spearman() -> Metric:
    """Spearman's correlation coefficient: Pearson's coefficient of the ranks; ties get their mean rank.

    It keeps all elements until the end. `update` takes outputs and targets of one shape (B, ...).

    Returns:
        A metric that computes a 0-d tensor in [-1, 1]; `nan` where one side is constant.

    Example:
        >>> import torch
        >>> from holofunc import metrics
        >>> metric = metrics.spearman()
        >>> x = torch.tensor([1.0, 2.0, 3.0])
        >>> round(metric.compute(metric.update(metric.init(), x, x**5)).item(), 6)
        1.0
    """

    def columns(outputs: Tensor, targets: Tensor, weights: Tensor | None) -> tuple[tuple[Tensor, Tensor], Tensor]:
        _difference(outputs, targets)
        weight = row_weights(weights, outputs).flatten()
        x, y = (torch.where(weight == 0, 0, side.flatten()) for side in (outputs, targets))  # padding may hold nan
        return (x, y), weight

    def compute(rows: Rows) -> Tensor:
        weight = rows.weights if rows.weights.device.type == "mps" else rows.weights.double()
        x, y = (_ranks(values, weight) for values in rows.columns)
        return _correlation(_moments(x, y, weight))

    return gathered(columns, ((), ()), compute)


def _difference(outputs: Tensor, targets: Tensor) -> Tensor:
    check_tensors(outputs, targets)
    if outputs.shape != targets.shape:
        raise ValueError(f"targets must have the shape of outputs {tuple(outputs.shape)}, got {tuple(targets.shape)}")
    return accurate(outputs) - accurate(targets)


def _correlation(m: Moments) -> Tensor:
    outputs, targets = _spread(m.outputs, m.output, m.weight), _spread(m.targets, m.target, m.weight)
    return m.product / (outputs.sqrt() * targets.sqrt())


def _spread(squares: Tensor, mean: Tensor, weight: Tensor) -> Tensor:
    """A sum of squared deviations from a mean; `nan` where it is no more than what rounding makes of a constant."""
    rounding = weight * (64 * torch.finfo(squares.dtype).eps * mean) ** 2
    return torch.where(squares > rounding, squares, torch.nan)


def _ranks(values: Tensor, weight: Tensor) -> Tensor:
    """The rank of each value, from 1; a weight of 2 is two values."""
    if not len(values):
        return values.to(weight.dtype)
    order, [(below, among)] = tied_sums(values, weight)
    return torch.zeros_like(below).scatter(0, order, (below + among + 1) / 2)


def _moments(x: Tensor, y: Tensor, weight: Tensor) -> Moments:
    x, y = (torch.where(weight == 0, 0, side.to(weight.dtype)) for side in (x, y))
    total = weight.sum()
    count = torch.where(total == 0, 1, total)
    mean_x, mean_y = (weight * x).sum() / count, (weight * y).sum() / count
    dx, dy = x - mean_x, y - mean_y
    return Moments(total, mean_x, mean_y, *((weight * product).sum() for product in (dx * dx, dy * dy, dx * dy)))


def _of_moments(compute: Callable[[Moments], Tensor]) -> Metric:
    def init(*, device: torch.device | str | None = None) -> Moments:
        return Moments(*(zeros((), device) for _ in range(6)))

    def update(state: Moments, outputs: Tensor, targets: Tensor, *, weights: Tensor | None = None) -> Moments:
        _difference(outputs, targets)
        weight = row_weights(weights, outputs).to(state.weight.dtype)
        return merge(state, _moments(outputs, targets, weight))

    def merge(a: Moments, b: Moments) -> Moments:
        total = a.weight + b.weight
        count = torch.where(total == 0, 1, total)
        x, y = b.output - a.output, b.target - a.target
        share, both = b.weight / count, a.weight * b.weight / count
        return Moments(
            total,
            a.output + x * share,
            a.target + y * share,
            a.outputs + b.outputs + x * x * both,
            a.targets + b.targets + y * y * both,
            a.product + b.product + x * y * both,
        )

    return Metric(init, update, merge, compute)
