"""Losses with one label, or one distribution over labels, per position."""

from torch import Tensor

from holofunc.losses.contract import MeanOver, Reduction, Weight, check_finite, check_nonnegative
from holofunc.losses.reduction import classwise, focus
from holofunc.ops.arithmetic import upcast
from holofunc.typing import Scalar

__all__ = [
    "cross_entropy",
    "focal",
    "multilabel_cross_entropy",
    "poly",
]


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    reduction: Reduction = "mean",
    weight: Weight = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    mean_over: MeanOver = "weights",
) -> Tensor:
    """The negative log-likelihood of the targets under softmax(logits).

    loss = -sum_k w_k t_k log p_k with p = softmax(logits) and t the one-hot label or the soft target, smoothed by
    t <- (1 - label_smoothing) t + label_smoothing / K.

    Args:
        logits: shape (N, K, ...), K at least 2, with any number of spatial dimensions, or (K,) for one unbatched sample
            (with a 0-d label), so that `torch.func.vmap` over samples works as it is; half precision is computed in
            float32. A class whose logit is -inf does not exist: smoothing passes it over.
        targets: class labels in [0, K), shape (N, ...), any integer dtype; or soft targets of the shape of ``logits``,
            floating point. A soft target that is all zeros is ignored. Labels are not looked at here (that would wait
            for the device): see `check_labels`.
        reduction: "mean", "sum" or "none".
        weight: class weights w, a tensor or numbers, shape (K,); one number w is (w, 1 - w), for two classes.
        ignore_index: the label, any integer, of positions that count nothing; of soft targets, the share in that class
            counts nothing, or, if there is no such class, entries of that value.
        label_smoothing: in [0, 1].
        mean_over: what "mean" divides by: "weights", the sum of the weights of the positions that count, as torch does
            for labels; "samples", their number, as Holocron does.

    Returns:
        A 0-d tensor, 0 if everything is ignored; for "none", shape (N, ...). At least float32.

    Raises:
        TypeError: if labels are not integers, soft targets not floating point, or logits not floating point.
        ValueError: if the shapes do not fit, the batch is empty, there is one class, or an option is out of its range.

    Source: equal to `torch.nn.functional.cross_entropy`, except that soft targets too are averaged over their weights,
        that a mean over no weight at all is 0 instead of NaN, and what is said of logits of -inf.

    Example:
        >>> import torch
        >>> from holofunc import losses
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
        >>> losses.cross_entropy(logits, torch.tensor([0, 1]), reduction="none")
        tensor([0.1269, 0.6931])
        >>> losses.cross_entropy(logits, torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
        tensor(0.4100)
    """
    return classwise(
        logits,
        targets,
        reduction=reduction,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        mean_over=mean_over,
    )


def focal(
    logits: Tensor,
    targets: Tensor,
    *,
    gamma: Scalar = 2.0,
    reduction: Reduction = "mean",
    weight: Weight = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    mean_over: MeanOver = "weights",
) -> Tensor:
    """Cross entropy that gives less weight to well-predicted positions.

    loss = -sum_k w_k t_k (1 - p_k)^gamma log p_k with p = softmax(logits); cross entropy for gamma = 0.

    Args:
        logits: shape (N, K, ...) or (K,).
        targets: labels (N, ...) or soft targets of the shape of ``logits``.
        gamma: focusing exponent, at least 0; a number, or a 0-d tensor (then not checked).
        reduction: as in `cross_entropy`, like all that follows.
        weight: class weights w (the paper's alpha), shape (K,).
        ignore_index: the label that is ignored.
        label_smoothing: in [0, 1].
        mean_over: "weights" or "samples".

    Returns:
        A 0-d tensor; for "none", shape (N, ...). At least float32.

    Raises:
        TypeError: as in `cross_entropy`.
        ValueError: as in `cross_entropy`, or if gamma is negative.

    Source: Lin et al., "Focal Loss for Dense Object Detection" (ICCV 2017), eq. 5, over softmax instead of sigmoid. The
        mean is over the positions, not over the anchors assigned to an object.

    Example:
        >>> import torch
        >>> from holofunc import losses
        >>> losses.focal(torch.zeros(1, 2), torch.tensor([0]))  # log 2 / 4
        tensor(0.1733)
    """
    check_nonnegative(gamma=gamma)
    return classwise(
        logits,
        targets,
        lambda logp: -focus(1 - logp.exp(), gamma) * logp,  # expm1 would cost as much as all the rest
        reduction=reduction,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        mean_over=mean_over,
    )


