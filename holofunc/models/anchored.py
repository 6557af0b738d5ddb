"""Boxes told relative to anchors: what the maps of YOLOv2 and YOLOv4 stand for.

A map (N, A (5 + K), H, W) holds at each of its places A slots ``(x, y, w, h, o, classes)``. Such a slot's box, in
fractions of the image, has its centre at ``(s sigmoid(x, y) - (s - 1) / 2 + place) / (W, H)`` and is as large as its
anchor times ``exp(w, h)``. Slots are numbered map by map, anchor by anchor, and row by row.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from holofunc.models.heads import Predictions
from holofunc.ops.arithmetic import safe_divide, upcast
from holofunc.ops.matching import occupied
from holofunc.ops.targets import Targets

__all__ = [
    "Slots",
    "boxes_of",
    "candidates",
    "centers_and_sizes",
    "locate",
    "others",
    "pick",
    "predicted",
    "read_maps",
    "shape_iou",
]

Anchors = Sequence[Sequence[float]]

MAX_LOG_SIZE = 10.0
"""Boxes are at most exp(10) times as large as their anchors, lest they overflow."""


class Slots(NamedTuple):
    """Some slots, whose parts broadcast; of a map, (N, A, H, W) of them.

    Attributes:
        raw: (..., 5 + K); of a map, it is seen, not copied.
        places: (..., 2), the column and the row of each slot's place.
        grid: (..., 2), the columns and rows that its map has.
        anchors: (..., 2), widths and heights as fractions of the image.
        stretch: (..., 1), the factor s.
    """

    raw: Tensor
    places: Tensor
    grid: Tensor
    anchors: Tensor
    stretch: Tensor

    @property
    def planes(self) -> Tensor:
        """Of a map: ``raw`` as it lies there, (N, A, 5 + K, H, W), so that gradients of its parts lie there too."""
        return self.raw.movedim(-1, 2)


def read_maps(maps: Sequence[Tensor], anchors: Sequence[Anchors], stretch: Sequence[float]) -> list[Slots]:
    """The slots of maps of A (5 + K) channels, each with its anchors and its factor."""
    return [_read_map(*each) for each in zip(maps, anchors, stretch, strict=True)]


def _read_map(x: Tensor, anchors: Anchors, stretch: float) -> Slots:
    raw = upcast(x).unflatten(1, (len(anchors), -1)).movedim(2, -1)
    height, width = x.shape[-2:]
    rows, columns = (torch.arange(n, device=x.device, dtype=raw.dtype) for n in (height, width))
    places = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1)
    grid = torch.stack([raw.new_full((), width), raw.new_full((), height)])
    sizes = torch.tensor(anchors, dtype=raw.dtype).to(x.device)  # made there, it would not be under `grad` on meta
    return Slots(raw, places, grid, sizes[:, None, None], raw.new_full((1,), stretch))


def boxes_of(slots: Slots) -> Tensor:
    """The slots' boxes, (..., 4) xyxy."""
    return torch.cat(_ends(slots), -1)


def _ends(slots: Slots) -> tuple[Tensor, Tensor]:
    """Their upper left and lower right corners, (..., 2) each."""
    offsets = slots.stretch * torch.sigmoid(slots.raw[..., :2]) - (slots.stretch - 1) / 2
    centers = (offsets + slots.places) / slots.grid
    sizes = slots.anchors * slots.raw[..., 2:4].clamp(max=MAX_LOG_SIZE).exp()
    return centers - sizes / 2, centers + sizes / 2


def predicted(maps: Sequence[Slots], probabilities: Callable[[Tensor], Tensor]) -> Predictions:
    """All slots of all maps as predictions; ``probabilities`` makes them of what is said of the classes."""
    parts = [(boxes_of(slots), slots.raw[..., 4].sigmoid(), probabilities(slots.raw[..., 5:])) for slots in maps]
    return Predictions(*(torch.cat([x.flatten(1, 3) for x in part], 1) for part in zip(*parts, strict=True)))


# --- true boxes --------------------------------------------------------------------------------------------------


def centers_and_sizes(targets: Targets) -> tuple[Tensor, Tensor]:
    """Centres and sizes of the true boxes, (N, M, 2) each, at least float32."""
    low, high = upcast(targets.boxes).split(2, -1)
    return (low + high) / 2, (high - low).clamp_min(0)


