"""Images with boxes."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from holofunc import data, metrics, plots, random
from holofunc.cli.segmentation import drawn_images
from holofunc.cli.task import IMAGES, Opened, Task, of_outputs
from holofunc.config import Config
from holofunc.metrics import Metric
from holofunc.model import Model
from holofunc.models import Detector, Targets
from holofunc.models.catalog import constructors
from holofunc.typing import Key, PyTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Detection"]


class Detection(Task):
    """The loss is the detector's own; its anchors are made of the training set's boxes, unless they are given."""

    sources = ("canvases", "shapes", "coco:PATH", "voc:PATH")
    model = "yolov2"
    monitor = "val/coco/ap"
    loss = ()
    axes: ClassVar = {
        "images": IMAGES,
        "boxes": ("batch", "detections", "x1, y1, x2, y2"),
        **dict.fromkeys(("scores", "labels", "mask"), ("batch", "detections")),
    }

    def usual_size(self, config: Config) -> int | None:
        return 96 if config.data in DRAWN else 416

    def small(self, config: Config) -> dict[str, Any]:
        return dict(SMALL) if config.data in DRAWN else {}

    def open(self, config: Config, split: str) -> Opened:
        if draw := DRAWN.get(str(config.data)):
            key = random.fold_in(random.key(config.seed), int(split == "test"))
            return draw(key, drawn_images(config, split), config.image_size or 96, split)
        found = data.open_boxes(str(config.data), split=split, image_size=config.image_size)
        classes, most = len(found.classes), max([1, *(len(record.boxes) for record in found.records)])
        judged = split == "test"
        collate: Any = functools.partial(_collate_judged, most, classes) if judged else data.collate_boxes(
            most, num_classes=classes
        )  # fmt: skip
        samples = _Judged(found) if judged else found
        paths = tuple(str(record.path) for record in found.records)
        return Opened(samples, found.classes, found.mean, found.std, {"collate": collate}, paths, found.sizes())

    def decided(self, config: Config) -> dict[str, Any]:
        sized = {"image_size": config.image_size} if "image_size" in _options(config) else {}
        return super().decided(config) | sized

    def prepared(self, config: Config, source: Opened) -> Config:
        usual = _options(config).get("anchors")
        if usual is None or source.boxes is None or {"anchors", "weights"} & config.model_options.keys():
            return config
        shape = torch.tensor(usual.default).shape
        if len(source.boxes) < shape[:-1].numel():  # too few to make any
            return config
        found = data.anchors(source.boxes, shape[:-1].numel(), key=random.key(config.seed)).reshape(shape)
        return replace(config, model_options={**config.model_options, "anchors": found.tolist()})

    def check_model(self, config: Config, model: Model, output: torch.Size | None, shape: Sequence[int]) -> None:
        if not isinstance(model, Detector):
            raise ValueError(f"model {config.model} is not a detector; 'holofunc models' lists the detectors")
        if config.loss or config.label_smoothing:
            raise ValueError("loss is the detector's own; the weights of its terms are among the model_options")

    def objective_loss(self, config: Config, model: Model, *, smooth: bool) -> Callable[..., Any]:
        assert isinstance(model, Detector)
        return lambda outputs, targets: model.loss(outputs, _as_targets(targets))

    def measured(self, config: Config, model: Model, *, held_out: bool) -> dict[str, Metric]:
        if not held_out:
            return {}
        side = config.image_size or 1
        metric = metrics.coco(len(config.classes), image_size=(side, side))
        return {"coco": of_outputs(metric, functools.partial(self.outputs_of, model))}

    def outputs_of(self, model: Model, outputs: PyTree) -> PyTree:
        assert isinstance(model, Detector)
        return model.decode(outputs, score_threshold=0.01, max_detections=100)

    def draw(self, config: Config, model: Model, images: Tensor, outputs: PyTree, targets: PyTree) -> "Figure":
        assert isinstance(model, Detector)
        found = model.decode(outputs, score_threshold=0.3, max_detections=50)
        truth = _as_targets(targets)
        return plots.detections(
            images, found, truth, class_names=config.classes, mean=config.mean, std=config.std
        )  # fmt: skip

    def told(self, outputs: Any, classes: Sequence[str]) -> list[str]:
        def line(boxes: Tensor, scores: Tensor, labels: Tensor, mask: Tensor) -> str:
            rows = zip(boxes.tolist(), scores.tolist(), labels.tolist(), mask.tolist(), strict=True)
            found = [(classes[k], p, box) for box, p, k, there in rows if there and p >= 0.3]
            places = ((name, p, ", ".join(f"{x:.3f}" for x in box)) for name, p, box in found)
            return "; ".join(f"{name} {p:.2f} at {place}" for name, p, place in places) or "nothing"

        return [line(*one) for one in zip(*outputs, strict=True)]

    def summary(self, values: Mapping[str, Any]) -> str:
        return f"AP {values['coco/ap']:.3f}, AP50 {values['coco/ap50']:.3f}"


def _options(config: Config) -> Mapping[str, inspect.Parameter]:
    """Those of the network's constructor; none if there is no such network, which is said elsewhere."""
    constructor = constructors().get(str(config.model))
    return inspect.signature(constructor).parameters if constructor else {}


