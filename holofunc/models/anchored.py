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
    "Maps",
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


class Maps(NamedTuple):
    """The maps of a detector, and of the anchors of all of them, A, what does not differ from place to place.

    Attributes:
        planes: for each map, (N, its anchors, 5 + K, H, W), seen, not copied.
        grid: (A, 2), the columns and rows that the anchor's map has.
        anchors: (A, 2), widths and heights as fractions of the image.
        stretch: (A, 1), the factor s.
    """

    planes: list[Tensor]
    grid: Tensor
    anchors: Tensor
    stretch: Tensor

    @property
    def counts(self) -> list[int]:
        """Of the anchors of each map."""
        return [planes.shape[1] for planes in self.planes]

    @property
    def places(self) -> list[int]:
        """Of each map, H W."""
        return [planes.shape[3:].numel() for planes in self.planes]


class Slots(NamedTuple):
    """Some slots, whose parts broadcast.

    Attributes:
        raw: (..., 5 + K), or the first of these.
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


def read_maps(maps: Sequence[Tensor], anchors: Sequence[Anchors], stretch: Sequence[float]) -> Maps:
    """Maps of A (5 + K) channels, each with its anchors and its factor."""
    planes = [upcast(x).unflatten(1, (len(own), -1)) for x, own in zip(maps, anchors, strict=True)]
    rows = [
        [x.shape[-1], x.shape[-2], *anchor, factor]
        for x, own, factor in zip(planes, anchors, stretch, strict=True)
        for anchor in own
    ]
    table = torch.tensor(rows, dtype=planes[0].dtype).to(planes[0].device)  # made there, it fails under `grad` on meta
    return Maps(planes, *table.split([2, 2, 1], 1))


def _every(maps: Maps, channels: int | None = None) -> Slots:
    """All P slots, (N, P), and the first channels of what is said of them; in memory, one channel after the other."""
    raw, tables = [], []
    of_anchors = torch.cat(maps[1:], 1).mT.split(maps.counts, 1)
    for planes, table in zip(maps.planes, of_anchors, strict=True):
        count, (height, width) = planes.shape[1], planes.shape[3:]
        at = torch.arange(height * width, device=table.device)
        places = torch.stack([at % width, at // width]).to(table.dtype)
        tables.append(torch.cat([places.repeat(1, count), table.repeat_interleave(height * width, 1)]))
        raw.append(planes[:, :, :channels].movedim(2, 1).flatten(2))
    return Slots(torch.cat(raw, 2).movedim(1, -1), *torch.cat(tables, 1).mT.split([2, 2, 2, 1], 1))


def boxes_of(slots: Slots) -> Tensor:
    """The slots' boxes, (..., 4) xyxy."""
    return torch.cat(_ends(slots), -1)


def _ends(slots: Slots) -> tuple[Tensor, Tensor]:
    """Their upper left and lower right corners, (..., 2) each."""
    offsets = slots.stretch * torch.sigmoid(slots.raw[..., :2]) - (slots.stretch - 1) / 2
    centers = (offsets + slots.places) / slots.grid
    halves = slots.anchors * slots.raw[..., 2:4].clamp(max=MAX_LOG_SIZE).exp() / 2
    return centers - halves, centers + halves


def predicted(maps: Maps, probabilities: Callable[[Tensor], Tensor]) -> Predictions:
    """All slots of all maps as predictions; ``probabilities`` makes them of what is said of the classes."""
    slots = _every(maps)
    return Predictions(boxes_of(slots), slots.raw[..., 4].sigmoid(), probabilities(slots.raw[..., 5:]))


# --- true boxes --------------------------------------------------------------------------------------------------


def centers_and_sizes(targets: Targets) -> tuple[Tensor, Tensor]:
    """Centres and sizes of the true boxes, (N, M, 2) each, at least float32."""
    low, high = upcast(targets.boxes).split(2, -1)
    return (low + high) / 2, (high - low).clamp_min(0)


