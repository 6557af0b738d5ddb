"""Losses of regions, for segmentation."""

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from holofunc.losses.contract import (
    Reduction,
    Weight,
    check_choice,
    check_finite,
    check_positive,
    class_dim,
    class_weights,
    column,
    prepare,
)
from holofunc.losses.reduction import dense_targets, focus, reduce
from holofunc.ops.arithmetic import safe_divide

__all__ = ["dice", "generalized_dice", "lovasz", "tversky"]

Activation: TypeAlias = Literal["softmax", "sigmoid", "none"]
Absent: TypeAlias = Literal["exclude", "count"]


def dice(
    logits: Tensor,
    targets: Tensor,
    *,
    activation: Activation = "softmax",
    absent: Absent = "exclude",
    squared: bool = True,
    gamma: float = 1.0,
    eps: float = 1e-8,
    reduction: Reduction = "mean",
    weight: Weight = None,
    ignore_index: int = -100,
) -> Tensor:
    """One minus the overlap of predicted and true regions, averaged over classes; in [0, 1].

    loss = sum_k w_k (1 - D_k) / sum_k w_k over the classes of a sample, with
    D_k = ((1 + gamma) sum p t + eps) / (sum p^2 + gamma sum t^2 + eps) over its positions (p and t without the squares
    for squared=False).

    Args:
        logits: shape (N, K, ...) or (K,). Sums run over the positions of one sample; to pool them over the batch, as
            Holocron does, make the batch a position: ``logits.transpose(0, 1).flatten(1)[None]``.
        targets: labels (N, ...), or soft targets in [0, 1] of the shape of ``logits``. For K = 1 (with
            activation="sigmoid") a label is the target, 0 or 1.
        activation: what makes p of the logits: "softmax" over classes, K at least 2; "sigmoid" for K = 1 or overlapping
            classes; "none" if they are probabilities already.
        absent: what to do with classes that a sample's targets do not contain: "exclude" them from the mean, or "count"
            them; they then cost eps / (sum p^2 + eps) less than 1, so give ``eps`` the size of a region worth
            forgiving.
        squared: the paper's squares in the denominator; False for the Sorensen-Dice of set sizes.
        gamma: above 1 false negatives cost more, below 1 false positives do; needs squared=False unless it is 1.
        eps: added to both sides, above 0.
        reduction: "mean", "sum" or "none", over samples.
        weight: class weights w, a tensor or numbers, shape (K,).
        ignore_index: the label of positions that count nothing; in soft targets, the value, outside [0, K), of entries
            that do not.

    Returns:
        A 0-d tensor, 0 if everything is ignored; for "none", shape (N,). At least float32.

    Raises:
        TypeError: as in `cross_entropy`.
        ValueError: as in `cross_entropy`, or if an option is out of its range.

    Source: Milletari et al., "V-Net" (3DV 2016), 1 - D instead of maximising D, averaged over classes; gamma as in the
        F_beta score, gamma = beta^2.

    Example:
        >>> import torch
        >>> from holofunc import losses
        >>> logits = torch.tensor([[[9.0, -9.0, -9.0], [-9.0, 9.0, 9.0]]])  # 2 classes, 3 pixels
        >>> losses.dice(logits, torch.tensor([[0, 1, 0]]), reduction="none").round(decimals=4)
        tensor([0.3333])
    """
    _check(activation, absent, eps)
    check_positive(gamma=gamma)
    if squared and gamma != 1:
        raise ValueError(f"gamma must be 1 with squared=True (the loss would leave [0, 1]), got {gamma}")
    p, t, valid = _regions(logits, targets, activation, ignore_index)
    areas = p * p + t * t if squared else p + gamma * t
    shared, sizes = (1 + gamma) * _total(p * t) + eps, _total(areas) + eps
    overlap = (shared.log() - sizes.log()).exp()  # the quotient; compiled, its derivative is taken once per class
    present = t > 0 if absent == "exclude" else valid
    return _over_classes(1 - overlap, present, weight, reduction)


