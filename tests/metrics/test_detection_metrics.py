"""Detection: pycocotools' numbers where it is installed, numbers by hand, and the laws of metrics."""

import contextlib
import functools
import io
import math

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_map

from holofunc import metrics

NAMES = (
    *("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
    *("ar_1", "ar_10", "ar_100", "ar_small", "ar_medium", "ar_large"),
)


def scene(seed, images, classes, detections, targets):
    """Targets, some of them crowds, and detections near them, some tied; (detections, targets) of static shapes."""
    g = np.random.default_rng(seed)
    corner, side = g.uniform(0, 200, (images, targets, 2)), np.exp(g.uniform(1.5, 5, (images, targets, 2)))
    boxes = np.concatenate([corner, corner + side], -1).round(1)
    labels, mask = g.integers(0, classes, (images, targets)), g.random((images, targets)) < 0.8
    source = g.integers(0, targets, (images, detections))
    near = np.take_along_axis(boxes, source[..., None], 1)
    near = near + g.normal(0, 1, near.shape) * np.tile(np.take_along_axis(side, source[..., None], 1), 2) / 10
    near = np.concatenate([np.minimum(near[..., :2], near[..., 2:]), np.maximum(near[..., :2], near[..., 2:]) + 1], -1)
    guess = np.where(g.random((images, detections)) < 0.8, np.take_along_axis(labels, source, 1), 0)
    found = near.round(1), g.random((images, detections)).round(1).astype("f4"), guess, g.random(guess.shape) < 0.9
    true = {"boxes": boxes, "labels": labels, "mask": mask, "crowd": g.random(mask.shape) < 0.2}
    true["areas"] = (side.prod(-1) * g.uniform(0.5, 1, mask.shape)).round(1)
    return tuple(map(torch.tensor, found)), {name: torch.tensor(x) for name, x in true.items()}


def pycocotools(found, true, classes):
    coco, evaluation = pytest.importorskip("pycocotools.coco"), pytest.importorskip("pycocotools.cocoeval")
    annotations, results = [], []
    for i, j in true["mask"].nonzero().tolist():
        x1, y1, x2, y2 = true["boxes"][i, j].tolist()
        place = {"image_id": i, "category_id": true["labels"][i, j].item(), "bbox": [x1, y1, x2 - x1, y2 - y1]}
        more = {"id": len(annotations) + 1, "area": true["areas"][i, j].item(), "iscrowd": int(true["crowd"][i, j])}
        annotations.append(place | more)
    for i, j in found[3].nonzero().tolist():
        x1, y1, x2, y2 = found[0][i, j].tolist()
        place = {"image_id": i, "category_id": found[2][i, j].item(), "bbox": [x1, y1, x2 - x1, y2 - y1]}
        results.append(place | {"score": found[1][i, j].item()})
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco.COCO()
        truth.dataset = {
            "images": [{"id": i} for i in range(len(found[0]))],
            "categories": [{"id": c} for c in range(classes)],
            "annotations": annotations,
        }
        truth.createIndex()
        judge = evaluation.COCOeval(truth, truth.loadRes(results), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return [math.nan if x == -1 else x for x in judge.stats]


def value(metric, found, true, **options):
    return metric.compute(metric.update(metric.init(), found, true, **options))


@pytest.mark.parametrize(
    ("seed", "shape"), [(0, (30, 3, 20, 9)), (1, (30, 2, 12, 5)), (2, (3, 1, 230, 30)), (3, (4, 5, 3, 1))]
)
def test_the_twelve_numbers_are_pycocotools(seed, shape):
    found, true = scene(seed, *shape)
    got = value(metrics.coco(shape[1]), found, true)
    assert tuple(got) == NAMES
    np.testing.assert_allclose([x.item() for x in got.values()], pycocotools(found, true, shape[1]), atol=1e-9)


MEMBERS = {"coco": metrics.coco(3), "detection_errors": metrics.detection_errors()}


same = functools.partial(torch.testing.assert_close, equal_nan=True)


@pytest.mark.parametrize("name", MEMBERS)
def test_laws(name):
    metric, (found, true) = MEMBERS[name], scene(5, 9, 3, 6, 4)
    whole = value(metric, found, true)
    rows = lambda a, b: tree_map(lambda x: x[a:b], (found, true))  # noqa: E731
    parts = [metric.update(metric.init(), *rows(a, b)) for a, b in ((0, 2), (2, 3), (3, 9))]
    merged = metric.merge(metric.merge(metric.init(), parts[0]), metric.merge(parts[1], parts[2]))
    same(metric.compute(merged), whole)
    padded = tree_map(lambda x: torch.cat([x, x[-1:].expand(2, *x.shape[1:])]), (found, true))
    weights = (torch.arange(11) < 9).float()
    same(value(metric, *padded, weights=weights), whole)
    compiled = torch.compile(metric.update, backend="eager", fullgraph=True)
    same(metric.compute(compiled(metric.init(), found, true)), whole)
    three = tree_map(lambda x: x.unflatten(0, (3, 3)), (found, true))
    states = torch.func.vmap(lambda *batch: metric.update(metric.init(), *batch))(*three)
    for i in range(3):
        expected = value(metric, *rows(3 * i, 3 * i + 3))
        same(metric.compute(tree_map(lambda x: x[i], states)), expected)  # noqa: B023
    assert all(x.isnan() for x in metric.compute(metric.init()).values())


def test_relative_boxes_have_the_sizes_of_their_images():
    boxes, there = torch.tensor([[[0.0, 0.0, 0.25, 0.5]]]), torch.tensor([[True]])
    found, label = (boxes, torch.ones(1, 1), torch.zeros(1, 1).long(), there), torch.zeros(1, 1).long()
    medium = value(metrics.coco(1, image_size=(100, 200)), found, (boxes, label, there))  # 50 x 50
    assert medium["ap_medium"] == 1
    assert medium["ap_small"].isnan()
    small = value(
        metrics.coco(1), found, {"boxes": boxes, "labels": label, "mask": there, "sizes": torch.tensor([[40, 80]])}
    )
    assert small["ap_small"] == 1
    assert small["ap_medium"].isnan()


def test_numbers_of_any_dtype():
    boxes, there = torch.tensor([[[0, 0, 50, 50]]]), torch.tensor([[True]])
    label = torch.zeros(1, 1, dtype=torch.int32)
    found = boxes, torch.ones(1, 1, dtype=torch.float16), label, there
    assert value(metrics.coco(1), found, (boxes, label, there.int()))["ap"] == 1


def test_errors_by_hand():
    a, b, c = [0.0, 0, 2, 2], [4.0, 4, 6, 6], [8.0, 8, 9, 9]
    there = torch.tensor([[True, True, True]])
    found = torch.tensor([[a, b, c]]), torch.ones(1, 3), torch.tensor([[0, 1, 2]]), there
    true = torch.tensor([[a, b]]), torch.tensor([[0, 0]]), there[:, :2]
    rates = value(metrics.detection_errors(), found, true)
    assert {name: round(x.item(), 6) for name, x in rates.items()} == {
        "localization": round(1 - 4 / 5, 6), "classification": 0.5, "detection": round(1 - 2 / 5, 6),
    }  # fmt: skip
    low = value(metrics.detection_errors(score_threshold=1.5), found, true)
    assert low["localization"] == low["detection"] == 1
    assert low["classification"].isnan()


@pytest.mark.parametrize(("found", "true"), [(0, 0), (0, 1), (1, 0)])
def test_tensors_of_no_boxes(found, true):
    """Not padded, where an image, or all of them, has none."""
    box, label = torch.tensor([[[0.0, 0, 2, 2]]]), torch.zeros(1, 1).long()
    outputs = box[:, :found], torch.ones(1, found), label[:, :found], torch.ones(1, found).bool()
    targets = box[:, :true], label[:, :true], torch.ones(1, true).bool()
    rates = value(metrics.detection_errors(), outputs, targets)
    assert rates["detection"].nan_to_num(7.0) == (1 if found or true else 7)
    assert value(metrics.coco(1), outputs, targets)["ap"].nan_to_num(7.0) == (0 if true else 7)


def test_a_target_whose_best_box_is_taken_has_a_second_choice():
    found = torch.tensor([[[0.0, 0, 10, 10], [0.0, 0, 10, 7]]]), torch.ones(1, 2), torch.zeros(1, 2).long()
    true = torch.tensor([[[0.0, 0, 10, 9], [0.0, 0, 10, 11]]]), torch.zeros(1, 2).long(), torch.ones(1, 2).bool()
    rates = value(metrics.detection_errors(), (*found, torch.ones(1, 2).bool()), true)
    assert rates["detection"] == 0


def test_refuses():
    found, true = scene(0, 2, 1, 3, 2)
    with pytest.raises(ValueError, match=r"iou_threshold must be in \(0, 1\], got 0"):
        metrics.detection_errors(0)
    with pytest.raises(ValueError, match="num_classes must be an integer of at least 1, got 0"):
        metrics.coco(0)
    with pytest.raises(TypeError, match="outputs must be a tuple or dict of boxes, scores, labels, mask, got Tensor"):
        value(metrics.coco(1), found[0], true)
    with pytest.raises(ValueError, match="targets must have boxes, labels, mask, got none of labels, mask"):
        value(metrics.coco(1), found, {"boxes": true["boxes"]})
    with pytest.raises(ValueError, match=r"targets: labels must have shape \(2, 2\), got \(2, 1\)"):
        value(metrics.coco(1), found, {**true, "labels": true["labels"][:, :1]})
