"""The examples of detection, segmentation and recognition: they run, go on where they ended, and read folders."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from holofunc import data, models, plots, random
from holofunc.models import Detections

ROOT = Path(__file__).parents[1]


def example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"examples/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


detection, segmentation, ocr = (example(f"train_{name}") for name in ("detection", "segmentation", "ocr"))
SMOKE = {detection: ["--size", "64"], segmentation: [], ocr: []}
MEASURED = {detection: "box/ap50", segmentation: "pixels/mean_iou", ocr: "error_rate"}


@pytest.mark.parametrize("module", SMOKE, ids=lambda module: module.__name__)
def test_a_smoke_run_and_its_continuation(module, tmp_path, capsys):
    options = ["--smoke", *SMOKE[module], "--out", str(tmp_path)]
    first = module.main(options)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("checkpoints", "history.csv", "curves.png", "predictions.png")
    }
    printed = capsys.readouterr().out
    assert str(tmp_path) in printed
    assert f"val/{MEASURED[module]}" in (tmp_path / "history.csv").read_text().splitlines()[0]
    steps = last_step(tmp_path)
    assert module.main(options) == first  # the run was over
    module.main([*options, "--epochs", "2"])
    assert last_step(tmp_path) == 2 * steps


def last_step(folder):
    return int((folder / "history.csv").read_text().splitlines()[-1].split(",")[0])


def test_detection_with_and_without_mosaic(tmp_path, capsys):
    options = ["--smoke", "--size", "64", "--images", "16", "--augment", "none", "mosaic", "--out", str(tmp_path)]
    found = detection.main(options)
    assert list(found) == ["none", "mosaic"]
    assert {path.name for path in tmp_path.iterdir()} == set(found)
    table = capsys.readouterr().out.splitlines()[-3:]
    assert table[0].split() == ["augment", "AP50", "AP", "s"]
    assert [line.split()[0] for line in table[1:]] == list(found)


# --- folders -----------------------------------------------------------------------------------------------------


@pytest.fixture
def coco(tmp_path):
    """Sixteen images with a rectangle each, its box and its outline."""
    for name in ("train", "val"):
        (tmp_path / "images" / name).mkdir(parents=True)
        images = [{"id": i, "file_name": f"{i}.png", "width": 40, "height": 40} for i in range(16)]
        boxes = [
            {"id": i, "image_id": i, "category_id": 5, "bbox": [x, y, w, h], "iscrowd": 0,
             "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]}
            for i, (x, y, w, h) in enumerate((i, 5, 12 + i % 3, 9 + i % 5) for i in range(16))
        ]  # fmt: skip
        content = {"images": images, "annotations": boxes, "categories": [{"id": 5, "name": "box"}]}
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / f"annotations/instances_{name}.json").write_text(json.dumps(content))
        for image in images:
            Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "images" / name / image["file_name"])
    return tmp_path


@pytest.mark.parametrize("module", [detection, segmentation], ids=lambda module: module.__name__)
def test_a_folder_in_its_place(module, coco, monkeypatch):
    monkeypatch.setattr(module, "FULL", module.SMALL)
    out = coco / "out"
    found = module.main(["--smoke", "--size", "32", "--data", f"coco:{coco}", "--out", str(out)])
    assert 0 <= (found["none"] if module is detection else found) <= 1
    with pytest.raises(ValueError, match=r"data must be .*coco:PATH.*, got 'folder:x'"):
        module.main(["--data", "folder:x", "--out", str(out)])


def test_a_folder_of_lines(tmp_path):
    codec = data.CTCCodec("abc")
    for name, seed in (("train", 0), ("val", 1)):
        (tmp_path / name).mkdir()
        images, texts = data.draw_text_lines(random.key(seed), 32, codec.alphabet, length=(1, 3), size=(32, 64))
        for i, image in enumerate(images):
            Image.fromarray(image[0].numpy()).save(tmp_path / name / f"{i}.png")
        (tmp_path / name / "labels.txt").write_text("".join(f"{i}.png\t{text}\n" for i, text in enumerate(texts)))
    out = tmp_path / "out"
    assert ocr.main(["--smoke", "--data", f"text:{tmp_path}", "--out", str(out)]) >= 0
    with pytest.raises(ValueError, match="data must be text:PATH, got 'folder:x'"):
        ocr.main(["--data", "folder:x", "--out", str(out)])


# --- pictures ----------------------------------------------------------------------------------------------------


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


def test_what_a_decoding_model_finds_is_what_its_detector_decodes():
    """It is what the example evaluates."""
    model = models.yolov2(2, layout=[(8, 0), (8, 0)], head_channels=8, stem_channels=8)
    params, buffers = model.init(random.key(0))
    x = random.normal(random.key(1), (2, 3, 16, 16))
    found, _ = model.decoding(max_detections=4).apply(params, buffers, x)
    expected = model.decode(model.apply(params, buffers, x)[0], max_detections=4)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
