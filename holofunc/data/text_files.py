"""Folders of images of text lines."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from holofunc.data.pictures import read
from holofunc.data.splits import holdout, part_of
from holofunc.data.text import CTCCodec

__all__ = ["TextFiles", "line_pixels", "open_lines"]

HEIGHT, FRAME = 32, 4
"""Pixels of the images' height, and of a frame's width, of `holofunc.models.ctc_recognizer`."""


class TextFiles(Dataset[Any]):
    """Images of lines on disk, as samples ``(image, labels)``; made by `open_lines`.

    Images are uint8 (1, 32, width): grey, 32 pixels high, in their proportions as far as they fit, their last column
    repeated up to the width. Labels are int64, of the longest text's length, -100 after the text.

    Attributes:
        paths: of the images.
        texts: what is written on them.
        codec: characters as labels.
        width: of the images, in pixels.
    """

    mean = (0.5,)
    std = (0.3,)

    def __init__(self, paths: Sequence[Path], texts: Sequence[str], codec: CTCCodec, width: int = 128) -> None:
        self.paths, self.texts, self.codec, self.width = list(paths), list(texts), codec, width
        self.labels = codec.encode_all(self.texts)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return line_pixels(read(self.paths[index], "L"), self.width), self.labels[index]


def line_pixels(image: Image.Image, width: int) -> Tensor:
    """A line as recognizers see it, uint8 (1, 32, width): in its proportions as far as it fits, its end repeated."""
    wide = min(width, max(1, round(image.width * HEIGHT / image.height)))
    pixels = np.array(image.convert("L").resize((wide, HEIGHT), Image.Resampling.BILINEAR))
    return torch.from_numpy(np.pad(pixels, ((0, 0), (0, width - wide)), mode="edge"))[None]


def open_lines(spec: str, *, split: str = "train", width: int = 128, alphabet: str | None = None) -> TextFiles:
    """Open a folder of images of text lines: ``text:PATH``.

    `labels.txt` has a line for each image: its name, a tab (or a space), and what is written on it. It lies with the
    images in ``PATH/train`` and ``PATH/val`` (or ``PATH/test``), or in `PATH`, of which every fifth line is held out.

    Args:
        spec: ``text:PATH``.
        split: ``"train"`` or ``"test"``.
        width: of the images, in pixels: a multiple of 4.
        alphabet: the characters that there are; by default, those of the texts; of another split, the training set's.

    Raises:
        ValueError: if the spec is another, or a line of the file has no image, no text, characters that are not in the
            alphabet, or more of them than the width has room for; the message names file, line and image.
    """
    name, _, path = spec.partition(":")
    if name != "text" or not path:
        raise ValueError(f"data must be text:PATH, got {spec!r}")
    if width < FRAME or width % FRAME:
        raise ValueError(f"image_size, the width of lines, must be a multiple of {FRAME}, got {width}")
    root, whole = part_of(Path(path), split)
    file = root / "labels.txt"
    if not file.is_file():
        raise ValueError(f"folder {str(root)!r} has no labels.txt")
    lines = [(i, line) for i, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), 1) if line.strip()]
    rows = [_row(f"{file}: line {i}", root, line, width, alphabet) for i, line in lines]
    alphabet = alphabet or "".join(sorted({c for _, text in rows for c in text}))
    kept = range(len(rows)) if whole else holdout([0] * len(rows), split).tolist()
    if not kept:
        raise ValueError(f"{file}: there are too few lines, got {len(rows)}")
    return TextFiles([rows[i][0] for i in kept], [rows[i][1] for i in kept], CTCCodec(alphabet), width)


def _row(where: str, root: Path, line: str, width: int, alphabet: str | None) -> tuple[Path, str]:
    name, _, text = (part.strip() for part in line.partition("\t" if "\t" in line else " "))
    if not text:
        raise ValueError(f"{where} must be the name of an image, a tab and its text, got {line!r}")
    if not (root / name).is_file():
        raise ValueError(f"{where}: image {name!r} is not in {str(root)!r}")
    if strange := sorted({c for c in text if not c.isprintable() or c not in (alphabet or c)}):
        raise ValueError(f"{where}: the text {text!r} of image {name!r} has characters of no alphabet: {strange}")
    frames = len(text) + sum(a == b for a, b in pairwise(text))  # a blank between equal characters
    if frames > width // FRAME:
        raise ValueError(
            f"{where}: the text {text!r} of image {name!r} needs {frames * FRAME} pixels, got image_size={width}"
        )
    return root / name, text
