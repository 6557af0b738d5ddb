"""Metrics of four counts per class: true positives, predictions, occurrences and samples."""

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias, TypedDict, Unpack

import torch
from torch import Tensor

from holofunc.metrics.base import (
    Metric,
    check_positive,
    check_scores,
    check_sizes,
    flat_rows,
    row_weights,
    zeros,
)
from holofunc.metrics.classification import true_and_predicted
from holofunc.ops.arithmetic import upcast
from holofunc.ops.checks import check_counts

__all__ = ["Counts", "decisions", "f_beta", "hamming", "iou", "precision", "recall", "specificity"]

Averaging: TypeAlias = Literal["macro", "micro", "weighted", "none"]


class Options(TypedDict, total=False):
    """What `precision` and its kin have in common."""

    multilabel: bool
    average: Averaging
    threshold: float
    ignore_index: int


class Counts(NamedTuple):
    """The state of metrics made of counts, each (C,): of rows that have a class and were predicted it, and so on."""

    hits: Tensor
    predicted: Tensor
    true: Tensor
    total: Tensor


def precision(
    num_classes: int = 1,
    *,
    multilabel: bool = False,
    average: Averaging = "macro",
    threshold: float = 0.5,
    ignore_index: int = -100,
) -> Metric:
    """Fraction of the predictions of a class that are right: ``hits / predicted``.

    A class that neither occurs nor is predicted has no score (`nan`) and is left out of averages; one that occurs and
    is never predicted scores 0.

    `update` takes scores (B, C, ...) or predicted indices (B, ...), and targets as in `accuracy`; if multilabel, logits
    and targets of 0 and 1, both (B, C, ...); for one decision logits (B, ...) or (B, 1, ...) and as many targets.

    Args:
        num_classes: `C`; 1 is one yes-or-no decision.
        multilabel: whether every class is a decision by itself, instead of one class per row.
        average: "macro", the mean over classes; "micro", the score of the sums over classes; "weighted", the mean
            weighted by how often a class occurs; "none", one score per class (C,).
        threshold: probability from which a decision is positive, inside (0, 1).
        ignore_index: targets that are not counted.

    Returns:
        A metric that computes a 0-d tensor, or (C,) for average="none".

    Raises:
        ValueError: if an option is out of range; in `update`, if shapes do not fit.

    Example:
        >>> import torch
        >>> from holofunc import metrics
        >>> metric = metrics.precision(3, average="none")
        >>> state = metric.update(metric.init(), torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1]))
        >>> metric.compute(state).tolist()
        [0.5, 1.0, nan]
    """
    given: Options = {
        "multilabel": multilabel,
        "average": average,
        "threshold": threshold,
        "ignore_index": ignore_index,
    }
    return _score(lambda c: _ratio(c.hits, c.predicted), num_classes, **given)


def recall(num_classes: int = 1, **options: Unpack[Options]) -> Metric:
    """Fraction of the occurrences of a class that are found: ``hits / true``.

    Args:
        num_classes: as in `precision`.
        **options: `multilabel`, `average`, `threshold` and `ignore_index`, as in `precision`.

    Returns:
        A metric that computes a 0-d tensor, or (C,) for average="none".

    Raises:
        ValueError: as in `precision`.

    Example:
        >>> import torch
        >>> from holofunc import metrics
        >>> metric = metrics.recall()
        >>> metric.compute(metric.update(metric.init(), torch.tensor([2.0, -1.0, 1.0]), torch.tensor([1, 1, 0]))).item()
        0.5
    """
    return _score(lambda c: _ratio(c.hits, c.true), num_classes, **options)


