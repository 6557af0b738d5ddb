"""The training step: a pure function ``step(state, batch) -> (state, metrics)``."""

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from holofunc import distributed, random, tree
from holofunc.compile import Checked
from holofunc.optim.base import GradientTransformation, apply_updates, as_transformation, flush
from holofunc.optim.capabilities import looks_twice, loss_scale, skipped
from holofunc.train.objective import Aux, Supervised
from holofunc.train.state import TrainState
from holofunc.typing import Batch, Buffers, Key, Objective, Params, PyTree, Scalar

__all__ = ["Gradient", "TrainStep", "is_samples", "make_train_step", "num_samples"]

Measure = Callable[[Params, Params, Params], Mapping[str, Any]]


class Gradient(NamedTuple):
    """The result of the first half of a step, passed to the second half."""

    grads: Params
    loss: Tensor
    buffers: Buffers
    metrics: dict[str, Tensor]
    weight: Tensor
    outputs: PyTree = ()


@dataclass(frozen=True)
class TrainStep(Checked):
    """A pure function ``step(state, batch) -> (state, metrics)``, made by `make_train_step`.

    Attributes:
        gradient: ``gradient(state, batch) -> Gradient``.
        update: ``update(state, gradient, batch) -> (state, metrics)``; the batch is for second gradients.
        check_batch: raises for an invalid batch; None checks nothing. It may read values, and runs outside graphs, once
            per step.
        finish: ``finish(state) -> state``: applies an incomplete accumulation of gradients, at the end of a run.
        settings: information for hooks, such as the ``precision`` of the objective.
    """

    gradient: Callable[[TrainState, Batch], Gradient]
    update: Callable[[TrainState, Gradient, Batch], tuple[TrainState, dict[str, Tensor]]]
    check_batch: Callable[[Batch], None] | None
    finish: Callable[[TrainState], TrainState]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def run(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Tensor]]:
        return self.update(state, self.gradient(state, batch), batch)

    def check(self, state: TrainState, batch: Batch) -> None:
        if self.check_batch is not None:
            self.check_batch(batch)


