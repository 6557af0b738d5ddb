"""YOLOv4: three grids of predictions on a CSPDarknet-53 and a path aggregation network.

Source: Bochkovskiy et al., "YOLOv4" (arXiv 2004.10934), and its authors' configuration for 608 pixels. Architecture and
names are Holocron's: Mish everywhere, DropBlock after each convolution but the heads'.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holofunc.models import darknet
from holofunc.models.anchored import (
    boxes_of,
    candidates,
    centers_and_sizes,
    others,
    predicted,
    read_maps,
    shape_iou,
)
from holofunc.models.base import Images, build_model, conv_bn
from holofunc.models.detection import Detector, freeze_norms
from holofunc.models.heads import Lambdas, Predictions, check_multiple, check_share, one_hot, read_anchors, total
from holofunc.nn import SPP, DropBlock2d
from holofunc.ops.boxes import box_iou, ciou_loss
from holofunc.ops.matching import assign
from holofunc.ops.targets import Targets

__all__ = ["PAN", "YOLOv4", "YOLOv4Head", "yolov4"]

ANCHORS = (
    ((12, 16), (19, 36), (40, 28)),
    ((36, 75), (76, 55), (72, 146)),
    ((142, 110), (192, 243), (459, 401)),
)
RELATIVE = tuple(tuple((w / 608, h / 608) for w, h in scale) for scale in ANCHORS)
STRETCH = (1.2, 1.1, 1.05)


# --- network -----------------------------------------------------------------------------------------------------


def mish(channels: int, out: int, kernel_size: int, stride: int = 1) -> list[nn.Module]:
    """A convolution, its normalization and Mish."""
    return [*conv_bn(channels, out, kernel_size, stride), nn.Mish()]


def narrow_and_widen(channels: int, out: int, hidden: int, layers: darknet.Layers, times: int) -> list[nn.Module]:
    """1x1 to ``out`` channels, then ``times`` a 3x3 to ``hidden`` and a 1x1 back."""
    found = layers(channels, out, 1)
    for _ in range(times):
        found += [*layers(out, hidden, 3), *layers(hidden, out, 1)]
    return found


class PAN(nn.Module):
    """Maps of twice the resolution joined with deeper ones.

    Args:
        deep: channels of the deeper maps.
        channels: of the maps of twice the resolution; the result has half of them.
        layers: a convolution and what follows it.
    """

    def __init__(self, deep: int, channels: int, layers: darknet.Layers) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Sequential(*layers(deep, half, 1))
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.conv2 = nn.Sequential(*layers(channels, half, 1))
        self.convs = nn.Sequential(*narrow_and_widen(channels, half, channels, layers, 2))

    def forward(self, deep: Tensor, x: Tensor) -> Tensor:
        return self.convs(torch.cat([self.conv2(x), self.up(self.conv1(deep))], 1))


class Neck(nn.Module):
    """Pooling at several sizes on the deepest maps, which two PANs then carry up."""

    def __init__(self, channels: Sequence[int], layers: darknet.Layers) -> None:
        super().__init__()
        c3, c4, c5 = channels
        half = c5 // 2
        self.fpn = nn.Sequential(
            *narrow_and_widen(c5, half, c5, layers, 1),
            SPP([5, 9, 13]),
            *narrow_and_widen(4 * half, half, c5, layers, 1),
        )
        self.pan1 = PAN(half, c4, layers)
        self.pan2 = PAN(c4 // 2, c3, layers)

    def forward(self, c3: Tensor, c4: Tensor, c5: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        deep = self.fpn(c5)
        middle = self.pan1(deep, c4)
        return self.pan2(middle, c3), middle, deep


class Anchors(nn.Module):
    """The anchors of one grid, under the name that they have in state dicts."""

    anchors: Tensor

    def __init__(self, anchors: Sequence[Sequence[float]]) -> None:
        super().__init__()
        self.register_buffer("anchors", torch.tensor(anchors))


class Heads(nn.Module):
    """From three maps, by way of the deeper ones, to the predictions of three grids."""

    def __init__(
        self, channels: Sequence[int], out: int, anchors: Any, bare: darknet.Layers, layers: darknet.Layers
    ) -> None:
        super().__init__()
        c3, c4, c5 = channels
        self.head1 = nn.Sequential(*bare(c3 // 2, c3, 3), nn.Conv2d(c3, out, 1))
        self.yolo1 = Anchors(anchors[0])
        self.pre_head2 = nn.Sequential(*layers(c3 // 2, c4 // 2, 3, 2))
        self.head2_1 = nn.Sequential(*narrow_and_widen(c4, c4 // 2, c4, layers, 2))
        self.head2_2 = nn.Sequential(*bare(c4 // 2, c4, 3), nn.Conv2d(c4, out, 1))
        self.yolo2 = Anchors(anchors[1])
        self.pre_head3 = nn.Sequential(*layers(c4 // 2, c5 // 2, 3, 2))
        deepest = [*narrow_and_widen(c5, c5 // 2, c5, layers, 2), *layers(c5 // 2, c5, 3)]
        self.head3 = nn.Sequential(*deepest, nn.Conv2d(c5, out, 1))
        self.yolo3 = Anchors(anchors[2])

    def forward(self, fine: Tensor, middle: Tensor, deep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        middle = self.head2_1(torch.cat([self.pre_head2(fine), middle], 1))
        deep = torch.cat([self.pre_head3(middle), deep], 1)
        return self.head1(fine), self.head2_2(middle), self.head3(deep)


class YOLOv4(Images):
    """A CSPDarknet-53 with a neck and three heads: images of any size, a multiple of 32.

    The output is three maps (N, A (5 + K), H / s, W / s) with s = 8, 16, 32.

    Args:
        num_classes: K.
        in_channels: of the images.
        anchors: (3, A, 2), of the grids from the finest on, widths and heights as fractions of the image.
        stem_channels: of the body's first convolution.
        layout: of the body, as for `cspdarknet53_body`; five stages.
        drop_block: probability of DropBlock.
        layers: ``layers(channels, out, kernel_size, stride=1)``, a convolution and what follows it but for DropBlock.
        body_layers: the same for the body; by default, ``layers``.
        frozen_norm: whether the body's BatchNorms stand still.
    """

    heads = ("head.head1.3", "head.head2_2.3", "head.head3.24")

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        anchors: Any,
        stem_channels: int = 32,
        layout: Sequence[tuple[int, int]] = darknet.DARKNET53,
        drop_block: float = 0.1,
        layers: darknet.Layers = mish,
        body_layers: darknet.Layers | None = None,
        frozen_norm: bool = False,
    ) -> None:
        super().__init__(in_channels)

        def dropped(bare: darknet.Layers) -> darknet.Layers:
            return lambda *args: [*bare(*args), DropBlock2d(drop_block)]

        body = darknet.cspdarknet53_body(
            in_channels, stem_channels, layout=layout, mish=True, drop_block=drop_block,
            layers=dropped(body_layers or layers),
        )  # fmt: skip
        self.backbone = freeze_norms(body) if frozen_norm else body
        channels = [width for width, _ in layout[-3:]]
        self.neck = Neck(channels, dropped(layers))
        out = len(anchors[0]) * (5 + num_classes)
        self.head = Heads(channels, out, anchors, layers, dropped(layers))

    def check_input(self, *inputs: Any) -> None:
        super().check_input(*inputs)
        (x,) = inputs
        check_multiple(x, 2 ** len(self.backbone.stages))  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.backbone.stem(x)  # type: ignore[operator]
        maps = []
        for stage in self.backbone.stages:  # type: ignore[union-attr]
            x = stage(x)
            maps.append(x)
        return self.head(*self.neck(*maps[-3:]))


# --- what its outputs mean ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class YOLOv4Head(Lambdas):
    """YOLOv4's boxes and its loss.

    For a true box answers the slot at its place whose anchor, of all grids, fits its shape best, and so does every
    other that fits it by more than ``iou_threshold`` and that no box has already. Their boxes should be the true one,
    by CIoU; their objectness should be 1 and their classes the true one, by binary cross entropy. The objectness of
    all others should be 0, of those excepted that overlap some true box by more than ``ignore_iou``.
    """

    num_classes: int
    anchors: tuple[tuple[tuple[float, ...], ...], ...]
    stretch: tuple[float, ...] = STRETCH
    iou_threshold: float = 0.213
    ignore_iou: float = 0.7
    label_smoothing: float = 0.0
    iou_share: float = 0.0
    lambda_noobj: float = field(default=1.0, kw_only=True)
    lambda_coords: float = field(default=0.07, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("iou_threshold", "ignore_iou", "label_smoothing", "iou_share"):
            check_share(name, getattr(self, name))

    def predictions(self, out: Sequence[Tensor]) -> Predictions:
        return predicted(read_maps(out, self.anchors, self.stretch), lambda classes: classes.sigmoid())

    def losses(self, out: Sequence[Tensor], targets: Targets) -> dict[str, Tensor]:
        maps = read_maps(out, self.anchors, self.stretch)
        centers, sizes = centers_and_sizes(targets)
        own, numbers, every = candidates(maps, centers)
        there = responsible(shape_iou(sizes, own.anchors), numbers, targets.mask, self.iou_threshold)
        boxes, found = targets.boxes[:, :, None].expand(*numbers.shape, 4), boxes_of(own)
        wanted = one_hot(targets.labels, self.num_classes)[:, :, None].to(found)
        wanted = wanted * (1 - self.label_smoothing) + self.label_smoothing / self.num_classes
        objectness, classes = own.raw[..., 4], own.raw[..., 5:]
        present = torch.ones_like(objectness)
        if self.iou_share:
            present = present - self.iou_share * (1 - box_iou(found.detach(), boxes, paired=True))
        free = others(maps, numbers.flatten(1), there.flatten(1), targets, self.ignore_iou)
        return self.weighted(
            obj=total(cross_entropy(objectness, present), there),
            noobj=total(F.softplus(every), free),
            bbox=total(ciou_loss(found, boxes, paired=True), there),
            clf=total(cross_entropy(classes, wanted).sum(-1), there),
        )


def responsible(fit: Tensor, numbers: Tensor, mask: Tensor, threshold: float) -> Tensor:
    """Which candidates (N, M, A) answer for a true box: its best, and those that fit it by more than a threshold.

    None answers for two boxes: the best of a box goes before what only fits, and then the better fit.
    """
    choice, placed = assign(fit, numbers, mask)
    best = (torch.arange(fit.shape[-1], device=fit.device) == choice[..., None]) & placed[..., None]
    same = numbers[:, :, None] == numbers[:, None, :]  # at the same anchor; of others slots are never the same
    also = (fit > threshold) & mask[..., None] & ~(same & best[:, None, :]).any(2)
    order = torch.arange(fit.shape[1], device=fit.device)
    earlier = (order[None, :] < order[:, None])[..., None]
    mine, theirs = fit[:, :, None], fit[:, None, :]
    better = (theirs > mine) | ((theirs == mine) & earlier)
    return best | (also & ~(same & also[:, None, :] & better).any(2))


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary, elementwise: softplus(x) - t x."""
    return F.softplus(logits) - targets * logits


