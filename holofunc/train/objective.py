"""Objectives: ``objective(params, buffers, batch, key) -> (loss, Aux)``, what a step differentiates."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
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
        outputs: the model's outputs, or whatever else; a step does not look at them.
        weight: what the loss is a mean over: the number of samples, or the sum of their weights where some count less
            or not at all. `holofunc.optim.multi_steps` weighs micro-batches by it. Nothing (an empty tuple,
            which transformations of `torch.func` let through) is the number of samples.
    """

    buffers: Buffers
    metrics: dict[str, Tensor]
    outputs: PyTree
    weight: Tensor | tuple[()] = ()


@dataclass(frozen=True)
class LossInfo:
    """What the signature of a loss says of targets; read when an objective is built, and never again.

    Attributes:
        ignore_index: the label that is left out; None if there is none.
        averages: whether the value is a mean over the targets that count, weighted by their classes.
        weight: the weights of the classes, shape (K,); None is one for all.
    """

    ignore_index: int | None = None
    averages: bool = False
    weight: Tensor | None = None

    @classmethod
    def of(cls, loss: Callable[..., Any]) -> "LossInfo":
        """Of a function, or a `functools.partial` of one; of what has no signature to read, nothing is known."""
        try:
            parameters = inspect.signature(loss).parameters
        except (TypeError, ValueError):
            return cls()
        default = {name: p.default for name, p in parameters.items()}
        labelled = {"ignore_index", "weight", "reduction"} <= default.keys() and "pos_weight" not in default
        positions = "mean_over" in default or getattr(loss, "func", loss) in (F.cross_entropy, F.nll_loss)
        weight = None if default.get("mean_over") == "samples" else default.get("weight")
        averages = labelled and positions and default["reduction"] == "mean"
        ignored = default.get("ignore_index")
        return cls(ignored if isinstance(ignored, int) else None, averages, weight if averages else None)

    def weights(self, targets: PyTree) -> Tensor | None:
        """What each sample counts in a mean over ``targets``, shape (N,); None if that is not known."""
        if not self.averages or not isinstance(targets, Tensor) or not targets.ndim or self.ignore_index is None:
            return None
        if not targets.is_floating_point():
            counts = torch.ne(targets, self.ignore_index)
            each = counts.float()
            if self.weight is not None:
                each = torch.where(counts, self.weight.to(targets.device)[torch.where(counts, targets, 0)], 0.0)
        elif self.weight is None:
            each = (targets != 0).any(1).to(targets.dtype)
        else:
            mass = targets.sum(1)
            each = torch.tensordot(targets, self.weight.to(targets), dims=([1], [0])) / torch.where(mass == 0, 1, mass)
        return each.flatten(1).sum(1) if each.ndim > 1 else each


@dataclass(frozen=True)
class Supervised:
    """The objective that `supervised` makes: calling it evaluates model and loss on a batch ``(images, targets)``."""

    model: Model
    loss: Callable[..., Any]
    metrics: Mapping[str, Metric]
    precision: str
    about_loss: LossInfo
    weight: Callable[[PyTree, PyTree], Tensor] | None = None

    def __call__(self, params: Params, buffers: Buffers, batch: Batch, key: Key) -> tuple[Tensor, Aux]:
        images, targets = pair(batch)
        outputs, buffers = run_model(self.model, self.precision, params, buffers, images, train=True, key=key)
        loss, parts = total_loss(self.loss, outputs, targets)
        measured = {
            name: m.compute(m.update(m.init(device=loss.device), outputs, targets)) for name, m in self.metrics.items()
        }
        if self.weight is not None:
            weight: Tensor | tuple[()] = self.weight(outputs, targets)
        else:
            each = self.about_loss.weights(targets)
            weight = () if each is None else each.sum()
        return loss, Aux(buffers, {**parts, **flat(measured)}, outputs, weight)

    @property
    def gradient_scale(self) -> float:
        """What gradients are multiplied by inside the network, and divided by where they leave it."""
        return FP16_SCALE if PRECISIONS[self.precision] is torch.float16 else 1.0

    def check(self, batch: Batch) -> None:
        """Refuse a batch that no step should see; runs outside of graphs, because it reads the labels' values.

        Raises:
            TypeError, ValueError: naming what is wrong with the images or the targets.
        """
        images, targets = pair(batch)
        check_lengths(images, targets)
        check_label_values(self.model, self.about_loss.ignore_index, images, targets)


def supervised(
    model: Model,
    loss: Callable[..., Any],
    *,
    metrics: Mapping[str, Metric] | None = None,
    precision: str = "fp32",
    weight: Callable[[PyTree, PyTree], Tensor] | None = None,
    frozen: Mapping[str, bool] | None = None,
) -> Supervised:
    """The objective of supervised learning: ``loss(model(images), targets)`` in train mode.

    Args:
        model: evaluated with ``train=True``.
        loss: ``loss(outputs, targets)``, a 0-d tensor, or a dict of them: their sum is minimized, the parts reported.
        weight: ``weight(outputs, targets)``, 0-d: what the loss is a mean over (`Aux.weight`). None is, for a loss with
            the arguments of `holofunc.losses.cross_entropy`, the weight of the targets that are not ignored; for others
            the number of samples.
        metrics: what to measure on the same outputs, by name, e.g. ``{"accuracy": metrics.accuracy()}``.
        frozen: the mask that `holofunc.optim.freeze` has: modules all of whose parameters are frozen are evaluated in
            eval mode, so that their BatchNorm statistics stand still and their dropout is off.
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
    if weight is not None and not callable(weight):
        raise TypeError(f"weight must be callable, weight(outputs, targets), or None, got {weight!r}")
    check_precision(precision)
    if frozen is not None:
        model = model.with_frozen(_frozen_modules(frozen))
    return Supervised(model, loss, dict(metrics or {}), precision, LossInfo.of(loss), weight)


def _frozen_modules(mask: Mapping[str, bool]) -> list[str]:
    """The names of the modules all of whose parameters are frozen."""
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
    outputs = tree.map(lambda x: x.float() if x.is_floating_point() else x, outputs)
    return (tree.map(lambda x: _with_gradient_times(x, FP16_SCALE), outputs) if scaled else outputs), buffers


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


def check_label_values(model: Model, ignored: int | None, images: Tensor, targets: Any) -> None:
    """Refuse labels out of range, if the loss knows an ``ignore_index`` and looking costs no synchronization."""
    model.check_inputs(images)
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.device.type != "cpu":
        return
    if not tree.is_known(targets):  # mapped over the members of a population
        return
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
