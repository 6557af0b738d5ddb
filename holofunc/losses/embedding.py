"""Losses of embeddings: metric and contrastive learning."""

import torch
from torch import Tensor

from holofunc.losses.contract import Reduction, check_finite, check_label_dtype, check_positive
from holofunc.losses.reduction import reduce
from holofunc.ops.arithmetic import safe_divide, upcast

__all__ = ["cosine", "nt_xent", "supervised_contrastive", "triplet"]


def cosine(
    logits: Tensor,
    targets: Tensor,
    *,
    similar: Tensor | None = None,
    margin: float = 0.0,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """One minus the cosine similarity of two embeddings; for dissimilar pairs, its excess over the margin.

    Args:
        logits: embeddings, shape (..., D), floating point.
        targets: embeddings to compare with, the same shape.
        similar: which pairs belong together, bool of shape (...); all where None.
        margin: the largest cosine that costs nothing for the others, in [-1, 1].
        reduction: "mean", "sum" or "none".
        weight: weight of every pair, shape (...).

    Returns:
        A 0-d tensor, 0 if all weights are; for "none", shape (...). At least float32.

    Raises:
        TypeError: if embeddings are not floating point.
        ValueError: if the shapes do not fit, or the margin is out of its range.

    Source: equal to `torch.nn.functional.cosine_embedding_loss` with ``similar`` for its target of 1 and -1. A vector
        of zeros has a cosine of 0 with every other.

    Example:
        >>> import torch
        >>> from holofunc import losses
        >>> x, y = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
        >>> losses.cosine(x, y, similar=torch.tensor([True, False]), margin=0.5, reduction="none")
        tensor([0.0000, 0.2071])
    """
    check_finite(margin=margin)
    if not -1 <= margin <= 1:
        raise ValueError(f"margin must be in [-1, 1], got {margin}")
    x, y = _checked(logits=logits, targets=targets)
    angle = (_unit(x) * _unit(y)).sum(-1)
    losses = 1 - angle
    if similar is not None:
        if similar.dtype != torch.bool or similar.shape != angle.shape:
            wanted = f"bool of shape {tuple(angle.shape)}"
            raise ValueError(f"similar must be {wanted}, got {similar.dtype} of shape {tuple(similar.shape)}")
        losses = torch.where(similar, losses, torch.relu(angle - margin))
    return _reduced(losses, torch.ones_like(losses), weight, reduction)


def triplet(
    logits: Tensor,
    targets: Tensor,
    negatives: Tensor,
    *,
    margin: float = 1.0,
    swap: bool = False,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """The amount by which the negative is not farther from the anchor than the positive plus ``margin``.

    loss = max(0, |a - p| - |a - n| + margin), with Euclidean norms.

    Args:
        logits: anchors a, shape (..., D), floating point.
        targets: their matches p, the same shape.
        negatives: others n, the same shape.
        margin: above 0.
        swap: take |p - n| where it is less than |a - n|.
        reduction: "mean", "sum" or "none".
        weight: weight of every triplet, shape (...).

    Returns:
        A 0-d tensor, 0 if all weights are; for "none", shape (...). At least float32.

    Raises:
        TypeError: if embeddings are not floating point.
        ValueError: if the shapes do not fit, or the margin is not above 0.

    Source: Schroff et al., "FaceNet" (CVPR 2015), with norms instead of their squares, as in
        `torch.nn.functional.triplet_margin_loss`; swap of Balntas et al. (BMVC 2016).

    Example:
        >>> import torch
        >>> from holofunc import losses
        >>> anchor, match, other = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([[1.5, 0.0]])
        >>> losses.triplet(anchor, match, other)
        tensor(0.5000)
    """
    check_positive(margin=margin)
    anchors, matches, others = _checked(logits=logits, targets=targets, negatives=negatives)
    far = _norm(anchors - others)
    if swap:
        far = torch.minimum(far, _norm(matches - others))
    losses = torch.relu(_norm(anchors - matches) - far + margin)
    return _reduced(losses, torch.ones_like(losses), weight, reduction)


def nt_xent(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 0.5,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """Cross entropy of identifying the other view of an image among all other views in the batch.

    loss_i = -log exp(s_ij / temperature) / sum_{k != i} exp(s_ik / temperature), with s the cosine, j the other view of
    i's image and k any of the 2N views; averaged over the two views of an image.

    Args:
        logits: embeddings of one view of each image, shape (N, D), floating point, N at least 2.
        targets: embeddings of another view, the same shape.
        temperature: above 0.
        reduction: "mean", "sum" or "none".
        weight: weight of every image, shape (N,).

    Returns:
        A 0-d tensor; for "none", shape (N,). At least float32.

    Raises:
        TypeError: if embeddings are not floating point.
        ValueError: if the shapes do not fit, or temperature is not above 0.

    Source: Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations" (ICML 2020), eq. 1.

    Example:
        >>> import torch
        >>> from holofunc import losses
        >>> losses.nt_xent(torch.eye(2), torch.eye(2), temperature=1.0)  # log(e + 2) - 1
        tensor(0.5514)
    """
    first, second = _checked(logits=logits, targets=targets)
    if logits.ndim != 2 or len(logits) < 2:
        raise ValueError(f"logits must have shape (N, D) with N at least 2, got {tuple(logits.shape)}")
    images = torch.arange(len(logits), device=logits.device)
    losses, _ = _contrast(torch.cat([first, second]), images.repeat(2), None, temperature)
    pairs = losses.view(2, -1).mean(0)
    return _reduced(pairs, torch.ones_like(pairs), weight, reduction)


def supervised_contrastive(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 0.1,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Cross entropy of identifying embeddings of the same class among all others in the batch.

    loss_i = -1 / |P(i)| sum_{p in P(i)} log exp(s_ip / temperature) / sum_{k != i} exp(s_ik / temperature), with s the
    cosine and P(i) the other embeddings of i's class. An embedding that is the only one of its class counts nothing.

    Args:
        logits: embeddings, shape (N, D) or, V views of each image, (N, V, D); floating point.
        targets: class labels, shape (N,), an integer dtype.
        temperature: above 0.
        reduction: "mean", "sum" or "none".
        weight: weight of every image, shape (N,).
        ignore_index: the label of images that are not there: neither compared nor compared with.

    Returns:
        A 0-d tensor, 0 if nothing has a partner; for "none", shape (N,) or (N, V). At least float32.

    Raises:
        TypeError: if embeddings are not floating point, or labels not integers.
        ValueError: if the shapes do not fit, or temperature is not above 0.

    Source: Khosla et al., "Supervised Contrastive Learning" (NeurIPS 2020), eq. 2 (the sum outside of the logarithm).

    Example:
        >>> import torch
        >>> from holofunc import losses
        >>> losses.supervised_contrastive(torch.eye(3), torch.tensor([0, 0, 1]))  # log 2, and one without a partner
        tensor(0.6931)
    """
    (embeddings,) = _checked(logits=logits)
    if logits.ndim not in (2, 3) or targets.shape != logits.shape[:1]:
        raise ValueError(
            "logits and targets must have shapes (N, D) or (N, V, D) and (N,), got "
            f"{tuple(logits.shape)} and {tuple(targets.shape)}"
        )
    check_label_dtype(targets)
    shape = logits.shape[:-1]
    labels = targets.long().reshape(-1, *[1] * (logits.ndim - 2)).expand(shape)
    losses, partners = _contrast(embeddings.flatten(0, -2), labels.flatten(), ignore_index, temperature)
    return _reduced(losses.view(shape), (partners > 0).to(losses.dtype).view(shape), weight, reduction)


def _contrast(
    embeddings: Tensor, labels: Tensor, ignore_index: int | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """For each of M embeddings, its loss and how many others share its label."""
    check_positive(temperature=temperature)
    z = _unit(embeddings)
    there = torch.ones_like(labels, dtype=torch.bool) if ignore_index is None else labels != ignore_index
    others = ~torch.eye(len(z), dtype=torch.bool, device=z.device) & there & there[:, None]
    same = others & (labels == labels[:, None])
    least = torch.finfo(z.dtype).min  # not -inf: a row may have no others
    logp = torch.where(others, z @ z.T / temperature, least).log_softmax(1)
    partners = same.sum(1)
    return -safe_divide(torch.where(same, logp, 0).sum(1), partners.to(z.dtype)), partners


def _checked(**embeddings: Tensor) -> list[Tensor]:
    """Embeddings of one shape, in the precision of the first."""
    shapes = [tuple(x.shape) for x in embeddings.values()]
    for name, x in embeddings.items():
        if not x.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {x.dtype}")
    if len(set(shapes)) > 1 or not shapes[0] or 0 in shapes[0]:
        names = " and ".join(embeddings)
        raise ValueError(f"{names} must have one shape (..., D) and not be empty, got {' and '.join(map(str, shapes))}")
    first = upcast(next(iter(embeddings.values())))
    return [x.to(first.dtype) for x in embeddings.values()]


def _unit(x: Tensor) -> Tensor:
    """Vectors of length 1; those of length 0 stay, without a gradient."""
    square = (x * x).sum(-1, keepdim=True)
    return x * torch.where(square > 0, torch.where(square > 0, square, 1).rsqrt(), 0)


def _norm(x: Tensor) -> Tensor:
    """The Euclidean length, whose derivatives are 0 where it is."""
    square = (x * x).sum(-1)
    return torch.where(square > 0, torch.where(square > 0, square, 1).sqrt(), 0)


def _reduced(losses: Tensor, counts: Tensor, weight: Tensor | None, reduction: Reduction) -> Tensor:
    """Losses of one value per sample (or per view of one), weighted and reduced."""
    if weight is not None:
        if weight.shape != losses.shape[: weight.ndim] or weight.ndim == 0:
            raise ValueError(f"weight must have shape {tuple(losses.shape)}, one per sample, got {tuple(weight.shape)}")
        counts = counts * weight.to(losses.dtype).reshape(weight.shape + (1,) * (losses.ndim - weight.ndim))
    return reduce(torch.where(counts == 0, 0, losses * counts), counts, reduction)