# --- variant -----------------------------------------------------------------------------------------------------


def yolov4(
    num_classes: int = 80,
    in_channels: int = 3,
    weights: Any = None,
    *,
    anchors: Any = RELATIVE,
    lambda_obj: float = 1.0,
    lambda_noobj: float = 1.0,
    lambda_class: float = 1.0,
    lambda_coords: float = 0.07,
    iou_threshold: float = 0.213,
    ignore_iou: float = 0.7,
    label_smoothing: float = 0.0,
    iou_share: float = 0.0,
    body_weights: Any = None,
    **options: Any,
) -> Detector:
    """YOLOv4, 64.4 M parameters with 80 classes.

    Args:
        num_classes: K.
        in_channels: channels of the images.
        weights: of the whole detector: a path or a URL.
        anchors: (3, A, 2), of the grids from the finest on, widths and heights as fractions of the image.
        lambda_obj: weight of the objectness of slots that answer for a true box.
        lambda_noobj: weight of the objectness of all others.
        lambda_class: weight of the classes.
        lambda_coords: weight of the coordinates.
        iou_threshold: anchors that fit a box by more than this answer for it beside the best one.
        ignore_iou: slots that overlap a true box by more than this need not have objectness 0; 1 is none of them.
        label_smoothing: in [0, 1): how much of a box's class is spread over all classes.
        iou_share: in [0, 1]: how much of the objectness to be predicted is the overlap; the paper has 0.
        body_weights: a classifier's from which the body starts: ``"DEFAULT"`` and the like, of `cspdarknet53_mish`.
        options: those of `holofunc.models.yolo4.YOLOv4`.

    Raises:
        ValueError: an option out of range. TypeError: an option that there is not.

    Example:
        >>> from holofunc import models
        >>> models.yolov4(num_classes=10)
        Model(yolov4, 63,986,151 parameters)
    """
    pairs = read_anchors(anchors, (3, None, 2))
    count = len(pairs) // 3
    grids = tuple(pairs[i : i + count] for i in range(0, len(pairs), count))
    options |= {"anchors": grids}
    outputs = [f"{head}.weight" for head in YOLOv4.heads]
    model = build_model("yolov4", YOLOv4, num_classes, in_channels, weights, options, small=outputs)
    head = YOLOv4Head(
        num_classes, grids, STRETCH, iou_threshold, ignore_iou, label_smoothing, iou_share, lambda_obj=lambda_obj,
        lambda_noobj=lambda_noobj, lambda_class=lambda_class, lambda_coords=lambda_coords,
    )  # fmt: skip
    detector = Detector(model, head, anchors=grids)
    return detector if body_weights is None else detector.with_body(body_weights, "cspdarknet53_mish")
