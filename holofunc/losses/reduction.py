"""The one contract of all losses: which targets are allowed, what a class weight means, how values are reduced.

A loss assigns to every position of a batch one value per class, l_k, the loss it would have were k its label. The
targets choose among those values (hard labels) or average them (soft targets); class weights, ignored positions, label
smoothing and the reduction are the same arithmetic for every loss, and live here.
"""

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from holofunc.ops.arithmetic import safe_divide, upcast

__all__ = [
    "MeanOver",
    "Reduction",
    "Weight",
    "check_choice",
    "check_label_dtype",
    "check_labels",
    "check_logits",
    "check_smoothing",
    "class_dim",
    "class_weights",
    "classwise",
    "column",
    "dense_targets",
    "log_probabilities",
    "prepare",
    "reduce",
]

Reduction = Literal["mean", "sum", "none", "parts"]
"""How losses become one number; "parts" is the pair of which "mean" is the quotient, to be added up over batches."""

MeanOver = Literal["weights", "samples"]
Weight: TypeAlias = Tensor | Sequence[float] | float | None
"""Class weights: a tensor or numbers, one per class; one number w for two classes, (w, 1 - w)."""


# --- shapes and dtypes -------------------------------------------------------------------------------------------


def class_dim(logits: Tensor) -> int:
    """The dimension of `logits` that counts classes: 1 for a batch, 0 for one unbatched sample of shape (K,).

    Args:
        logits: Shape (N, K, ...) or (K,).

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
        weight: Shape (K,), a tensor or numbers; one number w stands for (w, 1 - w), the weights of two classes.
        num_classes: K.
        logits: Where the weights will be used.

    Returns:
        Shape (K,), on the device of `logits`; None for None.

    Raises:
        TypeError: If `weight` is no number, tensor or sequence of numbers.
        ValueError: If there is not one weight per class.

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
        weight = torch.tensor(weight, dtype=upcast(logits).dtype, device=logits.device)
    if tuple(weight.shape) != (num_classes,):
        raise ValueError(f"weight must have shape ({num_classes},), one value per class, got {tuple(weight.shape)}")
    return weight


def column(weight: Tensor, logits: Tensor) -> Tensor:
    """Per-class values, shaped to broadcast against `logits`.

    Args:
        weight: Shape (K,).
        logits: What they will be combined with, shape (N, K, ...) or (K,).

    Returns:
        Shape (K, 1, ...) and the dtype of `logits`.

    Example:
        >>> import torch
        >>> column(torch.ones(3), torch.zeros(2, 3, 4, 4)).shape
        torch.Size([3, 1, 1])
    """
    return weight.to(logits.dtype).reshape(-1, *[1] * (logits.ndim - class_dim(logits) - 1))


# --- the boundary: what ranks, shapes and dtypes tell, so that it works while tracing -----------------------------


def check_choice(name: str, value: str, *choices: str) -> None:
    """Refuse an option that is not one of `choices`.

    Args:
        name: The option.
        value: What was given.
        *choices: What is allowed.

    Raises:
        ValueError: If `value` is not allowed.

    Example:
        >>> check_choice("reduction", "avg", "mean", "sum", "none")
        Traceback (most recent call last):
        ...
        ValueError: reduction must be one of 'mean', 'sum', 'none', got 'avg'
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_logits(logits: Tensor) -> None:
    """Refuse logits that are not floating point or empty.

    Args:
        logits: Any shape.

    Raises:
        TypeError: If `logits` are not floating point.
        ValueError: If `logits` are empty.

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
    """Refuse a share of smoothing outside [0, 1].

    Raises:
        ValueError: If it is outside.

    Example:
        >>> check_smoothing(2)
        Traceback (most recent call last):
        ...
        ValueError: label_smoothing must be in [0, 1], got 2
    """
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")


def check_label_dtype(targets: Tensor) -> None:
    """Refuse labels of a dtype that does not count.

    Args:
        targets: Class labels, any shape.

    Raises:
        TypeError: If the dtype is not an integer one.

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
    """Refuse labels outside [0, num_classes) that are not `ignore_index`.

    It reads values, so it waits for the device and cannot run while tracing: call it where data enters, on the host.
    The losses themselves look at dtypes and shapes only.

    Args:
        targets: Class labels, any shape, any integer dtype.
        num_classes: K, at least 1.
        ignore_index: The label that marks ignored positions.

    Raises:
        TypeError: If the dtype is not an integer one.
        ValueError: If a label is out of range.

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
        logits: Shape (N, K, ...), or (K,) for one unbatched sample; floating point, not empty.
        targets: Class labels of shape (N, ...), any integer dtype, or soft targets of the shape of `logits`, floating
            point.

    Returns:
        logits, half precision as float32, and targets: labels as int64, soft targets in the dtype of `logits`. Labels
        have one dimension fewer than the logits.

    Raises:
        TypeError: If a dtype is wrong.
        ValueError: If a shape is wrong, or the batch is empty.

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


# --- the arithmetic ----------------------------------------------------------------------------------------------


def log_probabilities(logits: Tensor) -> Tensor:
    """log softmax over the classes.

    Args:
        logits: Shape (N, K, ...) or (K,).

    Returns:
        The same shape.

    Example:
        >>> import torch
        >>> log_probabilities(torch.zeros(2)).exp()
        tensor([0.5000, 0.5000])
    """
    return torch.log_softmax(logits, class_dim(logits))


def reduce(losses: Tensor, mass: Tensor, reduction: str) -> Tensor:
    """The losses themselves, their sum, or their sum divided by the sum of `mass` (a mean of nothing is 0).

    Sums and masses of several batches, or of samples one by one, add up to those of all: what an evaluation needs, that
    shall equal the loss of one large batch, whatever was ignored or weighted.


    Args:
        losses: Weighted losses, 0 where ignored, any shape.
        mass: What each of them counts in the mean, the same shape.
        reduction: "mean", "sum" or "none"; "parts" for the two sums, of losses and of mass.

    Returns:
        A 0-d tensor; `losses` for "none", shape (2,) for "parts".

    Raises:
        ValueError: If `reduction` is another word.

    Example:
        >>> import torch
        >>> reduce(torch.tensor([3.0, 0.0]), torch.tensor([1.0, 0.0]), "mean")
        tensor(3.)
    """
    check_choice("reduction", reduction, "mean", "sum", "none", "parts")
    if reduction == "none":
        return losses
    if reduction == "parts":
        return torch.stack([losses.sum(), mass.sum()])
    if reduction == "sum":
        return losses.sum()
    return safe_divide(losses.sum(), mass.sum())


def dense_targets(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Labels as one target per class, and which of those count; for losses that look at every class by itself.

    Args:
        logits: Shape (N, K, ...) or (K,). With K = 1 a label is the target itself, 0 or 1.
        targets: As `prepare` returns them. In soft targets `ignore_index` marks single entries.
        ignore_index: What is ignored.

    Raises:
        ValueError: If `ignore_index` is a class (or 0 or 1) beside soft targets of several classes: would it be the
            class, or the value?

    Returns:
        Targets in the dtype of `logits` and their mask, bool, both of the shape of `logits`.

    Example:
        >>> import torch
        >>> dense_targets(torch.zeros(2, 3), torch.tensor([2, -100]), -100)
        (tensor([[0., 0., 1.],
                [0., 0., 0.]]), tensor([[ True,  True,  True],
                [False, False, False]]))
    """
    if targets.ndim < logits.ndim:
        targets = targets.unsqueeze(class_dim(logits))
        num_classes = logits.shape[class_dim(logits)]
        valid = (targets != ignore_index).expand_as(logits)
        if num_classes > 1:
            targets = targets == column(torch.arange(num_classes, device=targets.device), logits)
    else:
        num_classes = logits.shape[class_dim(logits)]
        if num_classes > 1 and 0 <= ignore_index < num_classes:
            raise ValueError(
                f"ignore_index must be outside [0, {num_classes}) beside soft or multi-hot targets, where it marks "
                f"entries that do not count, got {ignore_index}"
            )
        valid = targets != ignore_index
    return torch.where(valid, targets.to(logits.dtype), 0), valid