def make_train_step(
    objective: Objective,
    tx: GradientTransformation,
    *,
    augment: Callable[[Batch, Key], Batch] | None = None,
    measure: Measure | None = None,
    check: Callable[[Batch], None] | None = None,
    outputs: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> TrainStep:
    """Make a training step that minimizes an objective.

    Args:
        objective: ``objective(params, buffers, batch, key) -> (loss, Aux)``, for instance made by `supervised`.
        tx: gets the gradients and, as extra arguments, ``loss``, ``buffers`` (the new ones), ``weight`` (`Aux.weight`,
            by default the number of samples: `num_samples`) and, if it needs second gradients like `sam`, ``grad_fn``
            and ``value_and_grad_fn``: the gradient of this batch at other parameters, alone and with the loss.
        augment: ``augment(batch, key) -> batch``, on the device, inside the step.
        measure: ``measure(grads, updates, params) -> {name: 0-d tensor}``: metrics of gradients, updates and the
            parameters before the update (norms per layer, say), reported with the others.
        outputs: whether to return `Aux.outputs` among the metrics, as ``outputs``; `Event.outputs` in `fit`.
        settings: information for hooks and logs (`RunInfo.settings`), such as ``{"clip": 1.0}``, without any effect.
        check: raises for an invalid batch; None is the check of `supervised`, if it made the objective.

    Returns:
        A pure function ``step(state, batch) -> (state, metrics)``. ``metrics`` are 0-d tensors: ``loss``, ``grad_norm``
        (before any clipping) and those of the objective and ``measure``.

    Example:
        >>> import torch
        >>> from holofunc import lift, losses, optim, random, train
        >>> model, tx = lift(torch.nn.Linear, 3, 2), optim.sgd(0.1)
        >>> step = train.make_train_step(train.supervised(model, losses.cross_entropy), tx)
        >>> state = train.create_state(model, tx, random.key(0))
        >>> state, metrics = step(state, (torch.ones(4, 3), torch.tensor([0, 1, 0, 1])))
        >>> state.step, sorted(metrics)
        (tensor(1), ['grad_norm', 'loss'])
    """
    tx = as_transformation("tx", tx)
    given = {n: f for n, f in {"augment": augment, "measure": measure, "check": check}.items() if f is not None}
    for name, value in {"objective": objective, **given}.items():
        if not callable(value):
            raise TypeError(f"{name} must be callable, got {value!r}")
    own_scale, told = 1.0, dict(settings or {})
    if isinstance(objective, Supervised):
        check = check or objective.check
        own_scale, told = objective.gradient_scale, {"precision": objective.precision, **told}

    def scaled(scale: Scalar, params: Params, buffers: Buffers, batch: Batch, key: Key) -> tuple[Tensor, Any]:
        loss, aux = _parts_of(objective(params, buffers, batch, key))
        kept = _tensors_of(aux, batch, loss)
        return loss * scale, (loss, *kept, aux.outputs if outputs else ())

    def look(state: TrainState, batch: Batch, params: Params) -> tuple[Params, tuple[Any, ...]]:
        model_key, augment_key = random.split(random.fold_in(state.key, state.step))
        if augment is not None:
            batch = augment(batch, augment_key)
        scale = loss_scale(state.opt_state)
        factor = 1.0 if scale is None else scale / own_scale
        of_params = functools.partial(scaled, factor, buffers=state.buffers, batch=batch, key=model_key)
        grads, (_, aux) = torch.func.grad_and_value(of_params, has_aux=True)(params)
        return grads if scale is None else tree.map(lambda g: g / factor, grads), aux

    def gradient(state: TrainState, batch: Batch) -> Gradient:
        grads, aux = look(state, batch, state.params)
        return Gradient(grads, *aux)

    def update(state: TrainState, gradient: Gradient, batch: Batch) -> tuple[TrainState, dict[str, Tensor]]:
        grads, loss, buffers, metrics, weight, out = gradient
        extra: dict[str, Any] = {"loss": loss, "buffers": buffers, "weight": weight}
        if looks_twice(state.opt_state):  # known when tracing
            extra["grad_fn"] = lambda params: look(state, batch, params)[0]
            extra["value_and_grad_fn"] = lambda params: _loss_first(*look(state, batch, params))
        updates, opt_state = tx.update(grads, state.opt_state, state.params, **extra)
        params, skip = apply_updates(state.params, updates), skipped(opt_state)
        if skip is not None:
            buffers = tree.where(skip, state.buffers, buffers)
        measured = {} if measure is None else _numbers(measure(grads, updates, state.params), loss)
        new = TrainState(state.step + 1, params, buffers, opt_state, state.key)
        losses = distributed.over_ranks(opt_state, {"loss": loss, "grad_norm": tree.global_norm(grads)})
        return new, {**losses, **metrics, **measured} | ({"outputs": out} if outputs else {})

    def finish(state: TrainState) -> TrainState:
        updates, opt_state = flush(tx, state.opt_state, state.params, buffers=state.buffers)
        if opt_state is state.opt_state:  # nothing was accumulated
            return state
        return state._replace(params=apply_updates(state.params, updates), opt_state=opt_state)

    return TrainStep(gradient, update, check, finish, told)


def _loss_first(grads: Params, aux: tuple[Any, ...]) -> tuple[Tensor, Params]:
    return aux[0], grads


def _parts_of(result: Any) -> tuple[Tensor, Aux]:
    """The result of an objective, checked to be a loss and an ``Aux``."""
    wanted = "objective must return (loss, Aux(buffers, metrics, outputs)), "
    if not isinstance(result, tuple) or len(result) != 2:
        got = f"{type(result).__name__} of {len(result)}" if isinstance(result, tuple) else type(result).__name__
        raise TypeError(f"{wanted}got {got}")
    loss, aux = result
    if not isinstance(aux, Aux):
        raise TypeError(f"{wanted}got {type(aux).__name__} second")
    if not isinstance(loss, Tensor) or loss.ndim or not loss.is_floating_point():
        got = f"{loss.dtype} {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"{wanted}the loss 0-d and floating, got {got}")
    return loss, aux


def _tensors_of(aux: Any, batch: Batch, loss: Tensor) -> tuple[Buffers, dict[str, Tensor], Tensor]:
    """Buffers, metrics and weight of an ``Aux``, as tensors."""
    metrics = _numbers(aux.metrics, loss)
    if taken := {"loss", "grad_norm"} & metrics.keys():
        raise ValueError(f"metrics must have names other than the step's own, loss and grad_norm, got {sorted(taken)}")
    weight = num_samples(batch) if aux.weight is None or isinstance(aux.weight, tuple) else aux.weight
    if not isinstance(weight, (int, float, Tensor)) or (isinstance(weight, Tensor) and weight.ndim):
        got = f"shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else repr(weight)
        raise TypeError(f"Aux.weight must be a number or a 0-d tensor, got {got}")
    if not isinstance(weight, Tensor):
        weight = torch.full((), float(weight), device=loss.device)
    return aux.buffers, metrics, weight.detach()


def _numbers(metrics: Any, loss: Tensor) -> dict[str, Tensor]:
    if not isinstance(metrics, Mapping):
        raise TypeError(f"metrics must be a dict of 0-d tensors by name, got {type(metrics).__name__}")
    for name, value in metrics.items():
        if not isinstance(value, (int, float, Tensor)):
            raise TypeError(f"metrics must be 0-d tensors, got {value!r} for {name!r}")
    return {name: torch.as_tensor(value, device=loss.device) for name, value in metrics.items()}


def num_samples(batch: Batch) -> int:
    """The number of samples in a batch: the most frequent length of its fields.

    Fields are the members of a tuple, a list or a (nested) dict. The length of a list of images is their number, and so
    is that of a tuple of images, unless another field has a different length. Of equally frequent lengths, that of the
    field with more axes counts, because these are usually the images.

    Example:
        >>> import torch
        >>> from holofunc.train import num_samples
        >>> num_samples((torch.zeros(8, 3, 4, 4), torch.zeros(8)))
        8
        >>> num_samples({"scale": torch.ones(1), "images": [torch.zeros(3, 4, 4), torch.zeros(3, 5, 6)]})
        2
    """
    votes: Counter[int] = Counter()
    axes: dict[int, int] = {}
    for lengths in _lengths(batch):
        votes.update(lengths.keys())
        axes |= {length: max(own, axes.get(length, 0)) for length, own in lengths.items()}
    return max(votes, key=lambda length: (votes[length], axes[length]), default=1)


def _lengths(node: PyTree, *, field: bool = False) -> list[dict[int, int]]:
    """The possible lengths of each field, with its number of axes."""
    if isinstance(node, Tensor):
        return [{len(node): node.ndim}] if node.ndim else []
    if node is None or not tree.is_node(node):
        return []
    inside = [lengths for child in tree.children(node).values() for lengths in _lengths(child, field=True)]
    if not field or type(node) not in (list, tuple):
        return inside
    own = 1 + max((x.ndim for x in node if isinstance(x, Tensor)), default=0)
    either: dict[int, int] = {}  # of samples, or the number of fields: other fields decide
    for lengths in (*inside, {len(node): own if isinstance(node, list) or is_samples(node, len(node)) else 0}):
        either |= {length: max(axes, either.get(length, 0)) for length, axes in lengths.items()}
    return [either]


def is_samples(field: PyTree, number: int) -> bool:
    """Whether a field of a batch is a list or tuple of ``number`` samples, and not of fields."""
    if type(field) not in (list, tuple) or len(field) != number:
        return False
    tensors = [x for x in field if isinstance(x, Tensor)]
    if isinstance(field, list):
        return len(tensors) < number or not all(x.ndim and x.ndim != 3 and len(x) == number for x in tensors)
    return all(x.ndim == 3 if isinstance(x, Tensor) else isinstance(x, Mapping) for x in field)
