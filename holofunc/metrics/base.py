"""A metric as four pure functions over device tensors: `init`, `update`, `merge`, `compute`.

A metric's state is plain data, so it lives inside a compiled step, is stacked by `vmap`, summed over ranks by `merge`
and saved like any other tree. Nothing is read back to the host before `compute`, and `merge` of any split of the rows
equals one pass over all of them: a short last batch and padded rows (``weights=0``) are counted for what they are.

Accumulators are float64 (float32 on MPS, which has no float64), so that counts stay exact far beyond the number of
pixels in a segmentation set. A metric that has seen no row is `nan`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Average",
    "Metric",
    "Rows",
    "accurate",
    "average",
    "check_positive",
    "check_scores",
    "check_sizes",
    "check_tensors",
    "combine",
    "flat_rows",
    "gathered",
    "row_weights",
    "zeros",
]


class Metric(NamedTuple):
    """Four pure functions that measure something over many batches.

    A metric is changed by replacing a function, as in the example.

    Attributes:
        init: ``init(*, device=None) -> state``, the state of a metric that has seen nothing.
        update: ``update(state, outputs, targets=None, *, weights=None) -> state``; `weights` (B,) counts each row, 0
            leaves it out.
        merge: ``merge(a, b) -> state``, the state that has seen what both have.
        compute: ``compute(state)``, a tensor or a dict of tensors.

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
    """The state of every metric that is a weighted average: ``total / weight``, both 0-d."""

    total: Tensor
    weight: Tensor


class Rows(NamedTuple):
    """The state of metrics that need all samples at once: a value and a weight per sample.

    It grows with the rows. In a compiled step let `update` begin with ``init()``, of no rows, and `merge` outside of
    it, as `holofunc.train.evaluate` does: then all shapes are those of the batch."""

    columns: tuple[Tensor, ...]
    weights: Tensor