def f_beta(num_classes: int = 1, *, beta: float = 1.0, **options: Unpack[Options]) -> Metric:
    """The harmonic mean of precision and recall, recall counting ``beta`` squared times as much.

    ``(1 + beta^2) hits / (beta^2 true + predicted)``; F1 for beta = 1.

    Args:
        num_classes: as in `precision`.
        beta: above 0.
        **options: `multilabel`, `average`, `threshold` and `ignore_index`, as in `precision`.

    Returns:
        A metric that computes a 0-d tensor, or (C,) for average="none".

    Raises:
        ValueError: as in `precision`, or if beta is not above 0.

    Example:
        >>> import torch
        >>> from holofunc import metrics
        >>> metric = metrics.f_beta(3, average="micro")
        >>> metric.compute(metric.update(metric.init(), torch.eye(3), torch.tensor([0, 1, 0]))).item()
        0.6666666666666666
    """
    check_positive(beta=beta)

    def score(c: Counts) -> Tensor:
        return _ratio((1 + beta**2) * c.hits, beta**2 * c.true + c.predicted)

    return _score(score, num_classes, **options)


def iou(num_classes: int = 1, **options: Unpack[Options]) -> Metric:
    """Intersection over union of true and predicted occurrences of a class: ``hits / (true + predicted - hits)``.

    Args:
        num_classes: as in `precision`.
        **options: `multilabel`, `average`, `threshold` and `ignore_index`, as in `precision`.

    Returns:
        A metric that computes a 0-d tensor, or (C,) for average="none".

    Raises:
        ValueError: as in `precision`.

    Example:
        >>> import torch
        >>> from holofunc import metrics
        >>> metric = metrics.iou(2)
        >>> metric.compute(metric.update(metric.init(), torch.tensor([[0, 1, 1]]), torch.tensor([[0, 0, 1]]))).item()
        0.5
    """

    def score(c: Counts) -> Tensor:
        return _ratio(c.hits, c.true + c.predicted - c.hits)

    return _score(score, num_classes, **options)


def specificity(num_classes: int = 1, **options: Unpack[Options]) -> Metric:
    """Fraction of the samples without a class for which it was not predicted.

    Args:
        num_classes: as in `precision`.
        **options: `multilabel`, `average`, `threshold` and `ignore_index`, as in `precision`.

    Returns:
        A metric that computes a 0-d tensor, or (C,) for average="none".

    Raises:
        ValueError: as in `precision`.

    Example:
        >>> import torch
        >>> from holofunc import metrics
        >>> metric = metrics.specificity()
        >>> metric.compute(metric.update(metric.init(), torch.tensor([2.0, -1.0, 1.0]), torch.tensor([1, 0, 0]))).item()
        0.5
    """

    def score(c: Counts) -> Tensor:
        return _ratio(c.total - c.true - c.predicted + c.hits, c.total - c.true)

    return _score(score, num_classes, **options)


def hamming(
    num_classes: int = 1, *, multilabel: bool = False, threshold: float = 0.5, ignore_index: int = -100
) -> Metric:
    """Fraction of wrong decisions; with one class per sample, of wrong samples.

    Args:
        num_classes: as in `precision`, like all that follows.
        multilabel: whether every class is a decision by itself.
        threshold: inside (0, 1).
        ignore_index: targets that are not counted.

    Returns:
        A metric that computes a 0-d tensor.

    Raises:
        ValueError: as in `precision`.

    Example:
        >>> import torch
        >>> from holofunc import metrics
        >>> metric = metrics.hamming(2, multilabel=True)
        >>> metric.compute(metric.update(metric.init(), torch.tensor([[2.0, -1.0]]), torch.tensor([[1, 1]]))).item()
        0.5
    """
    counting = _counting(num_classes, multilabel, threshold, ignore_index)
    one_each = num_classes > 1 and not multilabel

    def compute(c: Counts) -> Tensor:
        if one_each:
            return 1 - c.hits.sum() / c.total[0]
        return (c.true + c.predicted - 2 * c.hits).sum() / c.total.sum()

    return counting._replace(compute=compute)