def locate(centers: Tensor, columns: int, rows: int) -> tuple[Tensor, Tensor]:
    """The cell of a grid that each centre (..., 2) lies in: its number, row by row, and its column and row (..., 2).

    What lies on the right or lower border belongs to the last cell.
    """
    x, y = centers.detach().unbind(-1)
    column, row = (x * columns).floor().clamp(0, columns - 1), (y * rows).floor().clamp(0, rows - 1)
    return (row * columns + column).long(), torch.stack([column, row], -1)


def candidates(maps: Sequence[Slots], centers: Tensor) -> tuple[Slots, Tensor]:
    """The slots that true boxes with these centres (N, M, 2) may take: one for each anchor of each map, A of all.

    Returns:
        Slots (N, M, A), and their numbers, int64 (N, M, A).
    """
    found, numbers, first = [], [], 0
    for slots in maps:
        _, count, _, height, width = slots.planes.shape
        cell, place = locate(centers, width, height)
        raw = slots.planes.flatten(3).take_along_dim(cell[:, None, None], 3).movedim(3, 1)
        anchor = torch.arange(count, device=cell.device)
        tables = (x.reshape(1, 1, -1, x.shape[-1]).expand(1, 1, count, -1) for x in slots[2:])
        found.append((raw, place[:, :, None].expand(-1, -1, count, -1), *tables))
        numbers.append(first + anchor * (height * width) + cell[..., None])
        first += count * height * width
    return Slots(*(torch.cat(parts, 2) for parts in zip(*found, strict=True))), torch.cat(numbers, -1)


def pick(slots: Slots, choice: Tensor) -> Slots:
    """Of candidates (N, M, A) one for each box, int64 (N, M): slots (N, M)."""
    return Slots(*(part.take_along_dim(choice[..., None, None], 2).squeeze(2) for part in slots))


def shape_iou(sizes: Tensor, anchors: Tensor) -> Tensor:
    """The IoU of boxes of these sizes (..., 2) with anchors (..., A, 2) of the same centre: (..., A)."""
    sizes = sizes[..., None, :]
    shared = torch.minimum(sizes, anchors).prod(-1)
    return safe_divide(shared, sizes.prod(-1) + anchors.prod(-1) - shared)


# --- all other slots ---------------------------------------------------------------------------------------------


def others(maps: Sequence[Slots], numbers: Tensor, placed: Tensor, targets: Targets, ignore_iou: float) -> list[Tensor]:
    """Which slots (N, A, H, W) of each map should say that nothing is there, a constant.

    They are those that answer for no true box, nor overlap one by more than ``ignore_iou``.

    Args:
        maps: all of them.
        numbers: of the slots that answer, (N, R).
        placed: which of these do, (N, R).
        targets: the true boxes.
        ignore_iou: 1 if overlaps do not matter.
    """
    shapes = [slots.raw.shape[1:4] for slots in maps]
    sizes = [shape.numel() for shape in shapes]
    free = (~occupied(numbers, placed, sum(sizes))).split(sizes, 1)
    parts = [part.unflatten(1, tuple(shape)) for part, shape in zip(free, shapes, strict=True)]
    if ignore_iou == 1 or targets.boxes.shape[1] == 0:
        return parts
    return [part & ~_overlapping(slots, targets, ignore_iou) for part, slots in zip(parts, maps, strict=True)]


def _overlapping(slots: Slots, targets: Targets, threshold: float) -> Tensor:
    """Which predicted boxes (N, A, H, W) overlap some true box by more than ``threshold``.

    The largest tensors of a loss are here, one number for each pair, and each pass over them counts: IoU is not divided
    out, only one side is cut off at 0, the predicted box's area is compared with once, and what lies together in the
    map stays together. (A maximum is many times faster than `any`.)
    """
    (ax1, ay1), (ax2, ay2) = (end[:, None].unbind(-1) for end in _ends(slots._replace(raw=slots.raw.detach())))
    bx1, by1, bx2, by2 = targets.boxes[:, :, None, None, None].unbind(-1)
    width = torch.minimum(ax2, bx2).sub_(torch.maximum(ax1, bx1)).clamp_min_(0)
    height = torch.minimum(ay2, by2).sub_(torch.maximum(ay1, by1))
    share = threshold / (1 + threshold)  # of both areas, that the intersection must exceed
    own, true = share * (ax2 - ax1) * (ay2 - ay1), share * (bx2 - bx1) * (by2 - by1)
    return width.mul_(height).sub_(true).amax(1) > own.squeeze(1)
