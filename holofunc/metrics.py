"""Metrics as four pure functions over device tensors: `init`, `update`, `merge`, `compute`.

A metric's state is plain data, so it lives inside a compiled step, is stacked by `vmap`, summed over ranks by `merge`
and saved like any other tree. Nothing is read back to the host before `compute`, and `merge` of any split of the rows
equals one pass over all of them: a short last batch and padded rows (`weights=0`) are counted for what they are.

Accumulators are float64 (float32 on MPS, which has no float64), so that counts stay exact far beyond the number of
pixels in a segmentation set. A metric that has seen no row is `nan`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Average", "Metric", "accuracy", "binary_accuracy", "combine", "confusion", "confusion_scores", "mean"]


class Metric(NamedTuple):
    """Four pure functions that measure something over many batches.

    Attributes:
        init: `init(*, device=None) -> state`, the state of a metric that has seen nothing.
        update: `update(state, outputs, targets=None, *, weights=None) -> state`; `weights` (B,) counts each row, 0
            leaves it out.
        merge: `merge(a, b) -> state`, the state that has seen what both have.
        compute: `compute(state)`, a tensor or a dict of tensors.

    A metric is changed by replacing a function:

    Example:
        >>> from holofunc import metrics
        >>> error = metrics.accuracy()
        >>> error = error._replace(compute=lambda state, accuracy=error.compute: 1 - accuracy(state))
    """

    init: Callable[..., Any]
    update: Callable[..., Any]
    merge: Callable[[Any, Any], Any]
    compute: Callable[[Any], Any]


class Average(NamedTuple):
    """The state of every metric that is a weighted average: `total / weight`, both 0-d."""

    total: Tensor
    weight: Tensor


def mean(value: Callable[[Tensor, Tensor], Tensor] | None = None) -> Metric:
    """Average a value over all rows: `sum(weights * value) / sum(weights)`.

    Args:
        value: `value(outputs, targets)`, one number per row (B,), per element (B, ...), or one for the batch (), which
            then counts as often as the batch has rows. Without it, `outputs` is the value.

    Returns:
        A metric that computes a 0-d tensor.

    Raises:
        ValueError: In `update`, if the value has no rows that the weights (B,) could belong to.

    Example:
        >>> import torch
        >>> from holofunc import metrics
        >>> loss = metrics.mean()
        >>> state = loss.update(loss.init(), torch.tensor([1.0, 2.0, 6.0]))
        >>> state = loss.update(state, torch.tensor([3.0, 100.0]), weights=torch.tensor([1.0, 0.0]))
        >>> loss.compute(state).item()
        3.0
    """

    def weighted_value(outputs: Tensor, targets: Tensor | None, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        if value is None:
            values = outputs
        else:
            values = value(outputs, targets)  # type: ignore[arg-type]
            if values.ndim == 0 and weights is None:  # a batch mean stands for as many rows as it was taken over
                return values, torch.as_tensor(float(outputs.shape[0]), device=values.device)
        return values, _row_weights(weights, values)

    return _average(weighted_value)


def accuracy(topk: int | Sequence[int] = 1, *, num_classes: int | None = None, ignore_index: int = -100) -> Metric:
    """Fraction of rows whose true class is among the `k` highest scores.

    Equal scores are ranked by class index, so that constant outputs score by chance, and a row with a `nan` for its
    true class is wrong.

    Args:
        topk: `k`, or several, each at least 1.
        num_classes: If given, `topk` is checked against it here; otherwise a `k` above the number of scores computes
            `nan`.
        ignore_index: Targets that are not counted.

    `update` takes outputs (B, C) or (B, C, ...) and targets of class indices (B, ...), or soft targets shaped like the
    outputs, whose largest entry is the true class.

    Returns:
        A metric that computes a 0-d tensor for one `k`, a dict `{"top1": ..., "top5": ...}` for several.

    Raises:
        ValueError: If `topk` is empty, below 1 or above `num_classes`.

    Example:
        >>> import torch
        >>> from holofunc import metrics
        >>> top = metrics.accuracy(topk=(1, 2))
        >>> scores = torch.tensor([[0.1, 0.9, 0.0], [0.5, 0.2, 0.3]])
        >>> {k: v.item() for k, v in top.compute(top.update(top.init(), scores, torch.tensor([1, 2]))).items()}
        {'top1': 0.5, 'top2': 1.0}
    """
    topk = (topk,) if isinstance(topk, int) else tuple(topk)
    if not topk or min(topk) < 1:
        raise ValueError(f"topk must hold numbers of at least 1, got {topk}")
    if num_classes is not None and max(topk) > num_classes:
        raise ValueError(f"topk must be at most num_classes={num_classes}, got {topk}")

    def in_top(k: int) -> Metric:
        def hits(outputs: Tensor, targets: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
            labels = _class_indices(targets, outputs)
            counted = labels != ignore_index
            rank = _rank(outputs, torch.where(counted, labels, 0))
            values = (
                (rank < k).float() if k <= outputs.shape[1] else torch.full_like(rank, torch.nan, dtype=torch.float32)
            )
            return values, _row_weights(weights, values) * counted

        return _average(hits)

    if len(topk) == 1:
        return in_top(topk[0])
    return combine(**{f"top{k}": in_top(k) for k in topk})


def binary_accuracy(threshold: float = 0.5) -> Metric:
    """Fraction of elements on the right side of the threshold: `(sigmoid(outputs) >= threshold) == (targets >= 0.5)`.

    Args:
        threshold: Probability from which an output counts as positive, inside (0, 1).

    `update` takes logits (B, ...) and as many targets of 0 and 1 (any dtype). A `nan` output is wrong.

    Returns:
        A metric that computes a 0-d tensor.

    Raises:
        ValueError: If `threshold` is outside (0, 1); in `update`, if outputs and targets differ in size.

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
        if outputs.numel() != targets.numel():
            raise ValueError(
                f"targets must have as many elements as outputs {tuple(outputs.shape)}, got {tuple(targets.shape)}"
            )
        same = (outputs.sigmoid() >= threshold) == (targets.reshape(outputs.shape) >= 0.5)
        return (same & ~outputs.isnan()).float()

    return mean(agree)


