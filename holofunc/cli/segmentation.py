"""Images with a class for each pixel."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from holofunc import data, metrics, plots, random
from holofunc.cli.task import IMAGES, Opened, Task
from holofunc.config import Config
from holofunc.metrics import Metric
from holofunc.model import Model
from holofunc.typing import PyTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Segmentation"]


class Segmentation(Task):
    """Cross-entropy finds what is there, Dice fits its outline."""

    sources = ("shapes", "masks:PATH", "coco:PATH", "voc:PATH")
    model = "unet"
    monitor = "val/mean_iou"
    loss = ("cross_entropy", "dice")
    axes: ClassVar = {"images": IMAGES, "outputs": ("batch", "classes", "height", "width")}

    def usual_size(self, config: Config) -> int | None:
        return 64 if config.data == "shapes" else 256

    def small(self, config: Config) -> dict[str, Any]:
        return {"layout": [16, 32, 64], "norm_layer": "BatchNorm2d"} if config.data == "shapes" else {}

    def open(self, config: Config, split: str) -> Opened:
        size = config.image_size or 64
        if config.data == "shapes":
            key = random.fold_in(random.key(config.seed), int(split == "test"))
            drawn = data.draw_shapes(key, drawn_images(config, split), size=size, most=2)
            classes, options = ("ground", *data.SHAPES), {"num_classes": 1 + len(data.SHAPES)}
            return Opened((drawn.images, drawn.masks), classes, (0.5,) * 3, (0.25,) * 3, options)
        found = data.open_masks(str(config.data), split=split, image_size=size, classes=config.classes or None)
        options, paths = {"num_classes": len(found.classes)}, tuple(map(str, found.images))
        return Opened(found, found.classes, found.mean, found.std, options, paths)

    def check_model(self, config: Config, model: Model, output: torch.Size | None, shape: Sequence[int]) -> None:
        if output != (1, len(config.classes), *shape[1:]):
            size = "x".join(map(str, shape))
            raise ValueError(f"model {config.model} segments no images of {size}: it makes {output or 'several maps'}")

    def measured(self, config: Config, model: Model, *, held_out: bool) -> dict[str, Metric]:
        counts = metrics.confusion(len(config.classes))
        mean_iou = counts._replace(compute=lambda matrix: metrics.confusion_scores(matrix)["mean_iou"])
        return {"mean_iou": mean_iou, "accuracy": metrics.accuracy(), "confusion": counts} if held_out else {}

    def draw(self, config: Config, model: Model, images: Tensor, outputs: PyTree, targets: PyTree) -> "Figure":
        return plots.segmentation(
            images, outputs, targets, class_names=config.classes, mean=config.mean, std=config.std
        )  # fmt: skip

    def told(self, outputs: Any, classes: Sequence[str]) -> list[str]:
        shares = torch.nn.functional.one_hot(outputs.argmax(1), len(classes)).float().mean((1, 2))
        return [", ".join(f"{classes[i]} {p:.1%}" for i, p in enumerate(row) if p) for row in shares.tolist()]

    def summary(self, values: Mapping[str, Any]) -> str:
        return f"mean IoU {values['mean_iou']:.3f}, {values['accuracy']:.2%} of the pixels"


def drawn_images(config: Config, split: str) -> int:
    """How many images to draw; a fifth more are held out."""
    images = config.images or 1000
    return images if split == "train" else max(images // 5, 8)
