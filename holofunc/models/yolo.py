"""YOLO and YOLOv2: one grid of predictions on a Darknet.

Sources: Redmon et al., "You only look once" (arXiv 1506.02640); Redmon and Farhadi, "YOLO9000" (arXiv 1612.08242) and,
for what the latter does not say of its loss, the authors' program. Architectures and names are Holocron's; its
YOLO passes what the paper leaves linear through sigmoids, and the class scores through a softmax.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holofunc.models import darknet
from holofunc.models.anchored import Slots, boxes_of, candidates, centers_and_sizes, locate, pick, read_maps, shape_iou
from holofunc.models.base import Images, build_model
from holofunc.models.detection import Detector, Predictions, check_lambdas, corners, freeze_norms, read_anchors
from holofunc.nn import ConcatDownsample2d, Dropout
from holofunc.ops.boxes import box_iou
from holofunc.ops.matching import assign, occupied
from holofunc.ops.targets import Targets

__all__ = ["YOLOv1", "YOLOv1Head", "YOLOv2", "YOLOv2Head", "yolov1", "yolov2"]

PLACES = ((1.3221, 1.73145), (3.19275, 4.00944), (5.05587, 8.09892), (9.47112, 4.84053), (11.2364, 10.0071))
ANCHORS = tuple((width / 13, height / 13) for width, height in PLACES)
"""The authors' for VOC, told in places of a grid of 13."""
LEAST = 1e-4
"""Sides of true boxes below this fraction of the image count as this."""


# --- networks ----------------------------------------------------------------------------------------------------


class YOLOv1(Images):
    """A Darknet-24, four convolutions and two linear layers: images of one size, on a grid 64 times coarser.

    Args:
        num_classes: K.
        in_channels: of the images.
        stem_channels: of the body's first convolution.
        layout: of the body, as for `darknet24_body`.
        image_size: height and width of the images, a multiple of 64.
        num_anchors: A, boxes per cell.
        head_channels: of the four convolutions.
        head_hidden_nodes: between the linear layers.
        dropout: probability, between the linear layers.
        layers: ``layers(channels, out, kernel_size, stride=1)``, a convolution and what follows it.
        body_layers: the same for the body; by default, ``layers``.
        frozen_norm: whether the body's BatchNorms, if its layers have any, stand still.

    The output has shape (N, S S (5 A + K)), S being ``image_size / 64``: for each cell ``(x, y, w, h, o)`` of each
    box, then the classes.
    """

    heads = ("classifier.4",)

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        stem_channels: int = 64,
        layout: Sequence[Sequence[int]] = darknet.DARKNET24,
        image_size: int = 448,
        num_anchors: int = 2,
        head_channels: int = 1024,
        head_hidden_nodes: int = 512,
        dropout: float = 0.5,
        layers: darknet.Layers = darknet.without_norm,
        body_layers: darknet.Layers | None = None,
        frozen_norm: bool = False,
    ) -> None:
        super().__init__(in_channels)
        self.image_size, side = image_size, image_size // 64
        body = darknet.darknet24_body(in_channels, stem_channels, layout=layout, layers=body_layers or layers)
        self.backbone = freeze_norms(body) if frozen_norm else body
        channels = layout[-1][-1]
        block = [layers(channels, head_channels, 3), layers(head_channels, head_channels, 3, 2)]
        block += [layers(head_channels, head_channels, 3) for _ in range(2)]
        self.block4 = nn.Sequential(*(layer for each in block for layer in each))
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(head_channels * side**2, head_hidden_nodes),
            nn.LeakyReLU(0.1),
            Dropout(dropout),
            nn.Linear(head_hidden_nodes, side**2 * (5 * num_anchors + num_classes)),
        )

    def check_input(self, *inputs: Any) -> None:
        super().check_input(*inputs)
        (x,) = inputs
        if x.shape[2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"images must be {self.image_size} pixels high and wide, as the linear layers were built for "
                f"(image_size={self.image_size}), got shape {tuple(x.shape)}"
            )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.block4(self.backbone(x)))


