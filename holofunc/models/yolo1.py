"""YOLO: one grid of predictions, by linear layers on a Darknet-24.

Source: Redmon et al., "You only look once" (arXiv 1506.02640). Architecture and names are Holocron's, which passes what
the paper leaves linear through sigmoids, and the class scores through a softmax.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holofunc.models import darknet
from holofunc.models.anchored import centers_and_sizes, locate
from holofunc.models.base import Images, build_model
from holofunc.models.detection import Detector, freeze_norms
from holofunc.models.heads import Lambdas, Predictions, corners, one_hot, total
from holofunc.nn import Dropout
from holofunc.ops.arithmetic import upcast
from holofunc.ops.boxes import box_iou
from holofunc.ops.checks import check_counts
from holofunc.ops.matching import assign, occupied
from holofunc.ops.targets import Targets

__all__ = ["YOLOv1", "YOLOv1Head", "yolov1"]


# --- network -----------------------------------------------------------------------------------------------------


class YOLOv1(Images):
    """A Darknet-24, four convolutions and two linear layers: images of one size, on a grid 64 times coarser.

    The output has shape (N, S S (5 A + K)), S being ``image_size / 64``: for each cell ``(x, y, w, h, o)`` of each
    box, then the classes.

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


# --- what its output means --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class YOLOv1Head(Lambdas):
    """YOLO's boxes and its loss (the paper's equation 3).

    In its cell, the box that overlaps a true one most answers for it: its objectness should be that overlap (a
    constant), its centre and the square roots of its sides those of the true box. All others' objectness should be 0.
    The cell's classes should be the true one, the mean of them where it has several boxes.
    """

    num_classes: int
    num_anchors: int
    side: int

    def _split(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """``(x, y, w, h, o)`` of all boxes, (N, S S A, 5), and the cells' classes, (N, S S, K)."""
        boxes, classes = (
            upcast(out).unflatten(-1, (self.side**2, -1)).split([5 * self.num_anchors, self.num_classes], -1)
        )
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
        cell, place = locate(centers, centers.new_full((2,), self.side))
        slots = cell[..., None] * self.num_anchors + torch.arange(self.num_anchors, device=out.device)
        overlap = self._overlap(out.detach(), slots, targets)
        choice, placed = assign(overlap, slots, targets.mask)
        slot = slots.gather(-1, choice[..., None])
        own = raw.gather(1, slot.expand(-1, -1, 5))
        iou = overlap.gather(-1, choice[..., None])[..., 0]
        objectness = raw[..., 4].sigmoid()
        free = ~occupied(slot[..., 0], placed, raw.shape[1])
        roots = (F.logsigmoid(own[..., 2:4]) / 2).exp()  # sqrt(sigmoid), whose derivative is finite everywhere
        errors = (own[..., :2].sigmoid() - (centers * self.side - place)).square() + (roots - sizes.sqrt()).square()
        likely = classes.gather(1, cell[..., None].expand(-1, -1, self.num_classes)).softmax(-1)
        wrong = (likely - one_hot(targets.labels, self.num_classes).to(likely)).square().sum(-1)
        shared = ((cell[..., None] == cell[..., None, :]) & placed[..., None, :]).sum(-1).clamp_min(1)
        return self.weighted(
            obj=total((own[..., 4].sigmoid() - iou).square(), placed),
            noobj=total(objectness.square(), free),
            bbox=total(errors.sum(-1), placed),
            clf=total(wrong / shared, placed),
        )

    def _overlap(self, out: Tensor, slots: Tensor, targets: Targets) -> Tensor:
        """The IoU of each true box with each box of its cell, (N, M, A)."""
        boxes = self.predictions(out).boxes
        rows = slots.flatten(1)[..., None].expand(-1, -1, 4)
        return box_iou(boxes.gather(1, rows).unflatten(1, slots.shape[1:]), targets.boxes[..., None, :], paired=True)


# --- variant -----------------------------------------------------------------------------------------------------


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
        options: those of `holofunc.models.yolo1.YOLOv1`.

    Raises:
        ValueError: an option out of range. TypeError: an option that there is not.

    Example:
        >>> from holofunc import models
        >>> models.yolov1(num_classes=10)
        Model(yolov1, 86,349,332 parameters)
    """
    if not isinstance(image_size, int) or image_size < 64 or image_size % 64:
        raise ValueError(f"image_size must be a multiple of 64, got {image_size!r} (models.yolov1)")
    check_counts(num_anchors=num_anchors)
    options |= {"image_size": image_size, "num_anchors": num_anchors}
    model = build_model("yolov1", YOLOv1, num_classes, in_channels, weights, options)
    head = YOLOv1Head(
        num_classes, num_anchors, image_size // 64, lambda_obj=lambda_obj, lambda_noobj=lambda_noobj,
        lambda_class=lambda_class, lambda_coords=lambda_coords,
    )  # fmt: skip
    detector = Detector(model, head)
    return detector if body_weights is None else detector.with_body(body_weights, "darknet24")
