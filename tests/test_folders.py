"""Folders of masks and of lines of text: what is read, and how they are divided."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from holofunc import data


def save(array, path, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(array, np.uint8))
    if mode == "P":
        image = image.convert("P")
        image.putdata(np.asarray(array).flatten().tolist())
    image.save(path)


@pytest.fixture
def masked(tmp_path):
    for i in range(6):
        save(np.full((6, 8, 3), i), tmp_path / f"images/{i}.png")
        mask = np.zeros((6, 8))
        mask[:, 4:] = 1 + i % 2
        mask[0, 0] = 255
        save(mask, tmp_path / f"masks/{i}.png")
    return tmp_path


def test_masks_are_classes_and_what_does_not_count(masked):
    found = data.open_masks(f"masks:{masked}")
    assert (len(found), found.classes) == (5, ("0", "1", "2"))
    image, mask = found[1]
    assert image.shape == (3, 6, 8)
    assert image.eq(1).all()
    assert mask[0, 0] == -100
    assert mask[:, 4:].eq(2).all()
    assert mask[1:, :4].eq(0).all()


def test_a_fifth_is_held_out_unless_the_folder_says_which(masked, tmp_path_factory):
    held_out = data.open_masks(f"masks:{masked}", split="test")
    assert [path.name for path in held_out.images] == ["4.png"]
    root = tmp_path_factory.mktemp("parts")
    for part in ("train", "val"):
        for kind in ("images", "masks"):
            (root / part).mkdir(exist_ok=True)
            (root / part / kind).symlink_to(masked / kind)
    assert [len(data.open_masks(f"masks:{root}", split=split)) for split in ("train", "test")] == [6, 6]


def test_images_and_masks_are_stretched_alike(masked):
    (masked / "classes.txt").write_text("ground\nleft\nright\n\n")
    found = data.open_masks(f"masks:{masked}", image_size=4)
    image, mask = found[0]
    assert (image.shape, mask.shape) == ((3, 4, 4), (4, 4))
    assert mask[:, 2:].eq(1).all()
    assert found.classes == ("ground", "left", "right")


def test_masks_of_0_and_255_are_no_two_classes(masked):
    for path in (masked / "masks").iterdir():
        save(np.where(np.arange(48).reshape(6, 8) < 9, 255, 0), path)
    with pytest.raises(ValueError, match=r"masks/0.png and all other masks hold nothing but 0 and 255, .* as 0 and 1"):
        data.open_masks(f"masks:{masked}", classes=["ground", "leaf"])


def test_outlines_of_more_categories_than_a_byte_has(tmp_path):
    save(np.zeros((6, 8, 3)), tmp_path / "train/a.png")
    squares = [(255, 0), (256, 2), (300, 4), (7, 6)]
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 8, "height": 6}],
        "categories": [{"id": i, "name": f"c{i}"} for i in range(1, 400)],
        "annotations": [
            {"image_id": 1, "category_id": category, "bbox": [x, 0, 2, 6], "iscrowd": int(category == 7),
             "segmentation": [[x, 0, x + 2, 0, x + 2, 6, x, 6]]}
            for category, x in squares
        ],
    }  # fmt: skip
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/instances_train.json").write_text(json.dumps(content))
    found = data.open_masks(f"coco:{tmp_path}")
    assert found[0][1].tolist() == [[255, 255, 256, 256, 300, 300, -100, -100]] * 6


def test_masks_of_voc(tmp_path):
    root = tmp_path / "VOC2012"
    save(np.zeros((6, 8, 3)), root / "JPEGImages/a.jpg")
    (root / "Annotations").mkdir()
    labels = np.full((6, 8), 20)
    labels[0] = 255
    save(labels, root / "SegmentationClass/a.png", mode="P")
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    for name in ("train", "val"):
        (root / f"ImageSets/Segmentation/{name}.txt").write_text("a\n")
    found = data.open_masks(f"voc:{tmp_path}")
    assert (found.classes[0], found.classes[20]) == ("ground", "tvmonitor")
    assert found[0][1].unique().tolist() == [-100, 20]
    (root / "ImageSets/Segmentation/val.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match=r"val.txt: 'b' is listed, but there is no .*b.jpg"):
        data.open_masks(f"voc:{tmp_path}", split="test")


@pytest.mark.parametrize("opener", [data.open_masks, data.open_lines])
def test_other_specs_are_refused(opener):
    with pytest.raises(ValueError, match=r"data must be .*:PATH.*, got 'folder:x'"):
        opener("folder:x")


def test_lines_keep_their_proportions(tmp_path):
    save(np.full((16, 20), 200), tmp_path / "a.png")
    save(np.full((64, 400), 100), tmp_path / "b b.png")
    (tmp_path / "labels.txt").write_text("a.png ab\n\nb b.png\tb a\n", encoding="utf-8-sig")
    for part in ("train", "val"):
        (tmp_path / part).symlink_to(tmp_path)
    found = data.open_lines(f"text:{tmp_path}", width=64)
    assert found.codec.alphabet == " ab"
    (image, labels), (other, _) = found[0], found[1]
    assert image.shape == other.shape == (1, 32, 64)
    assert image.eq(200).all()
    assert labels.tolist() == [2, 3, -100]
    assert found.codec.texts(torch.stack([found[i][1] for i in range(2)])) == ["ab", "b a"]


def test_every_fifth_line_is_held_out(tmp_path):
    for i in range(5):
        save(np.zeros((8, 8)), tmp_path / f"{i}.png")
    (tmp_path / "labels.txt").write_text("".join(f"{i}.png\t{'abcde'[i]}\n" for i in range(5)))
    held_out = data.open_lines(f"text:{tmp_path}", split="test", width=8)
    assert held_out.texts == ["e"]
    assert held_out.codec.alphabet == "abcde"
    with pytest.raises(ValueError, match="multiple of 4, got 30"):
        data.open_lines(f"text:{tmp_path}", width=30)
