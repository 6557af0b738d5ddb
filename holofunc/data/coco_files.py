"""Folders in the layout of COCO."""

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from holofunc.data.boxed import BoxedFiles, Record

__all__ = ["coco", "decode_rle", "mask_of", "masks"]

NAMES = {"train": "train", "test": "val"}


def coco(
    path: str | Path, *, split: str = "train", image_size: int | None = None, by: str = "name", tolerance: float = 1.0
) -> BoxedFiles:
    """Open a folder in COCO's layout: ``annotations/instances_NAME.json``, its images in ``NAME/`` or ``images/NAME/``.

    `NAME` begins with `train` or, for ``split="test"``, with `val`, as `train2017` does. Images without objects are
    kept. Categories, whose numbers may have gaps, become labels in the order of their numbers. Crowds are read, and
    marked as ignored. Boxes without area (COCO has some) are left out.

    Args:
        path: the folder, or an annotation file, whose images then lie in a folder of its `NAME` beside its own.
        split: ``"train"`` or ``"test"``.
        image_size: height and width to which images are stretched.
        by: ``"name"``, or ``"supercategory"``: classes are then the categories' parents.
        tolerance: pixels by which a box may jut out of its image; it is cut off.

    Returns:
        The dataset; ``masks(record)`` decodes the outlines of one of its records.

    Raises:
        ValueError: if a file or folder is missing, or an entry is broken; the message names file, image and entry.
    """
    if by not in ("name", "supercategory"):
        raise ValueError(f"by must be 'name' or 'supercategory', got {by!r}")
    file = _annotations(Path(path), split)
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{file}: no JSON that can be read: {error}") from error
    if absent := [n for n in ("images", "annotations", "categories") if not isinstance(_get(content, n), list)]:
        raise ValueError(f"{file}: there is no list {', '.join(map(repr, absent))} in it")
    folder = _images(file)
    classes, labels = _classes(file, content["categories"], by)
    objects: dict[Any, list[tuple[int, Mapping[str, Any]]]] = defaultdict(list)
    known: set[Any] = set()
    for i, image in enumerate(content["images"]):
        if not _is_id(_get(image, "id")) or image["id"] in known:
            raise ValueError(f"{file}: images[{i}] must have an id of its own, got {image}")
        known.add(image["id"])
    for i, each in enumerate(content["annotations"]):
        if not _is_id(_get(each, "image_id")) or each["image_id"] not in known:
            raise ValueError(f"{file}: annotations[{i}] is of image {_get(each, 'image_id')!r}, which is not there")
        objects[each["image_id"]].append((i, each))
    if not known:
        raise ValueError(f"{file}: there are no images in it")
    records = []
    for i, image in enumerate(content["images"]):
        record = _image(file, folder, i, image)
        records.append(_objects(file, record, objects[image["id"]], labels, tolerance))
    return BoxedFiles(records, classes, image_size)


def _get(entry: Any, name: str) -> Any:
    return entry.get(name) if isinstance(entry, Mapping) else None


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, float, str))


def _annotations(path: Path, split: str) -> Path:
    if split not in NAMES:
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    if path.is_file():
        return path
    found = sorted((path / "annotations").glob(f"instances_{NAMES[split]}*.json"))
    if not found:
        raise ValueError(f"folder {str(path)!r} has no annotations/instances_{NAMES[split]}*.json")
    return found[-1]


def _images(file: Path) -> Path:
    name, root = file.stem.removeprefix("instances_"), file.parent.parent
    tried = [root / name, root / "images" / name, file.parent / name, root / "images"]
    for folder in tried:
        if folder.is_dir():
            return folder
    raise ValueError(f"{file}: its images are in none of {', '.join(str(f) for f in tried)}")


def _classes(file: Path, categories: list[Any], by: str) -> tuple[list[str], dict[int, int]]:
    for i, each in enumerate(categories):
        if not isinstance(_get(each, "id"), int) or not isinstance(_get(each, by), str):
            raise ValueError(f"{file}: categories[{i}] must have an integer id and a {by}, got {each}")
    ordered = sorted(categories, key=lambda each: each["id"])
    names = list(dict.fromkeys(each[by] for each in ordered))
    if (by == "name" and len(names) < len(ordered)) or len({each["id"] for each in ordered}) < len(ordered):
        raise ValueError(f"{file}: categories must have different ids and names")
    return names, {each["id"]: names.index(each[by]) for each in ordered}


def _image(file: Path, folder: Path, i: int, image: Any) -> Record:
    name, width, height = (_get(image, key) for key in ("file_name", "width", "height"))
    if not isinstance(name, str) or not all(_is_finite(n) and n >= 1 and n % 1 == 0 for n in (width, height)):
        raise ValueError(f"{file}: images[{i}] must have a file_name, a width and a height, got {image}")
    path = folder / name
    if not path.is_file():
        raise ValueError(f"{file}: images[{i}], {name!r}, is not in {str(folder)!r}")
    none = torch.zeros(0)
    return Record(path, int(width), int(height), none.reshape(0, 4), none.long(), none.bool())


