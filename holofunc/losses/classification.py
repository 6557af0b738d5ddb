"""Losses of one label, or one distribution over labels, per position."""

import torch
from torch import Tensor

from holofunc.losses.reduction import MeanOver, Reduction, class_dim, classwise, prepare

__all__ = ["cross_entropy"]


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    mean_over: MeanOver = "weights",
) -> Tensor:
    """The negative log-likelihood of the targets under softmax(logits).

    loss = -sum_k w_k t_k log p_k with p = softmax(logits) and t the one-hot label or the soft target, smoothed by
    t <- (1 - label_smoothing) t + label_smoothing / K.

    Args:
        logits: Shape (N, K, ...) with any number of spatial dimensions, or (K,) for one unbatched sample (with a 0-d
            label), so that `torch.func.vmap` over samples works as it is; half precision is computed in float32.
        targets: Class labels in [0, K), shape (N, ...), any integer dtype; or soft targets of the shape of `logits`,
            floating point. A soft target that is all zeros is ignored. Labels are not looked at here (that would wait
            for the device): see `check_labels`.
        reduction: "mean", "sum" or "none".
        weight: Class weights w, shape (K,).
        ignore_index: The label, any integer, of positions that count nothing.
        label_smoothing: In [0, 1].
        mean_over: What "mean" divides by: "weights", the sum of the weights of the positions that count, as torch does
            for labels; "samples", their number, as Holocron does.

    Returns:
        A 0-d tensor, 0 if everything is ignored; for "none", shape (N, ...). At least float32.

    Raises:
        TypeError: If labels are not integers, soft targets not floating point, or logits not floating point.
        ValueError: If the shapes do not fit, the batch is empty, or an option is out of its range.

    Source: equal to `torch.nn.functional.cross_entropy`, except that soft targets too are averaged over their weights,
        and that a batch without any target gives 0 instead of NaN.

    Example:
        >>> import torch
        >>> from holofunc import losses
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
        >>> losses.cross_entropy(logits, torch.tensor([0, 1]), reduction="none")
        tensor([0.1269, 0.6931])
        >>> losses.cross_entropy(logits, torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
        tensor(0.4100)
    """
    logits, targets = prepare(
        logits, targets, reduction=reduction, mean_over=mean_over, weight=weight, label_smoothing=label_smoothing
    )
    return classwise(
        torch.log_softmax(logits, class_dim(logits)),
        targets,
        reduction=reduction,
        mean_over=mean_over,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )
