"""Class-balanced weighting of other losses."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from holofunc.losses.contract import Weight, check_finite, class_weights
from holofunc.ops.arithmetic import upcast

__all__ = ["class_balanced"]


def class_balanced(
    loss: Callable[..., Tensor], num_samples: Tensor | Sequence[float], beta: float = 0.99
) -> Callable[..., Tensor]:
    """``loss`` with class weights that compensate for the number of samples per class.

    w_k = c (1 - beta) / (1 - beta^n_k), the inverse of the effective number of samples, with c such that the weights
    sum to K. beta = 0 weighs all classes alike; beta -> 1 weighs them by 1 / n_k.

    Args:
        loss: a loss of this module, or any function of ``(logits, targets, *, weight, ...)``.
        num_samples: samples per class n, shape (K,), none negative. A class without samples is taken to have one.
        beta: in [0, 1).

    Returns:
        ``balanced(logits, targets, *, weight=None, **options)``; a `weight` given there multiplies w.

    Raises:
        ValueError: if num_samples or beta is out of range.

    Source: Cui et al., "Class-Balanced Loss Based on Effective Number of Samples" (CVPR 2019).

    Example:
        >>> import torch
        >>> from holofunc import losses
        >>> loss = losses.class_balanced(losses.focal, [900, 100], beta=0.999)
        >>> loss(torch.zeros(2, 2), torch.tensor([0, 1]), gamma=0.0, reduction="none")
        tensor([0.1916, 1.1947])
    """
    counts = torch.as_tensor(num_samples, dtype=torch.float64)
    if counts.ndim != 1 or counts.numel() == 0 or not bool((counts >= 0).all()):
        raise ValueError(f"num_samples must be one number per class, none negative, got {num_samples}")
    check_finite(beta=beta)
    if not 0 <= beta < 1:
        raise ValueError(f"beta must be in [0, 1), got {beta}")
    inverse = (1 - beta) / (1 - beta ** counts.clamp_min(1))
    weights = inverse * (len(counts) / inverse.sum())

    @functools.wraps(loss)
    def balanced(logits: Tensor, targets: Tensor, *, weight: Weight = None, **options: Any) -> Tensor:
        scale = weights.to(logits.device, upcast(logits).dtype)  # torch's own losses take no other dtype
        more = class_weights(weight, len(weights), logits)
        return loss(logits, targets, weight=scale if more is None else scale * more, **options)

    return balanced
