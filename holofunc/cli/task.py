"""What the commands have to know of a task: its data, its network, what is minimized and measured, how it is drawn."""

import functools
import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset

from holofunc import data, losses
from holofunc.config import Config, call
from holofunc.metrics import Metric
from holofunc.metrics.registry import METRICS
from holofunc.model import Model
from holofunc.typing import PyTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "IMAGES",
    "Opened",
    "Task",
    "arguments",
    "built",
    "extra_metrics",
    "known",
    "of_outputs",
    "parameters",
    "pixels",
]


class Opened(NamedTuple):
    """The data of a split.

    Attributes:
        data: what `holofunc.data.Batches` takes.
        classes: names of the classes, or characters.
        mean: of each channel, subtracted from the images.
        std: of each channel, which they are divided by.
        options: of `Batches`, for targets of this task.
        paths: files of the images, if they have any.
        boxes: all true boxes, (M, 4), of which anchors are made.
    """

    data: Any
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    options: Mapping[str, Any]
    paths: tuple[str, ...] = ()
    boxes: Tensor | None = None

    def batches(self, batch_size: int, **options: Any) -> data.Batches:
        return data.Batches(self.data, batch_size, **{"mean": self.mean, "std": self.std, **self.options, **options})

    def at(self, rows: Sequence[int]) -> "Opened":
        """Some of the samples."""
        chosen = list(rows)
        pair = isinstance(self.data, tuple)
        samples = tuple(part[chosen] for part in self.data) if pair else Subset(self.data, chosen)
        return self._replace(data=samples, paths=tuple(self.paths[i] for i in chosen) if self.paths else ())


IMAGES = ("batch", "channels", "height", "width")


class Task(ABC):
    """A kind of job. Outputs have the images as their first dimension, whatever those of the network have.

    Attributes:
        sources: how ``data`` may begin, the default first.
        model: the default network.
        monitor: the evaluation that says which step is the best.
        loss: the names of the losses that are added up by default; none is the network's own.
        axes: what the dimensions of an exported network's inputs and outputs are, by their names.
    """

    sources: ClassVar[tuple[str, ...]]
    model: ClassVar[str]
    monitor: ClassVar[str]
    loss: ClassVar[tuple[str, ...]]
    axes: ClassVar[Mapping[str, Sequence[str]]]

    def settled(self, config: Config) -> Config:
        """With this task's defaults. A network for images that are drawn is a small one, if none is asked for."""
        config = replace(config, data=config.data or self.sources[0])
        name = (config.data or "").partition(":")[0]
        if name not in {source.partition(":")[0] for source in self.sources}:
            wanted = f"{', '.join(self.sources[:-1])} or {self.sources[-1]}"
            raise ValueError(f"data must be {wanted}, got {config.data!r}")
        if config.model is None:
            options = {**self.small(config), **config.model_options}
            config = replace(config, model=self.model, model_options=options)
        return replace(config, image_size=config.image_size or self.usual_size(config))

    def usual_size(self, config: Config) -> int | None:
        """Pixels of the images, if nothing else is said; None is for data that have a size of their own."""
        return None

    def small(self, config: Config) -> dict[str, Any]:
        """Options that make the default network small enough for the data that come with the package."""
        return {}

    @abstractmethod
    def open(self, config: Config, split: str) -> Opened:
        """The data of ``"train"`` or ``"test"``, checked; ``config.classes``, if there are any, are the network's."""

    def decided(self, config: Config) -> dict[str, Any]:
        """The options of the network that the data decide."""
        return {"num_classes": len(config.classes), "in_channels": len(config.mean)}

    def prepared(self, config: Config, source: Opened) -> Config:
        """With what a new run finds in its training data and keeps."""
        return config

    @abstractmethod
    def check_model(self, config: Config, model: Model, output: torch.Size | None, shape: Sequence[int]) -> None:
        """Refuse a network of another task, by the shape of its output for an image of this shape."""

    def by_image(self, model: Model) -> Model:
        """The network with outputs whose first dimension is the images."""
        return model

    def objective_loss(self, config: Config, model: Model, *, smooth: bool) -> Callable[..., Any]:
        """What is minimized; measured on held-out data it is without label smoothing."""
        texts = config.loss or self.loss
        smoothing = config.label_smoothing if smooth else 0.0
        terms = {call(text)[0]: self.term(text, smoothing) for text in texts}
        if len(terms) < len(texts):
            raise ValueError(f"loss must have different names, got {', '.join(texts)}")
        if smoothing and not any("label_smoothing" in parameters(LOSSES[call(text)[0]]) for text in texts):
            raise ValueError(f"label_smoothing must be 0 for {', '.join(texts)}, got {smoothing:g}")
        if len(terms) == 1:
            return next(iter(terms.values()))
        return lambda outputs, targets: {name: term(outputs, targets) for name, term in terms.items()}

    def term(self, text: str, smoothing: float) -> Callable[..., Any]:
        name, options = call(text)
        loss = known("loss", name, LOSSES)
        if smoothing and "label_smoothing" in parameters(loss):
            options = {"label_smoothing": smoothing, **options}
        return functools.partial(loss, **arguments(f"loss {name}", loss, options, first=2)) if options else loss

    @abstractmethod
    def measured(self, config: Config, model: Model, *, held_out: bool) -> dict[str, Metric]:
        """Metrics by name: of the batches of training, or of an evaluation, those of ``config.metrics`` aside."""

    def outputs_of(self, model: Model, outputs: PyTree) -> PyTree:
        """What metrics take, made of the network's outputs."""
        return outputs

    @abstractmethod
    def draw(self, config: Config, model: Model, images: Tensor, outputs: PyTree, targets: PyTree) -> "Figure":
        """A picture of some images with what the network says of them."""

    def pixels(self, image: Image.Image, shape: Sequence[int]) -> Tensor:
        """A picture as the network takes it, uint8 (C, H, W): stretched, if nothing else is said."""
        return pixels(image.resize((shape[2], shape[1]), Image.Resampling.BILINEAR), shape[0])

    @abstractmethod
    def told(self, outputs: Any, classes: Sequence[str]) -> list[str]:
        """What an exported network says of each image, in words; ``outputs`` are those of its file."""

    @abstractmethod
    def summary(self, values: Mapping[str, Any]) -> str:
        """The result of an evaluation in a few words."""


