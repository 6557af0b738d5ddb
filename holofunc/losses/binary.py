"""Losses with an independent binary decision per class."""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from holofunc.losses.contract import MeanOver, Reduction, Weight, check_finite, check_nonnegative, class_dim, column
from holofunc.losses.reduction import decisionwise, focus
from holofunc.ops.arithmetic import upcast
from holofunc.typing import Scalar

__all__ = ["binary_cross_entropy", "sigmoid_focal"]


def binary_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    pos_weight: Tensor | Sequence[float] | float | None = None,
    reduction: Reduction = "mean",
    weight: Weight = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    mean_over: MeanOver = "weights",
) -> Tensor:
    """The negative log-likelihood of independent binary targets under sigmoid(logits).

    loss = -w (pos_weight t log p + (1 - t) log(1 - p)) with p = sigmoid(logits), smoothed by
    t <- (1 - label_smoothing) t + label_smoothing / 2.

    Args:
        logits: shape (N, K, ...) with K decisions per position, (K,) for one unbatched sample, or () for one decision.
            An infinite logit is an answer that is certain: smoothing leaves its target alone.
        targets: of the shape of ``logits`` and any dtype, in [0, 1]; or labels of shape (N, ...), an integer dtype: one
            class against the rest (for K = 1 the label is the target, 0 or 1, of any dtype).
        pos_weight: weight of the positive term: a number, or a tensor or numbers of shape (K,).
        reduction: "mean", "sum" or "none".
        weight: class weights w, a tensor or numbers, shape (K,).
        ignore_index: entries of ``targets`` with this value (unknown answers, ignored labels) count nothing. Beside
            multi-hot targets of several classes it must not be a class.
        label_smoothing: in [0, 1].
        mean_over: what "mean" divides by: "weights", the sum of the weights of what counts; "samples", the number of
            entries that count, as torch does.

    Returns:
        A 0-d tensor, 0 if everything is ignored; for "none", the shape of ``targets``, where a label's loss is the mean
        over its K decisions. At least float32.

    Raises:
        TypeError: if logits are not floating point, or labels for K > 1 not integers.
        ValueError: if the shapes do not fit, the batch is empty, or an option is out of its range.

    Source: equal to `torch.nn.functional.binary_cross_entropy_with_logits` without class weights; with ``weight``,
        equal for mean_over="samples".

    Example:
        >>> import torch
        >>> from holofunc import losses
        >>> logits = torch.tensor([[0.0, 2.0]])
        >>> losses.binary_cross_entropy(logits, torch.tensor([[1.0, 0.0]]), reduction="none")
        tensor([[0.6931, 2.1269]])
        >>> losses.binary_cross_entropy(logits, torch.tensor([0]))  # class 0 against the rest
        tensor(1.4100)
    """
    if pos_weight is not None:
        pos_weight = torch.as_tensor(pos_weight, dtype=upcast(logits).dtype, device=logits.device)
        if pos_weight.ndim > 0:
            num_classes = logits.shape[class_dim(logits)] if logits.ndim else 1
            if tuple(pos_weight.shape) != (num_classes,):
                wanted = f"be a number or have shape ({num_classes},), one value per class"
                raise ValueError(f"pos_weight must {wanted}, got {tuple(pos_weight.shape)}")
            pos_weight = column(pos_weight, upcast(logits))
    return decisionwise(
        logits,
        targets,
        functools.partial(F.binary_cross_entropy_with_logits, pos_weight=pos_weight, reduction="none"),
        reduction=reduction,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        mean_over=mean_over,
    )


def sigmoid_focal(
    logits: Tensor,
    targets: Tensor,
    *,
    alpha: Scalar | None = 0.25,
    gamma: Scalar = 2.0,
    reduction: Reduction = "mean",
    weight: Weight = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    mean_over: MeanOver = "weights",
) -> Tensor:
    """Binary cross entropy that gives less weight to well-predicted decisions: RetinaNet's focal loss.

    loss = -w (alpha t (1 - p)^gamma log p + (1 - alpha) (1 - t) p^gamma log(1 - p)) with p = sigmoid(logits).

    Args:
        logits: shape (N, K, ...), (K,) or (), as in `binary_cross_entropy`.
        targets: as in `binary_cross_entropy`.
        alpha: share of the positive term, in [0, 1]; None weighs both terms by 1.
        gamma: focusing exponent, at least 0; a number, or a 0-d tensor (then not checked).
        reduction: "mean", "sum" or "none". RetinaNet divides the sum by the number of anchors that hold an object.
        weight: class weights w, a tensor or numbers, shape (K,).
        ignore_index: as in `binary_cross_entropy`, like all that follows.
        label_smoothing: in [0, 1].
        mean_over: "weights" or "samples".

    Returns:
        A 0-d tensor; for "none", the shape of ``targets``. At least float32.

    Raises:
        TypeError: as in `binary_cross_entropy`.
        ValueError: as in `binary_cross_entropy`, or if alpha or gamma is out of range.

    Source: Lin et al., "Focal Loss for Dense Object Detection" (ICCV 2017), eq. 5. Equal to
        `torchvision.ops.sigmoid_focal_loss` for targets of 0 and 1; between them each term has a focus of its own.

    Example:
        >>> import torch
        >>> from holofunc import losses
        >>> losses.sigmoid_focal(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), reduction="none")  # log 2 / 16, 3 / 16
        tensor([[0.0433, 0.1300]])
    """
    if alpha is not None:
        check_finite(alpha=alpha)
    if isinstance(alpha, (int, float)) and not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1] or None, got {alpha}")
    check_nonnegative(gamma=gamma)
    positive, negative = (1, 1) if alpha is None else (alpha, 1 - alpha)

    def penalty(x: Tensor, t: Tensor) -> Tensor:
        missed, raised = (focus(z.sigmoid(), gamma) for z in (-x, x))
        return -(positive * t * missed * F.logsigmoid(x) + negative * (1 - t) * raised * F.logsigmoid(-x))

    return decisionwise(
        logits,
        targets,
        penalty,
        reduction=reduction,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        mean_over=mean_over,
    )
