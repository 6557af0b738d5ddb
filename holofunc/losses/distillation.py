"""Losses for distillation."""

import torch
from torch import Tensor

from holofunc.losses.contract import MeanOver, Reduction, Weight, check_positive
from holofunc.losses.reduction import classwise, log_probabilities
from holofunc.ops.arithmetic import upcast

__all__ = ["kl_divergence"]


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
        logits: the student's, shape (N, K, ...) or (K,), K at least 2.
        targets: the teacher's logits, of the same shape, floating point. Stop their gradient yourself if they have one.
        temperature: above 0; above 1 what the teacher makes of the wrong classes counts more.
        reduction: as in `cross_entropy`, like all that follows; "mean" is over positions, torch's "batchmean".
        weight: class weights w, a tensor or numbers, shape (K,).
        mean_over: "weights" or "samples".

    Returns:
        A 0-d tensor; for "none", shape (N, ...). At least float32.

    Raises:
        TypeError: if logits or targets are not floating point.
        ValueError: if the shapes differ, the batch is empty, there is one class, or an option is out of its range.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network" (2015), the first of its two terms.

    Example:
        >>> import torch
        >>> from holofunc import losses
        >>> teacher = torch.tensor([[0.0, 1.0]])
        >>> losses.kl_divergence(teacher, teacher), losses.kl_divergence(torch.zeros(1, 2), teacher)
        (tensor(0.), tensor(0.1109))
    """
    check_positive(temperature=temperature)
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
