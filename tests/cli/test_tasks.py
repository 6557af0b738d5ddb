"""Detection, segmentation and recognition from the command line: on folders, and on the sets that are drawn."""

import csv
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from holofunc import checkpoint, config, data, metrics, random
from holofunc.cli import job, main, runs
from holofunc.models.exporting import metadata

SIZE = 32


@pytest.fixture(scope="session")
def shapes():
    """Twelve images of shapes, their masks and boxes."""
    return data.draw_shapes(random.key(0), 12, size=SIZE, most=2)


def save(tensor, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = tensor.numpy().astype(np.uint8)
    Image.fromarray(array.transpose(1, 2, 0) if array.ndim == 3 else array).save(path)


@pytest.fixture(scope="session")
def coco(shapes, tmp_path_factory):
    """The images in COCO's layout, the first one with a crowd."""
    root = tmp_path_factory.mktemp("coco")
    for split in ("train", "val"):
        images, annotations = [], []
        for i, image in enumerate(shapes.images):
            save(image, root / split / f"{i}.png")
            images.append({"id": i, "file_name": f"{i}.png", "width": SIZE, "height": SIZE})
            for box, label in zip(shapes.boxes[i][shapes.present[i]], shapes.labels[i], strict=False):
                x1, y1, x2, y2 = (box * SIZE).tolist()
                outline = [x1, y1, x2, y1, x2, y2, x1, y2]
                about = {"image_id": i, "category_id": 3 + int(label), "iscrowd": int(not annotations)}
                annotations.append({**about, "bbox": [x1, y1, x2 - x1, y2 - y1], "segmentation": [outline]})
        categories = [{"id": 3 + i, "name": name} for i, name in enumerate(data.SHAPES)]
        (root / "annotations").mkdir(exist_ok=True)
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="session")
def masks(shapes, tmp_path_factory):
    root = tmp_path_factory.mktemp("masks")
    for i, (image, mask) in enumerate(zip(shapes.images, shapes.masks, strict=True)):
        save(image, root / f"images/{i:02}.jpg")
        save(torch.where(mask == 4, 255, mask), root / f"masks/{i:02}.png")
    return root


@pytest.fixture(scope="session")
def lines(tmp_path_factory):
    root = tmp_path_factory.mktemp("lines")
    images, texts = data.draw_text_lines(random.key(0), 12, "abc", length=(1, 3), size=(32, 40))
    for i, image in enumerate(images):
        save(image[0], root / f"{i}.png")
    (root / "labels.txt").write_text("".join(f"{i}.png\t{text}\n" for i, text in enumerate(texts)))
    return root


SMALL = {
    "detection": [
        "layout=[[8, 0], [8, 0], [8, 1], [8, 1]]",
        "stem_channels=4",
        "head_channels=8",
        "passthrough_ratio=4",
    ],
    "segmentation": ["layout=[4, 8]"],
    "recognition": [],
}


def options(task, out, *more):
    model = [word for option in SMALL[task] for word in ("--model-options", option)]
    common = ["--batch-size", "4", "--epochs", "1", "--log-every", "2", "--device", "cpu", "--no-compile"]
    return ["train", "--task", task, "--image-size", str(SIZE), *model, *common, "--out", str(out), *map(str, more)]


SLOW = pytest.mark.slow
CASES = [
    pytest.param("detection", "canvases", "val/coco/ap50", marks=SLOW),
    pytest.param("detection", "shapes", "val/coco/ap50", marks=SLOW),
    ("detection", "coco", "val/coco/ap50"),
    pytest.param("segmentation", "shapes", "val/mean_iou", marks=SLOW),
    ("segmentation", "masks", "val/mean_iou"),
    pytest.param("segmentation", "coco", "val/mean_iou", marks=SLOW),
    pytest.param("recognition", "lines", "val/error_rate", marks=SLOW),
    ("recognition", "text", "val/error_rate"),
]


