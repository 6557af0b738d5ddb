"""Classification metrics: accuracy, the confusion matrix, and scores computed from it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from holofunc import tree
from holofunc.metrics.aggregation import mean
from holofunc.metrics.base import (
    Metric,
    average,
    check_scores,
    check_sizes,
    check_tensors,
    combine,
    row_weights,
    zeros,
)
from holofunc.ops.arithmetic import upcast
from holofunc.ops.checks import check_counts

__all__ = ["accuracy", "binary_accuracy", "class_indices", "confusion", "confusion_scores", "true_and_predicted"]


def accuracy(topk: int | Sequence[int] = 1, *, num_classes: int | None = None, ignore_index: int = -100) -> Metric:
    """Fraction of rows whose true class is among the `k` highest scores.

    Equal scores are ranked by class index, so that constant outputs score by chance, and a row with a `nan` for its
    true class is wrong.

    `update` takes outputs (B, C) or (B, C, ...) and targets of class indices (B, ...), or soft targets shaped like the
    outputs, whose largest entry is the true class.

    Args:
        topk: `k`, or several, each at least 1.
        num_classes: if given, ``topk`` is checked against it here; otherwise a `k` above the number of scores computes
            `nan`.
        ignore_index: targets that are not counted.

    Returns:
        A metric that computes a 0-d tensor for one `k`, a dict ``{"top1": ..., "top5": ...}`` for several.

    Raises:
        ValueError: if ``topk`` is empty, below 1 or above ``num_classes``.

    Example:
        >>> import torch
        >>> from holofunc import metrics
        >>> top = metrics.accuracy(topk=(1, 2))
        >>> scores = torch.tensor([[0.1, 0.9, 0.0], [0.5, 0.2, 0.3]])
        >>> {k: v.item() for k, v in top.compute(top.update(top.init(), scores, torch.tensor([1, 2]))).items()}
        {'top1': 0.5, 'top2': 1.0}
    """
    topk = tuple(topk) if isinstance(topk, Sequence) else (topk,)
    if not topk or not all(type(k) is int and k >= 1 for k in topk):
        raise ValueError(f"topk must be integers of at least 1, got {topk}")
    if num_classes is not None and max(topk) > num_classes:
        raise ValueError(f"topk must be at most num_classes={num_classes}, got {topk}")

    def in_top(k: int) -> Metric:
        def hits(outputs: Tensor, targets: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
            labels = class_indices(targets, outputs, ignore_index)
            counted = labels != ignore_index
            rank = _rank(outputs, torch.where(counted, labels, 0))
            values = (
                (rank < k).float() if k <= outputs.shape[1] else torch.full_like(rank, torch.nan, dtype=torch.float32)
            )
            return values, row_weights(weights, values) * counted

        return average(hits)

    if len(topk) == 1:
        return in_top(topk[0])
    return combine(**{f"top{k}": in_top(k) for k in topk})


def binary_accuracy(threshold: float = 0.5) -> Metric:
    """Fraction of elements on the right side of the threshold: ``(sigmoid(outputs) >= threshold) == (targets >= 0.5)``.

    `update` takes logits (B, ...) and as many targets of 0 and 1 (any dtype). A `nan` output is wrong.

    Args:
        threshold: probability from which an output counts as positive, inside (0, 1).

    Returns:
        A metric that computes a 0-d tensor.

    Raises:
        ValueError: if ``threshold`` is outside (0, 1); in `update`, if outputs and targets differ in size.

    Example:
        >>> import torch
        >>> from holofunc import metrics
        >>> metric = metrics.binary_accuracy()
        >>> logits = torch.tensor([[2.0], [-1.0], [0.5], [3.0]])
        >>> state = metric.update(metric.init(), logits, torch.tensor([1, 0, 0, 1]))
        >>> metric.compute(state).item()
        0.75
    """
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must be inside (0, 1), got {threshold}")

    def agree(outputs: Tensor, targets: Tensor) -> Tensor:
        check_sizes(outputs, targets)
        same = (upcast(outputs).sigmoid() >= threshold) == (targets.reshape(outputs.shape) >= 0.5)
        return (same & ~outputs.isnan()).float()

    return mean(agree)


def confusion(num_classes: int, *, ignore_index: int = -100) -> Metric:
    """Count how often each true class (row) was predicted as each class (column).

    `update` takes scores (B, C, ...) or predicted class indices (B, ...), and targets as in `accuracy`. A predicted
    index that is no class, or a row with a `nan`, has no cell and is not counted: where it shall count as wrong,
    `recall` knows it.

    Args:
        num_classes: number of classes `C`, at least 1.
        ignore_index: targets that are not counted.

    Returns:
        A metric that computes the matrix (C, C); `confusion_scores` derives accuracy, recall, precision and IoU from
        it.

    Raises:
        ValueError: if ``num_classes`` is below 1; in `update`, if the outputs have another number of scores.

    Example:
        >>> import torch
        >>> from holofunc import metrics
        >>> metric = metrics.confusion(3)
        >>> state = metric.update(metric.init(), torch.tensor([0, 2, 2, 1]), torch.tensor([0, 1, 2, 1]))
        >>> metric.compute(state).int().tolist()
        [[1, 0, 0], [0, 1, 1], [0, 0, 1]]
    """
    check_counts(num_classes=num_classes)

    def init(*, device: torch.device | str | None = None) -> Tensor:
        return zeros((num_classes, num_classes), device)

    def update(state: Tensor, outputs: Tensor, targets: Tensor, *, weights: Tensor | None = None) -> Tensor:
        labels, predicted = true_and_predicted(outputs, targets, num_classes, ignore_index)
        counted = (labels != ignore_index) & (predicted >= 0) & (predicted < num_classes)
        cell = torch.where(counted, labels * num_classes + predicted, 0)
        weight = (row_weights(weights, cell) * counted).to(state.dtype)
        return state + torch.zeros_like(state).flatten().scatter_add(0, cell.flatten(), weight.flatten()).view_as(state)

    return Metric(init, update, torch.add, lambda state: state)


def confusion_scores(matrix: Tensor) -> dict[str, Tensor]:
    """Derive the usual scores from a confusion matrix.

    With ``tp = diag(matrix)``: ``recall = tp / true``, ``precision = tp / predicted``,
    ``iou = tp / (true + predicted - tp)``.

    Args:
        matrix: counts (C, C), rows true, columns predicted.

    Returns:
        `accuracy` and `mean_iou` (0-d), `recall`, `precision` and `iou` (C,). A class for which a score is 0 / 0 has
        `nan` there, and classes that neither occur nor are predicted are left out of `mean_iou`.

    Example:
        >>> import torch
        >>> from holofunc import metrics
        >>> scores = metrics.confusion_scores(torch.tensor([[3.0, 1.0, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 0.0]]))
        >>> scores["accuracy"].item(), round(scores["mean_iou"].item(), 3), scores["recall"].tolist()
        (0.875, 0.775, [0.75, 1.0, nan])
    """
    hits, true, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    union = true + predicted - hits
    present = union > 0
    iou = hits / union
    return {
        "accuracy": hits.sum() / matrix.sum(),
        "mean_iou": torch.where(present, iou, 0).sum() / present.sum(),
        "recall": hits / true,
        "precision": hits / predicted,
        "iou": iou,
    }


def true_and_predicted(outputs: Tensor, targets: Tensor, num_classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """True and predicted classes, int64, of scores (B, K, ...) or of outputs that are classes already.

    A row with a `nan` predicts -1, no class.

    Example:
        >>> import torch
        >>> true_and_predicted(torch.tensor([[0.2, 0.8]]), torch.tensor([0]), 2, -100)
        (tensor([0]), tensor([1]))
    """
    check_tensors(outputs, targets)
    if not outputs.is_floating_point():
        return check_range(targets.long(), num_classes, ignore_index), outputs.long()
    check_scores(outputs, num_classes)
    predicted = torch.where(outputs.isnan().any(1), -1, outputs.argmax(1))  # which would take a nan for the greatest
    return class_indices(targets, outputs, ignore_index), predicted


def class_indices(targets: Tensor, outputs: Tensor, ignore_index: int = -100) -> Tensor:
    """Class indices (B, ...) for scores (B, C, ...), from indices or from soft targets.

    Raises:
        ValueError: if the targets are neither, or (where `check_range` looks) no classes.

    Example:
        >>> import torch
        >>> class_indices(torch.tensor([[0.2, 0.8]]), torch.zeros(1, 2))
        tensor([1])
    """
    check_tensors(outputs, targets)
    if targets.is_floating_point() and targets.shape == outputs.shape:
        return targets.argmax(1)
    expected = outputs.shape[:1] + outputs.shape[2:]
    if outputs.ndim < 2 or targets.is_floating_point() or targets.shape != expected:
        raise ValueError(
            f"targets must be integers {tuple(expected)} or soft targets {tuple(outputs.shape)} "
            f"for outputs (B, C, ...) {tuple(outputs.shape)}, got {targets.dtype} {tuple(targets.shape)}"
        )
    return check_range(targets.long(), outputs.shape[1], ignore_index)


def check_range(labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """The labels, which are refused outside of [0, num_classes), where looking waits for nothing: eagerly, on the CPU.

    Raises:
        ValueError: if one is no class, and not ``ignore_index``.

    Example:
        >>> import torch
        >>> check_range(torch.tensor([0, 2, 5]), 3, -100)
        Traceback (most recent call last):
        ...
        ValueError: targets must be in [0, 3) or equal ignore_index=-100, got 5
    """
    if not tree.is_known(labels) or labels.device.type != "cpu" or not labels.numel():
        return labels
    low, high = torch.aminmax(labels)
    if low >= 0 and high < num_classes:
        return labels
    wrong = labels[((labels < 0) | (labels >= num_classes)) & (labels != ignore_index)]
    if wrong.numel():
        wanted = f"targets must be in [0, {num_classes}) or equal ignore_index={ignore_index}"
        raise ValueError(f"{wanted}, got {wrong.flatten()[0]}")
    return labels


def _rank(outputs: Tensor, labels: Tensor) -> Tensor:
    """How many classes score above the labelled one; of equal scores the lower index is above, and so is a nan."""
    labels = labels.unsqueeze(1)
    score = outputs.gather(1, labels)
    classes = torch.arange(outputs.shape[1], device=outputs.device).reshape(-1, *(1,) * (outputs.ndim - 2))
    beaten = (outputs < score) | ((outputs == score) & (classes >= labels))
    return outputs.shape[1] - beaten.sum(1)
