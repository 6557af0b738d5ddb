"""Detection error rates at one IoU threshold, for detections and targets of static shapes."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from holofunc.metrics.base import Metric, row_weights, zeros
from holofunc.ops.assignment import assign
from holofunc.ops.boxes import box_iou

__all__ = ["Boxes", "Matches", "as_detections", "as_targets", "detection_errors"]


class Boxes(NamedTuple):
    """What a metric reads of detections, or of targets, per image.

    Attributes:
        boxes: (B, M, 4) xyxy.
        labels: (B, M) int64.
        mask: (B, M) bool, the boxes that are there.
        scores: (B, M), of detections.
        crowd: (B, M) bool, of targets: boxes around many objects.
        areas: (B, M), of targets: in the square of the unit of area ranges.
        sizes: (B, 2), of targets: height and width, which relative boxes are multiplied by.
    """

    boxes: Tensor
    labels: Tensor
    mask: Tensor
    scores: Tensor | None = None
    crowd: Tensor | None = None
    areas: Tensor | None = None
    sizes: Tensor | None = None


class Matches(NamedTuple):
    """The state of `detection_errors`, all 0-d: boxes found, found with the right class, predicted, and true."""

    located: Tensor
    correct: Tensor
    predicted: Tensor
    true: Tensor


def detection_errors(iou_threshold: float = 0.5, *, score_threshold: float = 0.0) -> Metric:
    """Three error rates of detections that are matched with targets by IoU, each at most once.

    With `located` the pairs above the threshold and `correct` those of the same class:
    ``localization = 1 - 2 located / (predicted + true)``, ``classification = 1 - correct / located``,
    ``detection = 1 - 2 correct / (predicted + true)``.

    `update` takes detections ``(boxes (B, D, 4), scores (B, D), labels (B, D), mask (B, D))`` and targets
    ``(boxes (B, M, 4), labels (B, M), mask (B, M))``: tuples, or dicts by these names.

    Args:
        iou_threshold: what a pair's IoU must reach, in (0, 1].
        score_threshold: detections below it are not there.

    Returns:
        A metric that computes a dict of the three, 0-d each; `classification` is `nan` where nothing is located.

    Raises:
        ValueError: if a threshold is out of range; in `update`, if shapes do not fit.

    Source: the rates of Holocron's DetectionTrainer (`loc_err`, `clf_err`, `det_err`); pairs are those whose number and
        then whose sum of IoUs is greatest, where it gives no second choice to a target whose best box is taken.

    Example:
        >>> import torch
        >>> from holofunc import metrics
        >>> metric = metrics.detection_errors()
        >>> boxes = torch.tensor([[[0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]]])
        >>> there = torch.tensor([[True, True]])
        >>> found = boxes, torch.tensor([[0.9, 0.8]]), torch.tensor([[0, 1]]), there
        >>> state = metric.update(metric.init(), found, (boxes, torch.tensor([[0, 2]]), there))
        >>> {name: value.item() for name, value in metric.compute(state).items()}
        {'localization': 0.0, 'classification': 0.5, 'detection': 0.5}
    """
    if not 0 < iou_threshold <= 1:
        raise ValueError(f"iou_threshold must be in (0, 1], got {iou_threshold}")

    def init(*, device: torch.device | str | None = None) -> Matches:
        return Matches(*(zeros((), device) for _ in range(4)))

    def update(state: Matches, outputs: Any, targets: Any, *, weights: Tensor | None = None) -> Matches:
        found, true = as_detections(outputs), as_targets(targets)
        there = found.mask if found.scores is None else found.mask & (found.scores >= score_threshold)
        located, correct = _pairs(found._replace(mask=there), true, iou_threshold)
        counts = (located, correct, there, true.mask)
        weight = row_weights(weights, true.boxes.new_ones(len(true.boxes))).to(state.true.dtype)
        sums = (torch.where(weight == 0, 0, weight * x.sum(1)).sum() for x in counts)
        return Matches(*(old + new for old, new in zip(state, sums, strict=True)))

    def merge(a: Matches, b: Matches) -> Matches:
        return Matches(*map(torch.add, a, b))

    def compute(m: Matches) -> dict[str, Tensor]:
        boxes = m.predicted + m.true
        return {
            "localization": 1 - 2 * m.located / boxes,
            "classification": 1 - m.correct / m.located,
            "detection": 1 - 2 * m.correct / boxes,
        }

    return Metric(init, update, merge, compute)


def _pairs(found: Boxes, true: Boxes, iou_threshold: float) -> tuple[Tensor, Tensor]:
    """For every target, whether it is paired with a detection, and with one of its class; (B, M) each."""
    if not found.mask.shape[1] or not true.mask.shape[1]:
        return (torch.zeros_like(true.mask),) * 2
    overlap = box_iou(found.boxes, true.boxes)
    overlap = torch.where(found.mask[:, :, None] & true.mask[:, None], overlap, 0)
    near = overlap >= iou_threshold
    missing = max(overlap.shape[2] - overlap.shape[1], 0)  # as many rows as columns at least
    gain = torch.where(near, 1 + overlap / (overlap.shape[2] + 1), 0)  # one pair more is worth any sum of IoUs
    rows = assign(torch.nn.functional.pad(-gain, (0, 0, 0, missing)), true.mask).rows
    rows = torch.where(rows < overlap.shape[1], rows, 0)
    located = near.gather(1, rows[:, None]).squeeze(1) & true.mask
    return located, located & (found.labels.gather(1, rows) == true.labels)


# --- what detections and targets look like -----------------------------------------------------------------------


def as_detections(outputs: Any) -> Boxes:
    """Detections ``(boxes, scores, labels, mask)`` or a dict of them, checked.

    Raises:
        TypeError: if they are neither.
        ValueError: if shapes do not fit.

    Example:
        >>> import torch
        >>> found = torch.zeros(1, 2, 4), torch.zeros(1, 2), torch.zeros(1, 2).long(), torch.ones(1, 2).bool()
        >>> as_detections(found).labels
        tensor([[0, 0]])
    """
    return _named("outputs", outputs, ("boxes", "scores", "labels", "mask"), 4)


def as_targets(targets: Any) -> Boxes:
    """Targets ``(boxes, labels, mask)`` or a dict of them, with `crowd`, `areas` and `sizes` where known, checked.

    Raises:
        TypeError: if they are neither.
        ValueError: if shapes do not fit.

    Example:
        >>> import torch
        >>> as_targets({"boxes": torch.zeros(1, 2, 4), "labels": torch.zeros(1, 2).long(), "mask": torch.ones(1, 3)})
        Traceback (most recent call last):
        ...
        ValueError: targets: mask must have shape (1, 2), got (1, 3)
    """
    return _named("targets", targets, ("boxes", "labels", "mask", "crowd", "areas", "sizes"), 3)


def _named(argument: str, value: Any, names: tuple[str, ...], required: int) -> Boxes:
    if isinstance(value, Mapping):
        fields = {name: value[name] for name in names if value.get(name) is not None}
    elif isinstance(value, tuple | list):
        fields = {name: x for name, x in zip(names, value, strict=False) if x is not None}
    else:
        raise TypeError(
            f"{argument} must be a tuple or dict of {', '.join(names[:required])}, got {type(value).__name__}"
        )
    missing = [name for name in names[:required] if name not in fields]
    if missing:
        raise ValueError(f"{argument} must have {', '.join(names[:required])}, got none of {', '.join(missing)}")
    boxes = fields["boxes"]
    if boxes.ndim != 3 or boxes.shape[2] != 4:
        raise ValueError(f"{argument}: boxes must have shape (B, M, 4), got {tuple(boxes.shape)}")
    for name, x in fields.items():
        expected = {"boxes": boxes.shape, "sizes": (len(boxes), 2)}.get(name, boxes.shape[:2])
        if tuple(x.shape) != tuple(expected):
            raise ValueError(f"{argument}: {name} must have shape {tuple(expected)}, got {tuple(x.shape)}")
    fields["labels"], fields["mask"] = fields["labels"].long(), fields["mask"] != 0
    return Boxes(**fields)
