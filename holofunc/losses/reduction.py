"""The one contract of all losses: which targets are allowed, what a class weight means, how values are reduced.

A loss assigns to every position of a batch one value per class, l_k, the loss it would have were k its label. The
targets choose among those values (hard labels) or average them (soft targets); class weights, ignored positions, label
smoothing and the reduction are the same arithmetic for every loss, and live here.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["MeanOver", "Reduction", "check_labels", "classwise", "column", "is_hard", "prepare", "reduce", "upcast"]

Reduction = Literal["mean", "sum", "none"]
MeanOver = Literal["weights", "samples"]


def upcast(x: Tensor) -> Tensor:
    """Half precision as float32; float32 and float64 as they are.

    Args:
        x: Any floating-point tensor.

    Returns:
        The same values.

    Example:
        >>> import torch
        >>> upcast(torch.ones(2, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def class_dim(logits: Tensor) -> int:
    """The dimension of `logits` that counts classes: 1 for a batch, 0 for one unbatched sample of shape (K,)."""
    return min(logits.ndim - 1, 1)


def column(weight: Tensor, logits: Tensor) -> Tensor:
    """Per-class values, of shape (K,), shaped to broadcast against `logits`.

    Args:
        weight: Per-class values, shape (K,).
        logits: What they will be combined with, shape (N, K, ...) or (K,).

    Returns:
        Shape (K, 1, ...) and the dtype of `logits`.

    Example:
        >>> import torch
        >>> column(torch.ones(3), torch.zeros(2, 3, 4, 4)).shape
        torch.Size([3, 1, 1])
    """
    return weight.to(logits.dtype).reshape(-1, *[1] * (logits.ndim - class_dim(logits) - 1))


def is_hard(logits: Tensor, targets: Tensor) -> bool:
    """Whether `targets` are class labels (one dimension fewer than `logits`) rather than one value per class.

    Args:
        logits: Shape (N, K, ...) or (K,).
        targets: Shape (N, ...) or (), or that of `logits`.

    Returns:
        True for labels.

    Example:
        >>> import torch
        >>> is_hard(torch.zeros(2, 3), torch.tensor([0, 2]))
        True
    """
    return targets.ndim < logits.ndim


def check_reduction(reduction: str, mean_over: str = "weights") -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if mean_over not in ("weights", "samples"):
        raise ValueError(f"mean_over must be 'weights' or 'samples', got {mean_over!r}")


def check_logits(logits: Tensor, weight: Tensor | None, num_classes: int) -> None:
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}")
    if logits.numel() == 0:
        raise ValueError(f"logits must hold at least one sample and one class, got shape {tuple(logits.shape)}")
    if weight is None:
        return
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor of shape ({num_classes},), got {type(weight).__name__}")
    if tuple(weight.shape) != (num_classes,):
        raise ValueError(f"weight must have shape ({num_classes},), one value per class, got {tuple(weight.shape)}")


def check_hard_dtype(targets: Tensor) -> None:
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise TypeError(
            f"targets of shape {tuple(targets.shape)} are class labels and must have an integer dtype such as "
            f"torch.int64, got {targets.dtype}"
        )


def prepare(
    logits: Tensor,
    targets: Tensor,
    *,
    reduction: str = "mean",
    mean_over: str = "weights",
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Check everything that ranks, shapes and dtypes tell (so it works while tracing), and bring both to one precision.

    Args:
        logits: Shape (N, K, ...), or (K,) for one unbatched sample; floating point, not empty.
        targets: Class labels of shape (N, ...), any integer dtype, or soft targets of the shape of `logits`, floating
            point.
        reduction: "mean", "sum" or "none".
        mean_over: "weights" or "samples".
        weight: Class weights, shape (K,).
        label_smoothing: In [0, 1].

    Returns:
        logits, half precision as float32, and targets: labels as int64, soft targets in the dtype of `logits`.

    Raises:
        TypeError: If a dtype is wrong.
        ValueError: If a shape, an option or an option's range is wrong, or the batch is empty.

    Example:
        >>> import torch
        >>> logits, labels = prepare(torch.zeros(2, 3).half(), torch.tensor([0, 2], dtype=torch.uint8))
        >>> logits.dtype, labels.dtype
        (torch.float32, torch.int64)
    """
    check_reduction(reduction, mean_over)
    if logits.ndim == 0:
        raise ValueError("logits must have a class dimension: shape (N, K, ...) or (K,), got ()")
    dim = class_dim(logits)
    check_logits(logits, weight, logits.shape[dim])
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    positions = (*logits.shape[:dim], *logits.shape[dim + 1 :])
    if tuple(targets.shape) == positions:
        check_hard_dtype(targets)
        return upcast(logits), targets.long()
    if tuple(targets.shape) != tuple(logits.shape):
        raise ValueError(
            f"targets must have shape {positions} (class labels) or {tuple(logits.shape)} (soft targets) for logits of "
            f"shape {tuple(logits.shape)}, got {tuple(targets.shape)}"
        )
    if not targets.is_floating_point():
        raise TypeError(f"soft targets (of the shape of logits) must be floating point, got {targets.dtype}")
    logits = upcast(logits)
    return logits, targets.to(logits.dtype)


def check_labels(targets: Tensor, num_classes: int, ignore_index: int = -100) -> None:
    """Refuse labels outside [0, num_classes) that are not `ignore_index`.

    Reads values, so it waits for the device and cannot run while tracing: call it where data enters, on the host.

    Args:
        targets: Class labels, any shape, any integer dtype.
        num_classes: K, at least 1.
        ignore_index: The label that marks ignored positions.

    Raises:
        TypeError: If the dtype is not an integer one.
        ValueError: If a label is out of range.

    Example:
        >>> import torch
        >>> check_labels(torch.tensor([0, 2, -100]), num_classes=3)
        >>> check_labels(torch.tensor([0, 3]), num_classes=3)
        Traceback (most recent call last):
        ...
        ValueError: targets must be in [0, 3) or ignore_index=-100, got 3
    """
    check_hard_dtype(targets)
    labels = targets.long()
    wrong = labels[((labels < 0) | (labels >= num_classes)) & (labels != ignore_index)]
    if wrong.numel():
        raise ValueError(
            f"targets must be in [0, {num_classes}) or ignore_index={ignore_index}, got {wrong.flatten()[0].item()}"
        )


def safe_divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, and 0 with gradient 0 where the denominator is 0."""
    nonzero = denominator != 0
    return torch.where(nonzero, numerator / torch.where(nonzero, denominator, 1), 0)


def reduce(losses: Tensor, mass: Tensor, reduction: str) -> Tensor:
    """The losses themselves, their sum, or their sum divided by the sum of `mass` (0 where that is 0).

    Args:
        losses: Weighted losses, 0 where ignored, any shape.
        mass: What each of them counts in the mean, broadcastable to `losses`.
        reduction: "mean", "sum" or "none".

    Returns:
        A 0-d tensor, or `losses`.

    Example:
        >>> import torch
        >>> reduce(torch.tensor([3.0, 0.0]), torch.tensor([1.0, 0.0]), "mean")
        tensor(3.)
    """
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else safe_divide(total, mass.expand_as(losses).sum())


def pick(values: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """The value at each position's label, 0 with gradient 0 where ignored; unlike `gather` it knows ignored labels."""
    return -F.nll_loss(values, labels, reduction="none", ignore_index=ignore_index)


def classwise(
    values: Tensor,
    targets: Tensor,
    penalty: Callable[[Tensor], Tensor] = torch.neg,
    *,
    reduction: str,
    mean_over: str,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Reduce sum_k w_k t_k l_k with l = penalty(values), the loss each class would have as the label.

    The mean divides by the sum of each position's weight, sum_k w_k t_k / sum_k t_k: the weight of its class for hard
    labels. Ignored labels and all-zero rows of soft targets count nothing.

    Args:
        values: Shape (N, K, ...) or (K,); for most losses log-probabilities.
        targets: As `prepare` returns them.
        penalty: An elementwise function, finite and with a finite derivative.
        reduction: "mean", "sum" or "none".
        mean_over: "weights": as above; "samples": divide by the number of positions that are not ignored.
        weight: w, shape (K,); ones where None.
        ignore_index: The hard label that is ignored.
        label_smoothing: e in t <- (1 - e) t + e / K.

    Returns:
        A 0-d tensor, or for "none" shape (N, ...).

    Example:
        >>> import torch
        >>> options = dict(reduction="none", mean_over="weights", weight=None, ignore_index=-100)
        >>> classwise(torch.tensor([[-1.0, -2.0], [-3.0, -4.0]]), torch.tensor([1, -100]), **options)
        tensor([2., 0.])
    """
    dim = class_dim(values)
    weights = None if weight is None else column(weight, values)
    if is_hard(values, targets):
        valid = (targets != ignore_index).to(values.dtype)
        mass = valid if weights is None else pick(weights.expand_as(values), targets, ignore_index)
        losses = penalty(pick(values, targets, ignore_index)) * mass
    else:
        valid = (targets != 0).any(dim).to(values.dtype)
        weighted = targets if weights is None else weights * targets
        mass = valid if weights is None else safe_divide(weighted.sum(dim), targets.sum(dim))
        losses = (weighted * penalty(values)).sum(dim)
    if label_smoothing:
        every = penalty(values) if weights is None else weights * penalty(values)
        losses = (1 - label_smoothing) * losses + label_smoothing * every.mean(dim) * valid
    return reduce(losses, mass if mean_over == "weights" else valid, reduction)
