"""``holofunc predict``: an exported network on images, by what its file says of itself."""

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from holofunc import models
from holofunc.cli import job
from holofunc.cli.runs import say
from holofunc.data.datasets import images_in
from holofunc.data.pictures import read

__all__ = ["predict"]

NEEDED = ("task", "shape", "classes", "mean", "std")


def predict(arguments: Namespace) -> Callable[[], int]:
    """``holofunc predict``: a line for each image; those that cannot be read are named, and the others said."""
    path, size = Path(arguments.program), arguments.batch_size
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}")
    if size < 1:
        raise ValueError(f"batch_size must be at least 1, got {size}")
    about = models.exporting.metadata(path)
    if lacking := [name for name in NEEDED if not about.get(name)]:
        raise ValueError(f"{path} does not say its {', '.join(lacking)}: write it with 'holofunc export'")
    files = _files(arguments.images)

    def carry_out() -> int:
        program, task, code = models.exporting.load(path), job.TASKS[about["task"]], 0
        for start in range(0, len(files), size):
            images = {}
            for file in files[start : start + size]:
                try:
                    images[file] = _image(file, about)
                except ValueError as error:
                    sys.stderr.write(f"holofunc: error: {error}\n")
                    code = 1
            if images:
                said = task.told(program(torch.stack([*images.values()])), about["classes"])
                for file, told in zip(images, said, strict=True):
                    say(f"{file}: {told}")
        return code

    return carry_out


def _files(places: Sequence[str]) -> list[Path]:
    """The files, and those in the folders."""
    found: list[Path] = []
    for place in map(Path, places):
        if not place.exists():
            raise ValueError(f"there is no image {str(place)!r}")
        found += images_in(place) if place.is_dir() else [place]
    if not found:
        raise ValueError(f"there are no images in {', '.join(places)}")
    return found


def _image(path: Path, about: dict[str, Any]) -> Tensor:
    """An image as the network takes it, normalized."""
    pixels = job.TASKS[about["task"]].pixels(read(path), about["shape"])
    mean, std = (torch.tensor(about[name])[:, None, None] for name in ("mean", "std"))
    return (pixels / 255 - mean) / std
