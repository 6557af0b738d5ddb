"""Lists of all models, collected from the modules of the families; there is no registry."""

import difflib
import fnmatch
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from holofunc.model import Model
from holofunc.models import (
    convnext,
    darknet,
    mobileone,
    pyconv,
    recognition,
    repvgg,
    repvit,
    res2net,
    resnet,
    rexnet,
    sknet,
    small,
    tridentnet,
    unet,
    unet3p,
    unet_encoders,
    yolo1,
    yolo2,
    yolo4,
)
from holofunc.models.base import image_channels
from holofunc.models.weights import checkpoints

__all__ = ["Row", "constructors", "create", "list_models", "table"]

FAMILIES = {
    "classification": [
        *(convnext, darknet, mobileone, pyconv, repvgg, repvit),
        *(res2net, resnet, rexnet, sknet, small, tridentnet),
    ],
    "detection": [yolo1, yolo2, yolo4],
    "recognition": [recognition],
    "segmentation": [unet, unet3p, unet_encoders],
}
"""The modules of each task. Their public functions with a parameter ``num_classes`` are the constructors."""

INPUT_SIZES = {"classification": 224, "detection": 416, "recognition": 32, "segmentation": 256}
"""Height and width of the images for which `table` counts operations."""

OWN_SIZES = {"yolov1": 448, "yolov4": 608}
"""Sizes of models that are published for other image sizes."""


@functools.cache
def constructors(task: str | None = None) -> Mapping[str, Callable[..., Model]]:
    """All constructors of a task, or of all tasks, by name, sorted."""
    if task is not None and task not in FAMILIES:
        raise ValueError(f"task must be one of {', '.join(map(repr, FAMILIES))}, got {task!r}")
    modules = [m for name, family in FAMILIES.items() if task in (None, name) for m in family]
    named = {name: getattr(m, name) for m in modules for name in m.__all__}
    return {name: f for name, f in sorted(named.items()) if _constructs(f)}


def _constructs(f: Any) -> bool:
    return inspect.isfunction(f) and "num_classes" in inspect.signature(f).parameters


def list_models(pattern: str = "*", *, task: str | None = None, pretrained: bool | None = None) -> list[str]:
    """The names of the constructors.

    Args:
        pattern: a glob such as ``"resnet*"``.
        task: ``"classification"`` and so on; None is all.
        pretrained: only models with published weights (True), or only those without (False).

    Example:
        >>> from holofunc import models
        >>> models.list_models("resnet1*")
        ['resnet101', 'resnet152', 'resnet18']
        >>> models.list_models("resnet1*", pretrained=True)
        ['resnet18']
    """
    names = fnmatch.filter(constructors(task), pattern)
    return [n for n in names if pretrained is None or bool(checkpoints(n)) == pretrained]


def create(name: str, **options: Any) -> Model:
    """Build a model by the name of its constructor.

    Raises:
        ValueError: there is no such constructor; the message suggests similar names.

    Example:
        >>> from holofunc import models
        >>> models.create("resnet18", num_classes=2)
        Model(resnet18, 11,177,538 parameters)
    """
    if name not in constructors():
        alike = difflib.get_close_matches(name, constructors(), n=4)
        hint = f"did you mean {' or '.join(map(repr, alike))}?" if alike else "models.list_models() lists them"
        raise ValueError(f"there is no model named {name!r}: {hint}")
    return constructors()[name](**options)


class Row(NamedTuple):
    """One line of the table of models."""

    name: str
    task: str
    params: int
    macs: int
    """Multiply-adds for one image of ``input_size``."""
    input_size: int
    weights: tuple[str, ...]
    top1: float | None
    """Accuracy of the default weights on their data set."""
    dataset: str | None


def table(pattern: str = "*", *, task: str | None = None, pretrained: bool | None = None) -> list[Row]:
    """The models of `list_models` with parameters, multiply-adds and published weights.

    Counts are for 10 classes, and are made on the meta device.

    Example:
        >>> from holofunc import models
        >>> row = models.table("resnet18")[0]
        >>> row.params, round(row.macs / 1e9, 2), row.weights, row.top1
        (11181642, 1.81, ('resnet18.imagenette',), 0.9361)
    """
    tasks = {name: t for t in FAMILIES for name in constructors(t)}
    return [_row(name, tasks[name]) for name in list_models(pattern, task=task, pretrained=pretrained)]


def _row(name: str, task: str) -> Row:
    from torch.utils.flop_counter import FlopCounterMode  # imports triton

    model, published = create(name, num_classes=10), checkpoints(name)
    size = OWN_SIZES.get(name, INPUT_SIZES[task])
    images = torch.empty(1, image_channels(model.skeleton), size, size, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.skeleton(images)
    params = sum(p.numel() for p in model.skeleton.parameters())
    best = next((w for w in published if w.default), None)
    top1 = best.metrics.get("top1") if best else None
    weights = tuple(w.name for w in published)
    return Row(name, task, params, counter.get_total_flops() // 2, size, weights, top1, best.dataset if best else None)
