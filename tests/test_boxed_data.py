"""Boxes as data: padding, anchors, canvases, COCO and VOC folders, and what is wrong with broken ones."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from holofunc import data, models, random
from holofunc.data.coco_files import mask_of
from holofunc.ops.targets import Targets

EMPTY = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}


def one(*box, label=0):
    return {"boxes": torch.tensor([box]), "labels": torch.tensor([label])}


# --- padding -----------------------------------------------------------------------------------------------------


def test_targets_are_padded_with_zeros():
    found = data.pad_targets([one(0.1, 0.2, 0.3, 0.4, label=2), EMPTY, ([[0, 0, 1, 1]], [1])], 2, num_classes=3)
    assert isinstance(found, Targets)
    assert found.mask.tolist() == [[True, False], [False, False], [True, False]]
    assert found.labels.tolist() == [[2, 0], [0, 0], [1, 0]]
    torch.testing.assert_close(found.boxes[0], torch.tensor([[0.1, 0.2, 0.3, 0.4], [0, 0, 0, 0]]))
    assert (found.boxes.dtype, found.labels.dtype, found.mask.dtype) == (torch.float32, torch.int64, torch.bool)


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        ([EMPTY, one(0.1, 0.1, 1.5, 0.2)], ValueError, r"boxes must lie in \[0, 1\].*\(image 1, box 0\)"),
        (
            [one(0.5, 0.1, 0.2, 0.2)],
            ValueError,
            r"x1 <= x2 and y1 <= y2, got \[0.5, 0.1, 0.2, 0.2\] \(image 0, box 0\)",
        ),
        ([one(0.5, math.nan, 0.2, 0.2)], ValueError, r"boxes must be finite"),
        ([one(0.1, 0.1, 0.2, 0.2, label=7)], ValueError, r"labels must lie in \[0, 3\), got 7"),
        (
            [(torch.rand(3, 4), torch.zeros(3).long())],
            ValueError,
            "max_boxes=2 rows cannot hold the 3 boxes of image 0",
        ),
        ([(torch.rand(2, 4), torch.zeros(1).long())], ValueError, r"boxes and labels of image 0 must have shapes"),
        ([(torch.rand(1, 5), torch.zeros(1).long())], ValueError, r"boxes and labels of image 0 must have shapes"),
        ([(torch.rand(1, 4), torch.zeros(1))], TypeError, "labels of image 0 must be integers, got torch.float32"),
        ([torch.rand(1, 4)], TypeError, "the target of image 0 must hold boxes and labels, got Tensor"),
        ([{"boxes": torch.rand(1, 4)}], TypeError, "the target of image 0 must hold boxes and labels, got dict"),
    ],
)
def test_targets_that_are_refused(targets, error, message):
    with pytest.raises(error, match=message):
        data.pad_targets(targets, 2, num_classes=3)


def test_boxes_may_miss_the_image_by_their_rounding():
    rounded = torch.tensor([0.5, 0.5, 1.0, 1.0]).nextafter(torch.tensor(2.0))
    assert rounded[2] > 1
    assert data.pad_targets([one(*rounded.tolist())], 1).mask.all()
    with pytest.raises(ValueError, match=r"boxes must lie in \[0, 1\], .* got \[0.5, 0.5, 1.00002, 1.0\]"):
        data.pad_targets([one(0.5, 0.5, 1.00002, 1.0)], 1)


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="max_boxes must be an integer of at least 1, got 0"):
        data.pad_targets([EMPTY], 0)


def test_batches_of_boxes_come_in_any_position():
    images, targets = data.canvases(random.key(0), 10, size=32, max_digits=2)
    batches = data.Batches(
        data.Boxed(images, targets), 4, key=random.key(1), collate=data.collate_boxes(3, num_classes=10)
    )
    *_, last = batches.epoch(2)
    again = next(batches.epoch(2, start=2))
    assert last[1].boxes.shape == (2, 3, 4)
    assert torch.equal(last[1].boxes, again[1].boxes)
    order = batches.order(2)[8:]
    assert torch.equal(last[1].boxes[:, :2], targets.boxes[order])


def test_images_of_several_sizes_do_not_stack():
    samples = [(torch.zeros(3, 8, size), EMPTY) for size in (8, 9)]
    with pytest.raises(
        ValueError, match=r"images of a batch must have one shape, got .*: give the dataset an image_size"
    ):
        data.collate_boxes(2)(samples)


# --- anchors -----------------------------------------------------------------------------------------------------


def test_anchors_are_the_means_of_groups():
    sizes = torch.tensor([[0.1, 0.1], [0.1, 0.12], [0.4, 0.2], [0.42, 0.2], [0.3, 0.8], [0.3, 0.84]])
    boxes = torch.cat([torch.zeros(6, 2), sizes], 1)
    for seed in range(3):
        found = data.anchors(boxes, 3, key=random.key(seed))
        torch.testing.assert_close(found, torch.tensor([[0.1, 0.11], [0.41, 0.2], [0.3, 0.82]]))
    padded = Targets(torch.cat([boxes, torch.rand(2, 4)])[None], torch.zeros(1, 8).long(), (torch.arange(8) < 6)[None])
    torch.testing.assert_close(data.anchors(padded, 3, key=random.key(0)), found)
    assert data.anchor_iou(sizes, found).amax(1).min() > 0.9


def test_more_anchors_fit_better():
    _, targets = data.canvases(random.key(0), 60, size=48)
    sizes = targets.boxes[targets.mask][:, 2:] - targets.boxes[targets.mask][:, :2]
    fits = [data.anchor_iou(sizes, data.anchors(targets, n, key=random.key(1))).amax(1).mean() for n in (1, 3, 9)]
    assert fits[0] < fits[1] < fits[2]
    found = data.anchors(targets, 9, key=random.key(1))
    assert torch.equal(found, data.anchors(targets, 9, key=random.key(1)))
    assert models.yolov4(3, anchors=found.reshape(3, 3, 2)).head.anchors[0][0] == tuple(found[0].tolist())


@pytest.mark.parametrize(
    ("boxes", "count", "message"),
    [
        (torch.rand(4, 2), 2, r"boxes must have shape \(M, 4\), got \(4, 2\)"),
        (torch.zeros(4, 4), 1, "boxes must hold at least 1 with an area, one per anchor, got 0"),
        (torch.zeros(4, 4), 0, "count must be an integer of at least 1, got 0"),
    ],
)
def test_boxes_without_anchors(boxes, count, message):
    with pytest.raises(ValueError, match=message):
        data.anchors(boxes, count, key=random.key(0))


# --- canvases ----------------------------------------------------------------------------------------------------


def test_canvases_are_a_function_of_the_key():
    first, again, other = (data.canvases(random.key(seed), 20, size=64) for seed in (0, 0, 1))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1].boxes, again[1].boxes)
    assert not torch.equal(first[0], other[0])
    assert first[0].min() >= 0
    assert first[0].max() <= 1


def test_digits_are_where_boxes_are():
    images, targets = data.canvases(random.key(0), 100, size=64)
    models.yolov2(10).check_targets(targets)
    counts = targets.mask.sum(1)
    assert set(counts.tolist()) == {0, 1, 2, 3, 4}
    inside = torch.zeros_like(images[:, 0], dtype=torch.bool)
    for i, j in targets.mask.nonzero().tolist():
        x1, y1, x2, y2 = (targets.boxes[i, j] * 64).round().int().tolist()
        inside[i, y1:y2, x1:x2] = True
        assert images[i, 0, y1:y2, x1:x2].max() > 0.5
    assert images[:, 0][~inside].max() <= 0.5
    assert images[:, 0][inside].mean() > images[:, 0][~inside].mean() + 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count must be an integer of at least 1, got 0"),
        ({"size": 16}, "size must be an integer of at least 32, got 16"),
        ({"scale": (0.5, 0.2)}, r"scale must be two numbers, .* got \(0.5, 0.2\)"),
        ({"split": "val"}, "split must be 'train', 'test' or 'all'"),
    ],
)
def test_canvases_refuse(options, message):
    with pytest.raises(ValueError, match=message):
        data.canvases(random.key(0), **{"count": 2, **options})


# --- COCO --------------------------------------------------------------------------------------------------------

RLE = {"size": [20, 40], "counts": [25, 10, 765]}


def coco_content():
    return {
        "images": [
            {"id": 9, "file_name": "a.png", "width": 40, "height": 20},
            {"id": 4, "file_name": "b.png", "width": 30, "height": 30},
        ],
        "categories": [
            {"id": 18, "name": "dog", "supercategory": "animal"},
            {"id": 3, "name": "car", "supercategory": "vehicle"},
            {"id": 17, "name": "cat", "supercategory": "animal"},
        ],
        "annotations": [
            {"id": 1, "image_id": 9, "category_id": 18, "bbox": [4, 5, 16, 10], "iscrowd": 0,
             "segmentation": [[4, 5, 20, 5, 20, 15, 4, 15]]},
            {"id": 2, "image_id": 9, "category_id": 3, "bbox": [30, 0, 10.5, 20], "iscrowd": 0, "segmentation": RLE},
            {"id": 3, "image_id": 9, "category_id": 17, "bbox": [0, 0, 40, 20], "iscrowd": 1, "segmentation": RLE},
            {"id": 4, "image_id": 9, "category_id": 17, "bbox": [3, 3, 0, 5], "iscrowd": 0, "segmentation": []},
        ],
    }  # fmt: skip


def write_coco(root, content):
    (root / "annotations").mkdir()
    for name in ("train2017", "val2017"):
        (root / name).mkdir()
        (root / f"annotations/instances_{name}.json").write_text(json.dumps(content))
        for image in ("a.png", "b.png"):
            size = (40, 20) if image == "a.png" else (30, 30)
            Image.fromarray(np.full((size[1], size[0], 3), 99, np.uint8)).save(root / name / image)


def test_a_coco_folder(tmp_path):
    write_coco(tmp_path, coco_content())
    found = data.open_boxes(f"coco:{tmp_path}", image_size=16)
    assert found.classes == ("car", "cat", "dog")  # by number
    assert len(found) == 2
    image, target = found[0]
    assert (image.shape, image.dtype) == ((3, 16, 16), torch.uint8)
    torch.testing.assert_close(target["boxes"], torch.tensor([[0.1, 0.25, 0.5, 0.75], [0.75, 0, 1, 1]]))  # cut off
    assert target["labels"].tolist() == [2, 0]
    assert found.records[0].ignored.tolist() == [False, False, True]
    assert found[1][1]["boxes"].shape == (0, 4)
    assert found.max_boxes == 2
    assert found.sizes().shape == (2, 4)
    images, targets = next(iter(data.open_boxes(f"coco:{tmp_path}", split="test", image_size=16).batches(2)))
    assert images.shape == (2, 3, 16, 16)
    assert targets.mask.tolist() == [[True, True], [False, False]]


def test_a_coco_file_as_other_programs_write_it(tmp_path):
    content = changed("images", 0, "width", value=40.0)
    content["categories"][0]["name"] = "Dalmatiner ä"
    write_coco(tmp_path, content)
    text = json.dumps(content, ensure_ascii=False)
    (tmp_path / "annotations/instances_train2017.json").write_text(text, encoding="utf-8-sig")
    assert data.coco(tmp_path).classes == ("car", "cat", "Dalmatiner ä")
    assert data.coco(tmp_path)[0][0].shape == (3, 20, 40)


def test_parents_of_categories_are_classes(tmp_path):
    write_coco(tmp_path, coco_content())
    found = data.coco(tmp_path / "annotations/instances_val2017.json", by="supercategory")
    assert found.classes == ("vehicle", "animal")
    assert found[0][1]["labels"].tolist() == [1, 0]
    assert found[0][0].shape == (3, 20, 40)


def test_outlines_are_decoded_when_asked_for(tmp_path):
    write_coco(tmp_path, coco_content())
    found = data.masks(data.coco(tmp_path).records[0])
    assert found.shape == (3, 20, 40)
    assert found[0].sum() == 16 * 10
    assert found[0, 5:15, 4:20].all()
    assert found[1].nonzero().tolist() == [[row, 1] for row in range(5, 15)]  # columns first


def test_polygons_hold_the_pixels_whose_centres_they_hold():
    assert mask_of([[0.6, 0.0, 2.4, 0.0, 2.4, 9.0, 0.6, 9.0]], 3, 4).int().tolist() == [[0, 1, 0, 0]] * 3
    triangle = mask_of([[0, 0, 4, 0, 0, 4]], 4, 4)
    assert triangle.int().tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    two = mask_of([[0, 0, 2, 0, 2, 2, 0, 2], [1, 1, 4, 1, 4, 4, 1, 4]], 4, 4)
    assert two.sum() == 4 + 9 - 1
    ring = [0, 0, 4, 0, 4, 4, 0, 4, 0, 0, 1, 1, 1, 3, 3, 3, 3, 1, 1, 1]
    assert mask_of([ring], 4, 4).sum() == 16 - 4
    assert not mask_of([[1, 1], [1, 1, 3, 3]], 4, 4).any()  # a point and a line
    assert mask_of([[-9, -9, 9, -9, 9, 9, -9, 9]], 4, 4).all()


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of pycocotools
def test_polygons_are_those_of_cocos_own_program():
    programs = pytest.importorskip("pycocotools.mask")
    for seed in range(5):
        angles = torch.rand(9, generator=torch.Generator().manual_seed(seed)).sort().values * 2 * math.pi
        points = torch.stack([20 + 15 * angles.cos(), 25 + 18 * angles.sin()], 1).flatten().tolist()
        theirs = torch.from_numpy(programs.decode(programs.frPyObjects([points], 50, 40))[..., 0].astype(bool))
        ours = mask_of([points], 50, 40)
        assert (ours != theirs).sum() <= 0.05 * theirs.sum()  # it rounds corners to fifths of a pixel


def test_run_lengths_as_text():
    """Written by hand: 5 is "5", 40 needs two characters, and from the fourth on differences are."""
    assert torch.equal(
        mask_of({"size": [5, 10], "counts": "5X15"}, 5, 10), mask_of({"size": [5, 10], "counts": [5, 40, 5]}, 5, 10)
    )
    mask = mask_of({"size": [4, 4], "counts": [2, 3, 4, 5, 2]}, 4, 4)
    assert torch.equal(mask_of({"size": [4, 4], "counts": "2342N"}, 4, 4), mask)  # 5 - 3 = 2, 2 - 4 = -2


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (40, 30)])
def test_run_lengths_are_those_of_cocos_own_program(size):
    programs = pytest.importorskip("pycocotools.mask")
    for share in (0.0, 0.1, 0.5, 1.0):
        mask = torch.rand(size, generator=torch.Generator().manual_seed(0)) < share
        written = programs.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
        assert torch.equal(mask_of(written, *size), mask)
        assert torch.equal(mask_of({**written, "counts": written["counts"].decode()}, *size), mask)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"size": [4, 5], "counts": [20]}, r"run lengths must have size \[4, 4\], got \[4, 5\]"),
        ({"size": None, "counts": [16]}, r"run lengths must have size \[4, 4\], got None"),
        ({"size": [4, 4], "counts": [3, 4]}, r"run lengths must add up to 4 x 4, got 7"),
        ([[1, 2, 3]], r"an outline must be polygons \[x, y, x, y, ...\], or run lengths"),
        ("box", "an outline must be polygons"),
        ([None], "an outline must be polygons"),
        ([[1, 1, 2, 2, 3, "3"]], "an outline must be polygons"),
        ({"size": [4, 4], "counts": None}, "run lengths must be a list of integers or text, got None"),
        ({"size": [4, 4], "counts": [16.0]}, r"run lengths must be a list of integers or text, got \[16.0\]"),
    ],
)
def test_outlines_that_are_none(shape, message):
    with pytest.raises(ValueError, match=message):
        mask_of(shape, 4, 4)


def changed(*path, value):
    content = coco_content()
    place = content
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed("annotations", 1, "category_id", value=99), r"annotations\[1\] of image 'a.png' has the category 99"),
        (changed("annotations", 0, "image_id", value=5), r"annotations\[0\] is of image 5, which is not there"),
        (changed("annotations", 1, "bbox", value=[1, 2, math.nan, 4]), r"annotations\[1\] of image 'a.png' must have a bbox"),
        (changed("annotations", 1, "bbox", value=[1, 2, 3]), r"annotations\[1\] of image 'a.png' must have a bbox of four"),
        (changed("annotations", 1, "bbox", value=[9, 2, -3, 4]), r"annotations\[1\] .* has a bbox of negative size"),
        (changed("annotations", 1, "bbox", value=[9, 2, 60, 4]), r"annotations\[1\] .* outside of the image, .* 40x20"),
        (changed("images", 1, "file_name", value="c.png"), r"images\[1\], 'c.png', is not in '.*train2017'"),
        (changed("images", 1, "width", value=0), r"images\[1\] must have a file_name, a width and a height"),
        (changed("categories", 1, "id", value=18), "categories must have different ids and names"),
        (changed("categories", 1, "name", value=None), r"categories\[1\] must have an integer id and a name"),
        (changed("images", value=None), "there is no list 'images' in it"),
        (changed("images", 1, "id", value=9), r"images\[1\] must have an id of its own, got"),
        (changed("images", 1, "id", value=None), r"images\[1\] must have an id of its own, got"),
        (changed("annotations", 0, "image_id", value=[9]), r"annotations\[0\] is of image \[9\], which is not there"),
        (changed("annotations", 1, "category_id", value={}), r"annotations\[1\] of image 'a.png' has the category {}"),
        (changed("annotations", 1, "iscrowd", value="no"), r"annotations\[1\] .* must have an iscrowd of 0 or 1, got 'no'"),
        ({**coco_content(), "images": [], "annotations": []}, "there are no images in it"),
    ],
)  # fmt: skip
def test_broken_coco(tmp_path, content, message):
    write_coco(tmp_path, content)
    with pytest.raises(ValueError, match=r"instances_train2017.json: .*" + message) as caught:
        data.coco(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_broken_outline_is_told_by_image_and_object(tmp_path):
    write_coco(tmp_path, changed("annotations", 1, "segmentation", value=[[1, 1, 5]]))
    with pytest.raises(ValueError, match=r"^image 'a.png', object \d: an outline must be polygons \[x, y"):
        data.masks(data.coco(tmp_path).records[0])


def test_coco_folders_that_are_none(tmp_path):
    with pytest.raises(ValueError, match=r"has no annotations/instances_train\*.json"):
        data.coco(tmp_path)
    write_coco(tmp_path, coco_content())
    (tmp_path / "annotations/instances_train2017.json").write_text("{")
    with pytest.raises(ValueError, match=r"instances_train2017.json: no JSON that can be read"):
        data.coco(tmp_path)
    with pytest.raises(ValueError, match="by must be 'name' or 'supercategory', got 'id'"):
        data.coco(tmp_path, by="id")
    with pytest.raises(ValueError, match="split must be 'train' or 'test', got 'val'"):
        data.coco(tmp_path, split="val")
    with pytest.raises(ValueError, match="data must be coco:PATH or voc:PATH, got 'cocoa'"):
        data.open_boxes("cocoa")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_images_of_any_mode_have_three_channels(tmp_path, mode):
    write_coco(tmp_path, coco_content())
    Image.new(mode, (40, 20)).save(tmp_path / "train2017/a.png")
    image, _ = data.coco(tmp_path)[0]
    assert (image.shape, image.dtype) == ((3, 20, 40), torch.uint8)


def test_images_that_are_not_what_is_written(tmp_path):
    write_coco(tmp_path, changed("images", 0, "width", value=41))
    with pytest.raises(ValueError, match=r"cannot read image '.*a.png': it has \(40, 20\) pixels, .* \(41, 20\)"):
        data.coco(tmp_path)[0]
    Image.fromarray(np.full((20, 41), 60000, np.uint16)).save(tmp_path / "train2017/a.png")
    with pytest.raises(ValueError, match=r"cannot read image '.*a.png': its pixels have more than 8 bits"):
        data.coco(tmp_path)[0]
    (tmp_path / "train2017/a.png").write_bytes(b"none")
    with pytest.raises(ValueError, match=r"cannot read image '.*a.png'"):
        data.coco(tmp_path)[0]
    Image.new("I;16", (41, 20), 60000).save(tmp_path / "train2017/a.png")
    with pytest.raises(ValueError, match=r"cannot read image '.*a.png': its pixels have more than 8 bits"):
        data.coco(tmp_path)[0]
    with pytest.raises(ValueError, match="image_size must be an integer of at least 1, got 0"):
        data.coco(tmp_path, image_size=0)


# --- VOC ---------------------------------------------------------------------------------------------------------

OBJECT = "<object><name>{}</name><difficult>{}</difficult><bndbox>{}</bndbox></object>"


def bndbox(*corners):
    return "".join(f"<{n}>{v}</{n}>" for n, v in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True))


def write_voc(root, *objects, size=(40, 20), name="a.png"):
    base = root / "VOC2012"
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (base / folder).mkdir(parents=True)
    for part in ("train", "val"):
        (base / f"ImageSets/Main/{part}.txt").write_text("a\n")
    Image.new("RGB", (40, 20)).save(base / "JPEGImages/a.png")
    sides = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
    text = f"<annotation><filename>{name}</filename>{sides}{''.join(objects)}</annotation>"
    (base / "Annotations/a.xml").write_text(text)


def test_a_voc_folder(tmp_path):
    hard = OBJECT.format("cat", 1, bndbox(1, 1, 5, 5))
    write_voc(tmp_path, OBJECT.format("dog", 0, bndbox(5, 6, 20, 15)), hard)
    found = data.open_boxes(f"voc:{tmp_path}", image_size=8)
    assert found.classes[11] == "dog"
    image, target = found[0]
    assert image.shape == (3, 8, 8)
    torch.testing.assert_close(target["boxes"], torch.tensor([[0.1, 0.25, 0.5, 0.75]]))  # counted from 1, inclusive
    assert target["labels"].tolist() == [11]
    assert found.records[0].ignored.tolist() == [False, True]
    assert data.voc(tmp_path / "VOC2012", split="test", classes=["cat", "dog"])[0][1]["labels"].tolist() == [1]


def test_a_voc_image_without_objects(tmp_path):
    write_voc(tmp_path)
    assert data.voc(tmp_path)[0][1]["boxes"].shape == (0, 4)


@pytest.mark.parametrize(
    ("objects", "options", "message"),
    [
        ([OBJECT.format("dgo", 0, bndbox(1, 1, 5, 5))], {}, r"object\[0\] of image 'a.png' has the class 'dgo', which"),
        ([OBJECT.format("dog", 0, bndbox(1, "x", 5, 5))], {}, r"object\[0\] .* must have a number at bndbox/ymin, got 'x'"),
        ([OBJECT.format("dog", 0, bndbox(9, 1, 5, 5))], {}, r"object\[0\] .* has a bndbox with its corners swapped"),
        ([OBJECT.format("dog", 0, bndbox(1, 1, 5, 25))], {}, r"object\[0\] .* outside of the image, .* in 40x20 pixels"),
        ([], {"size": ("nan", 20)}, r"image 'a.png' must have a number at size/width, got 'nan'"),
        ([], {"size": (0, 20)}, r"image 'a.png' must have a size of at least 1x1, got 0x20"),
        ([], {"name": "b.png"}, r"its image 'b.png' is not in '.*JPEGImages'"),
        (["<"], {}, "no XML that can be read"),
    ],
)  # fmt: skip
def test_broken_voc(tmp_path, objects, options, message):
    write_voc(tmp_path, *objects, **options)
    with pytest.raises(ValueError, match=r"a.xml: .*" + message) as caught:
        data.voc(tmp_path)
    assert "\n" not in str(caught.value)


def test_voc_folders_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="has no Annotations and JPEGImages"):
        data.voc(tmp_path)
    write_voc(tmp_path)
    (tmp_path / "VOC2012/ImageSets/Main/train.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"train.txt: there are no images in it"):
        data.voc(tmp_path)
    (tmp_path / "VOC2012/ImageSets/Main/train.txt").unlink()
    with pytest.raises(ValueError, match=r"has no ImageSets/Main/train.txt"):
        data.voc(tmp_path)
    with pytest.raises(ValueError, match="split must be 'train' or 'test', got 'val'"):
        data.voc(tmp_path, split="val")
