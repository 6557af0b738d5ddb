"""Mean, sum, minimum and maximum of a value, and collection of all values."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from holofunc.metrics.base import Metric, Rows, average, gathered, row_weights, zeros

__all__ = ["collect", "max", "mean", "min", "sum"]

Value = Callable[[Tensor, Tensor], Tensor] | None


def mean(value: Value = None) -> Metric:
    """The mean of a value over all samples: ``sum(weights * value) / sum(weights)``.

    Args:
        value: ``value(outputs, targets)``, one number per row (B,), per element (B, ...), or one for the batch (),
            which then counts as often as the batch has rows. Without it, `outputs` is the value.

    Returns:
        A metric that computes a 0-d tensor.

    Raises:
        ValueError: in `update`, if the value has no rows that the weights (B,) could belong to.

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
        return values, row_weights(weights, values)

    return average(weighted_value)


def sum(value: Value = None) -> Metric:
    """The sum of a value over all samples: ``sum(weights * value)``.

    Args:
        value: as in `mean`, but one number for the batch counts once.

    Returns:
        A metric that computes a 0-d tensor; 0 before it has seen a row.

    Example:
        >>> import torch
        >>> from holofunc import metrics
        >>> total = metrics.sum()
        >>> total.compute(total.update(total.init(), torch.tensor([1.0, 2.0, 6.0]))).item()
        9.0
    """

    def update(
        state: Tensor, outputs: Tensor, targets: Tensor | None = None, *, weights: Tensor | None = None
    ) -> Tensor:
        values = _values(value, outputs, targets)
        weight = row_weights(weights, values).to(state.dtype)
        return state + torch.where(weight == 0, 0, values.to(state.dtype) * weight).sum()

    return Metric(lambda *, device=None: zeros((), device), update, torch.add, lambda state: state)


def min(value: Value = None) -> Metric:
    """The minimum of a value over all samples.

    Args:
        value: as in `mean`; rows of weight 0 are left out.

    Returns:
        A metric that computes a 0-d tensor.

    Example:
        >>> import torch
        >>> from holofunc import metrics
        >>> least = metrics.min()
        >>> least.compute(least.update(least.init(), torch.tensor([1.0, 2.0, 6.0]))).item()
        1.0
    """
    return _extreme(value, torch.inf, torch.amin, torch.minimum)


def max(value: Value = None) -> Metric:
    """The maximum of a value over all samples.

    Args:
        value: as in `mean`; rows of weight 0 are left out.

    Returns:
        A metric that computes a 0-d tensor.

    Example:
        >>> import torch
        >>> from holofunc import metrics
        >>> worst = metrics.max(lambda outputs, targets: (outputs - targets).abs())
        >>> worst.compute(worst.update(worst.init(), torch.tensor([1.0, 2.0]), torch.tensor([1.5, 0.0]))).item()
        2.0
    """
    return _extreme(value, -torch.inf, torch.amax, torch.maximum)


def collect(value: Callable[[Any, Any], Tensor] | None = None, *, shape: tuple[int, ...] = ()) -> Metric:
    """Keep a value of every sample, in the order of the data, for instance to write predictions to a file.

    Args:
        value: ``value(outputs, targets)``, shape (B, *shape). Without it, `outputs`.
        shape: of one row's value.

    Returns:
        A metric that computes the values of all rows, shape (n, *shape), padding (``weights=0``) left out.

    Example:
        >>> import torch
        >>> from holofunc import metrics
        >>> predictions = metrics.collect(lambda outputs, targets: outputs.argmax(1))
        >>> state = predictions.update(predictions.init(), torch.eye(3), weights=torch.tensor([1.0, 1.0, 0.0]))
        >>> predictions.compute(state)
        tensor([0, 1])
    """

    def columns(outputs: Any, targets: Any, weights: Tensor | None) -> tuple[tuple[Tensor], Tensor]:
        values = _values(value, outputs, targets)
        if values.shape[1:] != shape:
            wanted = f"value must have shape {('B', *shape)}".replace("'", "")
            raise ValueError(f"{wanted}, got {tuple(values.shape)}: see collect(shape=)")
        return (values,), row_weights(weights, values.flatten(1)[:, 0] if values.ndim > 1 else values)

    def compute(rows: Rows) -> Tensor:
        return rows.columns[0][rows.weights != 0]

    return gathered(columns, (shape,), compute)


def _values(value: Callable[[Any, Any], Tensor] | None, outputs: Any, targets: Any) -> Tensor:
    return outputs if value is None else value(outputs, targets)


def _extreme(
    value: Value, nothing: float, over: Callable[[Tensor], Tensor], of_two: Callable[[Tensor, Tensor], Tensor]
) -> Metric:
    def init(*, device: torch.device | str | None = None) -> Tensor:
        return zeros((), device) + nothing

    def update(
        state: Tensor, outputs: Tensor, targets: Tensor | None = None, *, weights: Tensor | None = None
    ) -> Tensor:
        values = _values(value, outputs, targets)
        if not values.numel():
            return state
        counted = row_weights(weights, values) != 0
        return of_two(state, over(torch.where(counted, values.to(state.dtype), nothing)))

    return Metric(init, update, of_two, lambda state: torch.where(state == nothing, torch.nan, state))
