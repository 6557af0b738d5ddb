"""What the arguments of all losses mean: which logits, targets and class weights there are, and which are errors.

Ranks, shapes and dtypes tell, so that it works while tracing; only `check_labels` reads values.
"""

import math
import numbers
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from holofunc.ops.arithmetic import upcast
from holofunc.typing import Scalar

__all__ = [
    "MeanOver",
    "Reduction",
    "Weight",
    "check_choice",
    "check_finite",
    "check_label_dtype",
    "check_labels",
    "check_logits",
    "check_nonnegative",
    "check_positive",
    "check_smoothing",
    "class_dim",
    "class_weights",
    "column",
    "prepare",
]

Reduction = Literal["mean", "sum", "none", "parts"]
"""How losses become one number; "parts" is the pair of which "mean" is the quotient, to be added up over batches."""

MeanOver = Literal["weights", "samples"]
Weight: TypeAlias = Tensor | Sequence[float] | float | None
"""Class weights: a tensor or numbers, one per class; one number w for two classes, (w, 1 - w)."""


# --- shapes and dtypes -------------------------------------------------------------------------------------------


def class_dim(logits: Tensor) -> int:
    """The dimension of ``logits`` that counts classes: 1 for a batch, 0 for one unbatched sample of shape (K,).

    Args:
        logits: shape (N, K, ...) or (K,).

    Returns:
        1 or 0.

    Example:
        >>> import torch
        >>> class_dim(torch.zeros(2, 3, 4, 4)), class_dim(torch.zeros(3))
        (1, 0)
    """
    return min(logits.ndim - 1, 1)


def class_weights(weight: Weight, num_classes: int, logits: Tensor) -> Tensor | None:
    """Class weights as a tensor.

    Args:
        weight: shape (K,), a tensor or numbers; one number w stands for (w, 1 - w), the weights of two classes.
        num_classes: K.
        logits: where the weights will be used.

    Returns:
        Shape (K,), on the device of ``logits``; None for None.

    Raises:
        TypeError: if ``weight`` is no number, tensor or sequence of numbers.
        ValueError: if there is not one weight per class.

    Example:
        >>> import torch
        >>> class_weights(0.25, 2, torch.zeros(1, 2)), class_weights([1, 2, 3], 3, torch.zeros(1, 3))
        (tensor([0.2500, 0.7500]), tensor([1., 2., 3.]))
    """
    if weight is None:
        return None
    if isinstance(weight, (int, float)) and not isinstance(weight, bool):
        if num_classes != 2:
            raise ValueError(f"weight must have shape ({num_classes},), one value per class, got {weight}")
        weight = (weight, 1 - weight)
    if not isinstance(weight, Tensor):
        if not isinstance(weight, Sequence) or isinstance(weight, str):
            wanted = f"a number, a sequence of numbers or a tensor of shape ({num_classes},)"
            raise TypeError(f"weight must be {wanted}, got {type(weight).__name__}")
        weight = torch.as_tensor(weight, dtype=upcast(logits).dtype, device=logits.device)
    if tuple(weight.shape) != (num_classes,):
        raise ValueError(f"weight must have shape ({num_classes},), one value per class, got {tuple(weight.shape)}")
    return weight


def column(weight: Tensor, logits: Tensor) -> Tensor:
    """Per-class values, shaped to broadcast against ``logits``.

    Args:
        weight: shape (K,).
        logits: what they will be combined with, shape (N, K, ...) or (K,).

    Returns:
        Shape (K, 1, ...) and the dtype of ``logits``.

    Example:
        >>> import torch
        >>> column(torch.ones(3), torch.zeros(2, 3, 4, 4)).shape
        torch.Size([3, 1, 1])
    """
    return weight.to(logits.dtype).reshape(-1, *[1] * (logits.ndim - class_dim(logits) - 1))


# --- checks ------------------------------------------------------------------------------------------------------