def confusion(num_classes: int, *, ignore_index: int = -100) -> Metric:
    """Count how often each true class (row) was predicted as each class (column).

    Args:
        num_classes: Number of classes `C`, at least 1.
        ignore_index: Targets that are not counted.

    `update` takes scores (B, C, ...) or predicted class indices (B, ...), and targets as in `accuracy`.

    Returns:
        A metric that computes the matrix (C, C); `confusion_scores` derives accuracy, recall, precision and IoU from
        it.

    Raises:
        ValueError: If `num_classes` is below 1; in `update`, if the outputs have another number of scores.

    Example:
        >>> import torch
        >>> from holofunc import metrics
        >>> metric = metrics.confusion(3)
        >>> state = metric.update(metric.init(), torch.tensor([0, 2, 2, 1]), torch.tensor([0, 1, 2, 1]))
        >>> metric.compute(state).int().tolist()
        [[1, 0, 0], [0, 1, 1], [0, 0, 1]]
    """
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")

    def init(*, device: torch.device | str | None = None) -> Tensor:
        return _zeros((num_classes, num_classes), device)

    def update(state: Tensor, outputs: Tensor, targets: Tensor, *, weights: Tensor | None = None) -> Tensor:
        if outputs.is_floating_point():
            if outputs.ndim < 2 or outputs.shape[1] != num_classes:
                raise ValueError(f"outputs must be (B, {num_classes}, ...) scores, got {tuple(outputs.shape)}")
            labels, predicted = _class_indices(targets, outputs), outputs.argmax(1)
        else:
            labels, predicted = targets, outputs
        counted = labels != ignore_index
        cell = torch.where(counted, labels * num_classes + predicted, 0)
        weight = (_row_weights(weights, cell) * counted).to(state.dtype)
        return state + torch.zeros_like(state).flatten().scatter_add(0, cell.flatten(), weight.flatten()).view_as(state)

    return Metric(init, update, torch.add, lambda state: state)