@pytest.mark.parametrize(("task", "kind", "measured"), CASES)
def test_every_task_trains_is_measured_and_explained(task, kind, measured, tmp_path, capsys, request):
    folder = {"coco": "coco", "masks": "masks", "text": "lines"}.get(kind)
    given = f"{kind}:{request.getfixturevalue(folder)}" if folder else kind
    more = [] if folder else ["--images", "12"]
    out = tmp_path / "run"
    assert main(options(task, out, "--data", given, *more)) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert {"curves.png", "predictions.png", "config.toml", "history.csv"} <= {path.name for path in out.iterdir()}
    with (out / "history.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    assert 0 <= float(last[measured]) <= 20
    assert np.isfinite(float(last["val/loss"]))
    assert re.search(r"on \d+ held-out images after \d steps", said)

    assert main(["evaluate", str(out)]) == 0
    values = dict(line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:-1])
    assert float(values[measured.removeprefix("val/")]) == pytest.approx(float(last[measured]), abs=1e-3)
    assert len([name for name in values if name.startswith("coco/")]) == (12 if task == "detection" else 0)

    assert main(["explain", str(out), "--count", "3"]) == 0
    with (out / "explain.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["index"]) for row in rows] == list(range(len(rows)))
    assert all(np.isfinite(float(row["loss"])) for row in rows)
    assert ("file" in rows[0]) == bool(folder)


def test_anchors_are_those_of_the_training_set(coco, tmp_path):
    assert main(options("detection", tmp_path, "--data", f"coco:{coco}", "--check")) == 0
    settings = job.TASKS["detection"].settled(config.Config(task="detection", data=f"coco:{coco}", image_size=SIZE))
    settings, source = job.open_data(settings, "train")
    found = job.TASKS["detection"].prepared(settings, source).model_options["anchors"]
    assert torch.tensor(found).shape == (5, 2)
    assert torch.allclose(torch.tensor(found), data.anchors(source.boxes, 5, key=random.key(0)))


def test_crowds_are_neither_missed_nor_found(coco):
    settings = job.TASKS["detection"].settled(config.Config(task="detection", data=f"coco:{coco}", image_size=SIZE))
    _, source = job.open_data(settings, "test")
    _, targets = next(iter(source.batches(12)))
    assert targets["crowd"].sum() == 1
    found = targets["boxes"], targets["mask"].float(), targets["labels"], targets["mask"]
    metric = metrics.coco(len(source.classes), image_size=(SIZE, SIZE))
    scores = metric.compute(metric.update(metric.init(), found, targets))
    assert scores["ap"] == pytest.approx(1.0)


@pytest.mark.slow
def test_a_run_on_boxes_goes_on_where_it_was(coco, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = ["--data", f"coco:{coco}", "--save-every", "1", "--keep", "9"]
    assert main(options("detection", whole, *more)) == 0
    assert main(options("detection", parts, *more)) == 0
    for step in checkpoint.steps(parts)[1:]:
        for file in (parts / f"step_{step:08}").iterdir():
            file.unlink()
        (parts / f"step_{step:08}").rmdir()
    assert main(["train", "--resume", "--out", str(parts)]) == 0
    one, other = (runs.trained(runs.stored(each), each, "latest")[1] for each in (whole, parts))
    assert all(torch.equal(one.params[name], other.params[name]) for name in one.params)


# --- pictures and tables -----------------------------------------------------------------------------------------


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.headings, self.links = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, text):
        if self.tags and self.tags[-1] == "h2":
            self.headings.append(text.strip())
            self.tags.append("text")


def test_explanation_is_one_page_with_a_picture_for_each_score(small, pictures, tmp_path, capsys):
    assert main([*small, "--lr", "0.1", "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    assert main(["explain", str(tmp_path), "--part", "training", "--count", "4"]) == 0
    said = dict(line.split() for line in capsys.readouterr().out.splitlines()[:-1])
    page = Page()
    page.feed((tmp_path / "explain.html").read_text())
    assert page.headings == ["loss", "el2n", "grad_norm", "entropy", "margin", "probability"]
    assert len(page.links) == 6
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    with (tmp_path / "explain.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 32
    assert said["samples"] == "32"
    assert all(row["label"] in row["file"] and str(pictures) in row["file"] for row in rows)
    right = [row["label"] == row["prediction"] for row in rows]
    assert sum(right) / 32 == pytest.approx(float(said["accuracy"]), abs=1e-3)
    evaluated = sum(float(row["loss"]) for row in rows) / 32
    assert evaluated == pytest.approx(float(said["loss/mean"]), abs=1e-3)


@pytest.mark.parametrize("suffix", ["pt2", pytest.param("onnx", marks=pytest.mark.slow)])
def test_exports_say_what_they_are_of_and_predict_by_it(small, pictures, tmp_path, suffix, capsys):
    assert main([*small, "--out", str(tmp_path)]) == 0
    assert main(["export", "--run", str(tmp_path), "--format", suffix]) == 0
    about = metadata(tmp_path / f"model.{suffix}")
    assert (about["task"], about["classes"], about["shape"]) == ("classification", ["bright", "dark"], [3, 8, 8])
    assert about["axes"] == {"images": ["batch", "channels", "height", "width"], "outputs": ["batch", "classes"]}
    assert about["mean"] == pytest.approx([0.485, 0.456, 0.406])
    capsys.readouterr()
    assert main(["predict", str(tmp_path / f"model.{suffix}"), str(pictures), "--batch-size", "32"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert main(["explain", str(tmp_path), "--count", "1", "--step", "best"]) == 0
    with (tmp_path / "explain.csv").open() as file:
        wanted = {f"{row['file']}: {row['prediction']} {float(row['confidence']):.1%}" for row in csv.DictReader(file)}
    assert len(told) == 40
    assert len(wanted) == 8
    assert wanted <= set(told)
    broken = tmp_path / "mixed/broken.jpg"
    broken.parent.mkdir()
    broken.write_bytes(b"<html>")
    (broken.parent / "whole.png").write_bytes((pictures / "dark/00.png").read_bytes())
    assert main(["predict", str(tmp_path / f"model.{suffix}"), str(broken.parent)]) == 1
    printed = capsys.readouterr()
    assert f"holofunc: error: cannot read image '{broken}'" in printed.err
    assert "whole.png: " in printed.out
    if suffix == "onnx":
        import onnx

        model = onnx.load(tmp_path / "model.onnx")
        dims = [each.type.tensor_type.shape.dim[0].dim_param for each in (model.graph.input[0], model.graph.output[0])]
        assert dims == ["batch", "batch"]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
@pytest.mark.parametrize("task", ["detection", "segmentation", "recognition"])
def test_every_task_is_exported_and_predicts(task, suffix, tmp_path, capsys):
    assert main(options(task, tmp_path, "--images", "12")) == 0
    assert main(["export", "--run", str(tmp_path), "--format", suffix]) == 0
    about = metadata(tmp_path / f"model.{suffix}")
    assert set(about["axes"]) - {"images"} == (
        {"boxes", "scores", "labels", "mask"} if task == "detection" else {"outputs"}
    )
    save(torch.zeros(3, 40, 50), tmp_path / "image.png")
    capsys.readouterr()
    assert main(["predict", str(tmp_path / f"model.{suffix}"), str(tmp_path / "image.png")]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'image.png'}: ")
    if suffix == "pt2":
        program = torch.export.load(tmp_path / "model.pt2").module()
        found = program(torch.zeros(5, *about["shape"]))
        assert [len(part) for part in found] == [5] * 4 if task == "detection" else 5 in found.shape[:2]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_every_task_compiles(task, tmp_path):
    assert main([*options(task, tmp_path, "--images", "12"), "--compile"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("task", ["detection", "segmentation", "recognition"])
def test_every_task_trains_in_half_precision(task, precision, tmp_path):
    assert main(options(task, tmp_path, "--images", "12", "--precision", precision)) == 0


# --- broken folders ----------------------------------------------------------------------------------------------


def copied(folder, to):
    for path in folder.rglob("*.*"):
        (to / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
        (to / path.relative_to(folder)).write_bytes(path.read_bytes())
    return to


def without_image(root):
    (root / "images/03.jpg").rename(root / "images/99.jpg")
    return r"images/99.jpg: there is no mask 99.png"


def other_size(root):
    save(torch.zeros(8, 9), root / "masks/03.png")
    return r"masks/03.png: the mask has 9x8 pixels, its image 32x32"


def in_colour(root):
    save(torch.zeros(3, SIZE, SIZE), root / "masks/03.png")
    return r"cannot read mask '.*masks/03.png': its pixels must be classes in one channel of 8 bits, got mode RGB"


def few_classes(root):
    (root / "classes.txt").write_text("ground\ndisc\n")
    return r"masks/\d\d.png: labels must be in \[0, 2\) or 255, got [23]"


@pytest.mark.parametrize("spoil", [without_image, other_size, in_colour, few_classes])
def test_broken_masks_are_named(masks, tmp_path, spoil, refused):
    root = copied(masks, tmp_path / "masks")
    wanted = spoil(root)
    assert re.search(wanted, refused(options("segmentation", tmp_path / "out", "--data", f"masks:{root}")))


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("20.png\tab", "labels.txt: line 13: image '20.png' is not in"),
        ("0.png", "labels.txt: line 13 must be the name of an image, a tab and its text, got '0.png'"),
        ("0.png\taaaaa", "line 13: the text 'aaaaa' of image '0.png' needs 36 pixels, got image_size=32"),
    ],
)
def test_broken_lines_are_named(lines, tmp_path, line, wanted, refused):
    root = copied(lines, tmp_path / "lines")
    with (root / "labels.txt").open("a") as file:
        file.write(line + "\n")
    assert wanted in refused(options("recognition", tmp_path / "out", "--data", f"text:{root}"))


def test_characters_that_are_not_in_the_alphabet(lines, tmp_path, refused):
    root = copied(lines, tmp_path / "lines")
    for part in ("train", "val"):
        copied(lines, root / part)
    (root / "val/labels.txt").write_text("0.png\tax\n")
    found = refused(options("recognition", tmp_path / "out", "--data", f"text:{root}"))
    assert "val/labels.txt: line 1: the text 'ax' of image '0.png' has characters of no alphabet: ['x']" in found


def test_broken_boxes_are_named(coco, tmp_path, refused):
    root = copied(coco, tmp_path / "coco")
    content = json.loads((root / "annotations/instances_train.json").read_text())
    content["annotations"][2]["bbox"][0] = 40
    (root / "annotations/instances_train.json").write_text(json.dumps(content))
    found = refused(options("detection", tmp_path / "out", "--data", f"coco:{root}"))
    assert re.search(
        r"instances_train.json: annotations\[2\] of image '\d+.png' has a bbox outside of the image", found
    )


def test_broken_images_are_listed_skipped_or_stop_the_run(masks, tmp_path, capsys):
    root = copied(masks, tmp_path / "masks")
    for name in ("00", "05"):
        (root / f"images/{name}.jpg").write_bytes(b"nothing")
    argv = options("segmentation", tmp_path / "out", "--data", f"masks:{root}")
    assert main([*argv, "--check"]) == 1
    first, second, count = capsys.readouterr().out.splitlines()
    assert "00.jpg" in first
    assert "05.jpg" in second
    assert count == f"masks:{root}: 2 images cannot be read"
    assert main(argv) == 2
    assert "cannot read image '" in capsys.readouterr().err
    with pytest.warns(UserWarning, match=r"others take the places of 2 images that cannot be read: .*00.jpg"):
        assert main([*argv, "--bad-images", "skip"]) == 0


def test_check_says_what_there_is(masks, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([*options("segmentation", out, "--data", f"masks:{masks}"), "--check"]) == 0
    assert capsys.readouterr().out == f"masks:{masks}: 10 and 2 images can be read\n"
    assert not out.exists()