def tversky(
    logits: Tensor,
    targets: Tensor,
    *,
    alpha: float = 0.3,
    beta: float = 0.7,
    gamma: float = 1.0,
    activation: Activation = "softmax",
    absent: Absent = "exclude",
    eps: float = 1e-8,
    reduction: Reduction = "mean",
    weight: Weight = None,
    ignore_index: int = -100,
) -> Tensor:
    """One minus an overlap with weights for false positives and false negatives, averaged over classes; in [0, 1].

    loss = sum_k w_k (1 - T_k)^gamma / sum_k w_k over the classes of a sample, with
    T_k = (sum p t + eps) / (sum p t + alpha sum p (1 - t) + beta sum (1 - p) t + eps) over its positions.

    Args:
        logits: shape (N, K, ...) or (K,), as in `dice`.
        targets: labels (N, ...) or soft targets, as in `dice`.
        alpha: weight of false positives, above 0. alpha = beta = 0.5 is the Dice of set sizes, 1 the IoU.
        beta: weight of false negatives, above 0.
        gamma: above 1 a class counts less the better it is already found; below 1, more (the paper takes 3 / 4).
        activation: "softmax", "sigmoid" or "none", as in `dice`, like all that follows.
        absent: "exclude" or "count" the classes that a sample's targets do not contain.
        eps: added to both sides, above 0.
        reduction: "mean", "sum" or "none", over samples.
        weight: class weights w, a tensor or numbers, shape (K,).
        ignore_index: what counts nothing.

    Returns:
        A 0-d tensor, 0 if everything is ignored; for "none", shape (N,). At least float32.

    Raises:
        TypeError: as in `dice`.
        ValueError: as in `dice`, or if alpha, beta or gamma is not above 0.

    Source: Salehi et al., "Tversky loss function for image segmentation using 3D fully convolutional deep networks"
        (MLMI 2017); gamma is that of Abraham and Khan, "A Novel Focal Tversky Loss Function" (ISBI 2019), inverted.

    Example:
        >>> import torch
        >>> from holofunc import losses
        >>> logits = torch.tensor([[[9.0, -9.0, -9.0], [-9.0, 9.0, 9.0]]])  # 2 classes, 3 pixels
        >>> losses.tversky(logits, torch.tensor([[0, 1, 0]])).round(decimals=4)  # 1 - 1 / 1.7 and 1 - 1 / 1.3
        tensor(0.3213)
    """
    check_finite(alpha=alpha, beta=beta, gamma=gamma)
    if min(alpha, beta, gamma) <= 0:
        raise ValueError(f"alpha, beta and gamma must be above 0, got alpha={alpha}, beta={beta}, gamma={gamma}")
    _check(activation, absent, eps)
    p, t, valid = _regions(logits, targets, activation, ignore_index)
    shared = _total(p * t) + eps
    sizes = shared + alpha * _total(p * (1 - t)) + beta * _total(torch.where(valid, (1 - p) * t, 0))
    missing = focus(1 - shared / sizes, gamma)
    return _over_classes(missing, t > 0 if absent == "exclude" else valid, weight, reduction)


def generalized_dice(
    logits: Tensor,
    targets: Tensor,
    *,
    activation: Activation = "softmax",
    eps: float = 1e-8,
    reduction: Reduction = "mean",
    weight: Weight = None,
    ignore_index: int = -100,
) -> Tensor:
    """One minus the overlap of all classes, each weighted by the inverse square of its true size; in [0, 1].

    loss = 1 - (2 sum_k v_k sum p t + eps) / (sum_k v_k sum (p + t) + eps) over the positions of a sample, with
    v_k = w_k / (sum t)^2, so that small regions count as much as large ones. Classes that a sample's targets do not
    contain have the weight of the smallest one that they do, as they would outweigh all others.

    Args:
        logits: shape (N, K, ...) or (K,), as in `dice`.
        targets: labels (N, ...) or soft targets, as in `dice`.
        activation: "softmax", "sigmoid" or "none", as in `dice`, like all that follows.
        eps: added to both sides, above 0.
        reduction: "mean", "sum" or "none", over samples.
        weight: class weights w, a tensor or numbers, shape (K,).
        ignore_index: what counts nothing.

    Returns:
        A 0-d tensor, 0 if everything is ignored; for "none", shape (N,). At least float32.

    Raises:
        TypeError: as in `dice`.
        ValueError: as in `dice`.

    Source: Sudre et al., "Generalised Dice overlap as a deep learning loss function for highly unbalanced
        segmentations" (DLMIA 2017), which leaves the weight of an absent class open.

    Example:
        >>> import torch
        >>> from holofunc import losses
        >>> logits = torch.tensor([[[9.0, -9.0, -9.0], [-9.0, 9.0, 9.0]]])  # 2 classes, 3 pixels
        >>> losses.generalized_dice(logits, torch.tensor([[0, 1, 0]])).round(decimals=4)  # 1 - 2.5 / 3.75
        tensor(0.3333)
    """
    _check(activation, "count", eps)
    p, t, _ = _regions(logits, targets, activation, ignore_index)
    dim, sizes = class_dim(logits), _total(t)
    known = torch.where(sizes > 0, sizes, torch.finfo(sizes.dtype).max)
    least = known.amin(dim, keepdim=True)
    inverse = torch.where(sizes > least, least / known, 1) ** 2  # of the smallest class, as squares of sizes underflow
    weight = class_weights(weight, logits.shape[dim], logits)
    if weight is not None:
        inverse = inverse * column(weight, inverse)
    inverse = safe_divide(inverse, inverse.amax(dim, keepdim=True))
    shared, areas = (2 * inverse * _total(p * t)).sum(dim), (inverse * _total(p + t)).sum(dim)
    counts = (sizes > 0).any(dim) & (inverse > 0).any(dim)
    losses = torch.where(counts, 1 - (shared + eps) / (areas + eps), 0)
    return reduce(losses, counts.to(t.dtype), reduction)


