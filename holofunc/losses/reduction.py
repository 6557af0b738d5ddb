"""The shared arithmetic of all losses: class weights, ignored positions, label smoothing and reduction.

A loss assigns to every position of a batch one value per class, l_k, the loss it would have were k its label. The
targets choose among those values (hard labels) or average them (soft targets): `classwise`. Or it decides every class
by itself: `decisionwise`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from holofunc import tree
from holofunc.losses.contract import (
    Weight,
    check_choice,
    check_labels,
    check_logits,
    check_smoothing,
    class_dim,
    class_weights,
    column,
    prepare,
)
from holofunc.ops.arithmetic import safe_divide, upcast
from holofunc.typing import Scalar

__all__ = ["classwise", "decisionwise", "dense_targets", "focus", "log_probabilities", "reduce"]


def log_probabilities(logits: Tensor) -> Tensor:
    """log softmax over the classes.

    Args:
        logits: shape (N, K, ...) or (K,).

    Returns:
        The same shape.

    Example:
        >>> import torch
        >>> log_probabilities(torch.zeros(2)).exp()
        tensor([0.5000, 0.5000])
    """
    return torch.log_softmax(logits, class_dim(logits))


def focus(miss: Tensor, gamma: Scalar) -> Tensor:
    """miss^gamma, the factor by which focal losses count less what is already right, with finite derivatives at 0.

    Args:
        miss: how much of the right answer is missing, in [0, 1].
        gamma: at least 0.

    Returns:
        The shape of ``miss``.

    Example:
        >>> import torch
        >>> focus(torch.tensor([0.0, 0.5]), 2.0)
        tensor([1.4211e-14, 2.5000e-01])
    """
    return miss.clamp_min(torch.finfo(miss.dtype).eps) ** gamma


def reduce(losses: Tensor, mass: Tensor, reduction: str) -> Tensor:
    """The losses themselves, their sum, or their sum divided by the sum of ``mass`` (a mean of nothing is 0).

    Sums and masses of several batches, or of samples one by one, add up to those of all: what an evaluation needs, that
    shall equal the loss of one large batch, whatever was ignored or weighted.

    Args:
        losses: weighted losses, 0 where ignored, any shape.
        mass: what each of them counts in the mean, the same shape.
        reduction: "mean", "sum" or "none"; "parts" for the two sums, of losses and of mass.

    Returns:
        A 0-d tensor; ``losses`` for "none", shape (2,) for "parts".

    Raises:
        ValueError: if ``reduction`` is another word.

    Example:
        >>> import torch
        >>> reduce(torch.tensor([3.0, 0.0]), torch.tensor([1.0, 0.0]), "mean")
        tensor(3.)
    """
    check_choice("reduction", reduction, "mean", "sum", "none", "parts")
    if reduction == "none":
        return losses
    if reduction == "parts":
        return torch.stack([losses.sum(), mass.sum()])
    if reduction == "sum":
        return losses.sum()
    return safe_divide(losses.sum(), mass.sum())


def dense_targets(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Labels as one target per class, and which of those count; for losses that look at every class by itself.

    Args:
        logits: shape (N, K, ...) or (K,). With K = 1 a label is the target itself, 0 or 1.
        targets: as `prepare` returns them. In soft targets ``ignore_index`` marks single entries.
        ignore_index: what is ignored.

    Returns:
        Targets in the dtype of ``logits`` and their mask, bool, both of the shape of ``logits``.

    Raises:
        ValueError: if ``ignore_index`` is a class (or 0 or 1) beside soft targets of several classes: would it be the
            class, or the value?

    Example:
        >>> import torch
        >>> dense_targets(torch.zeros(2, 3), torch.tensor([2, -100]), -100)
        (tensor([[0., 0., 1.],
                [0., 0., 0.]]), tensor([[ True,  True,  True],
                [False, False, False]]))
    """
    if targets.ndim < logits.ndim:
        targets = targets.unsqueeze(class_dim(logits))
        num_classes = logits.shape[class_dim(logits)]
        valid = (targets != ignore_index).expand_as(logits)
        if num_classes > 1:
            if targets.device.type == "cpu" and tree.is_known(targets):  # else one would be of no class, in silence
                check_labels(targets, num_classes, ignore_index)
            targets = targets == column(torch.arange(num_classes, device=targets.device), logits)
    else:
        num_classes = logits.shape[class_dim(logits)]
        if num_classes > 1 and 0 <= ignore_index < num_classes:
            raise ValueError(
                f"ignore_index must be outside [0, {num_classes}) beside soft or multi-hot targets, where it marks "
                f"entries that do not count, got {ignore_index}"
            )
        valid = targets != ignore_index
    return torch.where(valid, targets.to(logits.dtype), 0), valid


