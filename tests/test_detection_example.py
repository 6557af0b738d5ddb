"""The example of detection: it runs, resumes, reads folders; its average precision by hand; the picture it leaves."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from holofunc import data, models, plots, random
from holofunc.models import Detections, Targets

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("train_detection", ROOT / "examples/train_detection.py")
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)


def test_a_smoke_run_and_its_continuation(tmp_path, capsys):
    options = ["--smoke", "--size", "64", "--out", str(tmp_path)]
    assert 0 <= example.main(options) <= 1
    assert {"curves.png", "detections.png", "history.csv", "checkpoints"} <= {p.name for p in tmp_path.iterdir()}
    first = capsys.readouterr().out
    assert "mAP50" in first
    example.main([*options, "--epochs", "2", "--resume"])
    steps = [line.split(",")[0] for line in (tmp_path / "history.csv").read_text().splitlines()]
    assert steps[-1] == "4"


def test_a_folder_in_its_place(tmp_path, monkeypatch):
    for name in ("train", "val"):
        (tmp_path / "images" / name).mkdir(parents=True)
        images = [{"id": i, "file_name": f"{i}.png", "width": 40, "height": 40} for i in range(16)]
        boxes = [
            {"id": i, "image_id": i, "category_id": 5, "bbox": [i, 5, 12 + i % 3, 9 + i % 5], "iscrowd": 0}
            for i in range(16)
        ]
        content = {"images": images, "annotations": boxes, "categories": [{"id": 5, "name": "box"}]}
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / f"annotations/instances_{name}.json").write_text(json.dumps(content))
        for image in images:
            Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "images" / name / image["file_name"])
    monkeypatch.setattr(example, "FULL", example.SMALL)
    out = tmp_path / "out"
    assert 0 <= example.main(["--smoke", "--size", "32", "--data", f"coco:{tmp_path}", "--out", str(out)]) <= 1
    with pytest.raises(ValueError, match="data must be coco:PATH or voc:PATH, got 'folder:x'"):
        example.main(["--data", "folder:x", "--out", str(out)])


def found(*rows):
    """One image's detections: (box, score, label)."""
    boxes, scores, labels = (torch.tensor([list(part)]) for part in zip(*rows, strict=True))
    return Detections(boxes, scores, labels, torch.ones_like(labels, dtype=torch.bool))


LEFT, RIGHT = [0.0, 0.0, 0.4, 0.4], [0.5, 0.5, 0.9, 0.9]


def precision_of(detections, truth):
    metric = example.average_precision(models.yolov2(2), "ab")
    return {n: float(v) for n, v in metric.compute({"found": detections, "truth": truth}).items()}


def test_average_precision_by_hand():
    truth = Targets(torch.tensor([[LEFT, RIGHT]]), torch.tensor([[0, 0]]), torch.tensor([[True, True]]))
    both = found((LEFT, 0.9, 0), (RIGHT, 0.8, 0))
    assert precision_of(both, truth) == {"mAP50": 1.0, "AP a": 1.0}
    twice = found((LEFT, 0.9, 0), (LEFT, 0.8, 0), (RIGHT, 0.7, 0))  # right, wrong, right: 1/1 and 2/3
    assert precision_of(twice, truth)["AP a"] == pytest.approx((1 + 2 / 3) / 2)
    assert precision_of(found((LEFT, 0.9, 1)), truth)["mAP50"] == 0
    wrong_first = found(([0.0, 0.5, 0.3, 0.9], 0.95, 0), (LEFT, 0.9, 0), (RIGHT, 0.8, 0))  # 1/2, 2/3: an envelope
    assert precision_of(wrong_first, truth)["AP a"] == pytest.approx(2 / 3)


def test_padded_rows_of_a_batch_do_not_count():
    model = models.yolov2(2, layout=[(8, 0), (8, 0)], head_channels=8, stem_channels=8)
    metric = example.average_precision(model, "ab")
    out = random.normal(random.key(0), (2, 5 * 7, 2, 2))
    truth = Targets(torch.tensor([[LEFT], [RIGHT]]), torch.tensor([[0], [1]]), torch.ones(2, 1, dtype=torch.bool))
    state = metric.update(metric.init(), out, truth, weights=torch.tensor([1.0, 0.0]))
    assert state["truth"].mask.tolist() == [[True], [False]]
    assert not state["found"].mask[1].any()
    assert metric.merge(state, state)["truth"].boxes.shape == (4, 1, 4)


def test_pictures_with_boxes():
    images, targets = data.canvases(random.key(0), 3, size=32)
    detections = Detections(targets.boxes, targets.mask.float(), targets.labels, targets.mask)
    figure = plots.detections(images, detections, targets, class_names="0123456789", columns=3)
    count = int(targets.mask.sum())
    assert sum(len(axes.patches) for axes in figure.axes) == 2 * count
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert texts == [f"{int(label)} 1.00" for label in targets.labels[targets.mask]]
    x, y = figure.axes[0].patches[0].get_xy()
    assert (x, y) == pytest.approx(tuple(targets.boxes[0, 0, :2].mul(32).sub(0.5).tolist()))
    with pytest.raises(ValueError, match="truth must be of 3 images, got 2"):
        plots.detections(images, truth=Targets(*(part[:2] for part in targets)))
