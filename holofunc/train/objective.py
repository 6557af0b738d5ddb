"""Objectives: ``objective(params, buffers, batch, key) -> (loss, Aux)``, what a step differentiates."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from holofunc import tree
from holofunc.metrics import Metric
from holofunc.model import Model
from holofunc.typing import Batch, Buffers, Key, Params, PyTree

__all__ = ["Aux", "Supervised", "supervised"]

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
FP16_SCALE = 2.0**12
"""Gradients inside an fp16 network are this much larger, so that small ones do not vanish."""


class Aux(NamedTuple):
    """What an objective returns beside the loss.

    Attributes:
        buffers: the renewed buffers.
        metrics: 0-d tensors by name.
        outputs: the model's outputs.
    """

    buffers: Buffers
    metrics: dict[str, Tensor]
    outputs: PyTree


@dataclass(frozen=True)
class Supervised:
    """The objective that `supervised` makes: calling it evaluates model and loss on a batch ``(images, targets)``."""

    model: Model
    loss: Callable[..., Any]
    metrics: Mapping[str, Metric]
    precision: str

    def __call__(self, params: Params, buffers: Buffers, batch: Batch, key: Key) -> tuple[Tensor, Aux]:
        images, targets = pair(batch)
        outputs, buffers = run_model(self.model, self.precision, params, buffers, images, train=True, key=key)
        loss, parts = total_loss(self.loss, outputs, targets)
        measured = {
            name: m.compute(m.update(m.init(device=loss.device), outputs, targets)) for name, m in self.metrics.items()
        }
        return loss, Aux(buffers, {**parts, **flat(measured)}, outputs)

    def check(self, batch: Batch) -> None:
        """Refuse a batch that no step should see; runs outside of graphs, because it reads the labels' values.

        Raises:
            TypeError, ValueError: naming what is wrong with the images or the targets.
        """
        images, targets = pair(batch)
        check_lengths(images, targets)
        check_label_values(self.model, self.loss, images, targets)


def supervised(
    model: Model,
    loss: Callable[..., Any],
    *,
    metrics: Mapping[str, Metric] | None = None,
    precision: str = "fp32",
) -> Supervised:
    """The objective of supervised learning: ``loss(model(images), targets)`` in train mode.

    Args:
        model: evaluated with ``train=True``.
        loss: ``loss(outputs, targets)``, a 0-d tensor, or a dict of them: their sum is minimized, the parts reported.
        metrics: what to measure on the same outputs, by name, e.g. ``{"accuracy": metrics.accuracy()}``.
        precision: ``"fp32"``; ``"bf16"`` or ``"fp16"`` run the model under autocast. Parameters, gradients, loss and
            metrics stay in fp32; fp16 scales the gradients inside the network by 4096.

    Returns:
        ``objective(params, buffers, batch, key) -> (loss, Aux(buffers, metrics, outputs))`` for batches
        ``(images, targets)``. Any function of this signature serves in its place.

    Raises:
        ValueError: an unknown ``precision``. TypeError: ``loss`` is not callable.

    Example:
        >>> import torch
        >>> from holofunc import lift, losses, random, train
        >>> model = lift(torch.nn.Linear, 3, 2)
        >>> params, buffers = model.init(random.key(0))
        >>> objective = train.supervised(model, losses.cross_entropy)
        >>> loss, aux = objective(params, buffers, (torch.zeros(4, 3), torch.tensor([0, 1, 0, 1])), random.key(1))
        >>> aux.outputs.shape
        torch.Size([4, 2])
    """
    if not callable(loss):
        raise TypeError(f"loss must be callable, loss(outputs, targets), got {loss!r}")
    check_precision(precision)
    return Supervised(model, loss, dict(metrics or {}), precision)


# --- shared with evaluation --------------------------------------------------------------------------------------


def check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(map(repr, PRECISIONS))}, got {precision!r}")


def run_model(
    model: Model,
    precision: str,
    params: Params,
    buffers: Buffers,
    images: Tensor,
    *,
    train: bool = False,
    key: Key | None = None,
) -> tuple[PyTree, Buffers]:
    """The outputs in fp32, and the renewed buffers."""
    half = PRECISIONS[precision]
    if half is None:
        return model.apply(params, buffers, images, train=train, key=key)
    scaled = train and half is torch.float16
    if scaled:
        params = {name: _with_gradient_times(p, 1 / FP16_SCALE) for name, p in params.items()}
    with torch.autocast(images.device.type, dtype=half):
        outputs, buffers = model.apply(params, buffers, images, train=train, key=key)
    outputs = outputs.float()
    return (_with_gradient_times(outputs, FP16_SCALE) if scaled else outputs), buffers


def _with_gradient_times(x: Tensor, factor: float) -> Tensor:
    return x.detach() + factor * (x - x.detach()) if x.is_floating_point() else x


def total_loss(loss: Callable[..., Any], outputs: PyTree, targets: PyTree) -> tuple[Tensor, dict[str, Tensor]]:
    """The number to minimize and, if the loss is a dict, its parts."""
    value = loss(outputs, targets)
    if isinstance(value, Mapping):
        return torch.stack(list(value.values())).sum(), dict(value)
    return value, {}


def flat(measured: Mapping[str, Any]) -> dict[str, Tensor]:
    """Metrics by name; one that computes a dict contributes ``name/key``."""
    named: dict[str, Tensor] = {}
    for name, value in measured.items():
        named.update({f"{name}/{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {name: value})
    return named


def pair(batch: Batch) -> tuple[Any, Any]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        got = f"{type(batch).__name__} of {len(batch)}" if hasattr(batch, "__len__") else type(batch).__name__
        raise TypeError(f"batch must be a pair (images, targets), got {got}; write an objective for other batches")
    return batch[0], batch[1]


def check_lengths(images: Any, targets: Any) -> None:
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a tensor, got {type(images).__name__}")
    if len(images) == 0:
        raise ValueError(f"images must hold at least one image, got shape {tuple(images.shape)}")
    if isinstance(targets, Tensor) and (targets.ndim == 0 or len(targets) != len(images)):
        raise ValueError(f"images and targets must be of one length, got {len(images)} and {tuple(targets.shape)}")


def check_label_values(model: Model, loss: Callable[..., Any], images: Tensor, targets: Any) -> None:
    """Refuse labels out of range, if the loss knows an ``ignore_index`` and looking costs no synchronization."""
    model.check_inputs(images)
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.device.type != "cpu":
        return
    if not tree.is_known(targets):  # mapped over the members of a population
        return
    ignored = _ignore_index(loss)
    if ignored is None or not targets.numel():
        return
    try:
        outputs = model.output_shape(images)
    except (IndexError, RuntimeError, TypeError, ValueError):  # the forward pass says what it cannot take
        return
    if outputs is None or len(outputs) != targets.ndim + 1:
        return
    low, high = (int(x) for x in torch.aminmax(targets))
    if low >= 0 and high < outputs[1]:
        return
    wrong = targets[((targets < 0) | (targets >= outputs[1])) & (targets != ignored)]
    if wrong.numel():
        raise ValueError(
            f"targets must be in [0, {outputs[1]}) or equal ignore_index={ignored}, got {wrong.flatten()[0]}"
        )


def _ignore_index(loss: Callable[..., Any]) -> int | None:
    """The label that a loss leaves out; None if it knows none, or has no signature to read."""
    try:
        parameter = inspect.signature(loss).parameters.get("ignore_index")
    except (TypeError, ValueError):
        return None
    return None if parameter is None else parameter.default