def lovasz(
    logits: Tensor,
    targets: Tensor,
    *,
    activation: Activation = "softmax",
    absent: Absent = "exclude",
    reduction: Reduction = "mean",
    weight: Weight = None,
    ignore_index: int = -100,
) -> Tensor:
    """The convex surrogate of one minus IoU, averaged over classes; in [0, 1].

    loss = sum_k w_k L_k / sum_k w_k with L_k the Lovasz extension of the Jaccard loss at the errors |t - p| of class k:
    sum_i e_i (J_i - J_{i-1}), where e_1 >= e_2 >= ... are the errors sorted and J_i is 1 - IoU if the first i pixels
    are wrong. Where every p is 0 or 1 it is 1 - IoU.

    Args:
        logits: shape (N, K, ...) or (K,), as in `dice`. Sums run over the positions of one sample; the paper's variant
            that pools a batch is ``logits.transpose(0, 1).flatten(1)[None]``.
        targets: labels (N, ...), or targets of 0 and 1 of the shape of ``logits``, as in `dice`.
        activation: "softmax" (Lovasz-softmax), "sigmoid" or "none", as in `dice`, like all that follows.
        absent: "exclude" or "count" the classes that a sample's targets do not contain.
        reduction: "mean", "sum" or "none", over samples.
        weight: class weights w, a tensor or numbers, shape (K,).
        ignore_index: what counts nothing.

    Returns:
        A 0-d tensor, 0 if everything is ignored; for "none", shape (N,). At least float32.

    Raises:
        TypeError: as in `dice`.
        ValueError: as in `dice`.

    Source: Berman et al., "The Lovasz-Softmax loss" (CVPR 2018); for one class, sigmoid errors instead of hinge errors.

    Example:
        >>> import torch
        >>> from holofunc import losses
        >>> logits = torch.tensor([[[99.0, 0.0, 0.0], [0.0, 99.0, 99.0]]])  # 2 classes, 3 pixels
        >>> losses.lovasz(logits, torch.tensor([[0, 1, 0]]))
        tensor(0.5000)
    """
    _check(activation, absent, 1.0)
    p, t, valid = _regions(logits, targets, activation, ignore_index)
    errors, t = torch.where(valid, (t - p).abs(), 0), t.reshape(*t.shape[: class_dim(logits) + 1], -1)
    errors, order = errors.reshape(t.shape).sort(dim=-1, descending=True, stable=True)
    hits = t.gather(-1, order)
    counted = valid.reshape(t.shape).gather(-1, order).to(t.dtype)
    size = t.sum(-1, keepdim=True)
    intersection, union = size - hits.cumsum(-1), size + (counted - hits).cumsum(-1)
    jaccard = 1 - safe_divide(intersection, union)
    steps = torch.cat([jaccard[..., :1], jaccard[..., 1:] - jaccard[..., :-1]], -1)
    extension = (errors * steps.detach()).sum(-1)
    return _over_classes(extension, t > 0 if absent == "exclude" else valid, weight, reduction)


# --- what all of them are made of --------------------------------------------------------------------------------


def _check(activation: str, absent: str, eps: float) -> None:
    check_choice("activation", activation, "softmax", "sigmoid", "none")
    check_choice("absent", absent, "exclude", "count")
    check_positive(eps=eps)


def _regions(logits: Tensor, targets: Tensor, activation: str, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Predicted and true regions, 0 where they do not count, and where they do; all of the shape of ``logits``."""
    logits, targets = prepare(logits, targets)
    dim = class_dim(logits)
    if activation == "softmax" and logits.shape[dim] == 1:
        raise ValueError(
            "logits must have at least 2 classes for activation='softmax' (the softmax of one is 1, whatever the "
            "logit), got 1; for one region take activation='sigmoid'"
        )
    t, valid = dense_targets(logits, targets, ignore_index)
    p = logits
    if activation != "none":
        p = torch.softmax(logits, dim) if activation == "softmax" else torch.sigmoid(logits)
    return torch.where(valid, p, 0), t, valid


def _total(x: Tensor) -> Tensor:
    """Sums over the positions, (N, K)."""
    return x.reshape(*x.shape[: class_dim(x) + 1], -1).sum(-1)


def _over_classes(losses: Tensor, present: Tensor, weight: Weight, reduction: Reduction) -> Tensor:
    """The weighted mean of losses (N, K) over the classes ``present`` (N, K, ...) in a sample, reduced over samples."""
    dim = class_dim(losses)
    weight = class_weights(weight, losses.shape[dim], losses)
    counts = present.reshape(*losses.shape, -1).any(-1)
    mass = counts.to(losses.dtype) if weight is None else counts * column(weight, losses)
    each = safe_divide((mass * losses).sum(dim), mass.sum(dim))
    return reduce(each, counts.any(dim).to(losses.dtype), reduction)
