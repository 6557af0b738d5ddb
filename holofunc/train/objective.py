"""Objectives ``objective(params, buffers, batch, key) -> (loss, Aux)``, the functions that a step differentiates."""

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from holofunc import tree
from holofunc.metrics import Metric
from holofunc.model import Model
from holofunc.ops.arithmetic import upcast
from holofunc.train.criterion import Criterion, total_loss
from holofunc.typing import Batch, Buffers, ChecksTargets, Key, Params, PyTree

__all__ = ["Aux", "Supervised", "supervised", "total_loss"]

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
FP16_SCALE = 2.0**12
"""The factor of gradients inside an fp16 network, so that small ones do not underflow."""


class Aux(NamedTuple):
    """The second result of an objective.

    Attributes:
        buffers: the updated buffers.
        metrics: 0-d tensors by name.
        outputs: the model's outputs or anything else; a step does not use them.
        weight: the total weight that the loss is a mean over: the number of samples, or the sum of their weights.
            `holofunc.optim.multi_steps` weights micro-batches by it. The default, an empty tuple (which passes through
            `torch.func`), is the number of samples.
    """

    buffers: Buffers
    metrics: dict[str, Tensor]
    outputs: PyTree
    weight: Tensor | tuple[()] = ()


@dataclass(frozen=True)
class Supervised:
    """The objective that `supervised` makes: calling it evaluates model and loss on a batch ``(images, targets)``."""

    model: Model
    criterion: Criterion
    metrics: Mapping[str, Metric]
    precision: str
    weight: Callable[[PyTree, PyTree], Tensor] | None = None

    @property
    def loss(self) -> Callable[..., Any]:
        """The loss function."""
        return self.criterion.loss

    def __call__(self, params: Params, buffers: Buffers, batch: Batch, key: Key) -> tuple[Tensor, Aux]:
        images, targets = pair(batch)
        outputs, buffers = run_model(self.model, self.precision, params, buffers, images, train=True, key=key)
        loss, parts, mass = self.criterion(outputs, targets, key)
        measured = {
            name: m.compute(m.update(m.init(device=loss.device), outputs, targets)) for name, m in self.metrics.items()
        }
        weight = mass if self.weight is None else self.weight(outputs, targets)
        return loss, Aux(buffers, {**parts, **flat(measured)}, outputs, () if weight is None else weight)

    @property
    def gradient_scale(self) -> float:
        """The factor by which gradients are scaled inside the network."""
        return FP16_SCALE if PRECISIONS[self.precision] is torch.float16 else 1.0

    def check(self, batch: Batch) -> None:
        """Check a batch. Runs outside graphs, because it reads the values of labels.

        Raises:
            TypeError, ValueError: the images or the targets are invalid.
        """
        images, targets = pair(batch)
        check_lengths(images, targets)
        check_values(self.model, self.criterion, images, targets)


