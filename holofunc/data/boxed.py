"""Datasets of images with boxes, whose annotations are read and checked before anything is trained."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from holofunc.data.batches import Batches
from holofunc.data.pictures import read
from holofunc.data.targets import collate_boxes
from holofunc.ops.checks import check_counts
from holofunc.ops.targets import Targets

__all__ = ["Boxed", "BoxedFiles", "Record", "check_size", "open_boxes"]


class Record(NamedTuple):
    """One image of a dataset on disk.

    Attributes:
        path: of the image.
        width: in pixels.
        height: in pixels.
        boxes: (M, 4) float32, xyxy in pixels, cut off at the image's borders.
        labels: (M,) int64.
        ignored: (M,) bool: crowds and difficult objects, which are no targets.
        shapes: what the annotation says of each object's outline, as it stands there.
    """

    path: Path
    width: int
    height: int
    boxes: Tensor
    labels: Tensor
    ignored: Tensor
    shapes: tuple[Any, ...] = ()


class Boxed(Dataset[Any]):
    """Images in memory with their `Targets`, as samples ``(image, {"boxes", "labels"})`` for `Batches`.

    Example:
        >>> from holofunc import data, random
        >>> images, targets = data.canvases(random.key(0), 8, size=64)
        >>> batches = data.Batches(data.Boxed(images, targets), 4, collate=data.collate_boxes(4))
        >>> next(iter(batches))[1].labels.shape
        torch.Size([4, 4])
    """

    def __init__(self, images: Tensor, targets: Targets) -> None:
        if len(images) != len(targets.boxes):
            raise ValueError(f"images and targets must be of one length, got {len(images)} and {len(targets.boxes)}")
        self.images, self.targets = images, targets

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        boxes, labels, mask = (part[index] for part in self.targets)
        return self.images[index], {"boxes": boxes[mask], "labels": labels[mask]}


class BoxedFiles(Dataset[Any]):
    """Images on disk with boxes, as samples ``(image, {"boxes", "labels"})``; made by `coco`, `voc` and `open_boxes`.

    Images are uint8 (3, H, W), boxes xyxy as fractions of the image.

    Attributes:
        records: what was read of each image.
        classes: names of the classes, by label.
        image_size: height and width to which images are stretched; None leaves them as they are.
    """

    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)

    def __init__(self, records: Sequence[Record], classes: Sequence[str], image_size: int | None = None) -> None:
        self.records, self.classes = list(records), tuple(classes)
        self.image_size = check_size(image_size)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        record = self.records[index]
        kept = ~record.ignored
        scale = torch.tensor([record.width, record.height] * 2, dtype=torch.float32)
        return self._image(record), {"boxes": record.boxes[kept] / scale, "labels": record.labels[kept]}

    def _image(self, record: Record) -> Tensor:
        image = read(record.path, upright=False)
        if image.size != (record.width, record.height):
            sizes = f"it has {image.size} pixels, its annotation says {record.width, record.height}"
            raise ValueError(f"cannot read image {str(record.path)!r}: {sizes}")
        if self.image_size is not None:
            image = image.resize((self.image_size, self.image_size), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    @property
    def max_boxes(self) -> int:
        """The most boxes that an image has; at least 1."""
        return max([1, *(int((~record.ignored).sum()) for record in self.records)])

    def sizes(self) -> Tensor:
        """All boxes that are targets, (M, 4) as fractions of their images: what `anchors` takes."""
        scaled = [r.boxes[~r.ignored] / torch.tensor([r.width, r.height] * 2) for r in self.records]
        return torch.cat([torch.zeros(0, 4), *scaled])

    def batches(self, batch_size: int, **options: Any) -> Batches:
        """`Batches` of ``(images, Targets)``, normalised with ImageNet's mean and std."""
        collate = collate_boxes(self.max_boxes, num_classes=len(self.classes))
        return Batches(self, batch_size, **{"mean": self.mean, "std": self.std, "collate": collate, **options})


def check_size(image_size: int | None) -> int | None:
    check_counts(image_size=1 if image_size is None else image_size)
    return image_size


def open_boxes(spec: str, *, split: str = "train", image_size: int | None = None, **options: Any) -> BoxedFiles:
    """Open a folder of images with boxes: ``coco:PATH`` or ``voc:PATH``.

    Args:
        spec: one of the above; see `coco` and `voc` for how folders are laid out.
        split: ``"train"`` or ``"test"``.
        image_size: height and width to which images are stretched.
        options: those of `coco` or `voc`.

    Raises:
        ValueError: if the spec is another, or a file or an entry of it is broken: the message names file, image and
            entry. Images themselves are decoded when they are loaded.
    """
    from holofunc.data.coco_files import coco
    from holofunc.data.voc_files import voc

    name, _, path = spec.partition(":")
    if name not in ("coco", "voc") or not path:
        raise ValueError(f"data must be coco:PATH or voc:PATH, got {spec!r}")
    opener: Callable[..., BoxedFiles] = coco if name == "coco" else voc
    return opener(path, split=split, image_size=image_size, **options)
