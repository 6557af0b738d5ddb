"""Losses that decide every class by itself."""

import torch.nn.functional as F
from torch import Tensor

from holofunc.losses.reduction import (
    MeanOver,
    Reduction,
    check_choice,
    check_logits,
    class_dim,
    column,
    dense_targets,
    prepare,
    reduce,
)
from holofunc.ops.arithmetic import upcast

__all__ = ["binary_cross_entropy"]


def binary_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    pos_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    mean_over: MeanOver = "weights",
) -> Tensor:
    """The negative log-likelihood of independent yes-or-no targets under sigmoid(logits).

    loss = -w (pos_weight t log p + (1 - t) log(1 - p)) with p = sigmoid(logits), smoothed by
    t <- (1 - label_smoothing) t + label_smoothing / 2.

    Args:
        logits: Shape (N, K, ...) with K decisions per position, (K,) for one unbatched sample, or () for one decision.
        targets: Of the shape of `logits` and any dtype, in [0, 1]; or labels of shape (N, ...), an integer dtype: one
            class against the rest (for K = 1 the label is the target, 0 or 1, of any dtype).
        pos_weight: Weight of the positive term, shape (K,).
        reduction: "mean", "sum" or "none".
        weight: Class weights w, shape (K,).
        ignore_index: Entries of `targets` with this value (unknown answers, ignored labels) count nothing.
        label_smoothing: In [0, 1].
        mean_over: What "mean" divides by: "weights", the sum of the weights of what counts; "samples", the number of
            entries that count, as torch does.

    Returns:
        A 0-d tensor, 0 if everything is ignored; for "none", the shape of `targets`, where a label's loss is the mean
        over its K decisions. At least float32.

    Raises:
        TypeError: If logits are not floating point, or labels for K > 1 not integers.
        ValueError: If the shapes do not fit, the batch is empty, or an option is out of its range.

    Source: equal to `torch.nn.functional.binary_cross_entropy_with_logits` without class weights; with `weight`, equal
        for mean_over="samples".

    Example:
        >>> import torch
        >>> from holofunc import losses
        >>> logits = torch.tensor([[0.0, 2.0]])
        >>> losses.binary_cross_entropy(logits, torch.tensor([[1.0, 0.0]]), reduction="none")
        tensor([[0.6931, 2.1269]])
        >>> losses.binary_cross_entropy(logits, torch.tensor([0]))  # class 0 against the rest
        tensor(1.4100)
    """
    check_choice("mean_over", mean_over, "weights", "samples")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if logits.ndim == 0:
        return binary_cross_entropy(
            logits[None],
            targets[None],
            pos_weight=pos_weight,
            reduction="sum" if reduction == "none" else reduction,
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            mean_over=mean_over,
        )
    dim = class_dim(logits)
    check_logits(logits, logits.shape[dim], weight)
    labels = targets.ndim < logits.ndim
    if labels and logits.shape[dim] == 1:
        targets = targets.unsqueeze(dim)
    if targets.shape == logits.shape:
        logits = upcast(logits)
    else:
        logits, targets = prepare(logits, targets)
    t, valid = dense_targets(logits, targets, ignore_index)
    if label_smoothing:
        t = (1 - label_smoothing) * t + label_smoothing / 2
    factor = None if pos_weight is None else column(pos_weight, logits)
    counts = valid.to(logits.dtype)
    mass = counts if weight is None else counts * column(weight, logits)
    losses = mass * F.binary_cross_entropy_with_logits(logits, t, pos_weight=factor, reduction="none")
    mass = mass if mean_over == "weights" else counts
    return reduce(losses.mean(dim), mass.mean(dim), reduction) if labels else reduce(losses, mass, reduction)