def combine(**metrics: Metric) -> Metric:
    """Combine several metrics of the same outputs and targets into one; states and results are dicts by name.

    A metric that computes a dict itself contributes ``name/key`` for each of its keys.

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


# --- two kinds of state ------------------------------------------------------------------------------------------


def average(weighted_value: Callable[..., tuple[Tensor, Tensor]]) -> Metric:
    """The metric of a function ``(outputs, targets, weights) -> (values, weight of each value)``.

    Example:
        >>> import torch
        >>> metric = average(lambda outputs, targets, weights: (outputs, torch.tensor([1.0, 3.0])))
        >>> metric.compute(metric.update(metric.init(), torch.tensor([0.0, 4.0])))
        tensor(3., dtype=torch.float64)
    """

    def init(*, device: torch.device | str | None = None) -> Average:
        return Average(zeros((), device), zeros((), device))

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


def gathered(
    columns: Callable[..., tuple[tuple[Tensor, ...], Tensor]],
    empty: tuple[tuple[int, ...], ...],
    compute: Callable[[Rows], Any],
    weighted: tuple[int, ...] = (),
) -> Metric:
    """The metric that keeps rows.

    Args:
        columns: ``columns(outputs, targets, weights) -> (columns, weights)``, each of n rows.
        empty: the shapes of one row of each column.
        compute: ``compute(rows)``, from all rows.
        weighted: the shape of one row's weights.

    Example:
        >>> import torch
        >>> keep = lambda outputs, targets, weights: ((outputs,), torch.ones_like(outputs))
        >>> metric = gathered(keep, ((),), lambda rows: rows.columns[0].max())
        >>> metric.compute(metric.update(metric.init(), torch.tensor([1.0, 3.0])))
        tensor(3.)
    """

    def init(*, device: torch.device | str | None = None) -> Rows:
        kept = tuple(torch.zeros((0, *shape), device=device) for shape in empty)
        return Rows(kept, torch.zeros((0, *weighted), device=device))

    def update(state: Rows, outputs: Any, targets: Any = None, *, weights: Tensor | None = None) -> Rows:
        return merge(state, Rows(*columns(outputs, targets, weights)))

    def merge(a: Rows, b: Rows) -> Rows:
        return Rows(
            tuple(torch.cat([x.to(y.dtype), y.to(y.dtype)]) for x, y in zip(a.columns, b.columns, strict=True)),
            torch.cat([a.weights, b.weights]),
        )

    return Metric(init, update, merge, compute)


def zeros(shape: tuple[int, ...], device: torch.device | str | None) -> Tensor:
    """An accumulator.

    Example:
        >>> zeros((2,), None)
        tensor([0., 0.], dtype=torch.float64)
    """
    zeros = torch.zeros(shape, device=device)
    return zeros if zeros.device.type == "mps" else zeros.double()


def check_positive(**values: Any) -> None:
    """Refuse what is not above 0, or not finite.

    Example:
        >>> check_positive(beta=0.0)
        Traceback (most recent call last):
        ...
        ValueError: beta must be positive and finite, got 0.0
    """
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")


def check_tensors(outputs: Any, targets: Any) -> None:
    """Refuse outputs and targets that are no tensors.

    Example:
        >>> import torch
        >>> check_tensors(torch.zeros(2), None)
        Traceback (most recent call last):
        ...
        TypeError: targets must be a tensor, got NoneType
    """
    for name, value in (("outputs", outputs), ("targets", targets)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def check_sizes(outputs: Any, targets: Any) -> None:
    """Refuse targets that are not one for each output.

    Example:
        >>> import torch
        >>> check_sizes(torch.zeros(2, 1), torch.zeros(3))
        Traceback (most recent call last):
        ...
        ValueError: targets must have as many elements as outputs (2, 1), got (3,)
    """
    check_tensors(outputs, targets)
    if outputs.numel() != targets.numel():
        raise ValueError(
            f"targets must have as many elements as outputs {tuple(outputs.shape)}, got {tuple(targets.shape)}"
        )


def check_scores(outputs: Any, num_classes: int) -> None:
    """Refuse outputs that are not scores of so many classes.

    Example:
        >>> import torch
        >>> check_scores(torch.zeros(2, 4), 3)
        Traceback (most recent call last):
        ...
        ValueError: outputs must be (B, 3, ...) scores, got (2, 4)
    """
    check_tensors(outputs, outputs)
    if outputs.ndim < 2 or outputs.shape[1] != num_classes:
        raise ValueError(f"outputs must be (B, {num_classes}, ...) scores, got {tuple(outputs.shape)}")


def accurate(x: Tensor) -> Tensor:
    """As float64 (float32 on MPS): differences of integers do not wrap, squares of half precision do not overflow.

    Example:
        >>> import torch
        >>> accurate(torch.tensor(1, dtype=torch.uint8)) - accurate(torch.tensor(2, dtype=torch.uint8))
        tensor(-1., dtype=torch.float64)
    """
    return x.float() if x.device.type == "mps" else x.double()


def row_weights(weights: Tensor | None, values: Tensor) -> Tensor:
    """Weights of shape (B,) (or of the values' leading axes), repeated for every element of the values.

    Raises:
        ValueError: if the shapes do not fit.

    Example:
        >>> import torch
        >>> row_weights(torch.tensor([1.0, 0.0]), torch.zeros(2, 2))
        tensor([[1., 1.],
                [0., 0.]])
    """
    if weights is None:
        return torch.ones_like(values, dtype=torch.float32)
    weights = torch.as_tensor(weights, device=values.device)
    if weights.shape != values.shape[: weights.ndim]:
        raise ValueError(
            f"weights {tuple(weights.shape)} must match the leading axes of the values {tuple(values.shape)}"
            + ("; a batch mean cannot be weighted by row: return one value per row" if values.ndim == 0 else "")
        )
    return weights.reshape(weights.shape + (1,) * (values.ndim - weights.ndim)).expand(values.shape)


def flat_rows(x: Tensor) -> Tensor:
    """Scores (B, K, ...) as rows (n, K).

    Example:
        >>> import torch
        >>> flat_rows(torch.zeros(2, 3, 4, 5)).shape
        torch.Size([40, 3])
    """
    return x.movedim(1, -1).reshape(-1, x.shape[1])