def _pick(values: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """The value at each position's label; 0 with gradient 0 where ignored (`gather` knows no ignored labels)."""
    return -F.nll_loss(values, labels, reduction="none", ignore_index=ignore_index)


def _shares(targets: Tensor, ignore_index: int, dim: int) -> tuple[Tensor, Tensor]:
    """Soft targets without what is ignored of them, and the sum of each position's targets, ignored class included."""
    num_classes = targets.shape[dim]
    if 0 <= ignore_index < num_classes:
        counted = torch.arange(num_classes, device=targets.device) != ignore_index
        return targets * column(counted.to(targets.dtype), targets), targets.sum(dim)
    targets = torch.where(targets == ignore_index, 0, targets)
    return targets, targets.sum(dim)


def _penalties(scores: Tensor, penalty: Callable[[Tensor], Tensor], shares: Tensor | None = None) -> Tensor:
    """The penalty of every class; of those that do not exist, infinity if the target has a share in them, or else 0."""
    missing = scores == -torch.inf
    penalties = penalty(torch.where(missing, 0, scores))
    return penalties if shares is None else torch.where(missing & (shares != 0), torch.inf, penalties)


def classwise(
    logits: Tensor,
    targets: Tensor,
    penalty: Callable[[Tensor], Tensor] = torch.neg,
    *,
    values: Callable[[Tensor], Tensor] = log_probabilities,
    reduction: str = "mean",
    weight: Weight = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    mean_over: str = "weights",
) -> Tensor:
    """Reduce sum_k w_k t_k l_k, where l = penalty(values(logits)) is the loss each class would have as the label.

    The mean divides by the sum of each position's weight, sum_k w_k t_k / sum_k t_k: for labels, the weight of the
    label. Ignored labels and all-zero rows of soft targets count nothing. Classes with a value of -inf do not exist:
    they cost nothing where the target has no share in them, also when smoothing, and infinity where it has.

    Args:
        logits: shape (N, K, ...) or (K,), K at least 2 if ``values`` does not say otherwise.
        targets: labels or soft targets, as in `prepare`.
        penalty: an elementwise function with penalty(0) = 0; finite, with finite derivatives, on every finite value.
        values: a function that keeps the shape.
        reduction: "mean", "sum" or "none".
        weight: w, shape (K,); ones where None.
        ignore_index: the label that is ignored. Soft targets are ignored for the share they have in that class, if
            there is one, and in entries of that value if not.
        label_smoothing: e in t <- (1 - e) t + e / K.
        mean_over: "weights": as above; "samples": divide by the number of positions that are not ignored.

    Returns:
        A 0-d tensor, or for "none" shape (N, ...).

    Raises:
        TypeError: as `prepare`.
        ValueError: as `prepare`, for a single class, or if an option is none of its choices.

    Example:
        >>> import torch
        >>> classwise(torch.tensor([[0.0, 0.0], [8.0, 9.0]]), torch.tensor([1, -100]), reduction="none")
        tensor([0.6931, 0.0000])
    """
    check_choice("mean_over", mean_over, "weights", "samples")
    check_smoothing(label_smoothing)
    logits, targets = prepare(logits, targets)
    dim = class_dim(logits)
    weight = class_weights(weight, logits.shape[dim], logits)
    if logits.shape[dim] == 1 and values is log_probabilities:
        raise ValueError(
            "logits must have at least 2 classes (the softmax of one is 1, whatever the logit), got 1; for one "
            "yes-or-no decision use binary_cross_entropy or a sigmoid"
        )
    scores = values(logits)
    weights = None if weight is None else column(weight, logits)
    if targets.ndim < logits.ndim:
        mass = valid = (targets != ignore_index).to(logits.dtype)
        picked = _pick(scores, targets, ignore_index)
        if weights is not None:
            mass = _pick(weights.expand_as(logits), targets, ignore_index)
            picked = torch.where(mass == 0, 0, picked)  # of a class that does not exist, it may be infinite
        losses = penalty(picked) if weights is None else penalty(picked) * mass
    else:
        targets, whole = _shares(targets, ignore_index, dim)
        valid = (targets != 0).any(dim).to(logits.dtype)
        weighted = targets if weights is None else weights * targets
        mass = safe_divide(weighted.sum(dim), whole)
        losses = (weighted * _penalties(scores, penalty, weighted)).sum(dim)
    if label_smoothing:
        each = _penalties(scores, penalty)
        uniform = each if weights is None else weights * each
        losses = (1 - label_smoothing) * losses + label_smoothing * uniform.mean(dim) * valid
    return reduce(losses, mass if mean_over == "weights" else valid, reduction)


def decisionwise(
    logits: Tensor,
    targets: Tensor,
    penalty: Callable[[Tensor, Tensor], Tensor],
    *,
    reduction: str = "mean",
    weight: Weight = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    mean_over: str = "weights",
) -> Tensor:
    """Reduce penalty(logits, t) over yes-or-no decisions, where t in [0, 1] is the target of each.

    An infinite logit is a certain answer: it costs nothing if right, and infinity if not.

    Args:
        logits: shape (N, K, ...), (K,), or () for one decision.
        targets: of the shape of ``logits``, or labels of shape (N, ...): one class against the rest.
        penalty: an elementwise function, finite on finite logits.
        reduction: as in `classwise`, like all that follows.
        weight: shape (K,); ones where None.
        ignore_index: the label, or the value of single targets, that counts nothing.
        label_smoothing: e in t <- (1 - e) t + e / 2.
        mean_over: "weights" or "samples".

    Returns:
        A 0-d tensor; for "none", the shape of ``targets``.

    Raises:
        TypeError: as `prepare`.
        ValueError: as `prepare`, or if an option is none of its choices.

    Example:
        >>> import torch
        >>> error = lambda logits, t: (logits.sigmoid() - t).abs()
        >>> decisionwise(torch.tensor([0.0, -torch.inf]), torch.tensor([1.0, 0.0]), error, reduction="none")
        tensor([0.5000, 0.0000])
    """
    check_choice("mean_over", mean_over, "weights", "samples")
    check_smoothing(label_smoothing)
    scalar = logits.ndim == 0
    if scalar:
        logits, targets = logits[None], targets[None]
    check_logits(logits)
    dim = class_dim(logits)
    weight = class_weights(weight, logits.shape[dim], logits)
    labels = targets.ndim < logits.ndim
    if labels and logits.shape[dim] == 1:
        targets = targets.unsqueeze(dim)
    if targets.shape == logits.shape:
        logits = upcast(logits)
    else:
        logits, targets = prepare(logits, targets)
    t, valid = dense_targets(logits, targets, ignore_index)
    certain = logits.isinf()
    wrong = torch.where(logits < 0, t, 1 - t) > 0
    if label_smoothing:
        t = (1 - label_smoothing) * t + label_smoothing / 2
    each = penalty(torch.where(certain, 0, logits), t)
    each = torch.where(certain, torch.where(wrong, torch.inf, 0), each)
    counts = valid.to(logits.dtype)
    mass = counts if weight is None else counts * column(weight, logits)
    losses = torch.where(mass == 0, 0, mass * each)
    mass = mass if mean_over == "weights" else counts
    if labels:
        losses, mass = losses.mean(dim), mass.mean(dim)
    loss = reduce(losses, mass, reduction)
    return loss[0] if scalar and reduction == "none" else loss
