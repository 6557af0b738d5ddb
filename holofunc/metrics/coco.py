"""The twelve metrics of COCO's evaluation of boxes, equal to pycocotools."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from holofunc.metrics.base import Metric, row_weights, zeros
from holofunc.metrics.detection import Boxes, as_detections, as_targets
from holofunc.ops.checks import check_counts

__all__ = ["Found", "coco"]

THRESHOLDS = np.linspace(0.5, 0.95, 10).tolist()
RECALLS = np.linspace(0, 1, 101).tolist()  # numpy's roundings decide where a recall of 0.3 is reached
AREAS = ((0.0, 1e10), (0.0, 32.0**2), (32.0**2, 96.0**2), (96.0**2, 1e10))  # all, small, medium, large
MOST = (1, 10, 100)  # detections per image and class


class Found(NamedTuple):
    """The state of `coco`: all detections, and the number of targets of each class and area range.

    ``outcome`` (n, areas, thresholds) is 1 where a detection is right, 0 where it is wrong and -1 where it is not
    counted; ``rank`` is its place among those of its class in its image.
    """

    scores: Tensor
    labels: Tensor
    rank: Tensor
    outcome: Tensor
    weights: Tensor
    positives: Tensor


def coco(num_classes: int, *, image_size: tuple[int, int] | None = None) -> Metric:
    """Average precision and recall of boxes as COCO defines them: ten IoU thresholds, crowds, three ranges of area.

    Detections are matched in `update` and kept until the end, as 64 bytes each.

    `update` takes detections ``(boxes (B, D, 4) xyxy, scores (B, D), labels (B, D), mask (B, D))``, of which the best
    hundred per image and class are looked at, and targets ``(boxes (B, M, 4), labels (B, M), mask (B, M))``, as tuples
    or dicts by these names. Targets may have `crowd` (B, M): boxes around many objects, whose detections are not
    counted; `areas` (B, M) in pixels, of segmentation masks for instance; and `sizes` (B, 2), height and width.

    Args:
        num_classes: `C`; labels are in [0, C).
        image_size: height and width that relative boxes are multiplied by, so that areas are those of pixels; by
            default boxes are in pixels, or `sizes` of the targets say it image by image.

    Returns:
        A metric that computes a dict of 0-d tensors: `ap` (mean over thresholds 0.5 to 0.95), `ap50`, `ap75`,
        `ap_small`, `ap_medium`, `ap_large`; `ar_1`, `ar_10`, `ar_100` (by the most detections per image and class),
        `ar_small`, `ar_medium`, `ar_large`. Where there is no target, `nan` (-1 in pycocotools).

    Raises:
        ValueError: if ``num_classes`` is below 1; in `update`, if shapes do not fit.

    Source: Lin et al., "Microsoft COCO: Common Objects in Context" (ECCV 2014), as computed by pycocotools 2.0.

    Example:
        >>> import torch
        >>> from holofunc import metrics
        >>> metric = metrics.coco(1)
        >>> boxes, there = torch.tensor([[[0.0, 0.0, 50.0, 50.0]]]), torch.tensor([[True]])
        >>> found = boxes + torch.tensor([0.0, 0.0, 0.0, 9.0]), torch.tensor([[0.9]]), torch.tensor([[0]]), there
        >>> state = metric.update(metric.init(), found, (boxes, torch.tensor([[0]]), there))
        >>> scores = metric.compute(state)  # an IoU of 0.85 reaches 7 of 10 thresholds
        >>> round(scores["ap"].item(), 3), round(scores["ap50"].item(), 3)
        (0.7, 1.0)
    """
    check_counts(num_classes=num_classes)

    def init(*, device: torch.device | str | None = None) -> Found:
        none = torch.zeros(0, device=device)
        outcome = torch.zeros(0, len(AREAS), len(THRESHOLDS), dtype=torch.int8, device=device)
        return Found(none, none.long(), none.long(), outcome, none, zeros((num_classes, len(AREAS)), device))

    def update(state: Found, outputs: Any, targets: Any, *, weights: Tensor | None = None) -> Found:
        found, true = as_detections(outputs), as_targets(targets)
        found, true = (_in_pixels(boxes, true.sizes, image_size) for boxes in (found, true))
        areas = _area(true.boxes) if true.areas is None else true.areas
        crowd = torch.zeros_like(true.mask) if true.crowd is None else true.crowd != 0
        scores, labels = found.scores, found.labels
        assert scores is not None
        classes, truth = torch.where(found.mask, labels, -1), torch.where(true.mask, true.labels, -2)
        outcome, rank = _match(found.boxes, scores, classes, true.boxes, truth, crowd, areas)
        kept = found.mask & (rank < MOST[-1]) & ~scores.isnan()
        row_weight = row_weights(weights, scores.new_ones(len(scores)))
        there = true.mask & (true.labels >= 0) & (true.labels < num_classes) & (row_weight != 0)[:, None]
        counted = (there & ~crowd)[..., None] & _within(areas)
        amounts = (counted * row_weight[:, None, None]).to(state.positives.dtype).flatten(0, 1)
        places = torch.where(there, true.labels, 0).flatten()[:, None].expand_as(amounts)
        new = Found(
            scores.detach().float().flatten(),
            labels.flatten().long(),
            rank.flatten(),
            outcome.flatten(0, 1),
            (kept * row_weight[:, None]).float().flatten(),
            torch.zeros_like(state.positives).scatter_add(0, places, amounts),
        )
        return merge(state, new)

    def merge(a: Found, b: Found) -> Found:
        rows = (torch.cat([x, y]) for x, y in zip(a[:-1], b[:-1], strict=True))
        return Found._make([*rows, a.positives + b.positives])

    def compute(state: Found) -> dict[str, Tensor]:
        each = [_of_class(state, c) for c in range(num_classes)]
        ap, recall = (torch.stack(column) for column in zip(*each, strict=True))  # (C, areas, thresholds), (C, 5, ...)
        precise = {f"ap{name}": ap[:, i] for i, name in enumerate(("", "_small", "_medium", "_large"))}
        precise = {"ap": ap[:, 0], "ap50": ap[:, 0, 0], "ap75": ap[:, 0, 5], **precise}
        recalled = dict(
            zip(("ar_1", "ar_10", "ar_100", "ar_small", "ar_medium", "ar_large"), recall.unbind(1), strict=True)
        )
        return {name: values.nanmean() for name, values in {**precise, **recalled}.items()}

    return Metric(init, update, merge, compute)


def _in_pixels(found: Boxes, sizes: Tensor | None, image_size: tuple[int, int] | None) -> Boxes:
    boxes = found.boxes.double() if found.boxes.device.type != "mps" else found.boxes
    if sizes is not None:
        return found._replace(boxes=boxes * sizes.to(boxes.dtype).flip(1).repeat(1, 2)[:, None])
    if image_size is not None:
        return found._replace(boxes=boxes * boxes.new_tensor([*image_size[::-1], *image_size[::-1]]))
    return found._replace(boxes=boxes)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2] - boxes[..., 0]).clamp_min(0) * (boxes[..., 3] - boxes[..., 1]).clamp_min(0)


def _within(areas: Tensor) -> Tensor:
    """Which ranges an area is in, their bounds included: (..., areas)."""
    return torch.stack([(areas >= low) & (areas <= high) for low, high in AREAS], -1)


def _of_class(state: Found, label: int) -> tuple[Tensor, Tensor]:
    """Average precision of each area and threshold; recalls of each number of detections, then of each area."""
    rows = ((state.labels == label) & (state.weights > 0)).nonzero()[:, 0]
    rows = rows[state.scores[rows].argsort(descending=True, stable=True)]
    outcome, weight = state.outcome[rows].permute(1, 2, 0), state.weights[rows].to(state.positives.dtype)
    true = torch.where(state.positives[label] > 0, state.positives[label], torch.nan)[:, None]
    right = (outcome == 1) * weight
    recalls = [(right[0] * (state.rank[rows] < most)).sum(-1) / true[0] for most in MOST]
    recall = torch.stack([*recalls, *(right.sum(-1) / true)[1:]])
    hits, errors = right.cumsum(-1), ((outcome == 0) * weight).cumsum(-1)
    reached = hits.new_tensor(RECALLS).expand(*hits.shape[:2], -1)
    place = torch.searchsorted((hits / true[..., None]).contiguous(), reached.contiguous())
    precision = hits / (hits + errors).clamp_min(torch.finfo(hits.dtype).eps)
    best = torch.cat(
        [precision.flip(-1).cummax(-1).values.flip(-1) if len(rows) else precision, 0 * reached[..., :1]], -1
    )
    return best.gather(-1, place).mean(-1) + 0 * true, recall


@torch.library.custom_op("holofunc::match_boxes", mutates_args=())
def _match(
    boxes: Tensor, scores: Tensor, labels: Tensor, targets: Tensor, classes: Tensor, crowd: Tensor, areas: Tensor
) -> tuple[Tensor, Tensor]:
    """The outcome (B, D, areas, thresholds) of every detection, and its rank (B, D) in its class and image.

    In the order of their scores, detections of a class take the target of it that they overlap most, if it is free; one
    that is not counted (a crowd, another area) only if there is no other, and crowds without end. An operator of its
    own because detections are taken up rank by rank, as many ranks as there are.
    """
    batch, num, _ = boxes.shape
    same = labels[:, :, None] == labels[:, None]
    place = torch.empty_like(labels).scatter_(
        1,
        scores.argsort(dim=1, descending=True, stable=True),
        torch.arange(num, device=labels.device).expand(batch, -1),
    )
    rank = (same & (place[:, None] < place[:, :, None])).sum(2)
    low, high = torch.maximum(boxes[:, :, None, :2], targets[:, None, :, :2]), torch.minimum(
        boxes[:, :, None, 2:], targets[:, None, :, 2:]
    )  # fmt: skip
    shared = (high - low).clamp_min(0).prod(-1)
    whole = (
        _area(boxes)[..., None]
        + torch.where(crowd, 0, _area(targets))[:, None]
        - torch.where(crowd[:, None], 0, shared)
    )
    overlap = torch.where(labels[:, :, None] == classes[:, None], shared / whole.clamp_min(1e-300), -1.0)
    ignored = crowd[..., None] | ~_within(areas)  # (B, M, areas)
    preferred = torch.where(ignored, 0.0, 2.0).movedim(2, 1)[:, :, None].to(overlap.dtype)
    bar = boxes.new_tensor([min(t, 1 - 1e-10) for t in THRESHOLDS])[:, None]
    taken = torch.zeros(batch, len(AREAS), len(THRESHOLDS), targets.shape[1], dtype=torch.bool, device=boxes.device)
    outcome = torch.where(_within(_area(boxes)), 0, -1).to(torch.int8)[..., None].repeat(1, 1, 1, len(THRESHOLDS))
    if not taken.numel() or not num:
        return outcome, rank
    candidates = (overlap >= THRESHOLDS[0]).any(2) & (rank < MOST[-1])  # others match nothing
    for r in range(int(torch.where(candidates, rank, -1).max()) + 1):
        image, detection = (candidates & (rank == r)).nonzero().unbind(1)
        value = overlap[image, detection][:, None, None]
        free = (value >= bar) & (~taken[image] | crowd[image][:, None, None])
        value = torch.where(free, value + preferred[image], -1.0).flip(3)  # of equals the last, as pycocotools
        most, last = value.max(3, keepdim=True)
        match, index = most >= 0, targets.shape[1] - 1 - last
        k, area, threshold, _ = match.nonzero().unbind(1)
        taken[image[k], area, threshold, index[k, area, threshold, 0]] = True
        result = torch.where(most >= 2, 1, -1).to(torch.int8)
        outcome[image, detection] = torch.where(match, result, outcome[image, detection][..., None])[..., 0]
    return outcome, rank


@_match.register_fake
def _(
    boxes: Tensor, scores: Tensor, labels: Tensor, targets: Tensor, classes: Tensor, crowd: Tensor, areas: Tensor
) -> tuple[Tensor, Tensor]:
    outcome = boxes.new_empty((*labels.shape, len(AREAS), len(THRESHOLDS)), dtype=torch.int8)
    return outcome, torch.empty_like(labels)


@_match.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *tensors: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    size = info.batch_size
    laid = [
        t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0) for t, dim in zip(tensors, in_dims, strict=True)
    ]
    found = _match(*(t.flatten(0, 1) for t in laid))
    outcome, rank = (x.unflatten(0, (size, math.prod(x.shape[:1]) // size)) for x in found)
    return (outcome, rank), (0, 0)