# --- sets that are drawn -----------------------------------------------------------------------------------------


def _canvases(key: Key, count: int, size: int, split: str) -> Opened:
    images, targets = data.canvases(key, count, size=size, split=split)
    return _drawn(images, targets, tuple("0123456789"), (0.25,), (0.2,))


def _shapes(key: Key, count: int, size: int, split: str) -> Opened:
    drawn = data.draw_shapes(key, count, size=size)
    targets = Targets(drawn.boxes, drawn.labels, drawn.present)
    return _drawn(drawn.images, targets, data.SHAPES, (0.5,) * 3, (0.25,) * 3)


def _drawn(
    images: Tensor, targets: Targets, classes: Sequence[str], mean: tuple[float, ...], std: tuple[float, ...]
) -> Opened:
    collate = data.collate_boxes(targets.mask.shape[1], num_classes=len(classes))
    boxes = targets.boxes[targets.mask]
    return Opened(data.Boxed(images, targets), tuple(classes), mean, std, {"collate": collate}, boxes=boxes)


DRAWN: Mapping[str, Callable[[Key, int, int, str], Opened]] = {"canvases": _canvases, "shapes": _shapes}
SMALL = {
    "layout": [[24, 0], [48, 0], [96, 1], [128, 1]], "stem_channels": 16, "head_channels": 128, "passthrough_ratio": 4,
}  # fmt: skip
"""YOLOv2 made narrow, on a grid of 16 pixels."""


# --- folders -----------------------------------------------------------------------------------------------------


class _Judged(Dataset[Any]):
    """Held-out images with all that COCO's evaluation asks of their boxes: which are crowds, and sizes in pixels."""

    def __init__(self, boxed: data.BoxedFiles) -> None:
        self.boxed = boxed

    def __len__(self) -> int:
        return len(self.boxed)

    def __getitem__(self, index: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        record = self.boxed.records[index]
        size = torch.tensor([record.height, record.width], dtype=torch.float32)
        return self.boxed[index][0], (record.boxes / size.flip(0).repeat(2), record.labels, record.ignored, size)


def _collate_judged(most: int, num_classes: int, samples: Sequence[Any]) -> tuple[Tensor, dict[str, Tensor]]:
    pairs = [(image, (boxes, labels)) for image, (boxes, labels, _, _) in samples]
    images, targets = data.collate_boxes(most, num_classes=num_classes)(pairs)
    crowd = torch.stack([F.pad(ignored, (0, most - len(ignored))) for _, (_, _, ignored, _) in samples])
    return images, {**targets._asdict(), "crowd": crowd, "sizes": torch.stack([size for _, (*_, size) in samples])}


def _as_targets(targets: Any) -> Targets:
    """What there is to find: no crowds."""
    if isinstance(targets, Targets):
        return targets
    return Targets(targets["boxes"], targets["labels"], targets["mask"] & ~targets["crowd"])
