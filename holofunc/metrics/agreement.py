"""Metrics of a whole confusion matrix, and calibration."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from holofunc.metrics.base import Metric, check_scores, row_weights, zeros
from holofunc.metrics.classification import class_indices, confusion, confusion_scores
from holofunc.metrics.counts import decisions
from holofunc.ops.checks import check_counts

__all__ = ["Bins", "calibration_error", "class_scores", "kappa", "matthews"]


class Bins(NamedTuple):
    """The state of `calibration_error`, each (bins,): rows by confidence, its sum, and how many of them are right."""

    weight: Tensor
    confidence: Tensor
    hits: Tensor


def class_scores(num_classes: int, *, ignore_index: int = -100) -> Metric:
    """`confusion_scores` as a metric: accuracy and mean IoU, and recall, precision and IoU of each class.

    Args:
        num_classes: as in `confusion`.
        ignore_index: targets that are not counted.

    Returns:
        A metric that computes a dict: `accuracy`, `mean_iou` (0-d), `recall`, `precision`, `iou` (C,).

    Raises:
        ValueError: as in `confusion`.

    Example:
        >>> import torch
        >>> from holofunc import metrics
        >>> metric = metrics.class_scores(2)
        >>> scores = metric.compute(metric.update(metric.init(), torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0])))
        >>> scores["mean_iou"].item(), scores["recall"].tolist()
        (0.5, [0.5, 1.0])
    """
    return confusion(num_classes, ignore_index=ignore_index)._replace(compute=confusion_scores)


def kappa(
    num_classes: int = 1,
    *,
    weights: Literal["linear", "quadratic"] | None = None,
    threshold: float = 0.5,
    ignore_index: int = -100,
) -> Metric:
    """Cohen's kappa: agreement beyond chance, one minus the ratio of observed to expected disagreement.

    Args:
        num_classes: `C`; 1 is one yes-or-no decision, by logits.
        weights: what confusing class i with class j costs: 1, or |i - j| ("linear"), or its square ("quadratic").
        threshold: probability from which a decision is positive, inside (0, 1).
        ignore_index: targets that are not counted.

    Returns:
        A metric that computes a 0-d tensor, at most 1; `nan` where only one class occurs and is predicted.

    Raises:
        ValueError: if an option is out of range.

    Source: Cohen, "A Coefficient of Agreement for Nominal Scales" (1960); weights: Cohen (1968).

    Example:
        >>> import torch
        >>> from holofunc import metrics
        >>> metric = metrics.kappa(2)
        >>> metric.compute(metric.update(metric.init(), torch.tensor([0, 1, 1, 0]), torch.tensor([0, 1, 0, 0]))).item()
        0.5
    """
    if weights not in (None, "linear", "quadratic"):
        raise ValueError(f"weights must be None, 'linear' or 'quadratic', got {weights!r}")

    def compute(matrix: Tensor) -> Tensor:
        index = torch.arange(len(matrix), device=matrix.device)
        distance = (index - index[:, None]).abs().to(matrix.dtype)
        costs = distance**2 if weights == "quadratic" else distance if weights == "linear" else (distance > 0) * 1.0
        expected = matrix.sum(1, keepdim=True) * matrix.sum(0) / matrix.sum()
        return 1 - (costs * matrix).sum() / (costs * expected).sum()

    return _matrix(num_classes, threshold, ignore_index)._replace(compute=compute)


def matthews(num_classes: int = 1, *, threshold: float = 0.5, ignore_index: int = -100) -> Metric:
    """Matthews' correlation coefficient between predictions and targets.

    Args:
        num_classes: `C`; 1 is one yes-or-no decision, by logits.
        threshold: probability from which a decision is positive, inside (0, 1).
        ignore_index: targets that are not counted.

    Returns:
        A metric that computes a 0-d tensor in [-1, 1]; 0 where all predictions, or all targets, are one class.

    Raises:
        ValueError: if an option is out of range.

    Source: Matthews (1975), for any number of classes as Gorodkin, "Comparing two K-category assignments by a
        K-category correlation coefficient" (2004).

    Example:
        >>> import torch
        >>> from holofunc import metrics
        >>> metric = metrics.matthews()
        >>> logits = torch.tensor([2.0, 1.0, -1.0, -1.0])
        >>> metric.compute(metric.update(metric.init(), logits, torch.tensor([1, 0, 0, 0]))).item()
        0.5773502691896258
    """

    def compute(matrix: Tensor) -> Tensor:
        total, true, predicted = matrix.sum(), matrix.sum(1), matrix.sum(0)
        above = matrix.diagonal().sum() * total - (true * predicted).sum()
        below = (total**2 - (predicted**2).sum()) * (total**2 - (true**2).sum())
        score = torch.where(below > 0, above / torch.where(below > 0, below, 1).sqrt(), 0)
        return torch.where(total > 0, score, torch.nan)

    return _matrix(num_classes, threshold, ignore_index)._replace(compute=compute)


def calibration_error(
    num_classes: int = 1,
    *,
    bins: int = 15,
    norm: Literal["l1", "l2", "max"] = "l1",
    ignore_index: int = -100,
) -> Metric:
    """The difference between confidence and accuracy, over bins of confidence.

    With s_b the share of rows in bin b, c_b their mean confidence and a_b their accuracy: ``sum s_b |a_b - c_b|``
        ("l1", the expected calibration error), ``sqrt(sum s_b (a_b - c_b)^2)`` ("l2") or ``max |a_b - c_b|`` ("max").

    `update` takes logits (B, C, ...) and targets as in `accuracy`; for one decision logits and targets of one size.

    Args:
        num_classes: `C`; 1 is one yes-or-no decision, whose confidence is the probability of yes.
        bins: number of bins, at least 1; bin b is (b / bins, (b + 1) / bins].
        norm: "l1", "l2" or "max".
        ignore_index: targets that are not counted.

    Returns:
        A metric that computes a 0-d tensor in [0, 1].

    Raises:
        ValueError: if an option is out of range.

    Source: Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017).

    Example:
        >>> import torch
        >>> from holofunc import metrics
        >>> metric = metrics.calibration_error(2)
        >>> logits = torch.tensor([[0.9, 0.1], [0.9, 0.1]]).log()
        >>> round(metric.compute(metric.update(metric.init(), logits, torch.tensor([0, 1]))).item(), 4)
        0.4
    """
    check_counts(num_classes=num_classes, bins=bins)
    if norm not in ("l1", "l2", "max"):
        raise ValueError(f"norm must be one of 'l1', 'l2', 'max', got {norm!r}")

    def rows(outputs: Tensor, targets: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if num_classes == 1:
            _, true, weight = decisions(outputs, targets, weights, 0.5, ignore_index)
            return outputs.float().sigmoid(), true, weight
        check_scores(outputs, num_classes)
        labels = class_indices(targets, outputs, ignore_index)
        best = outputs.float().softmax(1).max(1)
        return best.values, best.indices == labels, row_weights(weights, labels) * (labels != ignore_index)

    def init(*, device: torch.device | str | None = None) -> Bins:
        return Bins(*(zeros((bins,), device) for _ in range(3)))

    def update(state: Bins, outputs: Tensor, targets: Tensor, *, weights: Tensor | None = None) -> Bins:
        confidence, right, weight = (x.flatten().to(state.weight.dtype) for x in rows(outputs, targets, weights))
        confidence = torch.where(weight == 0, 0, confidence)  # a padded row may hold nan
        place = (torch.ceil(confidence * bins).long() - 1).clamp(0, bins - 1)
        sums = (weight, weight * confidence, weight * right)
        return Bins(*(old.scatter_add(0, place, x) for old, x in zip(state, sums, strict=True)))

    def merge(a: Bins, b: Bins) -> Bins:
        return Bins(*map(torch.add, a, b))

    def compute(state: Bins) -> Tensor:
        count = torch.where(state.weight == 0, 1, state.weight)
        gaps, shares = ((state.hits - state.confidence) / count).abs(), state.weight / state.weight.sum()
        if norm == "max":
            return torch.where(shares.sum() > 0, gaps.max(), torch.nan)
        return (shares * gaps).sum() if norm == "l1" else (shares * gaps**2).sum().sqrt()

    return Metric(init, update, merge, compute)


def _matrix(num_classes: int, threshold: float, ignore_index: int) -> Metric:
    """The confusion matrix; of one decision, that of no and yes."""
    if num_classes != 1:
        return confusion(num_classes, ignore_index=ignore_index)
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must be inside (0, 1), got {threshold}")
    two = confusion(2, ignore_index=ignore_index)

    def update(state: Tensor, outputs: Tensor, targets: Tensor, *, weights: Tensor | None = None) -> Tensor:
        chosen, true, weight = decisions(outputs, targets, weights, threshold, ignore_index)
        return two.update(state, chosen.long(), true.long(), weights=weight)

    return two._replace(update=update)
