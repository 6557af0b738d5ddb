"""Evaluation: metrics over a whole dataset, exact for any batch size, without changing the state."""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from holofunc import distributed, tree
from holofunc.metrics import Metric, mean
from holofunc.model import Model
from holofunc.optim.base import eval_params
from holofunc.train.objective import (
    check_label_values,
    check_lengths,
    check_precision,
    flat,
    pair,
    run_model,
    total_loss,
)
from holofunc.train.state import TrainState
from holofunc.typing import Batch, PyTree

__all__ = ["EvalStep", "evaluate", "make_eval_step"]


class EvalStep:
    """``eval_step(state, batch, weights=None) -> states`` of the metrics for one batch; made by `make_eval_step`."""

    leafwise = True

    def __init__(
        self, model: Model, metrics: Mapping[str, Metric], loss: Callable[..., Any] | None, precision: str
    ) -> None:
        self.model, self.loss, self.precision = model, loss, precision
        self.metrics = {**({"loss": mean(self._row_losses)} if loss is not None else {}), **metrics}

    def __call__(self, state: TrainState, batch: Batch, weights: Tensor | None = None) -> dict[str, PyTree]:
        images, targets = pair(batch)
        params = tree.unpack(eval_params(state.opt_state, state.params))
        outputs, _ = run_model(self.model, self.precision, params, tree.unpack(state.buffers), images)
        device = tree.leaves(outputs)[0].device
        return {
            name: m.update(m.init(device=device), outputs, targets, weights=weights) for name, m in self.metrics.items()
        }

    def _row_losses(self, outputs: PyTree, targets: PyTree) -> Tensor:
        """The loss of each sample: what a mean over samples, some of them padding, is made of."""
        one = lambda output, target: total_loss(self.loss, output[None], target[None])[0]  # type: ignore[arg-type]  # noqa: E731
        return torch.vmap(one)(outputs, targets)

    def check(self, batch: Batch) -> None:
        """Refuse a batch that cannot be evaluated; reads values, so it runs outside of graphs."""
        images, targets = pair(batch)
        check_lengths(images, targets)
        if self.loss is not None:
            check_label_values(self.model, self.loss, images, targets)


def make_eval_step(
    model: Model,
    metrics: Mapping[str, Metric],
    *,
    loss: Callable[..., Any] | None = None,
    precision: str = "fp32",
) -> EvalStep:
    """What `evaluate` does with each batch.

    Args:
        model: evaluated in eval mode, on the weights that `holofunc.optim.eval_params` finds in the optimizer's state
            (an average, slow weights) or else on the parameters.
        metrics: by name, e.g. ``{"accuracy": metrics.accuracy()}``.
        loss: also reported, as ``loss``: the mean over samples of ``loss(outputs, targets)``.
        precision: as for `holofunc.train.supervised`.

    Example:
        >>> import torch
        >>> from holofunc import lift, losses, metrics, optim, random, train
        >>> model = lift(torch.nn.Linear, 3, 2)
        >>> state = train.create_state(model, optim.sgd(0.1), random.key(0))
        >>> eval_step = train.make_eval_step(model, {"accuracy": metrics.accuracy()}, loss=losses.cross_entropy)
        >>> data = [(torch.zeros(4, 3), torch.tensor([0, 1, 0, 1])), (torch.zeros(1, 3), torch.tensor([1]))]
        >>> sorted(train.evaluate(eval_step, state, data))
        ['accuracy', 'loss']
    """
    check_precision(precision)
    return EvalStep(model, dict(metrics), loss, precision)


def evaluate(eval_step: Callable[..., Any], state: TrainState, data: Iterable[Batch]) -> dict[str, Any]:
    """Metrics over all of ``data``, as Python numbers (a matrix stays a tensor).

    Args:
        eval_step: of `make_eval_step`, or `holofunc.jit` of that.
        state: read, not changed.
        data: batches ``(images, targets)``. A short one is padded to the size of the first, with weight zero, so that
            it needs no graph of its own and counts as what it is. On several ranks each brings its own part, of any
            size, and all get the metrics of the whole.

    Raises:
        ValueError: ``data`` holds no batch.
    """
    plain = inspect.unwrap(eval_step)
    check, metrics = plain.check, plain.metrics
    total: dict[str, PyTree] | None = None
    size, device = 0, state.step.device
    with torch.no_grad():
        for batch in data:
            check(batch)
            images, targets = pair(batch)
            size = size or len(images)
            weights = (torch.arange(max(size, len(images))) < len(images)).float().to(device)
            padded = tree.map(functools.partial(_padded, size=size, device=device), (images, targets))
            states = eval_step(state, padded, weights)
            total = states if total is None else {n: m.merge(total[n], states[n]) for n, m in metrics.items()}
    if total is None and distributed.world_size() == 1:
        raise ValueError("data must hold at least one batch, got none")
    total = total or {name: m.init(device=device) for name, m in metrics.items()}
    total = {name: distributed.fold(m.merge, total[name]) for name, m in metrics.items()}
    return read(flat({name: m.compute(total[name]) for name, m in metrics.items()}))


def _padded(x: Tensor, *, size: int, device: torch.device) -> Tensor:
    """``x`` with its last row repeated up to ``size`` rows, on the device."""
    whole = x if len(x) >= size else torch.cat([x, x[-1:].expand(size - len(x), *x.shape[1:])])
    return whole.to(device)


def read(values: Mapping[str, Tensor]) -> dict[str, Any]:
    """0-d tensors as Python numbers, in one transfer from the device; others as tensors on the CPU."""
    scalars = {name: v for name, v in values.items() if v.ndim == 0}
    numbers = torch.stack([v.detach().double() for v in scalars.values()]).tolist() if scalars else []
    found: dict[str, Any] = dict(zip(scalars, numbers, strict=True))
    return {name: found[name] if name in found else v.detach().cpu() for name, v in values.items()}
