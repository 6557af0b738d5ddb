"""Detectors against Holocron: names, order and shapes, raw outputs, boxes, and what its losses get right."""

import json
import lzma
import warnings
from pathlib import Path

import pytest
import torch

from holofunc import models
from holofunc.models.darknet import DARKNET19
from holofunc.ops.boxes import box_iou

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it scripts a class while it is imported
    from holocron.models import detection as holocron

NAMES = json.loads(lzma.decompress((Path(__file__).parents[1] / "data/holocron_detection.json.xz").read_bytes()))
SIZES = {"yolov1": (448, 448), "yolov2": (64, 96), "yolov4": (64, 96)}
NO_DROPOUT = {"yolov1": {"dropout": 0.0}, "yolov4": {"drop_block": 0.0}}


def without_dropout(module):
    for each in module.modules():
        if type(each).__name__ in ("DropBlock2d", "Dropout"):
            each.p = 0.0
    return module


def randomized(module):
    """Values that no layer treats as the identity."""
    generator = torch.Generator().manual_seed(0)
    values = {n: v.clone() for n, v in module.state_dict().items()}
    for name, value in values.items():
        if value.ndim == 1:
            value.add_(torch.rand(value.shape, generator=generator) * 0.3)
        assert value.ndim != 0 or name.endswith("num_batches_tracked")
    return values


def raw_output(theirs, name, x):
    """What Holocron computes before it decodes."""
    if name != "yolov4":
        return (theirs._forward(x),)
    kept = {}
    handles = [
        getattr(theirs.head, part).register_forward_hook(lambda m, i, o, part=part: kept.__setitem__(part, o))
        for part in ("head1", "head2_2", "head3")
    ]
    theirs(x, None if not theirs.training else [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long()}] * len(x))
    for handle in handles:
        handle.remove()
    return tuple(kept.values())


@pytest.mark.parametrize("name", NAMES)
def test_names_order_and_shapes(name):
    skeleton = getattr(models, name)(num_classes=10).skeleton
    assert [[n, list(v.shape)] for n, v in skeleton.state_dict().items()] == NAMES[name]


