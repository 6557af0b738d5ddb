"""Ranking metrics: the areas under the ROC and precision-recall curves."""

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from holofunc.metrics.base import (
    Metric,
    Rows,
    check_scores,
    check_sizes,
    check_tensors,
    flat_rows,
    gathered,
    row_weights,
    zeros,
)
from holofunc.metrics.classification import class_indices
from holofunc.ops.checks import check_counts

__all__ = ["Histogram", "auroc", "average_precision", "tied_sums"]

Averaging: TypeAlias = Literal["macro", "weighted", "none"]


class Histogram(NamedTuple):
    """The state of the binned metrics, each (bins, C): rows that have a class and that have not, by their score."""

    positive: Tensor
    negative: Tensor


def auroc(
    num_classes: int = 1,
    *,
    multilabel: bool = False,
    average: Averaging = "macro",
    bins: int | None = None,
    ignore_index: int = -100,
) -> Metric:
    """Area under the ROC curve: the probability that a positive sample scores above a negative one (ties count half).

    `update` takes logits and targets as `precision` does; with one class per row, rows are ranked by their softmax. A
    row of score `nan` is ranked as badly as can be.

    Args:
        num_classes: `C`; 1 is one yes-or-no decision.
        multilabel: whether every class is a decision by itself; otherwise it is one class against the rest.
        average: "macro", the mean over the classes for which there are both kinds of rows; "weighted" by how often
            they occur; "none", one area per class (C,).
        bins: None is exact and keeps every row's scores until the end. A number of bins has a state of fixed size: rows
            whose probabilities share a bin are tied.
        ignore_index: targets that are not counted.

    Returns:
        A metric that computes a 0-d tensor in [0, 1], or (C,) for average="none".

    Raises:
        ValueError: if an option is out of range; in `update`, if shapes do not fit.

    Example:
        >>> import torch
        >>> from holofunc import metrics
        >>> metric = metrics.auroc()
        >>> scores = torch.tensor([0.1, 0.4, 0.35, 0.8])
        >>> metric.compute(metric.update(metric.init(), scores, torch.tensor([0, 0, 1, 1]))).item()
        0.75
    """
    return _ranking(_area, num_classes, multilabel, average, bins, ignore_index)


def average_precision(
    num_classes: int = 1,
    *,
    multilabel: bool = False,
    average: Averaging = "macro",
    bins: int | None = None,
    ignore_index: int = -100,
) -> Metric:
    """Area under the precision-recall curve, as a sum of steps: ``sum_n (R_n - R_{n-1}) P_n`` over all thresholds.

    Args:
        num_classes: as in `auroc`, like all that follows.
        multilabel: whether every class is a decision by itself.
        average: "macro", the mean over the classes that occur; "weighted" or "none".
        bins: None is exact; a number of bins has a state of fixed size.
        ignore_index: targets that are not counted.

    Returns:
        A metric that computes a 0-d tensor in [0, 1], or (C,) for average="none".

    Raises:
        ValueError: as in `auroc`.

    Example:
        >>> import torch
        >>> from holofunc import metrics
        >>> metric = metrics.average_precision()
        >>> scores = torch.tensor([0.1, 0.4, 0.35, 0.8])
        >>> round(metric.compute(metric.update(metric.init(), scores, torch.tensor([0, 0, 1, 1]))).item(), 4)
        0.8333
    """
    return _ranking(_precision_steps, num_classes, multilabel, average, bins, ignore_index)


# --- areas of one class, from rows that may be tied --------------------------------------------------------------


