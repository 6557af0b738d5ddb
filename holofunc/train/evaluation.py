"""Evaluation: metrics over a whole dataset, exact for any batch size, without changing the state."""

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from holofunc import distributed, tree
from holofunc.compile import Compiled
from holofunc.data.mapping import length
from holofunc.metrics import Metric, mean
from holofunc.model import Model
from holofunc.optim.capabilities import eval_buffers, eval_params
from holofunc.train.criterion import Criterion
from holofunc.train.objective import check_lengths, check_parts, check_precision, check_values, flat, pair, run_model
from holofunc.train.records import read
from holofunc.train.state import TrainState
from holofunc.train.step import is_samples, num_samples
from holofunc.typing import Batch, Buffers, EpochData, EvalStep, Params, PyTree

__all__ = ["SupervisedEval", "check_data", "evaluate", "make_eval_step", "plain"]


WEIGHTS = ("eval", "raw", "both")


class SupervisedEval(EvalStep):
    """``eval_step(state, batch, weights=None) -> states`` of the metrics for one batch; made by `make_eval_step`."""

    def __init__(
        self, model: Model, metrics: Mapping[str, Metric], loss: Callable[..., Any] | None, precision: str, which: str
    ) -> None:
        self.model, self.loss, self.precision, self.which = model, loss, precision, which
        self.criterion = None if loss is None else Criterion.of(loss)
        self.own = metrics
        measured = {**({"loss": mean(), "nonfinite": _count} if loss is not None else {}), **metrics}
        raw = {f"raw/{name}": metric for name, metric in measured.items()} if which == "both" else {}
        self.metrics = {**measured, **raw}

    def __call__(self, state: TrainState, batch: Batch, weights: Tensor | None = None) -> dict[str, PyTree]:
        params, buffers = state.params, state.buffers
        if self.which != "raw":
            params, buffers = eval_params(state.opt_state, params), eval_buffers(state.opt_state, buffers)
        states = self._measured(params, buffers, batch, weights)
        if self.which == "both":
            raw = self._measured(state.params, state.buffers, batch, weights)
            states |= {f"raw/{name}": value for name, value in raw.items()}
        return states

    def _measured(self, params: Params, buffers: Buffers, batch: Batch, weights: Tensor | None) -> dict[str, PyTree]:
        images, targets = pair(batch)
        outputs, _ = run_model(self.model, self.precision, params, buffers, images)
        device = tree.leaves(outputs)[0].device
        states = {n: m.update(m.init(device=device), outputs, targets, weights=weights) for n, m in self.own.items()}
        if self.criterion is None:
            return states
        losses, mass = self.criterion.of_rows(outputs, targets)
        rows = torch.ones_like(losses) if weights is None else weights
        finite = losses.isfinite() | (mass == 0)
        loss = mean()
        states["loss"] = loss.update(loss.init(device=device), losses, weights=mass * rows * finite)
        states["nonfinite"] = _count.update(_count.init(device=device), ~finite, weights=rows)
        return states

    def check(self, batch: Batch) -> None:
        """Raise for an invalid batch. Reads values, so it runs outside graphs."""
        images, targets = pair(batch)
        check_lengths(images, targets)
        if self.criterion is not None:
            check_values(self.model, self.criterion, images, targets)


_count = mean(lambda flags, targets: flags.float())._replace(compute=lambda state: state.total)
"""Counts the samples for which a flag is true."""