@pytest.mark.parametrize("name", ["yolov2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("yolov1", "yolov4"))])
def test_raw_outputs_and_statistics(name):
    theirs = without_dropout(getattr(holocron, name)(pretrained_backbone=False, num_classes=10))
    values = randomized(theirs)
    theirs.load_state_dict(values)
    params = {n: values[n] for n, _ in theirs.named_parameters()}
    buffers = {n: v for n, v in values.items() if n not in params}
    model = getattr(models, name)(num_classes=10, **NO_DROPOUT.get(name, {}))
    model.check_anchors(buffers)
    x = torch.rand(2, 3, *SIZES[name], generator=torch.Generator().manual_seed(1))
    for train in (False, True):
        with torch.no_grad():
            out, new = model.apply(params, buffers, x, train=train)
            expected = raw_output(theirs.train(train), name, x)
        for got, wanted in zip(out if isinstance(out, tuple) else (out,), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
        if not train:
            check_boxes(model, theirs, name, out)
    for n, wanted in theirs.named_buffers():
        if n in new:
            torch.testing.assert_close(new[n], wanted, rtol=1e-4, atol=1e-5)


def check_boxes(model, theirs, name, out):
    """Boxes, objectness and classes before anything is left out."""
    found = model.predictions(out)
    if name == "yolov4":
        parts = [getattr(theirs.head, f"yolo{i}")._format_outputs(x) for i, x in enumerate(out, 1)]
        parts = [[x.movedim(3, 1).flatten(1, 3) for x in part] for part in parts]  # anchor by anchor
        boxes, objectness, classes = (torch.cat(each, 1) for each in zip(*parts, strict=True))
        objectness, classes = objectness.sigmoid(), classes.sigmoid()
    else:
        xywh, objectness, classes = theirs._format_outputs(out)
        if name == "yolov1":
            rows, columns = torch.meshgrid(torch.arange(7), torch.arange(7), indexing="ij")
            place = torch.stack([columns, rows], -1)[:, :, None]
            xywh = torch.cat([(xywh[..., :2] + place) / 7, xywh[..., 2:]], -1)
        boxes = torch.cat([xywh[..., :2] - xywh[..., 2:] / 2, xywh[..., :2] + xywh[..., 2:] / 2], -1)
        parts = boxes, objectness, classes.expand(*xywh.shape[:-1], -1)
        if name == "yolov2":  # anchor by anchor
            parts = [x.movedim(3, 1) for x in parts]
        boxes, objectness, classes = (x.flatten(1, 3) for x in parts)
    torch.testing.assert_close(found.boxes, boxes, rtol=1e-4, atol=1e-4)  # its anchors are rounded
    torch.testing.assert_close(found.objectness, objectness)
    torch.testing.assert_close(found.classes, classes)


def test_options_have_holocrons_names():
    """Other numbers of anchors, widths and normalization, in the same places of the state dict."""
    options = {"layout": [[16], [8, 16], [16, 32], [32, 1024]], "num_anchors": 3, "head_hidden_nodes": 8}
    with torch.device("meta"):
        theirs = holocron.YOLOv1(num_classes=3, stem_channels=8, **options)
    ours = models.yolov1(num_classes=3, stem_channels=8, **options)
    assert shapes(ours.skeleton) == shapes(theirs)
    anchors = torch.tensor([[0.1, 0.2], [0.5, 0.4]])
    layout = [(8, 0), (16, 1), (16, 1), (32, 2), (1024, 1)]
    with torch.device("meta"):
        theirs = holocron.YOLOv2(layout, num_classes=3, stem_chanels=8, anchors=anchors, passthrough_ratio=4)
    ours = models.yolov2(num_classes=3, layout=layout, stem_channels=8, anchors=anchors, passthrough_ratio=4)
    assert shapes(ours.skeleton) == shapes(theirs)
    assert ours.head.anchors == tuple(map(tuple, anchors.tolist()))


def shapes(module):
    return [(n, tuple(v.shape)) for n, v in module.state_dict().items()]


@pytest.mark.parametrize(("name", "same"), [("yolov1", {"obj", "noobj", "clf"}), ("yolov2", {"obj", "noobj"})])
def test_terms_of_one_box_that_were_right(name, same):
    """The rest of Holocron's terms is mended: `test_detection.py` has the numbers."""
    with torch.device("meta"):
        if name == "yolov1":
            theirs = holocron.YOLOv1([[16], [8, 16], [16, 32], [32, 64]], num_classes=3, head_hidden_nodes=8)
        else:
            theirs = holocron.YOLOv2([(8, 0), (8, 0), (8, 0), (8, 0), (64, 0)], num_classes=3)
    draw = torch.Generator().manual_seed(0)
    if name == "yolov1":
        head, out = models.yolov1(num_classes=3).head, torch.randn(1, 7 * 7 * 13, generator=draw)
    else:
        theirs.anchors = torch.tensor(models.yolo2.ANCHORS)
        head = models.yolov2(num_classes=3, ignore_iou=1.0).head
        out = torch.zeros(1, 40, 4, 4)  # where an anchor's shape decides in both: there it is the predicted one
        out[:, 4::8] = torch.randn(1, 5, 4, 4, generator=draw)
    box, label = torch.tensor([[0.2, 0.3, 0.5, 0.45]]), torch.tensor([1])
    expected = theirs._compute_losses(*theirs._format_outputs(out), [{"boxes": box, "labels": label}])
    found = head.losses(out, models.Targets(box[None], label[None], torch.tensor([[True]])))
    for term in same:
        torch.testing.assert_close(found[f"{term}_loss"], expected[f"{term}_loss"])


def test_layers_of_ones_own():
    def layers(channels, out, kernel_size, stride=1):
        conv = torch.nn.Conv2d(channels, out, kernel_size, stride, kernel_size // 2, bias=False)
        return [conv, torch.nn.GroupNorm(1, out), torch.nn.ReLU()]

    skeleton = models.yolov2(num_classes=3, layout=DARKNET19, layers=layers).skeleton
    kinds = {type(m).__name__ for m in skeleton.modules()}
    assert {"GroupNorm", "ReLU"} <= kinds
    assert not kinds & {"BatchNorm2d", "LeakyReLU"}
    mixed = models.yolov2(num_classes=3, layers=layers, body_layers=models.darknet.leaky).skeleton
    assert not any(isinstance(m, torch.nn.GroupNorm) for m in mixed.backbone.modules())
    assert any(isinstance(m, torch.nn.GroupNorm) for m in mixed.block5.modules())


def test_suppression_keeps_what_holocrons_does():
    """One class, so that class-agnostic and class-aware are the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)  # of other weights two boxes may have nearly the same score, and so either order
        theirs = holocron.YOLOv2(
            [(8, 0), (8, 0), (8, 0), (8, 0), (1024, 0)], num_classes=1, box_score_thresh=0.4
        ).eval()
    model = models.yolov2(num_classes=1, layout=[(8, 0), (8, 0), (8, 0), (8, 0), (1024, 0)])
    values = {n: v.clone() for n, v in theirs.state_dict().items()}
    values["head.weight"] *= 3
    theirs.load_state_dict(values)
    params = {n: values[n] for n, _ in theirs.named_parameters()}
    buffers = {n: v for n, v in values.items() if n not in params}
    x = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = theirs(x)
        found = model.decode(
            model.apply(params, buffers, x)[0], score_threshold=0.4, iou_threshold=0.7, max_detections=45
        )
    for i, each in enumerate(expected):
        scores, order = each["scores"].sort(descending=True)
        kept = found.mask[i]
        assert len(scores) == int(kept.sum()) > 3
        torch.testing.assert_close(found.scores[i][kept], scores, rtol=1e-4, atol=1e-5)
        overlap = box_iou(found.boxes[i][kept], each["boxes"][order].clamp(0, 1), paired=True)
        assert overlap.min() > 0.99


# --- what it gets wrong: each row of the table on detection in docs/deviations.md -------------------------------


def their_v1(**options):
    with torch.device("meta"):
        return holocron.YOLOv1([[16], [8, 16], [16, 32], [32, 64]], num_classes=3, head_hidden_nodes=8, **options)


def their_v2():
    with torch.device("meta"):
        module = holocron.YOLOv2([(8, 0), (8, 0), (8, 0), (8, 0), (64, 0)], num_classes=3)
    module.anchors = torch.tensor(models.yolo2.ANCHORS)
    return module


def lists(*boxes):
    return [{"boxes": torch.tensor(boxes), "labels": torch.zeros(len(boxes), dtype=torch.int64)}]


def padded(*boxes):
    return models.Targets(torch.tensor([boxes]), torch.zeros(1, len(boxes)).long(), torch.ones(1, len(boxes)).bool())


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


BOX, OTHER = [0.2, 0.3, 0.5, 0.45], [0.7, 0.7, 0.9, 0.95]


def test_theirs_classes_of_all_anchors():
    out = draw(1, 40, 4, 4).requires_grad_()
    theirs = their_v2()
    for loss, slots in (
        (theirs._compute_losses(*theirs._format_outputs(out), lists(BOX))["clf_loss"], 5),
        (models.yolov2(3).loss(out, padded(BOX))["clf_loss"], 1),
    ):
        (gradient,) = torch.autograd.grad(loss.sum(), out)
        touched = gradient.unflatten(1, (5, 8))[:, :, 5:].abs().sum((0, 2, 3, 4)) > 0
        assert int(touched.sum()) == slots


def test_theirs_boxes_learn_from_objectness():
    out, theirs, head = draw(1, 7 * 7 * 13).requires_grad_(), their_v1(), models.yolov1(3).head
    of = lambda gradient: gradient.unflatten(1, (49, 13))[..., :10].unflatten(-1, (2, 5))[..., :4]  # noqa: E731
    their_loss = theirs._compute_losses(*theirs._format_outputs(out), lists(BOX))["obj_loss"]
    assert of(torch.autograd.grad(their_loss.sum(), out)[0]).any()
    assert not of(torch.autograd.grad(head.losses(out, padded(BOX))["obj_loss"].sum(), out)[0]).any()


@pytest.mark.parametrize("name", ["yolov1", "yolov2"])
def test_theirs_errors_to_all_boxes(name):
    """Two boxes far apart: the term of both is the sum of two here, and not there."""
    theirs, head = (their_v1(), models.yolov1(3).head) if name == "yolov1" else (their_v2(), models.yolov2(3).head)
    out = draw(1, 7 * 7 * 13) if name == "yolov1" else draw(1, 40, 8, 8)
    sums = []
    for loss in (
        lambda *boxes: theirs._compute_losses(*theirs._format_outputs(out), lists(*boxes))["bbox_loss"],
        lambda *boxes: head.losses(out, padded(*boxes))["bbox_loss"],
    ):
        both, apart = loss(BOX, OTHER), loss(BOX) + loss(OTHER)
        sums.append(torch.allclose(both, apart))
    assert sums == [False, True]


@pytest.mark.parametrize("name", ["yolov1", "yolov2"])
def test_theirs_centres_at_the_border(name):
    theirs, head = (their_v1(), models.yolov1(3).head) if name == "yolov1" else (their_v2(), models.yolov2(3).head)
    out = draw(1, 7 * 7 * 13) if name == "yolov1" else draw(1, 40, 8, 8)
    edge = [1.0, 0.2, 1.0, 0.4]
    with pytest.raises(IndexError):
        theirs._compute_losses(*theirs._format_outputs(out), lists(edge))
    assert all(value.isfinite().all() for value in head.losses(out, padded(edge)).values())


def test_theirs_roots_at_zero():
    out = torch.full((1, 7 * 7 * 13), -200.0).requires_grad_()
    theirs, head = their_v1(), models.yolov1(3).head
    their_loss = theirs._compute_losses(*theirs._format_outputs(out), lists(BOX))["bbox_loss"]
    assert not torch.autograd.grad(their_loss.sum(), out)[0].isfinite().all()
    assert torch.autograd.grad(head.losses(out, padded(BOX))["bbox_loss"].sum(), out)[0].isfinite().all()


def test_two_boxes_in_one_cell_in_any_order():
    """Both want one slot; the one that fits better has it."""
    near = [0.21, 0.31, 0.49, 0.44]
    out, model = draw(1, 40, 4, 4), models.yolov2(3)
    turned = {"boxes": torch.tensor([near, BOX]), "labels": torch.tensor([1, 0])}
    kept = {"boxes": torch.tensor([BOX, near]), "labels": torch.tensor([0, 1])}
    ours = []
    for each in (kept, turned):
        targets = models.Targets(each["boxes"][None], each["labels"][None], torch.ones(1, 2).bool())
        ours.append(torch.stack(list(model.loss(out, targets).values())))
    torch.testing.assert_close(*ours)
