"""Losses of one label, or one distribution over labels, per position."""

import torch
from torch import Tensor

from holofunc.losses.reduction import (
    MeanOver,
    Reduction,
    Weight,
    class_dim,
    classwise,
    log_probabilities,
)
from holofunc.ops.arithmetic import safe_divide, upcast
from holofunc.typing import Scalar

__all__ = [
    "complement_cross_entropy",
    "cross_entropy",
    "focal",
    "kl_divergence",
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
        logits: Shape (N, K, ...), K at least 2, with any number of spatial dimensions, or (K,) for one unbatched sample
            (with a 0-d label), so that `torch.func.vmap` over samples works as it is; half precision is computed in
            float32. A class whose logit is -inf does not exist: smoothing passes it over.
        targets: Class labels in [0, K), shape (N, ...), any integer dtype; or soft targets of the shape of `logits`,
            floating point. A soft target that is all zeros is ignored. Labels are not looked at here (that would wait
            for the device): see `check_labels`.
        reduction: "mean", "sum" or "none".
        weight: Class weights w, a tensor or numbers, shape (K,); one number w is (w, 1 - w), for two classes.
        ignore_index: The label, any integer, of positions that count nothing; of soft targets, the share in that class
            counts nothing, or, if there is no such class, entries of that value.
        label_smoothing: In [0, 1].
        mean_over: What "mean" divides by: "weights", the sum of the weights of the positions that count, as torch does
            for labels; "samples", their number, as Holocron does.

    Returns:
        A 0-d tensor, 0 if everything is ignored; for "none", shape (N, ...). At least float32.

    Raises:
        TypeError: If labels are not integers, soft targets not floating point, or logits not floating point.
        ValueError: If the shapes do not fit, the batch is empty, there is one class, or an option is out of its range.

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
    """Cross entropy that counts a position less the better it is already predicted.

    loss = -sum_k w_k t_k (1 - p_k)^gamma log p_k with p = softmax(logits); cross entropy for gamma = 0.

    Args:
        logits: Shape (N, K, ...) or (K,).
        targets: Labels (N, ...) or soft targets of the shape of `logits`.
        gamma: Focusing exponent, at least 0; a number, or a 0-d tensor (then not checked).
        reduction: As in `cross_entropy`, like all that follows.
        weight: Class weights w (the paper's alpha), shape (K,).
        ignore_index: The label that is ignored.
        label_smoothing: In [0, 1].
        mean_over: "weights" or "samples".

    Returns:
        A 0-d tensor; for "none", shape (N, ...). At least float32.

    Raises:
        TypeError: As in `cross_entropy`.
        ValueError: As in `cross_entropy`, or if gamma is negative.

    Source: Lin et al., "Focal Loss for Dense Object Detection" (ICCV 2017), eq. 5, over softmax instead of sigmoid. The
        mean is over the positions, not over the anchors assigned to an object.

    Example:
        >>> import torch
        >>> from holofunc import losses
        >>> losses.focal(torch.zeros(1, 2), torch.tensor([0]))  # log 2 / 4
        tensor(0.1733)
    """
    if not isinstance(gamma, Tensor) and gamma < 0:
        raise ValueError(f"gamma must be at least 0, got {gamma}")

    def penalty(logp: Tensor) -> Tensor:
        # bounded from below, since x^gamma has no finite derivative at 0 for gamma < 1; expm1 would cost as much as all
        miss = (1 - logp.exp()).clamp_min(torch.finfo(logp.dtype).eps)
        return -(miss**gamma) * logp

    return classwise(
        logits,
        targets,
        penalty,
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
    """Poly-1: cross entropy with the first coefficient of its series in 1 - p raised by `eps`.

    loss = sum_k w_k t_k (-log p_k + eps (1 - p_k)) with p = softmax(logits); for targets that sum to 1 and no weights,
    the cross entropy plus eps (1 - sum_k t_k p_k).

    Args:
        logits: Shape (N, K, ...) or (K,).
        targets: Labels (N, ...) or soft targets of the shape of `logits`.
        eps: The paper's epsilon_1, a number or a 0-d tensor; 0 is cross entropy, and -1 the lowest in the paper.
        reduction: As in `cross_entropy`, like all that follows.
        weight: Class weights w, shape (K,).
        ignore_index: The label that is ignored.
        label_smoothing: In [0, 1].
        mean_over: "weights" or "samples".

    Returns:
        A 0-d tensor; for "none", shape (N, ...). At least float32.

    Raises:
        TypeError: As in `cross_entropy`.
        ValueError: As in `cross_entropy`.

    Source: Leng et al., "PolyLoss: A Polynomial Expansion Perspective of Classification Loss Functions" (ICLR 2022).

    Example:
        >>> import torch
        >>> from holofunc import losses
        >>> losses.poly(torch.zeros(1, 2), torch.tensor([0]))  # log 2 + 2 (1 - 1/2)
        tensor(1.6931)
    """
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
    """Cross entropy summed over every label a position has.

    loss = -sum_k w_k t_k log p_k with p = softmax(logits) and t multi-hot: the labels compete for one probability mass.
    For labels that do not exclude each other use `binary_cross_entropy`.

    Args:
        logits: Shape (N, K, ...) or (K,).
        targets: Multi-hot or soft targets of the shape of `logits`, any dtype; or labels (N, ...).
        reduction: As in `cross_entropy`, like all that follows.
        weight: Class weights w, shape (K,); a weight of 0 leaves a class out.
        ignore_index: The label that is ignored.
        label_smoothing: In [0, 1].
        mean_over: "weights" or "samples".

    Returns:
        A 0-d tensor; for "none", shape (N, ...). At least float32.

    Raises:
        TypeError: As in `cross_entropy`.
        ValueError: As in `cross_entropy`.

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


def complement_entropies(logits: Tensor) -> Tensor:
    """For every class, the entropy of the softmax over the other classes.

    H_k = -sum_{j != k} q_j log q_j with q_j = p_j / (1 - p_k). All K of them come from one softmax, by leaving one term
    out of its sums; only the most likely class, where that would cancel, has a softmax of its own.

    Args:
        logits: Shape (N, K, ...) or (K,), K at least 2.

    Returns:
        The same shape, in [0, log(K - 1)].

    Example:
        >>> import torch
        >>> complement_entropies(torch.tensor([90.0, 0.0, 0.0])).round(decimals=4)
        tensor([0.6931, 0.0000, 0.0000])
    """
    dim = class_dim(logits)
    rank = torch.arange(logits.shape[dim], device=logits.device).reshape(-1, *[1] * (logits.ndim - dim - 1))
    best = logits.argmax(dim, keepdim=True)
    top, missing = rank == best, logits == -torch.inf
    scores = logits - logits.gather(dim, best)
    second = torch.where(top, -torch.inf, scores).amax(dim, keepdim=True).detach()
    second = second.clamp_min(torch.finfo(second.dtype).min)  # of -inf: there is one class, and nothing left to share
    gaps = torch.where(top | missing, 0, scores - second)
    odds = torch.where(top | missing, 0, gaps.exp())
    total = odds.sum(dim, keepdim=True)
    mean = safe_divide((odds * gaps).sum(dim, keepdim=True), total)
    of_top = torch.where(total > 0, total, 1).log() - mean
    # for the others: the sums over all classes, less one term; for the top class that would cancel, and is not used
    score = torch.where(top | missing, -1, scores)
    own = torch.where(missing, 0, score.exp())
    share = second.exp() * total
    rest = 1 + share - own
    return torch.where(top, of_top, rest.log() - (share * (mean + second) - score * own) / rest)


def complement_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    gamma: Scalar = -1.0,
    reduction: Reduction = "mean",
    weight: Weight = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    mean_over: MeanOver = "weights",
) -> Tensor:
    """Cross entropy that also makes the probabilities of the wrong classes equal to each other.

    loss = sum_k w_k t_k (-log p_k + gamma / (K - 1) H_k), where H_k = -sum_{j != k} q_j log q_j is the entropy of
    q_j = p_j / (1 - p_k), the softmax over the classes other than k.

    Args:
        logits: Shape (N, K, ...) or (K,), K at least 2.
        targets: Labels (N, ...) or soft targets of the shape of `logits`.
        gamma: Weight of the complement entropy, a number or a 0-d tensor; negative to raise that entropy.
        reduction: As in `cross_entropy`, like all that follows.
        weight: Class weights w, shape (K,).
        ignore_index: The label that is ignored.
        label_smoothing: In [0, 1].
        mean_over: "weights" or "samples".

    Returns:
        A 0-d tensor; for "none", shape (N, ...). At least float32.

    Raises:
        TypeError: As in `cross_entropy`.
        ValueError: As in `cross_entropy`, or for a single class.

    Source: Kim et al., "Imbalanced Image Classification with Complement Cross Entropy" (2020). The complement's softmax
        is taken over the other logits themselves, so that it stays finite where the label's probability rounds to 1;
        soft targets average over the label, which the paper does not consider.

    Example:
        >>> import torch
        >>> from holofunc import losses
        >>> losses.complement_cross_entropy(torch.zeros(1, 3), torch.tensor([0]))  # log 3 - log 2 / 2
        tensor(0.7520)
    """

    def values(logits: Tensor) -> Tensor:
        others = logits.shape[class_dim(logits)] - 1
        if others == 0:
            raise ValueError(
                f"logits must have at least 2 classes, one to predict and its complement, got {others + 1}"
            )
        return log_probabilities(logits) - gamma / others * complement_entropies(logits)

    return classwise(
        logits,
        targets,
        values=values,
        reduction=reduction,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        mean_over=mean_over,
    )


def kl_divergence(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
    weight: Weight = None,
    mean_over: MeanOver = "weights",
) -> Tensor:
    """The Kullback-Leibler divergence of a student's prediction from a teacher's, for distillation.

    loss = temperature^2 sum_k w_k q_k (log q_k - log p_k) with p = softmax(logits / temperature) and
    q = softmax(targets / temperature); the square keeps the size of gradients when the temperature changes.

    Args:
        logits: The student's, shape (N, K, ...) or (K,), K at least 2.
        targets: The teacher's logits, of the same shape, floating point. Stop their gradient yourself if they have one.
        temperature: Above 0; above 1 what the teacher makes of the wrong classes counts more.
        reduction: As in `cross_entropy`, like all that follows; "mean" is over positions, torch's "batchmean".
        weight: Class weights w, a tensor or numbers, shape (K,).
        mean_over: "weights" or "samples".

    Returns:
        A 0-d tensor; for "none", shape (N, ...). At least float32.

    Raises:
        TypeError: If logits or targets are not floating point.
        ValueError: If the shapes differ, the batch is empty, there is one class, or an option is out of its range.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network" (2015), the first of its two terms.

    Example:
        >>> import torch
        >>> from holofunc import losses
        >>> teacher = torch.tensor([[0.0, 1.0]])
        >>> losses.kl_divergence(teacher, teacher), losses.kl_divergence(torch.zeros(1, 2), teacher)
        (tensor(0.), tensor(0.1109))
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if targets.shape != logits.shape:
        raise ValueError(f"targets must be logits of shape {tuple(logits.shape)}, got {tuple(targets.shape)}")
    if not targets.is_floating_point():
        raise TypeError(f"targets (the teacher's logits) must be floating point, got {targets.dtype}")
    teacher = log_probabilities(upcast(targets) / temperature)
    known = torch.where(teacher == -torch.inf, 0, teacher)  # 0 log 0 is 0
    return classwise(
        logits,
        teacher.exp(),
        lambda difference: -(temperature**2) * difference,
        values=lambda z: log_probabilities(z / temperature) - known.to(z.dtype),
        reduction=reduction,
        weight=weight,
        mean_over=mean_over,
    )
