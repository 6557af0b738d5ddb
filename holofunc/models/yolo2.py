"""YOLOv2: one grid of predictions, relative to anchors, on a Darknet-19.

Source: Redmon and Farhadi, "YOLO9000" (arXiv 1612.08242), and for what it does not say of its loss, the authors'
program. Architecture and names are Holocron's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from holofunc.models import darknet
from holofunc.models.anchored import (
    Maps,
    boxes_of,
    candidates,
    centers_and_sizes,
    others,
    pick,
    predicted,
    read_maps,
    shape_iou,
)
from holofunc.models.base import Images, build_model
from holofunc.models.detection import Detector, freeze_norms
from holofunc.models.heads import Lambdas, Predictions, check_multiple, check_share, read_anchors, total
from holofunc.nn import ConcatDownsample2d
from holofunc.ops.boxes import box_iou
from holofunc.ops.matching import assign
from holofunc.ops.targets import Targets

__all__ = ["YOLOv2", "YOLOv2Head", "yolov2"]

PLACES = ((1.3221, 1.73145), (3.19275, 4.00944), (5.05587, 8.09892), (9.47112, 4.84053), (11.2364, 10.0071))
ANCHORS = tuple((width / 13, height / 13) for width, height in PLACES)
"""The authors' for VOC, told in places of a grid of 13."""
LEAST = 1e-4
"""Sides of true boxes below this fraction of the image count as this."""


# --- network -----------------------------------------------------------------------------------------------------


class YOLOv2(Images):
    """A Darknet-19, whose next to last maps pass by its last stage: images of any size, a multiple of 32.

    The output has shape (N, A (5 + K), H / 32, W / 32): for each anchor ``(x, y, w, h, o)``, then the classes.

    Args:
        num_classes: K.
        in_channels: of the images.
        anchors: (A, 2), widths and heights as fractions of the image.
        stem_channels: of the body's first convolution.
        layout: of the body, as for `darknet19_body`.
        passthrough_ratio: by how much the maps that pass by are narrowed first.
        head_channels: of the three convolutions.
        layers: ``layers(channels, out, kernel_size, stride=1)``, a convolution and what follows it.
        body_layers: the same for the body; by default, ``layers``.
        frozen_norm: whether the body's BatchNorms stand still.
    """

    heads = ("head",)
    anchors: Tensor

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        anchors: Sequence[Sequence[float]],
        stem_channels: int = 32,
        layout: Sequence[tuple[int, int]] = darknet.DARKNET19,
        passthrough_ratio: int = 8,
        head_channels: int = 1024,
        layers: darknet.Layers = darknet.leaky,
        body_layers: darknet.Layers | None = None,
        frozen_norm: bool = False,
    ) -> None:
        super().__init__(in_channels)
        self.register_buffer("anchors", torch.tensor(anchors))
        body = darknet.darknet19_body(in_channels, stem_channels, layout=layout, layers=body_layers or layers)
        self.backbone = freeze_norms(body) if frozen_norm else body
        before, last = layout[-2][0], layout[-1][0]
        narrow = before // passthrough_ratio
        self.block5 = nn.Sequential(*layers(last, head_channels, 3), *layers(head_channels, head_channels, 3))
        self.passthrough_layer = nn.Sequential(*layers(before, narrow, 1), ConcatDownsample2d(2))
        self.block6 = nn.Sequential(*layers(head_channels + 4 * narrow, head_channels, 3))
        self.head = nn.Conv2d(head_channels, len(anchors) * (5 + num_classes), 1)

    def check_input(self, *inputs: Any) -> None:
        super().check_input(*inputs)
        (x,) = inputs
        check_multiple(x, 2 ** len(self.backbone.layers))  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = self.backbone.stem(x)  # type: ignore[operator]
        for stage in list(self.backbone.layers)[:-1]:  # type: ignore[arg-type]
            x = stage(x)
        deep = self.block5(self.backbone.layers[-1](x))  # type: ignore[index,operator]
        return self.head(self.block6(torch.cat([self.passthrough_layer(x), deep], 1)))