def supervised(
    model: Model,
    loss: Callable[..., Any],
    *,
    metrics: Mapping[str, Metric] | None = None,
    precision: str = "fp32",
    weight: Callable[[PyTree, PyTree], Tensor] | None = None,
    frozen: Mapping[str, bool] | None = None,
    remat: str | Collection[str] = (),
) -> Supervised:
    """The objective of supervised learning: ``loss(model(images), targets)`` in train mode.

    Args:
        model: evaluated with ``train=True``.
        loss: ``loss(outputs, targets)``, a 0-d tensor, or a dict of them, whose sum is minimized and whose values are
            reported. A loss with a keyword ``key`` (`holofunc.losses.mutual_channel`) gets a new key in each step.
        weight: ``weight(outputs, targets)``, 0-d: the total weight that the loss is a mean over (`Aux.weight`). None
            is the divisor of a loss of `holofunc.losses` (recognized by its keyword arguments ``weight`` and
            ``reduction``, and by ``reduction="parts"``); for other losses it is the number of samples.
        metrics: metrics of the same outputs, by name, e.g. ``{"accuracy": metrics.accuracy()}``.
        frozen: the mask of `holofunc.optim.freeze`: modules whose parameters are all frozen are evaluated in eval
            mode, so that their BatchNorm statistics do not change and their dropout is off.
        remat: modules whose activations are recomputed in the backward pass instead of being kept (activation
            checkpointing), by name (``"features.4"``) or pattern (``"layer?.*"``): less memory for about a third more
            time. Gradients, random draws and statistics are the same.
        precision: ``"fp32"``; ``"bf16"`` or ``"fp16"`` run the model under autocast. Parameters, gradients, loss and
            metrics stay in fp32; fp16 scales the gradients inside the network by 4096.

    Returns:
        ``objective(params, buffers, batch, key) -> (loss, Aux(buffers, metrics, outputs))`` for batches
        ``(images, targets)``. Any function of this signature can be used instead.

    Raises:
        ValueError: ``precision`` is unknown, or ``remat`` matches no module. TypeError: ``loss`` is not callable.

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
    if loss is None:
        raise TypeError("loss must be callable, loss(outputs, targets), got None")
    check_parts(model, metrics or {}, loss)
    if weight is not None and not callable(weight):
        raise TypeError(f"weight must be callable, weight(outputs, targets), or None, got {weight!r}")
    check_precision(precision)
    if frozen is not None:
        model = model.with_frozen(_frozen_modules(frozen))
    if remat:
        model = model.with_remat([remat] if isinstance(remat, str) else remat)
    return Supervised(model, Criterion.of(loss), dict(metrics or {}), precision, weight)


def _frozen_modules(mask: Mapping[str, bool]) -> list[str]:
    """The names of the modules whose parameters are all frozen."""
    inside: dict[str, bool] = {}
    for name, frozen in mask.items():
        parts = name.split(".")[:-1]
        for depth in range(1, len(parts) + 1):
            module = ".".join(parts[:depth])
            inside[module] = inside.get(module, True) and frozen
    return [module for module, frozen in inside.items() if frozen]


# --- shared with evaluation --------------------------------------------------------------------------------------


def check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(map(repr, PRECISIONS))}, got {precision!r}")


def check_parts(model: Any, metrics: Any, loss: Any = None) -> None:
    """Raise if an argument is not a model, a dict of metrics or a loss."""
    if not isinstance(model, Model):
        advice = ": lift its constructor, or use from_module" if isinstance(model, nn.Module) else ""
        raise TypeError(f"model must be a holofunc.Model, got {type(model).__name__}{advice}")
    if loss is not None and (not callable(loss) or isinstance(loss, type)):
        advice = f": call {loss.__name__}() first" if isinstance(loss, type) else ""
        raise TypeError(f"loss must be callable, loss(outputs, targets), got {loss!r}{advice}")
    if not isinstance(metrics, Mapping):
        raise TypeError(f"metrics must be a dict of metrics by name, got {type(metrics).__name__}")
    for name, metric in metrics.items():
        if not isinstance(metric, Metric):
            advice = f": call {metric.__name__}(...) first" if inspect.isfunction(metric) else ""
            raise TypeError(f"metrics[{name!r}] must be a holofunc.metrics.Metric, got {metric!r}{advice}")


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
    """The outputs in fp32, and the updated buffers."""
    half = PRECISIONS[precision]
    if half is None:
        return model.apply(params, buffers, images, train=train, key=key)
    scaled = train and half is torch.float16
    if scaled:
        params = {name: _with_gradient_times(p, 1 / FP16_SCALE) for name, p in params.items()}
    with torch.autocast(tree.leaves(images)[0].device.type, dtype=half):
        outputs, buffers = model.apply(params, buffers, images, train=train, key=key)
    outputs = tree.map(lambda x: upcast(x) if x.is_floating_point() else x, outputs)
    return (tree.map(lambda x: _with_gradient_times(x, FP16_SCALE), outputs) if scaled else outputs), buffers


def _with_gradient_times(x: Tensor, factor: float) -> Tensor:
    if not x.is_floating_point():
        return x
    return x.detach() + factor * torch.where(x.isfinite(), x - x.detach(), 0)  # masked values may be infinite


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
        advice = "" if targets.ndim else ": one sample is no batch, see holofunc.data.Batches"
        raise ValueError(
            f"images and targets must be of one length, got {len(images)} and {tuple(targets.shape)}{advice}"
        )


def check_values(model: Model, criterion: Criterion, images: Tensor, targets: Any) -> None:
    """Raise for targets out of range, if reading them needs no synchronization."""
    model.check_inputs(images)
    if criterion.adds_up and not any(isinstance(x, Tensor) for x in tree.leaves(targets)):
        raise TypeError(f"targets must be a tensor, got {type(targets).__name__}")
    if not all(isinstance(x, Tensor) and x.device.type == "cpu" and tree.is_known(x) for x in tree.leaves(targets)):
        return  # or under vmap, as in a population
    if criterion.loss == getattr(model, "loss", None) and isinstance(model, ChecksTargets):  # for its own loss
        model.check_targets(targets)
    elif isinstance(targets, Tensor) and not targets.is_floating_point() and targets.numel():
        _check_labels(model, criterion, images, targets)


def _check_labels(model: Model, criterion: Criterion, images: Tensor, labels: Tensor) -> None:
    ignored = criterion.ignore_index
    if ignored is None:
        return
    try:
        outputs = model.output_shape(images)
    except (IndexError, RuntimeError, TypeError, ValueError):  # left to the error of the forward pass
        return
    if outputs is None or len(outputs) != labels.ndim + 1:
        return
    classes = outputs[-1 if criterion.batch_axis else 1]
    low, high = (int(x) for x in torch.aminmax(labels))
    if low >= 0 and high < classes:
        return
    wrong = labels[((labels < 0) | (labels >= classes)) & (labels != ignored)]
    if wrong.numel():
        raise ValueError(f"targets must be in [0, {classes}) or equal ignore_index={ignored}, got {wrong.flatten()[0]}")
