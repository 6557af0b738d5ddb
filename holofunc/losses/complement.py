"""Complement cross entropy: cross entropy, and the entropy of the wrong classes."""

import torch
from torch import Tensor

from holofunc.losses.contract import MeanOver, Reduction, Weight, check_finite, class_dim
from holofunc.losses.reduction import classwise, log_probabilities
from holofunc.ops.arithmetic import safe_divide
from holofunc.typing import Scalar

__all__ = ["complement_cross_entropy", "complement_entropies"]


def complement_entropies(logits: Tensor) -> Tensor:
    """For every class, the entropy of the softmax over the other classes.

    H_k = -sum_{j != k} q_j log q_j with q_j = p_j / (1 - p_k). All K of them come from one softmax, by leaving one term
    out of its sums; only the most likely class, where that would cancel, has a softmax of its own.

    Args:
        logits: shape (N, K, ...) or (K,), K at least 2.

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
    """Cross entropy that also equalizes the probabilities of the wrong classes.

    loss = sum_k w_k t_k (-log p_k + gamma / (K - 1) H_k), where H_k = -sum_{j != k} q_j log q_j is the entropy of
    q_j = p_j / (1 - p_k), the softmax over the classes other than k.

    Args:
        logits: shape (N, K, ...) or (K,), K at least 2.
        targets: labels (N, ...) or soft targets of the shape of ``logits``.
        gamma: weight of the complement entropy, a number or a 0-d tensor; negative to raise that entropy.
        reduction: as in `cross_entropy`, like all that follows.
        weight: class weights w, shape (K,).
        ignore_index: the label that is ignored.
        label_smoothing: in [0, 1].
        mean_over: "weights" or "samples".

    Returns:
        A 0-d tensor; for "none", shape (N, ...). At least float32.

    Raises:
        TypeError: as in `cross_entropy`.
        ValueError: as in `cross_entropy`, or for a single class.

    Source: Kim et al., "Imbalanced Image Classification with Complement Cross Entropy" (2020). The complement's softmax
        is taken over the other logits themselves, so that it stays finite where the label's probability rounds to 1;
        soft targets average over the label, which the paper does not consider.

    Example:
        >>> import torch
        >>> from holofunc import losses
        >>> losses.complement_cross_entropy(torch.zeros(1, 3), torch.tensor([0]))  # log 3 - log 2 / 2
        tensor(0.7520)
    """

    check_finite(gamma=gamma)

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