# --- what its output means --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class YOLOv2Head(Lambdas):
    """YOLOv2's boxes and its loss.

    In its cell, the anchor whose shape fits a true box best answers for it: its objectness should be the overlap (a
    constant), ``(sigmoid(x), sigmoid(y), w, h)`` those that give the true box, small boxes counting up to twice as
    much as large ones, and its classes, by cross entropy, the true one. The objectness of all others should be 0, of
    those excepted that overlap some true box more than ``ignore_iou``.
    """

    num_classes: int
    anchors: tuple[tuple[float, ...], ...]
    ignore_iou: float = 0.6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("ignore_iou", self.ignore_iou)

    def _read(self, out: Tensor) -> Maps:
        return read_maps([out], [self.anchors], [1.0])

    def predictions(self, out: Tensor) -> Predictions:
        return predicted(self._read(out), lambda classes: classes.softmax(-1))

    def losses(self, out: Tensor, targets: Targets) -> dict[str, Tensor]:
        maps = self._read(out)
        centers, sizes = centers_and_sizes(targets)
        near, numbers, objectness = candidates(maps, centers)
        choice, placed = assign(shape_iou(sizes, near.anchors), numbers, targets.mask)
        own = pick(near, choice)
        iou = box_iou(boxes_of(own).detach(), targets.boxes, paired=True)
        wanted = (sizes.clamp_min(LEAST) / own.anchors).log()
        errors = (own.raw[..., :2].sigmoid() - (centers * own.grid - own.places)).square()
        errors = errors + (own.raw[..., 2:4] - wanted).square()
        classes = own.raw[..., 5:]
        wrong = classes.logsumexp(-1) - classes.take_along_dim(targets.labels[..., None], -1)[..., 0]
        taken = numbers.take_along_dim(choice[..., None], -1)[..., 0]
        free = others(maps, taken, placed, targets, self.ignore_iou)
        return self.weighted(
            obj=total((own.raw[..., 4].sigmoid() - iou).square(), placed),
            noobj=total(objectness.sigmoid().square(), free),
            bbox=total(errors.sum(-1) * (2 - sizes.prod(-1)), placed),
            clf=total(wrong, placed),
        )


# --- variant -----------------------------------------------------------------------------------------------------


def yolov2(
    num_classes: int = 20,
    in_channels: int = 3,
    weights: Any = None,
    *,
    anchors: Any = ANCHORS,
    lambda_obj: float = 1.0,
    lambda_noobj: float = 0.5,
    lambda_class: float = 1.0,
    lambda_coords: float = 5.0,
    ignore_iou: float = 0.6,
    body_weights: Any = None,
    **options: Any,
) -> Detector:
    """YOLOv2, 50.7 M parameters with 20 classes.

    Args:
        num_classes: K.
        in_channels: channels of the images.
        weights: of the whole detector: a path or a URL.
        anchors: (A, 2), widths and heights as fractions of the image; `holofunc.data.anchors` finds a dataset's.
        lambda_obj: weight of the objectness of slots that answer for a true box.
        lambda_noobj: weight of the objectness of all others.
        lambda_class: weight of the classes.
        lambda_coords: weight of the coordinates.
        ignore_iou: slots that overlap a true box by more than this need not have objectness 0; 1 is none of them.
        body_weights: a classifier's from which the body starts: ``"DEFAULT"`` and the like, of `darknet19`.
        options: those of `holofunc.models.yolo2.YOLOv2`.

    Raises:
        ValueError: an option out of range. TypeError: an option that there is not.

    Example:
        >>> from holofunc import models
        >>> models.yolov2(num_classes=10)
        Model(yolov2, 50,604,139 parameters)
    """
    pairs = read_anchors(anchors, (None, 2))
    options |= {"anchors": pairs}
    model = build_model("yolov2", YOLOv2, num_classes, in_channels, weights, options, small=["head.weight"])
    head = YOLOv2Head(
        num_classes, pairs, ignore_iou, lambda_obj=lambda_obj, lambda_noobj=lambda_noobj,
        lambda_class=lambda_class, lambda_coords=lambda_coords,
    )  # fmt: skip
    detector = Detector(model, head, anchors=pairs)
    return detector if body_weights is None else detector.with_body(body_weights, "darknet19")
