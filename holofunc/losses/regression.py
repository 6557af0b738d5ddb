"""Regression losses: Huber and smooth L1."""

import torch
from torch import Tensor

from holofunc.losses.contract import Reduction, check_nonnegative, check_positive
from holofunc.losses.reduction import reduce
from holofunc.ops.arithmetic import upcast

__all__ = ["huber", "smooth_l1"]


def huber(
    logits: Tensor,
    targets: Tensor,
    *,
    delta: float = 1.0,
    reduction: Reduction = "mean",
    weight: Tensor | float | None = None,
) -> Tensor:
    """Half the squared error up to ``delta``, and linear beyond.

    loss = w e^2 / 2 for e = |logits - targets| <= delta, else w delta (e - delta / 2).

    Args:
        logits: predictions, any shape, floating point.
        targets: of the same shape, any real dtype.
        delta: above 0.
        reduction: "mean" divides by the sum of the weights; "sum" or "none".
        weight: weight w of every element, a shape that broadcasts to that of ``logits``; where it is 0, a target may be
            anything, NaN too.

    Returns:
        A 0-d tensor, 0 if all weights are; for "none", the shape of ``logits``. At least float32.

    Raises:
        TypeError: if ``logits`` are not floating point.
        ValueError: if the shapes do not fit, there is nothing to compare, or delta is not above 0.

    Source: Huber, "Robust Estimation of a Location Parameter" (1964); equal to `torch.nn.functional.huber_loss`.

    Example:
        >>> import torch
        >>> from holofunc import losses
        >>> losses.huber(torch.tensor([0.5, 3.0]), torch.zeros(2), reduction="none")
        tensor([0.1250, 2.5000])
    """
    check_positive(delta=delta)
    return _reduced(logits, targets, delta, delta, reduction, weight)


def smooth_l1(
    logits: Tensor,
    targets: Tensor,
    *,
    beta: float = 1.0,
    reduction: Reduction = "mean",
    weight: Tensor | float | None = None,
) -> Tensor:
    """The absolute error minus beta / 2, and up to an error of ``beta`` half the squared error over beta.

    loss = w e^2 / (2 beta) for e = |logits - targets| <= beta, else w (e - beta / 2): `huber` over beta, and the
    absolute error for beta = 0.

    Args:
        logits: predictions, any shape, floating point.
        targets: of the same shape, any real dtype.
        beta: at least 0.
        reduction: as in `huber`.
        weight: as in `huber`.

    Returns:
        A 0-d tensor, 0 if all weights are; for "none", the shape of ``logits``. At least float32.

    Raises:
        TypeError: as in `huber`.
        ValueError: as in `huber`, or if beta is negative.

    Source: Girshick, "Fast R-CNN" (ICCV 2015); equal to `torch.nn.functional.smooth_l1_loss`.

    Example:
        >>> import torch
        >>> from holofunc import losses
        >>> losses.smooth_l1(torch.tensor([0.1, 3.0]), torch.zeros(2), beta=0.2, reduction="none")
        tensor([0.0250, 2.9000])
    """
    check_nonnegative(beta=beta)
    return _reduced(logits, targets, beta, 1.0, reduction, weight)


def _reduced(
    logits: Tensor, targets: Tensor, bend: float, slope: float, reduction: Reduction, weight: Tensor | float | None
) -> Tensor:
    """A parabola up to an error of ``bend``, then a line of ``slope``."""
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}")
    if logits.shape != targets.shape or logits.numel() == 0:
        raise ValueError(
            f"logits and targets must have the same shape and not be empty, got {tuple(logits.shape)} and "
            f"{tuple(targets.shape)}"
        )
    logits = upcast(logits)
    mass = torch.ones_like(logits)
    if weight is not None:
        mass = mass * torch.as_tensor(weight, dtype=logits.dtype, device=logits.device)
        if mass.shape != logits.shape:
            raise ValueError(f"weight must broadcast to {tuple(logits.shape)}, got {tuple(mass.shape)}")
    error = torch.where(mass == 0, 0, logits - targets.to(logits.dtype)).abs()
    near = error.clamp_max(bend)
    losses = slope * (error - near)
    if bend > 0:
        losses = losses + slope / bend * near * near / 2
    return reduce(mass * losses, mass, reduction)
