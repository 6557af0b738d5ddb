"""Losses of regions."""

from typing import Literal

import torch
from torch import Tensor

from holofunc.losses.reduction import Reduction, check_choice, class_dim, column, dense_targets, prepare, reduce

__all__ = ["dice"]


def dice(
    logits: Tensor,
    targets: Tensor,
    *,
    activation: Literal["softmax", "sigmoid", "none"] = "softmax",
    absent: Literal["exclude", "count"] = "exclude",
    squared: bool = True,
    gamma: float = 1.0,
    eps: float = 1e-8,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """One minus the overlap of predicted and true regions, averaged over classes; in [0, 1].

    loss = sum_k w_k (1 - D_k) / sum_k w_k over the classes of a sample, with
    D_k = ((1 + gamma) sum p t + eps) / (sum p^2 + gamma sum t^2 + eps) over its positions (p and t without the squares
    for squared=False).

    Args:
        logits: Shape (N, K, ...) or (K,). Sums run over the positions of one sample; to pool them over the batch, as
            Holocron does, make the batch a position: ``logits.transpose(0, 1).flatten(1)[None]``.
        targets: Labels (N, ...), or soft targets in [0, 1] of the shape of `logits`. For K = 1 (with
            activation="sigmoid") a label is the target, 0 or 1.
        activation: What makes p of the logits: "softmax" over classes; "sigmoid" for K = 1 or overlapping classes;
            "none" if they are probabilities already.
        absent: What to do with classes that a sample's targets do not contain: "exclude" them from the mean, or "count"
            them; they then cost eps / (sum p^2 + eps) less than 1, so give `eps` the size of a region worth forgiving.
        squared: The paper's squares in the denominator; False for the Sorensen-Dice of set sizes.
        gamma: Above 1 missed pixels cost more, below 1 false ones do; needs squared=False unless it is 1.
        eps: Added to both sides, above 0.
        reduction: "mean", "sum" or "none", over samples.
        weight: Class weights w, shape (K,).
        ignore_index: The label of positions that count nothing; in soft targets, the value of entries that do not.

    Returns:
        A 0-d tensor, 0 if everything is ignored; for "none", shape (N,). At least float32.

    Raises:
        TypeError: As in `cross_entropy`.
        ValueError: As in `cross_entropy`, or if an option is out of its range.

    Source: Milletari et al., "V-Net" (3DV 2016), 1 - D instead of maximising D, averaged over classes; gamma as in the
        F_beta score, gamma = beta^2.

    Example:
        >>> import torch
        >>> from holofunc import losses
        >>> logits = torch.tensor([[[9.0, -9.0, -9.0], [-9.0, 9.0, 9.0]]])  # 2 classes, 3 pixels
        >>> losses.dice(logits, torch.tensor([[0, 1, 0]]), reduction="none").round(decimals=4)
        tensor([0.3333])
    """
    check_choice("activation", activation, "softmax", "sigmoid", "none")
    check_choice("absent", absent, "exclude", "count")
    if eps <= 0 or gamma <= 0:
        raise ValueError(f"eps and gamma must be above 0, got eps={eps}, gamma={gamma}")
    if squared and gamma != 1:
        raise ValueError(f"gamma must be 1 with squared=True (the loss would leave [0, 1]), got {gamma}")
    logits, targets = prepare(logits, targets, weight)
    dim = class_dim(logits)
    t, valid = dense_targets(logits, targets, ignore_index)
    p = logits
    if activation != "none":
        p = torch.softmax(logits, dim) if activation == "softmax" else torch.sigmoid(logits)
    p = torch.where(valid, p, 0)

    def total(x: Tensor) -> Tensor:
        return x.reshape(*x.shape[: dim + 1], -1).sum(-1)

    areas = p * p + t * t if squared else p + gamma * t
    shared, sizes = (1 + gamma) * total(p * t) + eps, total(areas) + eps
    overlap = (shared.log() - sizes.log()).exp()  # the quotient; compiled, its derivative is taken once per class
    present = t > 0 if absent == "exclude" else valid
    counts = present.reshape(*shared.shape, -1).any(-1)
    mass = counts.to(t.dtype) if weight is None else counts * column(weight, overlap)
    whole = mass.sum(dim)
    losses = (mass * (1 - overlap)).sum(dim) / torch.where(whole == 0, 1, whole)
    return reduce(losses, counts.any(dim).to(t.dtype), reduction)