def decisions(
    outputs: Tensor, targets: Tensor, weights: Tensor | None, threshold: float, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What was decided, what is true, and how much each of these counts: all of the shape of the outputs.

    Example:
        >>> import torch
        >>> decisions(torch.tensor([[2.0]]), torch.tensor([1]), None, 0.5, -100)
        (tensor([[True]]), tensor([[True]]), tensor([[1.]]))
    """
    check_sizes(outputs, targets)
    targets = targets.reshape(outputs.shape)
    chosen = upcast(outputs).sigmoid() >= threshold if outputs.is_floating_point() else outputs > 0
    true = targets >= 0.5 if targets.is_floating_point() else targets > 0
    wrong_anyway = outputs.isnan()
    chosen = torch.where(wrong_anyway, ~true, chosen)
    return chosen, true, row_weights(weights, outputs) * (targets != ignore_index)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return above / torch.where(below == 0, 1, below)


def _score(
    score: Callable[[Counts], Tensor],
    num_classes: int,
    *,
    multilabel: bool = False,
    average: Averaging = "macro",
    threshold: float = 0.5,
    ignore_index: int = -100,
) -> Metric:
    if average not in ("macro", "micro", "weighted", "none"):
        raise ValueError(f"average must be one of 'macro', 'micro', 'weighted', 'none', got {average!r}")

    def compute(counts: Counts) -> Tensor:
        if average == "micro":
            counts = Counts(*(x.sum(0, keepdim=True) for x in counts))
        present = counts.true + counts.predicted > 0 if num_classes > 1 else counts.total > 0
        scores = torch.where(present, score(counts), torch.nan)
        if average == "none":
            return scores
        shares = present.to(scores.dtype) * (counts.true if average == "weighted" and num_classes > 1 else 1)
        return torch.where(shares > 0, scores * shares, 0).sum() / shares.sum()

    return _counting(num_classes, multilabel, threshold, ignore_index)._replace(compute=compute)


def _counting(num_classes: int, multilabel: bool, threshold: float, ignore_index: int) -> Metric:
    """A metric that counts; what it computes is its state."""
    check_counts(num_classes=num_classes)
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must be inside (0, 1), got {threshold}")

    def init(*, device: torch.device | str | None = None) -> Counts:
        return Counts(*(zeros((num_classes,), device) for _ in range(4)))

    def of_decisions(outputs: Tensor, targets: Tensor, weights: Tensor | None) -> list[Tensor]:
        if multilabel:
            check_scores(outputs, num_classes)
        chosen, true, weight = decisions(outputs, targets, weights, threshold, ignore_index)
        rows = [flat_rows(x) if multilabel else x.reshape(-1, 1) for x in (chosen & true, chosen, true, weight)]
        weight = rows[3].double() if rows[3].device.type != "mps" else rows[3]
        return [(weight * x).sum(0) for x in (*rows[:3], torch.ones_like(weight))]

    def of_labels(outputs: Tensor, targets: Tensor, weights: Tensor | None) -> list[Tensor]:
        labels, predicted = true_and_predicted(outputs, targets, num_classes, ignore_index)
        weight = (row_weights(weights, labels) * (labels != ignore_index)).flatten()
        weight = weight.double() if weight.device.type != "mps" else weight
        labels, predicted = torch.where(labels == ignore_index, 0, labels).flatten(), predicted.flatten()
        known = (predicted >= 0) & (predicted < num_classes)  # another is wrong, and no class's prediction

        def tally(classes: Tensor, amounts: Tensor) -> Tensor:
            return amounts.new_zeros(num_classes).scatter_add(0, classes, amounts)

        hits, predictions = tally(labels, weight * (labels == predicted)), torch.where(known, predicted, 0)
        return [hits, tally(predictions, weight * known), tally(labels, weight), weight.sum()]

    counted = of_decisions if multilabel or num_classes == 1 else of_labels

    def update(state: Counts, outputs: Tensor, targets: Tensor, *, weights: Tensor | None = None) -> Counts:
        new = counted(outputs, targets, weights)
        return Counts(*(old + x.to(old.dtype) for old, x in zip(state, new, strict=True)))

    def merge(a: Counts, b: Counts) -> Counts:
        return Counts(*map(torch.add, a, b))

    return Metric(init, update, merge, lambda state: state)
