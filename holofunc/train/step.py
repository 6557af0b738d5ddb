"""The training step: ``step(state, batch) -> (state, metrics)``, a pure function made of two."""

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from holofunc import distributed, random, tree
from holofunc.compile import Checked
from holofunc.optim.base import GradientTransformation, apply_updates, flush
from holofunc.optim.capabilities import looks_twice, loss_scale, skipped
from holofunc.train.objective import Aux, Supervised
from holofunc.train.state import TrainState
from holofunc.typing import Batch, Buffers, Key, Objective, Params, PyTree, Scalar

__all__ = ["Gradient", "TrainStep", "make_train_step", "num_samples"]

Measure = Callable[[Params, Params, Params], Mapping[str, Any]]


class Gradient(NamedTuple):
    """What the first half of a step hands to the second."""

    grads: Params
    loss: Tensor
    buffers: Buffers
    metrics: dict[str, Tensor]
    weight: Tensor
    outputs: PyTree = ()


@dataclass(frozen=True)
class TrainStep(Checked):
    """``step(state, batch) -> (state, metrics)``, pure; made by `make_train_step`.

    Attributes:
        gradient: ``gradient(state, batch) -> Gradient``.
        update: ``update(state, gradient, batch) -> (state, metrics)``; the batch is for second gradients.
        check_batch: raises on a batch that no step should see. It may read values, and runs outside of graphs, once per
            step; None refuses nothing.
        finish: ``finish(state) -> state``: closes an open window of accumulated gradients, as at the end of a run.
        settings: what hooks may want to know: the objective's ``precision``.
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
    """The step that moves parameters down the gradient of an objective.

    Args:
        objective: ``objective(params, buffers, batch, key) -> (loss, Aux)``, for instance of `supervised`.
        tx: receives the gradients and, as extra arguments, ``loss``, ``buffers`` (the new ones), ``weight`` (what the
            objective says in `Aux`, or else the number of samples: `num_samples`) and, if its state `looks_twice`,
            ``grad_fn``: the gradient of this batch at other parameters.
        augment: ``augment(batch, key) -> batch``, on the device, inside the step.
        measure: ``measure(grads, updates, params) -> {name: 0-d tensor}``: numbers made of gradients, updates and the
            parameters before them (norms per layer, say), reported with the others.
        outputs: whether to return `Aux.outputs` among the metrics, as ``outputs``; `Event.outputs` in `fit`.
        settings: for hooks and their logs to know (`RunInfo.settings`), as ``{"clip": 1.0}``; nothing depends on it.
        check: raises on a batch that no step should see; None is what `supervised` checks, if the objective is of it.

    Returns:
        ``step(state, batch) -> (state, metrics)``: pure. ``metrics`` holds 0-d tensors: ``loss``, ``grad_norm`` (before
        any clipping) and what was measured.

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
    needed = {"objective": objective, "tx.init": tx.init, "tx.update": tx.update}
    given = {n: f for n, f in {"augment": augment, "measure": measure, "check": check}.items() if f is not None}
    for name, value in {**needed, **given}.items():
        if not callable(value):
            raise TypeError(f"{name} must be callable, got {value!r}")
    own_scale, told = 1.0, dict(settings or {})
    if isinstance(objective, Supervised):
        check = check or objective.check
        own_scale, told = objective.gradient_scale, {"precision": objective.precision, **told}

    def scaled(scale: Scalar, params: Params, buffers: Buffers, batch: Batch, key: Key) -> tuple[Tensor, Any]:
        loss, aux = objective(params, buffers, batch, key)
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
        if looks_twice(state.opt_state):  # known when tracing, like whether updates may be refused
            extra["grad_fn"] = lambda params: look(state, batch, params)[0]
        updates, opt_state = tx.update(grads, state.opt_state, state.params, **extra)
        params, skip = apply_updates(state.params, updates), skipped(opt_state)
        if skip is not None:
            buffers = tree.where(skip, state.buffers, buffers)
        measured = {} if measure is None else dict(measure(grads, updates, state.params))
        new = TrainState(state.step + 1, params, buffers, opt_state, state.key)
        losses = distributed.over_ranks(opt_state, {"loss": loss, "grad_norm": tree.global_norm(grads)})
        return new, {**losses, **metrics, **measured} | ({"outputs": out} if outputs else {})

    def finish(state: TrainState) -> TrainState:
        updates, opt_state = flush(tx, state.opt_state, state.params, buffers=state.buffers)
        if opt_state is state.opt_state:  # no window was open
            return state
        return state._replace(params=apply_updates(state.params, updates), opt_state=opt_state)

    return TrainStep(gradient, update, check, finish, told)


def _tensors_of(aux: Any, batch: Batch, loss: Tensor) -> tuple[Buffers, dict[str, Tensor], Tensor]:
    """Buffers, metrics and weight: all that a step needs of an ``Aux``, and nothing that is no tensor."""
    if not isinstance(aux, Aux):
        raise TypeError(
            f"objective must return (loss, Aux(buffers, metrics, outputs)), got {type(aux).__name__} second"
        )
    metrics = {name: torch.as_tensor(value, device=loss.device) for name, value in aux.metrics.items()}
    weight = num_samples(batch) if aux.weight is None or isinstance(aux.weight, tuple) else aux.weight
    if not isinstance(weight, Tensor):
        weight = torch.full((), float(weight), device=loss.device)
    return aux.buffers, metrics, weight.detach()


def num_samples(batch: Batch) -> int:
    """The number of samples in a batch: the length that most of its fields have.

    Fields are the members of a tuple, a list or a dict (of dicts). The length of a list of images is their number.
    Where lengths are equally frequent, that of the field with more axes counts: of images, not of what is beside them.

    Example:
        >>> import torch
        >>> from holofunc.train import num_samples
        >>> num_samples((torch.zeros(8, 3, 4, 4), torch.zeros(8)))
        8
        >>> num_samples({"scale": torch.ones(1), "images": [torch.zeros(3, 4, 4), torch.zeros(3, 5, 6)]})
        2
    """
    lengths = list(_lengths(batch))
    frequency = Counter(length for length, _ in lengths)
    return max(lengths, key=lambda found: (frequency[found[0]], found[1]), default=(1, 0))[0]


def _lengths(node: PyTree, *, field: bool = False) -> list[tuple[int, int]]:
    """Length and number of axes of each field."""
    if isinstance(node, Tensor):
        return [(len(node), node.ndim)] if node.ndim else []
    if field and isinstance(node, list):
        axes = [x.ndim for x in node if isinstance(x, Tensor)]
        return [(len(node), 1 + max(axes, default=0))]
    if node is None or not tree.is_node(node):
        return []
    return [found for child in tree.children(node).values() for found in _lengths(child, field=True)]
