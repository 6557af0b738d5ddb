"""The training step: ``step(state, batch) -> (state, metrics)``, pure, and compiled as two graphs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from holofunc import random, tree
from holofunc.compile import Staged
from holofunc.optim.base import GradientTransformation, apply_updates, flush
from holofunc.optim.capabilities import looks_twice, skipped
from holofunc.train.state import TrainState
from holofunc.typing import Batch, Buffers, Key, Objective, Params

__all__ = ["Gradient", "make_train_step"]


class Gradient(NamedTuple):
    """What the first half of a step hands to the second."""

    grads: Params
    loss: Tensor
    buffers: Buffers
    metrics: dict[str, Tensor]
    weight: Tensor


def make_train_step(
    objective: Objective, tx: GradientTransformation, *, augment: Callable[[Batch, Key], Batch] | None = None
) -> Staged:
    """The step that moves parameters down the gradient of an objective.

    Args:
        objective: ``objective(params, buffers, batch, key) -> (loss, Aux)``, for instance of `supervised`.
        tx: receives the gradients and, as extra arguments, ``loss``, ``buffers`` (the new ones), ``weight`` (the number
            of samples) and, if its state `looks_twice`, ``grad_fn``: the gradient of this batch at other parameters.
        augment: ``augment(batch, key) -> batch``, on the device, inside the step.

    Returns:
        ``step(state, batch) -> (state, metrics)``: pure. ``metrics`` holds 0-d tensors: ``loss``, ``grad_norm`` (before
        any clipping) and what the objective measured. `holofunc.jit` compiles it as a gradient graph and an update
        graph.

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
    for name, value in (("objective", objective), ("tx.init", tx.init), ("tx.update", tx.update)):
        if not callable(value):
            raise TypeError(f"{name} must be callable, got {value!r}")

    differentiate = torch.func.grad_and_value(objective, has_aux=True)

    def look(state: TrainState, batch: Batch, params: Params) -> tuple[Params, tuple[Tensor, Any]]:
        model_key, augment_key = random.split(random.fold_in(state.key, state.step))
        if augment is not None:
            batch = augment(batch, augment_key)
        return differentiate(params, tree.unpack(state.buffers), batch, model_key)

    def gradient(state: TrainState, batch: Batch) -> Gradient:
        grads, (loss, aux) = look(state, batch, tree.unpack(state.params))
        weight = torch.full((), float(_num_samples(batch)), device=loss.device)
        return Gradient(grads, loss, aux.buffers, aux.metrics, weight)

    def update(state: TrainState, gradient: Gradient, batch: Batch = None) -> tuple[TrainState, dict[str, Tensor]]:
        grads, loss, buffers, metrics, weight = gradient
        extra: dict[str, Any] = {"loss": loss, "buffers": buffers, "weight": weight}
        if batch is not None:
            extra["grad_fn"] = lambda params: look(state, batch, params)[0]
        updates, opt_state = tx.update(grads, state.opt_state, state.params, **extra)
        params, skip = apply_updates(state.params, updates), skipped(opt_state)
        if skip is not None:  # known when tracing: whether there is a transformation that may refuse an update
            buffers = tree.where(skip, state.buffers, buffers)
        new = TrainState(state.step + 1, params, buffers, opt_state, state.key)
        return new, {"loss": loss, "grad_norm": tree.global_norm(grads), **metrics}

    def finish(state: TrainState) -> TrainState:
        updates, opt_state = flush(tx, state.opt_state, state.params)
        if opt_state is state.opt_state:  # no window was open
            return state
        return state._replace(params=apply_updates(state.params, updates), opt_state=opt_state)

    def rereads(state: TrainState) -> bool:
        return looks_twice(state.opt_state)

    return Staged(gradient, update, getattr(objective, "check", None), finish, rereads)


def _num_samples(batch: Batch) -> int:
    return next((len(x) for x in tree.leaves(batch) if isinstance(x, Tensor) and x.ndim), 1)