def confusion_scores(matrix: Tensor) -> dict[str, Tensor]:
    """Derive the usual scores from a confusion matrix.

    With `tp = diag(matrix)`: `recall = tp / true`, `precision = tp / predicted`, `iou = tp / (true + predicted - tp)`.

    Args:
        matrix: Counts (C, C), rows true, columns predicted.

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


def combine(**metrics: Metric) -> Metric:
    """Make one metric of several that see the same outputs and targets; states and results are dicts by name.

    A metric that computes a dict itself contributes `name/key` for each of its keys.

    Returns:
        A metric that computes a flat dict of tensors.

    Example:
        >>> import torch
        >>> from holofunc import metrics
        >>> peak = metrics.mean(lambda outputs, targets: outputs.amax(1))
        >>> both = metrics.combine(accuracy=metrics.accuracy(topk=(1, 2)), peak=peak)
        >>> state = both.update(both.init(), torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([2]))
        >>> {name: value.item() for name, value in both.compute(state).items()}
        {'accuracy/top1': 0.0, 'accuracy/top2': 1.0, 'peak': 3.0}
    """

    def init(*, device: torch.device | str | None = None) -> dict[str, Any]:
        return {name: metric.init(device=device) for name, metric in metrics.items()}

    def update(
        state: dict[str, Any], outputs: Tensor, targets: Tensor | None = None, *, weights: Tensor | None = None
    ) -> dict[str, Any]:
        return {name: m.update(state[name], outputs, targets, weights=weights) for name, m in metrics.items()}

    def merge(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
        return {name: metric.merge(a[name], b[name]) for name, metric in metrics.items()}

    def compute(state: dict[str, Any]) -> dict[str, Tensor]:
        results = {}
        for name, metric in metrics.items():
            value = metric.compute(state[name])
            if isinstance(value, Mapping):
                results.update({f"{name}/{key}": inner for key, inner in value.items()})
            else:
                results[name] = value
        return results

    return Metric(init, update, merge, compute)


def _average(weighted_value: Callable[..., tuple[Tensor, Tensor]]) -> Metric:
    """The metric of a function `(outputs, targets, weights) -> (values, weight of each value)`."""

    def init(*, device: torch.device | str | None = None) -> Average:
        return Average(_zeros((), device), _zeros((), device))

    def update(
        state: Average, outputs: Tensor, targets: Tensor | None = None, *, weights: Tensor | None = None
    ) -> Average:
        values, weight = weighted_value(outputs, targets, weights)
        weight = weight.to(state.weight.dtype)
        values = torch.where(weight == 0, 0, values.to(state.total.dtype))  # a padded row may hold nan
        return Average(state.total + (values * weight).sum(), state.weight + weight.sum())

    def merge(a: Average, b: Average) -> Average:
        return Average(a.total + b.total, a.weight + b.weight)

    return Metric(init, update, merge, lambda state: state.total / state.weight)


def _zeros(shape: tuple[int, ...], device: torch.device | str | None) -> Tensor:
    zeros = torch.zeros(shape, device=device)
    return zeros if zeros.device.type == "mps" else zeros.double()


def _row_weights(weights: Tensor | None, values: Tensor) -> Tensor:
    """Weights of shape (B,) (or of the values' leading axes), repeated for every element of the values."""
    if weights is None:
        return torch.ones_like(values, dtype=torch.float32)
    weights = torch.as_tensor(weights, device=values.device)
    if weights.shape != values.shape[: weights.ndim]:
        raise ValueError(
            f"weights {tuple(weights.shape)} must match the leading axes of the values {tuple(values.shape)}"
            + ("; a batch mean cannot be weighted by row: return one value per row" if values.ndim == 0 else "")
        )
    return weights.reshape(weights.shape + (1,) * (values.ndim - weights.ndim)).expand(values.shape)


def _class_indices(targets: Tensor, outputs: Tensor) -> Tensor:
    """Class indices (B, ...) for scores (B, C, ...), from indices or from soft targets."""
    if targets.is_floating_point() and targets.shape == outputs.shape:
        return targets.argmax(1)
    expected = outputs.shape[:1] + outputs.shape[2:]
    if outputs.ndim < 2 or targets.is_floating_point() or targets.shape != expected:
        raise ValueError(
            f"targets must be integers {tuple(expected)} or soft targets {tuple(outputs.shape)} "
            f"for outputs (B, C, ...) {tuple(outputs.shape)}, got {targets.dtype} {tuple(targets.shape)}"
        )
    return targets.long()


def _rank(outputs: Tensor, labels: Tensor) -> Tensor:
    """How many classes score above the labelled one; of equal scores the lower index is above, and so is a nan."""
    labels = labels.unsqueeze(1)
    score = outputs.gather(1, labels)
    classes = torch.arange(outputs.shape[1], device=outputs.device).reshape(-1, *(1,) * (outputs.ndim - 2))
    beaten = (outputs < score) | ((outputs == score) & (classes >= labels))
    return outputs.shape[1] - beaten.sum(1)
