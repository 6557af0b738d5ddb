"""Boxes told relative to anchors: what the maps of YOLOv2 and YOLOv4 stand for.

A map (N, A (5 + K), H, W) holds at each of its places A slots ``(x, y, w, h, o, classes)``. Such a slot's box, in
fractions of the image, has its centre at ``(s sigmoid(x, y) - (s - 1) / 2 + place) / (W, H)`` and is as large as its
anchor times ``exp(w, h)``. Slots are numbered row by row, anchor by anchor, and map by map.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from holofunc.ops.arithmetic import safe_divide, upcast
from holofunc.ops.targets import Targets

__all__ = ["Slots", "boxes_of", "candidates", "centers_and_sizes", "locate", "pick", "read_maps", "shape_iou"]

Anchors = Sequence[Sequence[float]]

MAX_LOG_SIZE = 10.0
"""Boxes are at most exp(10) times as large as their anchors, lest they overflow."""


class Slots(NamedTuple):
    """All P slots of one or more maps.

    Attributes:
        raw: (N, P, 5 + K).
        places: (P, 2), the column and the row of each slot's place.
        grids: (P, 2), the columns and rows that its map has.
        anchors: (P, 2), widths and heights as fractions of the image.
        stretch: (P, 1), the factor s.
    """

    raw: Tensor
    places: Tensor
    grids: Tensor
    anchors: Tensor
    stretch: Tensor


def read_maps(maps: Sequence[Tensor], anchors: Sequence[Anchors], stretch: Sequence[float]) -> Slots:
    """The slots of maps of A (5 + K) channels, each with its anchors and its factor."""
    parts = [_read_map(*each) for each in zip(maps, anchors, stretch, strict=True)]
    raw, *tables = zip(*parts, strict=True)
    return Slots(torch.cat(raw, 1), *(torch.cat(table) for table in tables))


def _read_map(x: Tensor, anchors: Anchors, stretch: float) -> Slots:
    height, width = x.shape[-2:]
    rows, columns = (torch.arange(n, device=x.device, dtype=torch.float32) for n in (height, width))
    raw = upcast(x).unflatten(1, (len(anchors), -1)).permute(0, 3, 4, 1, 2).flatten(1, 3)
    y, x_ = torch.meshgrid(rows, columns, indexing="ij")
    places = torch.stack([x_, y], -1).to(raw.dtype).flatten(0, 1).repeat_interleave(len(anchors), 0)
    grids = torch.stack([torch.full_like(places[:, 0], width), torch.full_like(places[:, 0], height)], -1)
    sizes = torch.tensor(anchors, dtype=raw.dtype, device=x.device).repeat(height * width, 1)
    return Slots(raw, places, grids, sizes, torch.full_like(places[:, :1], stretch))


def boxes_of(slots: Slots) -> Tensor:
    """The slots' boxes, (N, P, 4) xyxy."""
    offsets = slots.stretch * torch.sigmoid(slots.raw[..., :2]) - (slots.stretch - 1) / 2
    centers = (offsets + slots.places) / slots.grids
    sizes = slots.anchors * slots.raw[..., 2:4].clamp(max=MAX_LOG_SIZE).exp()
    return torch.cat([centers - sizes / 2, centers + sizes / 2], -1)


def pick(slots: Slots, rows: Tensor) -> Slots:
    """The slots that ``rows`` (N, R) number, with tables (N, R, ...) of their own."""
    raw = slots.raw.gather(1, rows[..., None].expand(-1, -1, slots.raw.shape[-1]))
    return Slots(raw, *(table[rows] for table in slots[1:]))


# --- true boxes --------------------------------------------------------------------------------------------------


def centers_and_sizes(targets: Targets) -> tuple[Tensor, Tensor]:
    """Centres and sizes of the true boxes, (N, M, 2) each, at least float32."""
    low, high = upcast(targets.boxes).split(2, -1)
    return (low + high) / 2, (high - low).clamp_min(0)


def locate(centers: Tensor, columns: int, rows: int) -> tuple[Tensor, Tensor]:
    """The cell of a grid that each centre (..., 2) lies in, and where in the cell, (..., 2) in [0, 1].

    Cells are numbered row by row. What lies on the right or lower border belongs to the last cell.
    """
    x, y = (centers[..., 0] * columns, centers[..., 1] * rows)
    column, row = x.detach().floor().clamp(0, columns - 1), y.detach().floor().clamp(0, rows - 1)
    return (row * columns + column).long(), torch.stack([x - column, y - row], -1)


def candidates(centers: Tensor, maps: Sequence[Tensor], counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The slots that boxes with these centres (N, M, 2) may take: one for each anchor of each map.

    Returns:
        Their numbers, int64 (N, M, A), and where in the place the centre lies, (N, M, A, 2). A counts
        the anchors of all maps.
    """
    slots, offsets, first = [], [], 0
    for x, count in zip(maps, counts, strict=True):
        height, width = x.shape[-2:]
        cell, offset = locate(centers, width, height)
        slots.append(first + cell[..., None] * count + torch.arange(count, device=x.device))
        offsets.append(offset[..., None, :].expand(*offset.shape[:-1], count, 2))
        first += height * width * count
    return torch.cat(slots, -1), torch.cat(offsets, -2)


def shape_iou(sizes: Tensor, anchors: Tensor) -> Tensor:
    """The IoU of boxes of these sizes (..., 2) with anchors (A, 2) of the same centre: (..., A)."""
    sizes = sizes[..., None, :]
    shared = torch.minimum(sizes, anchors).prod(-1)
    return safe_divide(shared, sizes.prod(-1) + anchors.prod(-1) - shared)