def locate(centers: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """The cell that each centre lies in: its number, row by row, and its column and row (..., 2).

    What lies on the right or lower border belongs to the last cell.

    Args:
        centers: (..., 2), fractions of the image.
        grid: (..., 2), its columns and rows.
    """
    place = torch.minimum((centers.detach() * grid).floor().clamp_min(0), grid - 1)
    return (place[..., 1] * grid[..., 0] + place[..., 0]).long(), place


def candidates(maps: Maps, centers: Tensor) -> tuple[Slots, Tensor, Tensor]:
    """What a loss looks at: the slots that true boxes with these centres (N, M, 2) may take, and all slots' objectness.

    Of a map nothing but that is read, and at once, so that its gradient is zeros into which this is written.

    Returns:
        Slots (N, M, A), one for each anchor; their numbers, int64 (N, M, A); the raw objectness of all slots, (N, P).
    """
    cell, place = locate(centers[:, :, None], maps.grid)
    raw, objectness, numbers, first = [], [], [], 0
    for planes, own, size in zip(maps.planes, cell.split(maps.counts, -1), maps.places, strict=True):
        images, count, channels = planes.shape[:3]
        starts = torch.arange(count * channels, device=cell.device).view(count, channels) * size
        every = (starts[:, 4:5] + torch.arange(size, device=cell.device)).flatten()
        near = starts + own[..., None]
        at = torch.cat([every.expand(images, -1), near.flatten(1)], 1)
        of_all, of_near = planes.flatten(1).gather(1, at).split([count * size, near[0].numel()], 1)
        raw.append(of_near.view(near.shape))
        objectness.append(of_all)
        numbers.append(first + starts[:, 0] // channels + own)
        first += count * size
    slots = Slots(torch.cat(raw, 2), place, *maps[1:])
    return slots, torch.cat(numbers, -1), torch.cat(objectness, 1)


def pick(slots: Slots, choice: Tensor) -> Slots:
    """Of candidates (N, M, A) one for each box, int64 (N, M): slots (N, M)."""
    shape = slots.raw.shape[:-1]
    parts = (part.expand(*shape, part.shape[-1]) for part in slots)
    return Slots(*(part.take_along_dim(choice[..., None, None], 2).squeeze(2) for part in parts))


def shape_iou(sizes: Tensor, anchors: Tensor) -> Tensor:
    """The IoU of boxes of these sizes (..., 2) with anchors (..., A, 2) of the same centre: (..., A)."""
    sizes = sizes[..., None, :]
    shared = torch.minimum(sizes, anchors).prod(-1)
    return safe_divide(shared, sizes.prod(-1) + anchors.prod(-1) - shared)


# --- all other slots ---------------------------------------------------------------------------------------------


def others(maps: Maps, numbers: Tensor, placed: Tensor, targets: Targets, ignore_iou: float) -> Tensor:
    """Which slots (N, P) should say that nothing is there, a constant.

    They are those that answer for no true box, nor overlap one by more than ``ignore_iou``.

    Args:
        maps: all of them.
        numbers: of the slots that answer, (N, R).
        placed: which of these do, (N, R).
        targets: the true boxes.
        ignore_iou: 1 if overlaps do not matter.
    """
    free = ~occupied(numbers, placed, sum(a * b for a, b in zip(maps.counts, maps.places, strict=True)))
    if ignore_iou == 1 or targets.boxes.shape[1] == 0:
        return free
    return free & ~_overlapping(maps, targets, ignore_iou)


def _overlapping(maps: Maps, targets: Targets, threshold: float) -> Tensor:
    """Which predicted boxes (N, P) overlap some true box by more than ``threshold``.

    The largest tensors of a loss are here, one number for each pair, and each pass over them counts: IoU is not divided
    out, only one side is cut off at 0, and the predicted box's area is compared with once. (A maximum is many times
    faster than `any`.)
    """
    ends = _ends(_every(maps._replace(planes=[planes.detach() for planes in maps.planes]), 4))
    (ax1, ay1), (ax2, ay2) = (end[:, None].unbind(-1) for end in ends)
    bx1, by1, bx2, by2 = targets.boxes[:, :, None].unbind(-1)
    width = torch.minimum(ax2, bx2).sub_(torch.maximum(ax1, bx1)).clamp_min_(0)
    height = torch.minimum(ay2, by2).sub_(torch.maximum(ay1, by1))
    share = threshold / (1 + threshold)  # of both areas, that the intersection must exceed
    own, true = share * (ax2 - ax1) * (ay2 - ay1), share * (bx2 - bx1) * (by2 - by1)
    return torch.addcmul(-true, width, height).amax(1) > own.squeeze(1)