LOSSES: Mapping[str, Callable[..., Any]] = {
    name: function
    for name, function in vars(losses).items()
    if name in losses.__all__ and list(inspect.signature(function).parameters)[:2] == ["logits", "targets"]
}


def pixels(image: Image.Image, channels: int) -> Tensor:
    """A picture, grey or in colour, as uint8 (C, H, W)."""
    array = np.array(image.convert("L" if channels == 1 else "RGB"))
    return torch.from_numpy(array.reshape(*array.shape[:2], channels)).permute(2, 0, 1)


def extra_metrics(task: Task, config: Config, model: Model) -> dict[str, Metric]:
    """Those of ``config.metrics``, by the text that asks for them."""
    found = {}
    for text in config.metrics:
        name, options = call(text)
        make = known("metrics", name, METRICS)
        if "num_classes" in parameters(make):
            options = {"num_classes": len(config.classes), **options}
        metric = built(f"metrics {name}", make, options)
        found[re.sub(r"\s", "", text)] = of_outputs(metric, functools.partial(task.outputs_of, model))
    return found


def of_outputs(metric: Metric, change: Callable[[PyTree], PyTree]) -> Metric:
    """The metric of ``change(outputs)``."""

    def update(state: PyTree, outputs: PyTree, targets: PyTree = None, *, weights: Tensor | None = None) -> PyTree:
        return metric.update(state, change(outputs), targets, weights=weights)

    return metric._replace(update=update)


# --- functions by name -------------------------------------------------------------------------------------------


def parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def known(what: str, name: str, table: Mapping[str, Any]) -> Any:
    if name not in table:
        raise ValueError(f"{what} must be one of {', '.join(sorted(table))}, got {name!r}")
    return table[name]


def arguments(what: str, function: Callable[..., Any], options: Mapping[str, Any], *, first: int = 0) -> dict[str, Any]:
    """The options, if the function has them all after its first parameters."""
    accepted = parameters(function)[first:]
    if unknown := options.keys() - set(accepted):
        raise ValueError(f"{what} has no option {', '.join(sorted(unknown))}; it has {', '.join(accepted)}")
    return dict(options)


def built(what: str, function: Callable[..., Any], options: Mapping[str, Any]) -> Any:
    """``function(**options)``; what it refuses is said of ``what``."""
    try:
        return function(**arguments(what, function, options))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what}: {error}") from error
