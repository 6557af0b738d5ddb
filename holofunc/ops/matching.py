"""Matching of predictions and true boxes, without a loop over boxes."""

import torch
from torch import Tensor

__all__ = ["assign", "occupied"]


def assign(quality: Tensor, slots: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Match every box with the best of its candidate slots, and no slot with two boxes.

    If several boxes have the same best slot, the one with the highest quality gets it (the first of equals), and the
    others take their next best that is free. A box without free candidates gets none. After min(A, M) rounds every box
    is matched or has no candidates left, so the number of operations is fixed.

    Args:
        quality: of each of M boxes for each of its A candidates, shape (..., M, A).
        slots: indices of the candidates, int64, the same shape.
        mask: which boxes are not padding, shape (..., M).

    Returns:
        The chosen candidate of each box, int64 in [0, A), and whether it has one, both of shape (..., M).

    Example:
        >>> import torch
        >>> from holofunc.ops.matching import assign
        >>> quality = torch.tensor([[0.6, 0.3], [0.9, 0.1], [0.8, 0.2]])  # three boxes in one cell of two slots
        >>> assign(quality, torch.tensor([[0, 1]]).expand(3, 2), torch.tensor([True, True, True]))
        (tensor([1, 0, 0]), tensor([ True,  True, False]))
    """
    boxes, count = quality.shape[-2:]
    order = quality.detach().flatten(-2).sort(dim=-1, descending=True, stable=True).indices  # of equals, the first
    rank = (boxes * count - order.argsort(-1)).view(quality.shape)  # unique ranks, the highest is best
    rank = torch.where(mask[..., None], rank, 0)
    choice = torch.full_like(slots[..., :1], -1)
    for _ in range(min(boxes, count)):  # at least one box is matched in each round
        value, best = rank.max(-1, keepdim=True)
        wants = torch.where(value > 0, slots.gather(-1, best), -1)
        beaten = ((wants == wants.mT) & (value < value.mT)).any(-1, keepdim=True)
        won = wants.masked_fill(beaten, -1)
        wins = won >= 0
        choice = torch.where(wins, best, choice)
        taken = (slots[..., None] == won.mT[..., None, :]).any(-1)
        rank = rank.masked_fill(taken | wins, 0)
    choice = choice[..., 0]
    return choice.clamp_min(0), choice >= 0


def occupied(slots: Tensor, mask: Tensor, size: int) -> Tensor:
    """A mask of ``size`` slots that is True for the given ones.

    Args:
        slots: int64, shape (..., M), in [0, size) where ``mask`` is True.
        mask: which of them count, shape (..., M).
        size: number of slots.

    Returns:
        bool, shape (..., size).

    Example:
        >>> import torch
        >>> from holofunc.ops.matching import occupied
        >>> occupied(torch.tensor([2, 0]), torch.tensor([True, False]), 4)
        tensor([False, False,  True, False])
    """
    counted = torch.where(mask, slots, size)  # masked ones go to an extra slot, which is dropped
    marks = torch.zeros(*slots.shape[:-1], size + 1, dtype=torch.bool, device=slots.device)
    return marks.scatter(-1, counted, torch.ones_like(mask))[..., :size]