def make_eval_step(
    model: Model,
    metrics: Mapping[str, Metric],
    *,
    loss: Callable[..., Any] | None = None,
    precision: str = "fp32",
    weights: str = "eval",
) -> SupervisedEval:
    """Make the evaluation of a batch, for `evaluate`.

    Args:
        model: evaluated in eval mode.
        metrics: by name, e.g. ``{"accuracy": metrics.accuracy()}``.
        loss: also reported, as ``loss``: the mean of ``loss(outputs, targets)`` over the samples, with the weights of
            training (`supervised`). For `holofunc.losses` it equals the loss of one batch of all samples, also with
            ignored or weighted targets. Samples with a non-finite loss are left out, and counted as ``nonfinite``.
        precision: as for `holofunc.train.supervised`.
        weights: ``"eval"`` evaluates the weights that `holofunc.optim.eval_params` finds in the optimizer state (an
            average, slow weights), or else the parameters; ``"raw"`` the parameters; ``"both"`` both, with the
            parameters as ``raw/name``.

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
    check_parts(model, metrics, loss)
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(map(repr, WEIGHTS))}, got {weights!r}")
    if loss is not None and (taken := sorted({"loss", "nonfinite"} & set(metrics))):
        raise ValueError(f"metrics must have names other than the loss's own, loss and nonfinite, got {taken}")
    return SupervisedEval(model, dict(metrics), loss, precision, weights)


def evaluate(
    eval_step: EvalStep | Compiled,
    state: TrainState,
    data: Iterable[Batch],
    *,
    max_batches: int | None = None,
    progress: Callable[[int, int | None, Batch], Any] | None = None,
) -> dict[str, Any]:
    """Compute metrics over all of ``data``, as Python numbers (a matrix stays a tensor).

    Args:
        eval_step: made by `make_eval_step`, another `EvalStep`, or `holofunc.jit` of one.
        state: not changed.
        data: batches ``(images, targets)``. A shorter batch is padded to the size of the first with weight zero, so
            that it needs no other graph and is counted correctly. On several ranks, each rank passes its own part, of
            any size, and all get the metrics of the whole.
        max_batches: the largest number of batches to evaluate.
        progress: called after each batch with the number of batches done, the total if known, and the batch.

    Raises:
        ValueError: ``data`` has no batch, or no sample has a finite loss.
    """
    source = plain(eval_step)
    check_data(data)
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches must be at least 1 or None, got {max_batches}")
    total: dict[str, PyTree] | None = None
    size, seen, device = 0, 0, state.step.device
    batches = length(data)
    with torch.no_grad():
        drawn = data.epoch(0) if isinstance(data, EpochData) else data
        for number, batch in enumerate(itertools.islice(drawn, max_batches), start=1):
            source.check(batch)
            count = num_samples(batch)
            size, seen = size or count, seen + count
            weights = (torch.arange(max(size, count)) < count).float().to(device)
            padded = _padded(batch, count, size, device)
            states = eval_step(state, padded, weights)
            if states.keys() != source.metrics.keys():
                wanted = f"eval_step must return the state of each of its metrics, {sorted(source.metrics)}"
                raise TypeError(f"{wanted}, got {sorted(states)}")
            total = states if total is None else {n: m.merge(total[n], states[n]) for n, m in source.metrics.items()}
            if progress is not None:
                progress(number, batches if max_batches is None else min(max_batches, batches or max_batches), batch)
    if total is None and distributed.world_size() == 1:
        raise ValueError("data must hold at least one batch, got none")
    total = total or {name: m.init(device=device) for name, m in source.metrics.items()}
    total = {name: distributed.fold(m.merge, total[name]) for name, m in source.metrics.items()}
    seen = int(distributed.fold(torch.add, torch.tensor(seen, device=device)))
    if seen == 0 and distributed.world_size() > 1:
        raise ValueError("data must hold a batch on some rank, got none")
    return _complete(read(flat({name: m.compute(total[name]) for name, m in source.metrics.items()})), seen)


@runtime_checkable
class Measures(Protocol):
    """An evaluation with named metrics."""

    metrics: Mapping[str, Metric]


@runtime_checkable
class Indexed(Protocol):
    """A sequence, iterated by index."""

    def __getitem__(self, index: int, /) -> Batch:
        """The batch of this index, or IndexError at the end."""


def check_data(data: Any, name: str = "data") -> None:
    if not isinstance(data, (Iterable, EpochData, Indexed)):
        raise TypeError(f"{name} must be an iterable of batches, got {type(data).__name__}")


def plain(eval_step: Any) -> EvalStep:
    """The step itself, if it is wrapped in `holofunc.jit`."""
    source = eval_step.fn if isinstance(eval_step, Compiled) else eval_step
    given = eval_step if callable(eval_step) else type(eval_step).__name__
    if not isinstance(source, EvalStep):
        raise TypeError(f"eval_step must be an EvalStep (make_eval_step makes one), or jit of one, got {given}")
    if not isinstance(source, Measures):
        raise TypeError(f"eval_step must have metrics by name, as EvalStep.metrics says, got {given}")
    return source


def _complete(found: dict[str, Any], samples: int) -> dict[str, Any]:
    """The results without zero counts of non-finite samples."""
    for name in [name for name in found if name.split("/")[-1] == "nonfinite"]:
        if found[name] >= samples:
            raise ValueError(f"the loss must be finite for a sample at least, got none of {samples}")
        if not found[name]:
            del found[name]
    return found


def _padded(node: Any, count: int, size: int, device: torch.device, *, field: bool = False) -> Any:
    """A batch on the device, padded to ``size`` by repeating the last sample."""
    if isinstance(node, Tensor):
        short = node.ndim > 0 and len(node) == count < size
        return (torch.cat([node, node[-1:].expand(size - count, *node.shape[1:])]) if short else node).to(device)
    if node is None or not tree.is_node(node):
        return node
    if field and is_samples(node, count):
        rows = [tree.map(functools.partial(_placed, device=device), row) for row in node]
        return type(node)([*rows, *rows[-1:] * (size - count)])
    children = tree.children(node).values()
    return tree.with_children(node, [_padded(child, count, size, device, field=True) for child in children])


def _placed(x: Any, device: torch.device) -> Any:
    return x.to(device) if isinstance(x, Tensor) else x
