"""Folders in the layout of PASCAL VOC."""

import math
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import torch

from holofunc.data.boxed import BoxedFiles, Record

__all__ = ["CLASSES", "voc", "voc_root"]

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


def voc(
    path: str | Path,
    *,
    split: str = "train",
    image_size: int | None = None,
    classes: Sequence[str] | None = None,
    tolerance: float = 1.0,
) -> BoxedFiles:
    """Open a folder in VOC's layout: ``Annotations/*.xml``, ``JPEGImages/*``, and ``ImageSets/Main/*.txt``.

    The split is `train.txt`, or `val.txt` for ``split="test"``. Pixels are counted from 1 there, and a box's last ones
    belong to it; both is undone. Difficult objects are read, and marked as ignored.

    Args:
        path: the folder (``VOCdevkit/VOC2012``), or one that holds it.
        split: ``"train"`` or ``"test"``.
        image_size: height and width to which images are stretched.
        classes: names of the classes, by label; by default, VOC's 20.
        tolerance: pixels by which a box may jut out of its image; it is cut off.

    Raises:
        ValueError: if a file or folder is missing, or an entry is broken; the message names file, image and entry.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    root = voc_root(Path(path))
    listed = root / "ImageSets" / "Main" / f"{'train' if split == 'train' else 'val'}.txt"
    if not listed.is_file():
        raise ValueError(f"folder {str(root)!r} has no ImageSets/Main/{listed.name}")
    names = [line.split()[0] for line in listed.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if not names:
        raise ValueError(f"{listed}: there are no images in it")
    labels = {name: i for i, name in enumerate(CLASSES if classes is None else classes)}
    records = [_read(root / "Annotations" / f"{name}.xml", root / "JPEGImages", labels, tolerance) for name in names]
    return BoxedFiles(records, list(labels), image_size)


def voc_root(path: Path) -> Path:
    """The folder that holds `Annotations` and `JPEGImages`: the path itself, or one below it."""
    for root in (path, *sorted(path.glob("VOC*"), reverse=True), *sorted(path.glob("VOCdevkit/VOC*"), reverse=True)):
        if (root / "Annotations").is_dir() and (root / "JPEGImages").is_dir():
            return root
    raise ValueError(f"folder {str(path)!r} has no Annotations and JPEGImages")


def _read(file: Path, images: Path, labels: dict[str, int], tolerance: float) -> Record:
    try:
        root = ElementTree.parse(file).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise ValueError(f"{file}: no XML that can be read: {error}") from error
    name = root.findtext("filename", "").strip() or f"{file.stem}.jpg"
    path = images / (name if Path(name).suffix else f"{name}.jpg")  # some programs write it without
    if not path.is_file():
        raise ValueError(f"{file}: its image {name!r} is not in {str(images)!r}")
    width, height = (_number(root, f"size/{side}", f"{file}: image {name!r}") for side in ("width", "height"))
    if width < 1 or height < 1:
        raise ValueError(f"{file}: image {name!r} must have a size of at least 1x1, got {width:g}x{height:g}")
    found = []
    for i, entry in enumerate(root.iter("object")):
        where = f"{file}: object[{i}] of image {name!r}"
        label = (entry.findtext("name") or "").strip()
        if label not in labels:
            raise ValueError(f"{where} has the class {label!r}, which is none of {', '.join(labels)}")
        x1, y1, x2, y2 = (_number(entry, f"bndbox/{side}", where) for side in ("xmin", "ymin", "xmax", "ymax"))
        x1, y1 = x1 - 1, y1 - 1
        if x2 <= x1 or y2 <= y1:
            raise ValueError(f"{where} has a bndbox with its corners swapped, {[x1 + 1, y1 + 1, x2, y2]}")
        if min(x1, y1) < -tolerance or x2 > width + tolerance or y2 > height + tolerance:
            size = f"{width:g}x{height:g}"
            raise ValueError(f"{where} has a bndbox outside of the image, {[x1 + 1, y1 + 1, x2, y2]} in {size} pixels")
        corners = [max(0.0, x1), max(0.0, y1), min(width, x2), min(height, y2)]
        found.append((corners, labels[label], entry.findtext("difficult", "0").strip() == "1"))
    boxes, classes, difficult = zip(*found, strict=True) if found else ((), (), ())
    return Record(
        path,
        int(width),
        int(height),
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(classes, dtype=torch.int64),
        torch.tensor(difficult, dtype=torch.bool),
    )


def _number(entry: ElementTree.Element, path: str, where: str) -> float:
    text = entry.findtext(path)
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{where} must have a number at {path}, got {text!r}")
    return value
