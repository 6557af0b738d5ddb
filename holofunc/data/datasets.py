"""Open the datasets of the command line by name."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Subset

from holofunc.data.batches import Batches
from holofunc.data.embedded import digits
from holofunc.data.inspecting import problems
from holofunc.data.pictures import read
from holofunc.data.splits import holdout, part_of

__all__ = ["Source", "open_dataset"]


class Source(NamedTuple):
    """An opened dataset, with everything that a training run needs to know about it.

    Attributes:
        data: for `Batches`: a pair of tensors, or a dataset of pairs (image, label).
        classes: names of the classes, by label.
        mean: mean of each channel, for pixels in [0, 1].
        std: standard deviation of each channel.
    """

    data: Any
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def batches(self, batch_size: int, **options: Any) -> Batches:
        """`Batches` of the data, normalised with its mean and std, labels checked against its classes."""
        return Batches(
            self.data, batch_size, **{"mean": self.mean, "std": self.std, "num_classes": len(self.classes), **options}
        )


IMAGES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
HIDDEN = (".", "__")
"""Prefixes of the names of hidden folders and files: `.cache`, `__MACOSX`."""
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def open_dataset(
    spec: str,
    root: str | Path = "data",
    *,
    split: str = "train",
    image_size: int | None = None,
    download: bool = False,
    bad_images: str = "stop",
) -> Source:
    """Open a dataset by its name.

    - `digits`: the 8x8 digits in the package.
    - `cifar10`: 32x32, kept in memory.
    - `imagenette`: ten classes of ImageNet, resized and cropped to ``image_size``.
    - ``folder:PATH``: ``PATH/train/<class>/*.jpg`` and ``PATH/val/...`` (or ``PATH/test/...``). Without these two,
      ``PATH/<class>/*.jpg``, where every fifth file of each class is held out for testing.

    Args:
        spec: one of the above.
        root: folder of torchvision's datasets.
        split: ``"train"`` or ``"test"``.
        image_size: height and width of the images of `imagenette` and `folder`, 224 by default: the shorter side is
            resized, the centre cropped.
        download: whether torchvision may download a dataset that is not in ``root``.
        bad_images: how to treat files of a folder that cannot be decoded: ``"stop"`` raises an error with the path when
            one is loaded; ``"skip"`` reads all files first, warns, and leaves these out.

    Returns:
        The data with class names, mean and std.

    Raises:
        ValueError: if the name is unknown, the data are missing or contain no images, or an option is invalid. An
            image that cannot be decoded raises it when it is loaded, with its path.

    Example:
        >>> from holofunc import data
        >>> source = data.open_dataset("digits", split="test")
        >>> len(source.batches(64)), source.classes[:3]
        (6, ('0', '1', '2'))
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    name, _, path = spec.partition(":")
    if image_size is not None and (image_size < 1 or name in ("digits", "cifar10")):
        raise ValueError(
            f"image_size must be at least 1, for imagenette and folder:PATH only, got {image_size} for {spec!r}"
        )
    decode = Decode(image_size or 224)
    if spec == "digits":
        return Source(digits(split), tuple("0123456789"), (0.305,), (0.376,))
    if spec == "cifar10":
        return _open_cifar10(Path(root), split, download)
    if spec == "imagenette":
        return _open_imagenette(Path(root), split, download, decode)
    if name == "folder" and path:
        return _open_folder(Path(path), split, decode, bad_images)
    raise ValueError(f"data must be digits, cifar10, imagenette or folder:PATH, got {spec!r}")


def _open_cifar10(root: Path, split: str, download: bool) -> Source:
    from torchvision.datasets import CIFAR10

    found = _from_torchvision("cifar10", root, download, lambda: CIFAR10(root, split == "train", download=download))
    images = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    return Source((images, torch.tensor(found.targets)), tuple(found.classes), mean, std)


def _open_imagenette(root: Path, split: str, download: bool, decode: "Decode") -> Source:
    from torchvision.datasets import Imagenette

    size = "160px" if decode.size <= 160 else "320px" if decode.size <= 320 else "full"
    part = "train" if split == "train" else "val"
    found = _from_torchvision(
        "imagenette", root, download, lambda: Imagenette(root, part, size, download=download, loader=decode)
    )
    return Source(found, tuple(names[0] for names in found.classes), *IMAGENET)


def _from_torchvision(name: str, root: Path, download: bool, build: Callable[[], Any]) -> Any:
    try:
        return build()
    except (RuntimeError, OSError) as error:
        advice = "the download failed" if download else "download it there (download=True), or name another root"
        raise ValueError(f"{name} is not in {str(root)!r}: {advice} ({str(error).splitlines()[0]})") from error


def _open_folder(path: Path, split: str, decode: "Decode", bad_images: str) -> Source:
    from torchvision.datasets import ImageFolder as Torchvisions

    class ImageFolder(Torchvisions):
        """torchvision's folder dataset without hidden folders and files."""

        def find_classes(self, directory: Any) -> tuple[list[str], dict[str, int]]:
            names = [n for n in super().find_classes(directory)[0] if not n.startswith(HIDDEN)]
            return names, {name: label for label, name in enumerate(names)}

    def opened(place: Path) -> ImageFolder:
        return ImageFolder(str(place), loader=decode, is_valid_file=lambda file: _is_image(Path(file), place))

    if bad_images not in ("stop", "skip"):
        raise ValueError(f"bad_images must be 'stop' or 'skip', got {bad_images!r}")
    place, whole = part_of(path, split)
    try:
        found = opened(place)
        classes = opened(path / "train").classes if split == "test" and whole else found.classes
    except FileNotFoundError as error:
        raise ValueError(f"folder {str(path)!r} needs a folder of images for each class: {error}") from error
    if found.classes != classes:
        raise ValueError(f"the classes of {str(place)!r} must be those of train, {classes}, got {found.classes}")
    if len(classes) < 2:
        raise ValueError(f"folder {str(path)!r} must hold at least 2 folders of classes, got {classes}")
    if bad_images == "skip":
        broken = {problem.path for problem in _broken(found)}
        if broken:
            warnings.warn(f"left out {len(broken)} images that cannot be read: {sorted(broken)[:5]}", stacklevel=3)
        found.samples = found.imgs = [sample for sample in found.samples if sample[0] not in broken]
        found.targets = [label for _, label in found.samples]
    data: Any = found if whole else Subset(found, holdout(found.targets, split).tolist())
    if len(data) == 0:
        raise ValueError(f"folder {str(path)!r} has too few images to hold out a fifth of each class")
    return Source(data, tuple(classes), *IMAGENET)


def _is_image(file: Path, root: Path) -> bool:
    return file.name.lower().endswith(IMAGES) and not any(n.startswith(HIDDEN) for n in file.relative_to(root).parts)


class BrokenImage(NamedTuple):
    """An image that cannot be read, and the reason."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def check_folder(path: str | Path, *, image_size: int = 224) -> list[BrokenImage]:
    """List the images of a folder that cannot be read.

    Args:
        path: of the images, searched recursively, following links. Hidden files and folders are ignored.
        image_size: as for `open_dataset`.

    Example:
        >>> from holofunc import data
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     data.check_folder(folder)
        []
    """
    root = Path(path)
    if not root.is_dir():
        raise ValueError(f"folder {str(path)!r} does not exist")
    return _broken_among([str(f) for f in images_in(root)], cast(Any, Decode(image_size)))


def images_in(root: Path) -> list[Path]:
    """The image files in a folder, searched recursively, sorted, without hidden ones."""
    seen, files = {os.path.realpath(root)}, list[Path]()
    for folder, inside, names in os.walk(root, followlinks=True):
        inside[:] = [n for n in inside if os.path.realpath(Path(folder, n)) not in seen]  # links may be circular
        seen.update(os.path.realpath(Path(folder, n)) for n in inside)
        files += [Path(folder, name) for name in names if _is_image(Path(folder, name), root)]
    return sorted(files)


def check(source: Source) -> list[BrokenImage]:
    """List the images of a dataset of `open_dataset` that cannot be read."""
    data: Any = source.data
    indices: Any = None
    if isinstance(data, Subset):
        data, indices = data.dataset, data.indices
    samples = getattr(data, "samples", None)  # datasets in memory have none, and are valid
    if samples is None:
        return []
    wanted = samples if indices is None else [samples[i] for i in indices]
    return _broken_among([str(path) for path, _ in wanted], data.loader)


def _broken(folder: Any) -> list[BrokenImage]:
    return _broken_among([path for path, _ in folder.samples], folder.loader)


def _broken_among(paths: list[str], decode: Callable[[str], Any]) -> list[BrokenImage]:
    return [BrokenImage(paths[number], why) for number, why in problems(decode, paths).items()]


class Decode(NamedTuple):
    """Read an image file as a uint8 tensor (3, size, size): shorter side resized, centre cropped, rotated upright."""

    size: int

    def __call__(self, path: str) -> Tensor:
        rgb = ImageOps.fit(read(path), (self.size, self.size), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)