def poly(
    logits: Tensor,
    targets: Tensor,
    *,
    eps: Scalar = 2.0,
    reduction: Reduction = "mean",
    weight: Weight = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    mean_over: MeanOver = "weights",
) -> Tensor:
    """Poly-1: cross entropy with the first coefficient of its Taylor series in 1 - p raised by ``eps``.

    loss = sum_k w_k t_k (-log p_k + eps (1 - p_k)) with p = softmax(logits); for targets that sum to 1 and no weights,
    the cross entropy plus eps (1 - sum_k t_k p_k).

    Args:
        logits: shape (N, K, ...) or (K,).
        targets: labels (N, ...) or soft targets of the shape of ``logits``.
        eps: the paper's epsilon_1, a number or a 0-d tensor; 0 is cross entropy, and -1 the lowest in the paper.
        reduction: as in `cross_entropy`, like all that follows.
        weight: class weights w, shape (K,).
        ignore_index: the label that is ignored.
        label_smoothing: in [0, 1].
        mean_over: "weights" or "samples".

    Returns:
        A 0-d tensor; for "none", shape (N, ...). At least float32.

    Raises:
        TypeError: as in `cross_entropy`.
        ValueError: as in `cross_entropy`.

    Source: Leng et al., "PolyLoss: A Polynomial Expansion Perspective of Classification Loss Functions" (ICLR 2022).

    Example:
        >>> import torch
        >>> from holofunc import losses
        >>> losses.poly(torch.zeros(1, 2), torch.tensor([0]))  # log 2 + 2 (1 - 1/2)
        tensor(1.6931)
    """
    check_finite(eps=eps)
    return classwise(
        logits,
        targets,
        lambda logp: eps * (1 - logp.exp()) - logp,
        reduction=reduction,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        mean_over=mean_over,
    )


def multilabel_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    reduction: Reduction = "mean",
    weight: Weight = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    mean_over: MeanOver = "weights",
) -> Tensor:
    """The sum of the cross entropies of all labels of a position.

    loss = -sum_k w_k t_k log p_k with p = softmax(logits) and t multi-hot: the labels compete for one probability mass.
    For labels that do not exclude each other use `binary_cross_entropy`.

    Args:
        logits: shape (N, K, ...) or (K,).
        targets: Multi-hot or soft targets of the shape of ``logits``, any dtype; or labels (N, ...).
        reduction: as in `cross_entropy`, like all that follows.
        weight: class weights w, shape (K,); a weight of 0 leaves a class out.
        ignore_index: the label that is ignored.
        label_smoothing: in [0, 1].
        mean_over: "weights" or "samples".

    Returns:
        A 0-d tensor; for "none", shape (N, ...). At least float32.

    Raises:
        TypeError: as in `cross_entropy`.
        ValueError: as in `cross_entropy`.

    Source: `cross_entropy`, for targets that need not sum to 1 nor be floating point.

    Example:
        >>> import torch
        >>> from holofunc import losses
        >>> losses.multilabel_cross_entropy(torch.zeros(1, 4), torch.tensor([[1, 0, 0, 1]]))  # 2 log 4
        tensor(2.7726)
    """
    if targets.shape == logits.shape:
        targets = targets.to(upcast(logits).dtype)
    return cross_entropy(
        logits,
        targets,
        reduction=reduction,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        mean_over=mean_over,
    )