def _objects(
    file: Path, record: Record, entries: list[tuple[int, Mapping[str, Any]]], labels: dict[int, int], tolerance: float
) -> Record:
    """The record with its objects."""
    found = []
    for i, entry in entries:
        where = f"{file}: annotations[{i}] of image {record.path.name!r}"
        if not _is_id(_get(entry, "category_id")) or entry["category_id"] not in labels:
            raise ValueError(f"{where} has the category {_get(entry, 'category_id')!r}, which is not there")
        box, crowd = _get(entry, "bbox"), _get(entry, "iscrowd")
        if not isinstance(box, list) or len(box) != 4 or not all(_is_finite(x) for x in box):
            raise ValueError(f"{where} must have a bbox of four finite numbers, got {box}")
        if crowd not in (None, 0, 1):
            raise ValueError(f"{where} must have an iscrowd of 0 or 1, got {crowd!r}")
        x, y, width, height = box
        if width < 0 or height < 0:
            raise ValueError(f"{where} has a bbox of negative size, {box}")
        if min(x, y) < -tolerance or x + width > record.width + tolerance or y + height > record.height + tolerance:
            size = f"{record.width}x{record.height}"
            raise ValueError(f"{where} has a bbox outside of the image, {box} in {size} pixels")
        corners = [max(0, x), max(0, y), min(record.width, x + width), min(record.height, y + height)]
        if corners[2] > corners[0] and corners[3] > corners[1]:
            found.append((corners, labels[entry["category_id"]], bool(crowd), entry.get("segmentation")))
    if not found:
        return record
    boxes, classes, crowds, shapes = zip(*found, strict=True)
    return record._replace(
        boxes=torch.tensor(boxes, dtype=torch.float32),
        labels=torch.tensor(classes),
        ignored=torch.tensor(crowds),
        shapes=shapes,
    )


def _is_finite(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


# --- outlines ----------------------------------------------------------------------------------------------------


def masks(record: Record) -> Tensor:
    """The decoded masks of a record's objects: bool (M, height, width).

    Raises:
        ValueError: if an outline is no polygons and no run lengths of this size; the message names image and object.
    """
    found = torch.zeros(len(record.shapes), record.height, record.width, dtype=torch.bool)
    for i, shape in enumerate(record.shapes):
        try:
            found[i] = mask_of(shape, record.height, record.width)
        except ValueError as error:
            raise ValueError(f"image {record.path.name!r}, object {i}: {error}") from error
    return found


def mask_of(shape: Any, height: int, width: int) -> Tensor:
    """One outline, decoded: polygons ``[[x1, y1, x2, y2, ...], ...]``, or ``{"size": [h, w], "counts": ...}``.

    A polygon of one or two points holds no pixel.

    Example:
        >>> from holofunc.data.coco_files import mask_of
        >>> mask_of({"size": [2, 3], "counts": [1, 2, 3]}, 2, 3).int()
        tensor([[0, 1, 0],
                [1, 0, 0]], dtype=torch.int32)
    """
    if isinstance(shape, Mapping) and "counts" in shape:
        if shape.get("size") not in ([height, width], (height, width)):
            raise ValueError(f"run lengths must have size [{height}, {width}], got {shape.get('size')}")
        return decode_rle(shape["counts"], height, width)
    if not isinstance(shape, list) or not all(map(_is_polygon, shape)):
        raise ValueError(f"an outline must be polygons [x, y, x, y, ...], or run lengths, got {shape!r:.80}")
    inside = np.zeros((height, width), bool)
    for polygon in shape:
        inside |= _filled(np.array(polygon, float).reshape(-1, 2), height, width)
    return torch.from_numpy(inside)


def _is_polygon(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and len(value) % 2 == 0 and all(map(_is_finite, value))


def _filled(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """The pixels whose centres lie inside of a polygon: where an edge crosses a row, inside becomes outside."""
    x1, y1, x2, y2 = (side[:, None] for side in (*points.T, *np.roll(points, -1, 0).T))
    rows = np.arange(height) + 0.5
    edge, row = ((y1 <= rows) != (y2 <= rows)).nonzero()
    share = (rows[row] - y1[edge, 0]) / (y2 - y1)[edge, 0]
    crossing = x1[edge, 0] + share * (x2 - x1)[edge, 0]
    turns = np.zeros((height, width + 1), int)
    np.add.at(turns, (row, np.ceil(crossing - 0.5).clip(0, width).astype(int)), 1)
    return turns.cumsum(1)[:, :-1] % 2 == 1


def decode_rle(counts: Any, height: int, width: int) -> Tensor:
    """Run lengths, of 0 and 1 in turns, column by column: a list of numbers, or COCO's text.

    In the text a number is written in groups of five bits, the lowest first, each as a character from ``"0"`` on; the
    sixth bit says that more follow, the last group's highest is the sign. From the fourth number on it is the
    difference to the last but one.
    """
    runs = _read_counts(counts) if isinstance(counts, (str, bytes)) else counts
    if not isinstance(runs, list) or not all(isinstance(n, int) for n in runs):
        raise ValueError(f"run lengths must be a list of integers or text, got {runs!r:.80}")
    if sum(runs) != height * width or min(runs, default=0) < 0:
        raise ValueError(f"run lengths must add up to {height} x {width}, got {sum(runs)}")
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return torch.from_numpy(flat.reshape(width, height).T.copy())


def _read_counts(text: str | bytes) -> list[int]:
    codes = text.encode() if isinstance(text, str) else text
    runs: list[int] = []
    value = shift = 0
    for code in codes:
        group = code - 48
        value |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue
        if group & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return runs
