"""Losses on feature maps with several channels per class."""

import torch
from torch import Tensor

from holofunc import random
from holofunc.losses.contract import MeanOver, Reduction, Weight, check_finite, check_logits
from holofunc.losses.reduction import classwise, log_probabilities
from holofunc.ops.arithmetic import upcast
from holofunc.typing import Key, Scalar

__all__ = ["mutual_channel"]


def mutual_channel(
    logits: Tensor,
    targets: Tensor,
    *,
    xi: int = 2,
    alpha: Scalar = 1.0,
    key: Key | None = None,
    reduction: Reduction = "mean",
    weight: Weight = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    mean_over: MeanOver = "weights",
) -> Tensor:
    """Cross entropy of the strongest of ``xi`` channels per class, minus the spatial diversity of these channels.

    loss = CE(max_j M F) - alpha h, with F the channels of shape (N, K, xi, positions), j over the xi channels of a
    class and M a mask that zeroes a random floor(xi / 2) of them; for one target per sample the maximum is averaged
    over positions. h = 1/K sum_k sum_positions max_j softmax(F over positions), in [1, xi]: 1 if the channels of a
    class respond at one place, xi if at xi different places.

    Args:
        logits: channels, shape (N, K xi, ...), the xi channels of a class next to each other; or (K xi, ...) with a 0-d
            label. Without spatial dimensions h is 1.
        targets: labels (N,) or soft targets (N, K) for whole samples; or labels (N, ...) or soft targets (N, K, ...)
            for every position.
        xi: channels per class, at least 1.
        alpha: weight of the diversity (the paper's lambda, which it sets to 10), a number or a 0-d tensor.
        key: draws M, one mask per class, the same for all samples; None, as in evaluation, masks nothing.
        reduction: as in `cross_entropy`, like all that follows.
        weight: class weights, shape (K,).
        ignore_index: the label that is ignored.
        label_smoothing: in [0, 1].
        mean_over: "weights" or "samples".

    Returns:
        A 0-d tensor; for "none", the shape of the labels. At least float32.

    Raises:
        TypeError: as in `cross_entropy`.
        ValueError: as in `cross_entropy`, if xi is below 1, or if it does not divide the channels.

    Source: Chang et al., "The Devil is in the Channels: Mutual-Channel Loss for Fine-Grained Image Classification" (TIP
        2020), L_dis - lambda L_div. One target per position is Holocron's extension.

    Example:
        >>> import torch
        >>> from holofunc import losses, random
        >>> features = torch.eye(4).reshape(1, 4, 2, 2)  # each channel responds at a place of its own
        >>> losses.mutual_channel(features, torch.tensor([1]), key=random.key(0))
        tensor(-0.6073)
    """
    check_finite(alpha=alpha)
    if xi < 1:
        raise ValueError(f"xi must be at least 1, got {xi}")
    single = targets.ndim == 0 or logits.ndim == 1
    if single:
        logits, targets = logits[None], targets[None]
    if logits.ndim < 2 or logits.shape[1] % xi:
        raise ValueError(
            f"logits must have shape (N, K * xi, ...), xi={xi} channels per class, got {tuple(logits.shape)}"
        )
    check_logits(logits)
    maps = upcast(logits).unflatten(1, (-1, xi))
    seen = maps.clamp_min(torch.finfo(maps.dtype).min)  # a channel of -inf responds nowhere, that is alike everywhere
    diversity = seen.reshape(*maps.shape[:3], -1).softmax(-1).max(2).values.sum(-1).mean(1)
    if key is not None:
        order = random.uniform(key, maps.shape[1:3], dtype=torch.float32).argsort(-1).argsort(-1)
        keep = order >= xi // 2
        maps = torch.where(keep.reshape(*keep.shape, *[1] * (maps.ndim - 3)), maps, 0)
    peaks = maps.max(2).values
    if targets.ndim == 1 or (targets.ndim == 2 and targets.is_floating_point()):
        peaks = peaks.reshape(*peaks.shape[:2], -1).mean(-1)
    loss = classwise(
        peaks,
        targets,
        values=lambda z: log_probabilities(z) + alpha * diversity.reshape(-1, *[1] * (z.ndim - 1)),
        reduction=reduction,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        mean_over=mean_over,
    )
    return loss[0] if single and reduction == "none" else loss
