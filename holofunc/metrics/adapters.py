"""Adapters for metrics of torchmetrics."""

import importlib.util
import itertools
from typing import Any

import torch
from torch import Tensor

from holofunc.metrics.base import Metric, Rows, row_weights

__all__ = ["from_torchmetrics"]


def from_torchmetrics(metric: Any) -> Metric:
    """Make a pure metric from a metric of torchmetrics.

    All outputs and targets are kept until the end, when a fresh copy of ``metric`` sees them at once: so padding is
    left out, states merge, and nothing that torchmetrics remembers leaks into a step. Needs the extra
    ``pip install 'holofunc[torchmetrics]'``.

    Args:
        metric: a `torchmetrics.Metric` whose `update` takes (outputs, targets), outputs only, or more: then targets are
            a tuple, as ``(targets, indexes)`` of retrieval; or a `MetricCollection` of such. Each of these is a tensor
            or, as texts and dicts of boxes are, a list with an entry per row. It is copied, not changed.

    Returns:
        A metric that computes what `metric.compute` does. Weights other than 0 count as 1.

    Raises:
        ImportError: if torchmetrics is not installed.
        TypeError: if ``metric`` is not one of its metrics.

    Example:
        >>> from holofunc import metrics
        >>> metrics.from_torchmetrics("accuracy")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        TypeError: metric must be a torchmetrics.Metric or MetricCollection, got 'accuracy'
    """
    if importlib.util.find_spec("torchmetrics") is None:
        raise ImportError("from_torchmetrics needs torchmetrics: pip install 'holofunc[torchmetrics]'")
    import torchmetrics  # not at import time: an extra

    if not isinstance(metric, (torchmetrics.Metric, torchmetrics.MetricCollection)):
        raise TypeError(f"metric must be a torchmetrics.Metric or MetricCollection, got {metric!r}")
    fresh = metric.clone()
    fresh.reset()

    def init(*, device: torch.device | str | None = None) -> Rows:
        return Rows((), torch.zeros(0, device=device))

    def update(state: Rows, outputs: Any, targets: Any = None, *, weights: Tensor | None = None) -> Rows:
        rest = targets if isinstance(targets, tuple) else () if targets is None else (targets,)
        columns = (outputs, *rest)
        for column in columns:
            if not isinstance(column, (Tensor, list)):
                raise TypeError(f"outputs and targets must be tensors or lists, got {type(column).__name__}")
        device = outputs.device if isinstance(outputs, Tensor) else state.weights.device
        return merge(state, Rows(columns, row_weights(weights, torch.ones(len(outputs), device=device))))

    def merge(a: Rows, b: Rows) -> Rows:
        if not a.columns or not b.columns:
            return a if a.columns else b
        pairs = zip(a.columns, b.columns, strict=True)
        joined = (torch.cat([x, y]) if isinstance(x, Tensor) else [*x, *y] for x, y in pairs)
        return Rows(tuple(joined), torch.cat([a.weights, b.weights]))

    def compute(state: Rows) -> Any:
        copy, counted = fresh.clone().to(state.weights.device), state.weights != 0
        if not state.columns or not bool(counted.any()):
            return torch.tensor(torch.nan, device=state.weights.device)
        copy.update(*(_chosen(column, counted) for column in state.columns))
        return copy.compute()

    return Metric(init, update, merge, compute)


def _chosen(column: Any, rows: Tensor) -> Any:
    return column[rows] if isinstance(column, Tensor) else list(itertools.compress(column, rows.tolist()))