def check_choice(name: str, value: str, *choices: str) -> None:
    """Raise unless an option is one of ``choices``.

    Args:
        name: the option.
        value: what was given.
        *choices: what is allowed.

    Raises:
        ValueError: if ``value`` is not allowed.

    Example:
        >>> check_choice("reduction", "avg", "mean", "sum", "none")
        Traceback (most recent call last):
        ...
        ValueError: reduction must be one of 'mean', 'sum', 'none', got 'avg'
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_logits(logits: Tensor) -> None:
    """Raise unless logits are floating point, and not empty.

    Args:
        logits: any shape.

    Raises:
        TypeError: if ``logits`` are not floating point.
        ValueError: if ``logits`` are empty.

    Example:
        >>> import torch
        >>> check_logits(torch.zeros(0, 3))
        Traceback (most recent call last):
        ...
        ValueError: logits must hold at least one sample and one class, got shape (0, 3)
    """
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}")
    if logits.numel() == 0:
        raise ValueError(f"logits must hold at least one sample and one class, got shape {tuple(logits.shape)}")


def check_smoothing(label_smoothing: float) -> None:
    """Raise for a share of smoothing outside [0, 1].

    Raises:
        ValueError: if it is outside.

    Example:
        >>> check_smoothing(2)
        Traceback (most recent call last):
        ...
        ValueError: label_smoothing must be in [0, 1], got 2
    """
    check_finite(label_smoothing=label_smoothing)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")


def check_finite(**values: Scalar) -> None:
    """Raise unless each value is a finite number; tensors are not looked at.

    Raises:
        TypeError: no number. ValueError: one that is not finite. Both name the first.

    Example:
        >>> check_finite(eps=float("nan"))
        Traceback (most recent call last):
        ...
        ValueError: eps must be finite, got nan
    """
    for name, value in values.items():
        if isinstance(value, Tensor):
            continue
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a number, got {value!r}")
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")


def check_nonnegative(**values: Scalar) -> None:
    """Raise unless each value is a finite number of at least 0; tensors are not looked at.

    Raises:
        ValueError: naming the first that is none.

    Example:
        >>> check_nonnegative(gamma=-1)
        Traceback (most recent call last):
        ...
        ValueError: gamma must be at least 0, got -1
    """
    check_finite(**values)
    for name, value in values.items():
        if not isinstance(value, Tensor) and value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}")


def check_positive(**values: float) -> None:
    """Raise unless each value is a finite number above 0.

    Raises:
        ValueError: naming the first that is none.

    Example:
        >>> check_positive(margin=0.5, temperature=0.0)
        Traceback (most recent call last):
        ...
        ValueError: temperature must be above 0, got 0.0
    """
    check_finite(**values)
    for name, value in values.items():
        if value <= 0:
            raise ValueError(f"{name} must be above 0, got {value}")


def check_label_dtype(targets: Tensor) -> None:
    """Raise unless labels are of an integer dtype.

    Args:
        targets: class labels, any shape.

    Raises:
        TypeError: if the dtype is not an integer one.

    Example:
        >>> import torch
        >>> check_label_dtype(torch.tensor([0.0]))
        Traceback (most recent call last):
        ...
        TypeError: targets of shape (1,) are class labels and must have an integer dtype such as torch.int64, ...
    """
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise TypeError(
            f"targets of shape {tuple(targets.shape)} are class labels and must have an integer dtype such as "
            f"torch.int64, got {targets.dtype}"
        )


def check_labels(targets: Tensor, num_classes: int, ignore_index: int = -100) -> None:
    """Raise for labels outside [0, num_classes) that are not ``ignore_index``.

    It reads values, so it waits for the device and cannot run while tracing: call it where data enters, on the host.
    The losses themselves look at dtypes and shapes only.

    Args:
        targets: class labels, any shape, any integer dtype.
        num_classes: K, at least 1.
        ignore_index: the label that marks ignored positions.

    Raises:
        TypeError: if the dtype is not an integer one.
        ValueError: if a label is out of range.

    Example:
        >>> import torch
        >>> from holofunc import losses
        >>> losses.check_labels(torch.tensor([0, 2, -100]), num_classes=3)
        >>> losses.check_labels(torch.tensor([0, 3]), num_classes=3)
        Traceback (most recent call last):
        ...
        ValueError: targets must be in [0, 3) or equal ignore_index=-100, got 3
    """
    check_label_dtype(targets)
    labels = targets.long()
    wrong = labels[((labels < 0) | (labels >= num_classes)) & (labels != ignore_index)]
    if wrong.numel():
        raise ValueError(
            f"targets must be in [0, {num_classes}) or equal ignore_index={ignore_index}, got {wrong.flatten()[0]}"
        )


def prepare(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Check logits and targets against each other, and bring them to one precision.

    Args:
        logits: shape (N, K, ...), or (K,) for one unbatched sample; floating point, not empty.
        targets: class labels of shape (N, ...), any integer dtype, or soft targets of the shape of ``logits``, floating
            point.

    Returns:
        logits, half precision as float32, and targets: labels as int64, soft targets in the dtype of ``logits``. Labels
        have one dimension fewer than the logits.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if a shape is wrong, or the batch is empty.

    Example:
        >>> import torch
        >>> logits, labels = prepare(torch.zeros(2, 3).half(), torch.tensor([0, 2], dtype=torch.uint8))
        >>> logits.dtype, labels.dtype
        (torch.float32, torch.int64)
    """
    if logits.ndim == 0:
        raise ValueError("logits must have a class dimension: shape (N, K, ...) or (K,), got ()")
    dim = class_dim(logits)
    check_logits(logits)
    positions = (*logits.shape[:dim], *logits.shape[dim + 1 :])
    if tuple(targets.shape) == positions:
        check_label_dtype(targets)
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
