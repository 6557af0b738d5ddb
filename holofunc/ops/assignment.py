"""The linear assignment problem: pairs of predictions and targets with the least total cost."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from holofunc.ops.arithmetic import upcast

__all__ = ["Assignment", "assign"]


class Assignment(NamedTuple):
    """The row that each column is assigned; ``rows`` is 0 where ``mask`` is False."""

    rows: Tensor  # (..., N) int64
    mask: Tensor  # (..., N) bool


def assign(costs: Tensor, mask: Tensor | None = None) -> Assignment:
    """Assign every column a row of its own such that the sum of the costs is least: the Hungarian algorithm, batched.

    Shapes are known before it runs, so it compiles without a break (it is one operator of the graph, and runs on the
    CPU) and maps over batches. It takes N searches of at most N rounds, each of O(M) operations, for all batches at
    once.

    Args:
        costs: shape (..., M, N), M rows (predictions) and N columns (targets), M at least N, real. What is not finite
            is taken only if there is no other way.
        mask: columns that are there, bool of shape (..., N); all where None.

    Returns:
        ``Assignment(rows, mask)``, both of shape (..., N): the row of every column that is there.

    Raises:
        ValueError: if there are more columns than rows, or the mask has another shape.

    Source: Kuhn (1955) and Munkres (1957), by shortest augmenting paths as in Jonker and Volgenant (1987); the cost is
        that of `scipy.optimize.linear_sum_assignment`.

    Example:
        >>> import torch
        >>> from holofunc.ops import assignment
        >>> assignment.assign(torch.tensor([[1.0, 2.0], [1.0, 4.0], [9.0, 9.0]]))
        Assignment(rows=tensor([1, 0]), mask=tensor([True, True]))
    """
    if costs.ndim < 2 or costs.shape[-2] < costs.shape[-1]:
        raise ValueError(
            "costs must have shape (..., M, N) with at least as many rows (predictions) as columns (targets), got "
            f"{tuple(costs.shape)}"
        )
    columns = (*costs.shape[:-2], costs.shape[-1])
    if mask is None:
        mask = torch.ones(columns, dtype=torch.bool, device=costs.device)
    elif mask.shape != columns or mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool of shape {tuple(columns)}, got {mask.dtype} of shape {tuple(mask.shape)}")
    return Assignment(_assign(upcast(costs).detach(), mask), mask)


@torch.library.custom_op("holofunc::assign", mutates_args=())
def _assign(costs: Tensor, mask: Tensor) -> Tensor:
    """The rows of all columns that are there, for all leading dimensions at once.

    An operator of its own because how often it repeats depends on the costs.
    """
    finite = costs.isfinite()
    worst = torch.where(finite, costs.abs(), 0).amax().double().item() if costs.numel() else 0.0
    table = torch.where(finite, costs.double(), 2 * (worst + 1) * (costs.shape[-1] + 1)).cpu()
    batch = math.prod(costs.shape[:-2])
    rows = _augmented(table.reshape(batch, *costs.shape[-2:]), mask.cpu().reshape(batch, mask.shape[-1]))
    return rows.reshape(mask.shape).to(costs.device)


def _augmented(costs: Tensor, mask: Tensor) -> Tensor:
    """Shortest augmenting paths, one column after the other; costs (B, M, N), mask (B, N)."""
    batch, num_rows, num_columns = costs.shape
    each = torch.arange(batch)
    of_row = torch.full((batch, num_rows + 1), -1)  # the column that has a row; the last place takes what leads nowhere
    row_price, column_price = costs.new_zeros(batch, num_rows), costs.new_zeros(batch, num_columns)
    for column in range(num_columns):
        active = mask[:, column].clone()
        current = torch.full((batch,), column)
        distance = torch.full((batch, num_rows), torch.inf, dtype=costs.dtype)
        before, done = torch.full((batch, num_rows), -1), torch.zeros(batch, num_rows, dtype=torch.bool)
        reached, end = costs.new_zeros(batch), torch.full((batch,), num_rows)
        while bool(active.any()):
            step = reached[:, None] + costs[each, :, current] - row_price - column_price[each, current][:, None]
            nearer = active[:, None] & ~done & (step < distance)
            distance, before = torch.where(nearer, step, distance), torch.where(nearer, current[:, None], before)
            nearest, row = torch.where(done, torch.inf, distance).min(1)
            reached = torch.where(active, nearest, reached)
            done[each, row] |= active
            owner = of_row[each, row]
            end = torch.where(active & (owner < 0), row, end)
            active &= owner >= 0
            current = torch.where(active, owner, current)
        # prices: every visited column paid less than the path that was found, by the difference
        visited, there = done & (of_row[:, :-1] >= 0), mask[:, column]
        saved = torch.where(done, reached[:, None] - distance, 0)
        row_price -= saved
        owners = torch.where(visited, of_row[:, :-1], 0)
        column_price.scatter_add_(1, owners, torch.where(visited, saved, 0))
        column_price[:, column] += torch.where(there, reached, 0)
        # along the path back to the column, each row changes hands
        active = there.clone()
        while bool(active.any()):
            owner = before[each, end.clamp_max(num_rows - 1)]
            held = (of_row[:, :-1] == owner[:, None]).long()
            given_up = torch.where(held.any(1), held.argmax(1), num_rows)
            of_row[each, torch.where(active, end, num_rows)] = torch.where(active, owner, -1)
            active &= owner != column
            end = torch.where(active, given_up, end)
    taken = of_row[:, :-1, None] == torch.arange(num_columns)
    return torch.where(mask, taken.long().argmax(1), 0)


@_assign.register_fake
def _(costs: Tensor, mask: Tensor) -> Tensor:
    return torch.empty_like(mask, dtype=torch.int64)


@_assign.register_vmap
def _(info: object, in_dims: tuple[int | None, int | None], costs: Tensor, mask: Tensor) -> tuple[Tensor, int]:
    pairs = list(zip((costs, mask), in_dims, strict=True))
    size = next(t.shape[dim] for t, dim in pairs if dim is not None)
    both = [t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0) for t, dim in pairs]
    return _assign(*both), 0