class YOLOv2(Images):
    """A Darknet-19, whose next to last maps pass by its last stage: images of any size, a multiple of 32.

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

    The output has shape (N, A (5 + K), H / 32, W / 32): for each anchor ``(x, y, w, h, o)``, then the classes.
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


def check_multiple(x: Tensor, stride: int) -> None:
    """Refuse images whose sides no grid divides."""
    if any(side % stride or side == 0 for side in x.shape[2:]):
        raise ValueError(f"the sides of images must be multiples of {stride}, got shape {tuple(x.shape)}")


# --- what their outputs mean -------------------------------------------------------------------------------------


def terms(obj: Tensor, noobj: Tensor, bbox: Tensor, clf: Tensor) -> dict[str, Tensor]:
    """The terms of every detector here, under Holocron's names."""
    return {"obj_loss": obj, "noobj_loss": noobj, "bbox_loss": bbox, "clf_loss": clf}


@dataclass(frozen=True)
class YOLOv1Head:
    """YOLO's boxes and its loss (the paper's equation 3).

    In its cell, the box that overlaps a true one most answers for it: its objectness should be that overlap (a
    constant), its centre and the square roots of its sides those of the true box. All others' objectness should be 0.
    The cell's classes should be the true one, the mean of them where it has several boxes.
    """

    num_classes: int
    num_anchors: int
    side: int
    lambda_obj: float = 1.0
    lambda_noobj: float = 0.5
    lambda_class: float = 1.0
    lambda_coords: float = 5.0

    def _split(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """``(x, y, w, h, o)`` of all boxes, (N, S S A, 5), and the cells' classes, (N, S S, K)."""
        cells = out.float() if out.dtype in (torch.float16, torch.bfloat16) else out
        boxes, classes = cells.unflatten(-1, (self.side**2, -1)).split([5 * self.num_anchors, self.num_classes], -1)
        return boxes.unflatten(-1, (self.num_anchors, 5)).flatten(1, 2), classes

    def predictions(self, out: Tensor) -> Predictions:
        boxes, classes = self._split(out)
        boxes = boxes.sigmoid()
        cell = torch.arange(self.side**2, device=out.device).repeat_interleave(self.num_anchors)
        places = torch.stack([cell % self.side, cell // self.side], -1)
        xyxy = corners((boxes[..., :2] + places) / self.side, boxes[..., 2:4])
        return Predictions(xyxy, boxes[..., 4], classes.softmax(-1).repeat_interleave(self.num_anchors, 1))

    def losses(self, out: Tensor, targets: Targets) -> dict[str, Tensor]:
        raw, classes = self._split(out)
        centers, sizes = centers_and_sizes(targets)
        cell, offset = locate(centers, self.side, self.side)
        slots = cell[..., None] * self.num_anchors + torch.arange(self.num_anchors, device=out.device)
        overlap = self._overlap(out.detach(), slots, targets)
        choice, placed = assign(overlap, slots, targets.mask)
        slot = slots.gather(-1, choice[..., None])
        own = raw.gather(1, slot.expand(-1, -1, 5))
        iou = overlap.gather(-1, choice[..., None])[..., 0]
        objectness = raw[..., 4].sigmoid()
        free = ~occupied(slot[..., 0], placed, raw.shape[1])
        roots = (F.logsigmoid(own[..., 2:4]) / 2).exp()  # sqrt(sigmoid), whose derivative is finite everywhere
        errors = (own[..., :2].sigmoid() - offset).square() + (roots - sizes.sqrt()).square()
        likely = classes.gather(1, cell[..., None].expand(-1, -1, self.num_classes)).softmax(-1)
        wrong = (likely - one_hot(targets.labels, self.num_classes).to(likely)).square().sum(-1)
        shared = ((cell[..., None] == cell[..., None, :]) & placed[..., None, :]).sum(-1).clamp_min(1)
        return terms(
            obj=self.lambda_obj * total((own[..., 4].sigmoid() - iou).square(), placed),
            noobj=self.lambda_noobj * total(objectness.square(), free),
            bbox=self.lambda_coords * total(errors.sum(-1), placed),
            clf=self.lambda_class * total(wrong / shared, placed),
        )

    def _overlap(self, out: Tensor, slots: Tensor, targets: Targets) -> Tensor:
        """The IoU of each true box with each box of its cell, (N, M, A)."""
        boxes = self.predictions(out).boxes
        rows = slots.flatten(1)[..., None].expand(-1, -1, 4)
        return box_iou(boxes.gather(1, rows).unflatten(1, slots.shape[1:]), targets.boxes[..., None, :], paired=True)


@dataclass(frozen=True)
class YOLOv2Head:
    """YOLOv2's boxes and its loss.

    In its cell, the anchor whose shape fits a true box best answers for it: its objectness should be the overlap (a
    constant), ``(sigmoid(x), sigmoid(y), w, h)`` those that give the true box, small boxes counting up to twice as
    much as large ones, and its classes, by cross entropy, the true one. The objectness of all others should be 0, of
    those excepted that overlap some true box more than ``ignore_iou``.
    """

    num_classes: int
    anchors: tuple[tuple[float, ...], ...]
    lambda_obj: float = 1.0
    lambda_noobj: float = 0.5
    lambda_class: float = 1.0
    lambda_coords: float = 5.0
    ignore_iou: float = 0.6

    def predictions(self, out: Tensor) -> Predictions:
        slots = read_maps([out], [self.anchors], [1.0])
        return Predictions(boxes_of(slots), slots.raw[..., 4].sigmoid(), slots.raw[..., 5:].softmax(-1))

    def losses(self, out: Tensor, targets: Targets) -> dict[str, Tensor]:
        slots = read_maps([out], [self.anchors], [1.0])
        centers, sizes = centers_and_sizes(targets)
        anchors = torch.tensor(self.anchors, dtype=slots.raw.dtype, device=out.device)
        numbers, offsets = candidates(centers, [out], [len(self.anchors)])
        choice, placed = assign(shape_iou(sizes, anchors), numbers, targets.mask)
        slot = numbers.gather(-1, choice[..., None])[..., 0]
        own = pick(slots, slot)
        raw = own.raw
        iou = box_iou(boxes_of(own._replace(raw=raw.detach())), targets.boxes, paired=True)
        wanted = (sizes.clamp_min(LEAST) / own.anchors).log()
        errors = (raw[..., :2].sigmoid() - offsets[..., 0, :]).square() + (raw[..., 2:4] - wanted).square()
        labels = torch.where(placed, targets.labels, 0)
        wrong = raw[..., 5:].logsumexp(-1) - raw[..., 5:].gather(-1, labels[..., None])[..., 0]
        free = ~occupied(slot, placed, slots.raw.shape[1])
        if self.ignore_iou < 1:
            free = free & ~overlapping(slots, targets, self.ignore_iou)
        return terms(
            obj=self.lambda_obj * total((raw[..., 4].sigmoid() - iou).square(), placed),
            noobj=self.lambda_noobj * total(slots.raw[..., 4].sigmoid().square(), free),
            bbox=self.lambda_coords * total(errors.sum(-1) * (2 - sizes.prod(-1)), placed),
            clf=self.lambda_class * total(wrong, placed),
        )


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """bool (..., K); torch's reads values, and does not map."""
    return labels[..., None] == torch.arange(num_classes, device=labels.device)


def total(values: Tensor, mask: Tensor) -> Tensor:
    """The sum over an image of the values where ``mask`` is True, (N, R) to (N,); the rest may be anything."""
    return torch.where(mask, values, 0).sum(1)


def overlapping(slots: Slots, targets: Targets, threshold: float) -> Tensor:
    """Which of all predicted boxes overlap some true box by more than ``threshold``: (N, P), a constant.

    The largest tensors of a loss are here, one number for each pair: IoU is not divided out.
    """
    ax1, ay1, ax2, ay2 = boxes_of(slots._replace(raw=slots.raw.detach()))[:, :, None].unbind(-1)
    bx1, by1, bx2, by2 = targets.boxes[:, None].unbind(-1)
    width = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp_min(0)
    height = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp_min(0)
    areas = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1)
    return ((1 + threshold) * (width * height) > threshold * areas).any(-1)


# --- variants ----------------------------------------------------------------------------------------------------


def yolov1(
    num_classes: int = 20,
    in_channels: int = 3,
    weights: Any = None,
    *,
    image_size: int = 448,
    num_anchors: int = 2,
    lambda_obj: float = 1.0,
    lambda_noobj: float = 0.5,
    lambda_class: float = 1.0,
    lambda_coords: float = 5.0,
    body_weights: Any = None,
    **options: Any,
) -> Detector:
    """YOLO, 86.6 M parameters with 20 classes.

    Args:
        num_classes: K.
        in_channels: channels of the images.
        weights: of the whole detector: a path or a URL.
        image_size: height and width of the images, a multiple of 64: the linear layers are built for it.
        num_anchors: boxes per cell.
        lambda_obj: weight of the objectness of boxes that answer for a true one.
        lambda_noobj: weight of the objectness of all others.
        lambda_class: weight of the classes.
        lambda_coords: weight of the coordinates.
        body_weights: a classifier's from which the body starts: ``"DEFAULT"`` and the like, of `darknet24`.
        options: those of `holofunc.models.yolo.YOLOv1`.

    Raises:
        ValueError: an option out of range. TypeError: an option that there is not.

    Example:
        >>> from holofunc import models
        >>> models.yolov1(num_classes=10)
        Model(yolov1, 86,349,332 parameters)
    """
    if not isinstance(image_size, int) or image_size < 64 or image_size % 64:
        raise ValueError(f"image_size must be a multiple of 64, got {image_size!r} (models.yolov1)")
    if not isinstance(num_anchors, int) or num_anchors < 1:
        raise ValueError(f"num_anchors must be an integer of at least 1, got {num_anchors!r} (models.yolov1)")
    lambdas = {"lambda_obj": lambda_obj, "lambda_noobj": lambda_noobj}
    lambdas |= {"lambda_class": lambda_class, "lambda_coords": lambda_coords}
    check_lambdas(**lambdas)
    options |= {"image_size": image_size, "num_anchors": num_anchors}
    model = build_model("yolov1", YOLOv1, num_classes, in_channels, weights, options)
    detector = Detector(model, YOLOv1Head(num_classes, num_anchors, image_size // 64, **lambdas))
    return detector if body_weights is None else detector.with_body(body_weights, "darknet24")


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
        options: those of `holofunc.models.yolo.YOLOv2`.

    Raises:
        ValueError: an option out of range. TypeError: an option that there is not.

    Example:
        >>> from holofunc import models
        >>> models.yolov2(num_classes=10)
        Model(yolov2, 50,604,139 parameters)
    """
    lambdas = {"lambda_obj": lambda_obj, "lambda_noobj": lambda_noobj}
    lambdas |= {"lambda_class": lambda_class, "lambda_coords": lambda_coords}
    check_lambdas(**lambdas, ignore_iou=ignore_iou)
    pairs = read_anchors(anchors, (None, 2))
    model = build_model(
        "yolov2", YOLOv2, num_classes, in_channels, weights, options | {"anchors": pairs}, small=["head.weight"]
    )
    detector = Detector(model, YOLOv2Head(num_classes, pairs, ignore_iou=ignore_iou, **lambdas), anchors=pairs)
    return detector if body_weights is None else detector.with_body(body_weights, "darknet19")
