"""Images with a class each."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Subset

from holofunc import data, metrics, plots
from holofunc.cli.task import IMAGES, Opened, Task, pixels
from holofunc.config import Config
from holofunc.metrics import Metric
from holofunc.model import Model
from holofunc.typing import PyTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Classification"]


class Classification(Task):
    """The default task."""

    sources = ("digits", "cifar10", "imagenette", "folder:PATH")
    model = "smallnet"
    monitor = "val/accuracy"
    loss = ("cross_entropy",)
    axes: ClassVar = {"images": IMAGES, "outputs": ("batch", "classes")}

    def open(self, config: Config, split: str) -> Opened:
        source = data.open_dataset(
            str(config.data), config.root, split=split, image_size=config.image_size, download=config.download
        )
        return Opened(*source, options={"num_classes": len(source.classes)}, paths=_paths(source.data))

    def check_model(self, config: Config, model: Model, output: torch.Size | None, shape: Sequence[int]) -> None:
        if output != (1, len(config.classes)):
            size = "x".join(map(str, shape))
            raise ValueError(f"model {config.model} is not a classifier: from an image of {size} it makes {output}")

    def measured(self, config: Config, model: Model, *, held_out: bool) -> dict[str, Metric]:
        found = {"accuracy": metrics.accuracy()}
        return {**found, "confusion": metrics.confusion(len(config.classes))} if held_out else found

    def draw(self, config: Config, model: Model, images: Tensor, outputs: PyTree, targets: PyTree) -> "Figure":
        sure, found = outputs.softmax(1).max(1)
        named = [[config.classes[i] for i in labels.tolist()] for labels in (targets, found)]
        titles = [f"{true} → {each}\n{p:.0%}" for true, each, p in zip(*named, sure.tolist(), strict=True)]
        return plots.images(images, titles=titles, mean=config.mean, std=config.std)

    def pixels(self, image: Image.Image, shape: Sequence[int]) -> Tensor:
        size = (shape[2], shape[1])
        return pixels(ImageOps.fit(image.convert("RGB"), size, Image.Resampling.BILINEAR), shape[0])

    def told(self, outputs: Any, classes: Sequence[str]) -> list[str]:
        sure, found = outputs.softmax(1).max(1)
        return [f"{classes[i]} {p:.1%}" for i, p in zip(found.tolist(), sure.tolist(), strict=True)]

    def summary(self, values: Mapping[str, Any]) -> str:
        return f"accuracy {values['accuracy']:.2%}"


def _paths(samples: Any) -> tuple[str, ...]:
    """The files of a folder, or of a part of one; none of images in memory."""
    if isinstance(samples, Subset):
        whole = _paths(samples.dataset)
        return tuple(whole[i] for i in samples.indices)
    return tuple(str(path) for path, _ in getattr(samples, "samples", ()))
