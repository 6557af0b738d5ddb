"""Which of a detector's predictions answers for which true box, decided without a loop over boxes."""

import torch
from torch import Tensor

__all__ = ["assign", "occupied"]


def assign(quality: Tensor, slots: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Give every box the best of its candidate slots, and no slot to two boxes.

    Where several boxes want one slot, the one that fits it best has it (of equals the first), and the others take the
    next best that is free. A box whose candidates are all gone has none. After A rounds, or M, every box has its slot
    or has lost all of its candidates, so the number of operations is fixed.

    Args:
        quality: how well each of M boxes fits each of its A candidates, shape (..., M, A).
        slots: which slots those are, int64, the same shape.
        mask: which boxes there are, shape (..., M).

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
    order = quality.detach().flatten(-2).sort(dim=-1, descending=True, stable=True).indices  # of equals the first box
    rank = (boxes * count - order.argsort(-1)).view(quality.shape)  # all different, and the best is the highest
    rank = torch.where(mask[..., None], rank, 0)
    choice = torch.full_like(slots[..., :1], -1)
    for _ in range(min(boxes, count)):  # in each, a box or more gets its slot
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
    """Which of ``size`` slots are among those given.

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
    counted = torch.where(mask, slots, size)  # the rest go to one slot more, which is cut off
    marks = torch.zeros(*slots.shape[:-1], size + 1, dtype=torch.bool, device=slots.device)
    return marks.scatter(-1, counted, torch.ones_like(mask))[..., :size]