def _pick(values: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """The value at each position's label; 0 with gradient 0 where ignored (`gather` knows no ignored labels)."""
    return -F.nll_loss(values, labels, reduction="none", ignore_index=ignore_index)


def _shares(targets: Tensor, ignore_index: int, dim: int) -> tuple[Tensor, Tensor]:
    """Soft targets without what is ignored of them, and the sum of each position's targets, ignored class included."""
    num_classes = targets.shape[dim]
    if 0 <= ignore_index < num_classes:
        counted = torch.arange(num_classes, device=targets.device) != ignore_index
        return targets * column(counted.to(targets.dtype), targets), targets.sum(dim)
    targets = torch.where(targets == ignore_index, 0, targets)
    return targets, targets.sum(dim)


def _penalties(scores: Tensor, penalty: Callable[[Tensor], Tensor], shares: Tensor | None = None) -> Tensor:
    """The penalty of every class; of those that do not exist, infinity if the target has a share in them, or else 0."""
    missing = scores == -torch.inf
    penalties = penalty(torch.where(missing, 0, scores))
    return penalties if shares is None else torch.where(missing & (shares != 0), torch.inf, penalties)


def classwise(
    logits: Tensor,
    targets: Tensor,
    penalty: Callable[[Tensor], Tensor] = torch.neg,
    *,
    values: Callable[[Tensor], Tensor] = log_probabilities,
    reduction: str = "mean",
    weight: Weight = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    mean_over: str = "weights",
) -> Tensor:
    """Reduce sum_k w_k t_k l_k, where l = penalty(values(logits)) is the loss each class would have as the label.

    The mean divides by the sum of each position's weight, sum_k w_k t_k / sum_k t_k: for labels, the weight of the
    label. Ignored labels and all-zero rows of soft targets count nothing. Classes with a value of -inf do not exist:
    they cost nothing where the target has no share in them, also when smoothing, and infinity where it has.

    Args:
        logits: Shape (N, K, ...) or (K,), K at least 2 if `values` does not say otherwise.
        targets: Labels or soft targets, as in `prepare`.
        penalty: An elementwise function with penalty(0) = 0; finite, with finite derivatives, on every finite value.
        values: A function that keeps the shape.
        reduction: "mean", "sum" or "none".
        weight: w, shape (K,); ones where None.
        ignore_index: The label that is ignored. Soft targets are ignored for the share they have in that class, if
            there is one, and in entries of that value if not.
        label_smoothing: e in t <- (1 - e) t + e / K.
        mean_over: "weights": as above; "samples": divide by the number of positions that are not ignored.

    Returns:
        A 0-d tensor, or for "none" shape (N, ...).

    Raises:
        TypeError: As `prepare`.
        ValueError: As `prepare`, for a single class, or if an option is none of its choices.

    Example:
        >>> import torch
        >>> classwise(torch.tensor([[0.0, 0.0], [8.0, 9.0]]), torch.tensor([1, -100]), reduction="none")
        tensor([0.6931, 0.0000])
    """
    check_choice("mean_over", mean_over, "weights", "samples")
    check_smoothing(label_smoothing)
    logits, targets = prepare(logits, targets)
    dim = class_dim(logits)
    weight = class_weights(weight, logits.shape[dim], logits)
    if logits.shape[dim] == 1 and values is log_probabilities:
        raise ValueError(
            "logits must have at least 2 classes (the softmax of one is 1, whatever the logit), got 1; for one "
            "yes-or-no decision use binary_cross_entropy or a sigmoid"
        )
    scores = values(logits)
    weights = None if weight is None else column(weight, logits)
    if targets.ndim < logits.ndim:
        mass = valid = (targets != ignore_index).to(logits.dtype)
        losses = penalty(_pick(scores, targets, ignore_index))
        if weights is not None:
            mass = _pick(weights.expand_as(logits), targets, ignore_index)
            losses = losses * mass
    else:
        targets, whole = _shares(targets, ignore_index, dim)
        valid = (targets != 0).any(dim).to(logits.dtype)
        weighted = targets if weights is None else weights * targets
        mass = safe_divide(weighted.sum(dim), whole)
        losses = (weighted * _penalties(scores, penalty, weighted)).sum(dim)
    if label_smoothing:
        each = _penalties(scores, penalty)
        uniform = each if weights is None else weights * each
        losses = (1 - label_smoothing) * losses + label_smoothing * uniform.mean(dim) * valid
    return reduce(losses, mass if mean_over == "weights" else valid, reduction)