def tied_sums(scores: Tensor, *amounts: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Sort scores, and sum amounts along them, row by row of what is tied.

    Args:
        scores: shape (n, ...), n at least 1.
        *amounts: the same shape.

    Returns:
        The order, and for each amount, in that order, the sums of what lies below a row's ties, and of what lies below
        and among them.

    Example:
        >>> import torch
        >>> order, [(below, among)] = tied_sums(torch.tensor([2.0, 1.0, 2.0]), torch.ones(3))
        >>> below, among
        (tensor([0., 1., 1.]), tensor([1., 3., 3.]))
    """
    scores, order = scores.sort(0)
    differs = scores[1:] != scores[:-1]
    edge = torch.ones_like(scores[:1], dtype=torch.bool)
    first, last = torch.cat([edge, differs]), torch.cat([differs, edge])
    sums = []
    for amount in amounts:
        amount = amount.gather(0, order)
        upto = amount.cumsum(0)
        below = torch.where(first, upto - amount, -torch.inf).cummax(0).values
        among = torch.where(last, upto, torch.inf).flip(0).cummin(0).values.flip(0)
        sums.append((below, among))
    return order, sums


def _area(scores: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    order, [(below, among)] = tied_sums(scores, negative)
    won = (positive.gather(0, order) * (below + among) / 2).sum(0)
    return won / (positive.sum(0) * negative.sum(0))


def _precision_steps(scores: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    order, [(missed, _), (spared, _)] = tied_sums(scores, positive, negative)
    hits, errors = positive.sum(0) - missed, negative.sum(0) - spared  # from a row's score upwards, its ties included
    precision = hits / (hits + errors).clamp_min(torch.finfo(hits.dtype).tiny)
    return (positive.gather(0, order) * precision).sum(0) / positive.sum(0)


def _ranking(
    area: Callable[[Tensor, Tensor, Tensor], Tensor],
    num_classes: int,
    multilabel: bool,
    average: Averaging,
    bins: int | None,
    ignore_index: int,
) -> Metric:
    check_counts(num_classes=num_classes)
    check_counts(2, bins=2 if bins is None else bins)
    if average not in ("macro", "weighted", "none"):
        raise ValueError(f"average must be one of 'macro', 'weighted', 'none', got {average!r}")
    one_each = num_classes > 1 and not multilabel

    def columns(outputs: Tensor, targets: Tensor, weights: Tensor | None) -> tuple[tuple[Tensor, ...], Tensor]:
        true, weight = _truth(outputs, targets, weights, num_classes, one_each, ignore_index)
        outputs = outputs.float()
        scores = (
            outputs.reshape(-1, 1) if num_classes == 1 else flat_rows(outputs.log_softmax(1) if one_each else outputs)
        )
        worst = torch.where(true, -torch.inf, torch.inf)
        return (torch.where(scores.isnan(), worst, scores), true), weight

    def averaged(scores: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        if not len(scores):
            scores, positive, negative = (x.new_zeros(1, num_classes) for x in (scores, positive, negative))
        areas, there = area(scores, positive, negative), positive.sum(0)
        if average == "none":
            return areas
        shares = torch.where(areas.isnan(), 0, there if average == "weighted" else torch.ones_like(there))
        return torch.where(areas.isnan(), 0, areas * shares).sum() / shares.sum()

    def compute(rows: Rows) -> Tensor:
        scores, true = rows.columns
        weight = rows.weights if rows.weights.device.type == "mps" else rows.weights.double()
        return averaged(scores, weight * (true != 0), weight * (true == 0))

    if bins is None:
        return gathered(columns, ((num_classes,), (num_classes,)), compute, (num_classes,))
    return _binned(columns, torch.exp if one_each else torch.sigmoid, averaged, num_classes, bins)


def _binned(
    columns: Callable[..., tuple[tuple[Tensor, ...], Tensor]],
    probability: Callable[[Tensor], Tensor],
    averaged: Callable[[Tensor, Tensor, Tensor], Tensor],
    num_classes: int,
    bins: int,
) -> Metric:
    """The same of the bins that the probabilities of scores fall into."""

    def init(*, device: torch.device | str | None = None) -> Histogram:
        return Histogram(zeros((bins, num_classes), device), zeros((bins, num_classes), device))

    def update(state: Histogram, outputs: Tensor, targets: Tensor, *, weights: Tensor | None = None) -> Histogram:
        (scores, true), weight = columns(outputs, targets, weights)
        place = (probability(scores).clamp(0, 1) * bins).long().clamp_max(bins - 1)
        weight = weight.to(state.positive.dtype)
        return Histogram(
            state.positive.scatter_add(0, place, weight * true), state.negative.scatter_add(0, place, weight * ~true)
        )

    def merge(a: Histogram, b: Histogram) -> Histogram:
        return Histogram(*map(torch.add, a, b))

    def compute(state: Histogram) -> Tensor:
        places = torch.arange(bins, device=state.positive.device, dtype=state.positive.dtype)
        return averaged(places[:, None].expand(bins, num_classes), state.positive, state.negative)

    return Metric(init, update, merge, compute)


def _truth(
    outputs: Tensor, targets: Tensor, weights: Tensor | None, num_classes: int, one_each: bool, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Which rows have which class, and what each of that counts; both (n, C)."""
    if num_classes > 1:
        check_scores(outputs, num_classes)
    check_tensors(outputs, targets)
    if one_each:
        labels = class_indices(targets, outputs, ignore_index)
        weight = (row_weights(weights, labels) * (labels != ignore_index)).reshape(-1, 1)
        true = labels.reshape(-1, 1) == torch.arange(num_classes, device=labels.device)
        return true, weight.expand(true.shape)
    check_sizes(outputs, targets)
    targets = targets.reshape(outputs.shape)
    true = targets >= 0.5 if targets.is_floating_point() else targets > 0
    weight = row_weights(weights, outputs) * (targets != ignore_index)
    if num_classes == 1:
        return true.reshape(-1, 1), weight.reshape(-1, 1)
    return flat_rows(true), flat_rows(weight)
