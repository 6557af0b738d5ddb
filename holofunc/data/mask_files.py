"""Images with segmentation masks on disk: folders of masks, VOC, and COCO's outlines."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from holofunc.data.boxed import Record, check_size, open_boxes
from holofunc.data.coco_files import masks
from holofunc.data.datasets import IMAGES
from holofunc.data.inspecting import parallel
from holofunc.data.pictures import read
from holofunc.data.splits import holdout, part_of
from holofunc.data.voc_files import CLASSES, voc_root

__all__ = ["SegmentedFiles", "open_masks"]

UNLABELED, IGNORED = 255, -100
"""Pixels that do not count, in files and in targets."""


class SegmentedFiles(Dataset[Any]):
    """Images on disk with masks, as samples ``(image, mask)``; made by `open_masks`.

    Images are uint8 (3, H, W), masks int64 (H, W) with -100 where a pixel does not count. Resized, a pixel of the mask
    has the class of the one it is nearest to.

    Attributes:
        images: paths.
        masks: of each image the path of its mask, or what COCO says of it.
        classes: names of the classes, by label; the first is that of the ground.
        image_size: height and width to which images and masks are stretched; None leaves them as they are.
    """

    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)

    def __init__(
        self,
        images: Sequence[Path],
        masks: Sequence[Path | Record],
        classes: Sequence[str] | None = None,
        image_size: int | None = None,
    ) -> None:
        self.images, self.masks, self.image_size = list(images), list(masks), check_size(image_size)
        highest = max(parallel(self._checked, range(len(self.images))), default=0)
        self.classes = tuple(map(str, range(highest + 1))) if classes is None else tuple(classes)
        if highest >= len(self.classes):
            wrong = next(i for i in range(len(self.images)) if self._checked(i) >= len(self.classes))
            raise ValueError(
                f"{self._name(wrong)}: labels must be in [0, {len(self.classes)}) or {UNLABELED}, got "
                f"{self._checked(wrong)}"
            )
        if highest == 0 and any((self._labels(i) == IGNORED).any() for i in range(len(self.images))):
            raise ValueError(
                f"{self._name(0)} and all other masks hold nothing but 0 and {UNLABELED}, which does not count: masks "
                "of two classes must be written as 0 and 1"
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = read(self.images[index], upright=False)
        mask = Image.fromarray(self._labels(index))
        if self.image_size is not None:
            image = image.resize((self.image_size, self.image_size), Image.Resampling.BILINEAR)
            mask = mask.resize((self.image_size, self.image_size), Image.Resampling.NEAREST)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), torch.from_numpy(np.array(mask)).long()

    def _checked(self, index: int) -> int:
        """The highest label of a mask of the size of its image."""
        labels = self._labels(index)
        try:
            with Image.open(self.images[index]) as image:  # reads no more than its head
                size = image.size
        except OSError:  # that is said where images are read: one that is broken may be left out
            size = labels.shape[::-1]
        if labels.shape[::-1] != size:
            sizes = "{}x{} pixels, its image {}x{}".format(*labels.shape[::-1], *size)
            raise ValueError(f"{self._name(index)}: the mask has {sizes}")
        return int(labels.max(initial=0))

    def _name(self, index: int) -> str:
        mask = self.masks[index]
        return str(mask if isinstance(mask, Path) else mask.path)

    def _labels(self, index: int) -> np.ndarray:
        """Classes of the pixels, int32 (H, W)."""
        mask = self.masks[index]
        if isinstance(mask, Record):
            try:
                return _drawn(mask)
            except ValueError as error:
                raise ValueError(f"{self._name(index)}: {error}") from error
        try:
            with Image.open(mask) as image:
                if image.mode not in ("1", "L", "P"):
                    raise ValueError(f"its pixels must be classes in one channel of 8 bits, got mode {image.mode}")
                labels = np.array(image, dtype=np.int32)
        except Exception as error:
            raise ValueError(f"cannot read mask {str(mask)!r}: {error}") from error
        return np.where(labels == UNLABELED, np.int32(IGNORED), labels)


def _drawn(record: Record) -> np.ndarray:
    """The outlines of COCO, small ones over large ones; crowds do not count."""
    labels = np.zeros((record.height, record.width), np.int32)
    found = masks(record)
    for i in found.flatten(1).sum(1).argsort(descending=True).tolist():
        labels[found[i].numpy()] = IGNORED if record.ignored[i] else 1 + int(record.labels[i])
    return labels


def open_masks(
    spec: str, *, split: str = "train", image_size: int | None = None, classes: Sequence[str] | None = None
) -> SegmentedFiles:
    """Open a folder of images with masks.

    - ``masks:PATH``: images in ``images/``, and in ``masks/`` for each a file of the same stem (``7.jpg``, ``7.png``)
    whose
      pixels are classes, 255 where they do not count; both in ``PATH/train`` and ``PATH/val`` (or ``PATH/test``), or in
      `PATH`, of which every fifth image is held out. ``PATH/classes.txt`` names the classes, a line each, the ground
      first.
    - ``voc:PATH``: the 20 classes of VOC and the ground, from `SegmentationClass` and ``ImageSets/Segmentation``.
    - ``coco:PATH``: the outlines of objects over the ground; see `coco`.

    Args:
        spec: one of the above.
        split: ``"train"`` or ``"test"``.
        image_size: height and width to which images and masks are stretched.
        classes: names of the classes, instead of those found; of another split, those of the training set.

    Raises:
        ValueError: if the spec is another, or a mask is missing, cannot be read, is of another size than its image or
            has labels that are no classes; the message names the file. All masks are read here.
    """
    name, _, path = spec.partition(":")
    if name not in ("masks", "voc", "coco") or not path:
        raise ValueError(f"data must be masks:PATH, voc:PATH or coco:PATH, got {spec!r}")
    if name == "coco":
        boxed = open_boxes(spec, split=split)
        labelled = ("ground", *boxed.classes)
        return SegmentedFiles([r.path for r in boxed.records], boxed.records, classes or labelled, image_size)
    if name == "voc":
        return SegmentedFiles(*_voc_pairs(Path(path), split), classes or ("ground", *CLASSES), image_size)
    return SegmentedFiles(*_pairs(Path(path), split), classes or _classes(Path(path)), image_size)


def _voc_pairs(path: Path, split: str) -> tuple[list[Path], list[Path]]:
    root = voc_root(path)
    listed = root / "ImageSets" / "Segmentation" / f"{'train' if split == 'train' else 'val'}.txt"
    if not listed.is_file():
        raise ValueError(f"folder {str(root)!r} has no ImageSets/Segmentation/{listed.name}")
    names = listed.read_text(encoding="utf-8-sig").split()
    images = [root / "JPEGImages" / f"{name}.jpg" for name in names]
    labels = [root / "SegmentationClass" / f"{name}.png" for name in names]
    if absent := [file for file in (*images, *labels) if not file.is_file()]:
        raise ValueError(f"{listed}: {absent[0].stem!r} is listed, but there is no {absent[0]}")
    return images, labels


def _pairs(path: Path, split: str) -> tuple[list[Path], list[Path]]:
    root, whole = part_of(path, split)
    for name in ("images", "masks"):
        if not (root / name).is_dir():
            raise ValueError(f"folder {str(root)!r} has no folder {name}")
    images = sorted(f for f in (root / "images").iterdir() if f.name[0] != "." and f.suffix.lower() in IMAGES)
    labels = {f.stem: f for f in (root / "masks").iterdir() if f.name[0] != "."}
    if not images:
        raise ValueError(f"folder {str(root / 'images')!r} holds no images")
    if absent := [image for image in images if image.stem not in labels]:
        raise ValueError(f"{absent[0]}: there is no mask {absent[0].stem}.png in {str(root / 'masks')!r}")
    kept = range(len(images)) if whole else holdout([0] * len(images), split).tolist()
    if not kept:
        raise ValueError(f"folder {str(root)!r} has too few images to hold out a fifth")
    return [images[i] for i in kept], [labels[images[i].stem] for i in kept]


def _classes(path: Path) -> list[str] | None:
    file = path / "classes.txt"
    if not file.is_file():
        return None
    return [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
