"""Averages over ranks, of gradients and metrics."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from holofunc import tree
from holofunc.distributed.collectives import all_gather, collective
from holofunc.distributed.ranks import world_size
from holofunc.optim.base import GradientTransformation, MaybeParams
from holofunc.optim.capabilities import Accumulates, CanSkip, JoinsRanks, find, skipped
from holofunc.optim.checks import check_one_number
from holofunc.optim.numerics import scalar_dtype
from holofunc.typing import Params, PyTree, Scalar

__all__ = ["AverageGradientsState", "average_gradients", "fold", "over_ranks"]


class _Average(NamedTuple):
    loss: Tensor
    grad_norm: Tensor


class AverageGradientsState(_Average, JoinsRanks):
    """The mean loss over the samples of all ranks and the norm of their mean gradient, of the latest average."""

    __slots__ = ()

    @staticmethod
    def start(params: Params) -> "AverageGradientsState":
        device = next((p.device for p in tree.leaves(params)), None)
        return AverageGradientsState(*torch.zeros(2, dtype=scalar_dtype(params), device=device))

    def latest(self, loss: Any) -> Any:
        """The loss that ``update`` was called with, or that of the call before."""
        check_one_number(loss=loss)
        return self.loss if loss is None else torch.as_tensor(loss)


def average_gradients(group: Any = None) -> GradientTransformation:
    """Average gradients over the samples of all ranks: partial in, replicated out; one collective per update.

    A rank's gradient is the mean of its own samples' and counts by their number, the extra argument ``weight`` (1 if it
    is not given): so the average is that of the whole batch in one process, however uneven its parts are. It stands
    before all that is not linear: ``chain(average_gradients(), clip_by_global_norm(1.0), adam(1e-3))``. Inside of
    `holofunc.optim.multi_steps` there is a collective only where a window closes. In front of `sam` it averages the
    first gradient, inside of it the second.

    What is not finite on one rank (a gradient, the loss, a buffer) makes the average NaN on all, so that
    `holofunc.optim.apply_if_finite` refuses an update on all ranks or on none. Around a `multi_steps` that this is
    inside of, it would look at the gradient of one rank: steps of `holofunc.train` refuse that. Such steps report the
    loss and the gradient's norm of all ranks together (`over_ranks`).

    In one process it is the identity.

    Args:
        group: a process group of `torch.distributed`; None is all ranks.

    Example:
        >>> import torch
        >>> from holofunc import distributed, optim
        >>> tx = optim.chain(distributed.average_gradients(), optim.sgd(0.1))
        >>> tx.update({"w": torch.ones(2)}, tx.init({"w": torch.zeros(2)}))[0]
        {'w': tensor([-0.1000, -0.1000])}
    """

    def update(
        updates: PyTree,
        state: AverageGradientsState,
        params: MaybeParams = None,
        *,
        weight: Scalar = 1.0,
        loss: Any = None,
        due: Tensor | None = None,
        buffers: PyTree = None,
        **extra: Any,
    ) -> tuple[PyTree, AverageGradientsState]:
        loss = state.latest(loss)
        if world_size(group) == 1 or not tree.leaves(updates):
            return updates, AverageGradientsState(loss, tree.global_norm(updates))
        flat = tree.leaves_with_path(updates)
        in_order = sorted(flat, key=lambda pair: pair[0])
        parts = [tree.upcast(g).flatten() for _, g in in_order]
        mean, loss = means(collective("sum", torch.cat(counted(parts, weight, loss, buffers)), group, due=due))
        cut = zip(in_order, mean.split([part.numel() for part in parts]), strict=True)
        averaged = {path: part.view(g.shape).to(g.dtype) for (path, g), part in cut}
        new = AverageGradientsState(loss, torch.linalg.vector_norm(mean))
        return tree.rebuild(updates, [averaged[path] for path, _ in flat]), new

    return GradientTransformation(lambda params: AverageGradientsState.start(params), update)


def counted(parts: Sequence[Tensor], weight: Scalar, loss: Scalar, buffers: PyTree, grads: PyTree = ()) -> list[Tensor]:
    """``parts`` and the loss, times the number of samples; that number; whether something else is not finite."""
    like = parts[0]
    weight, loss = (torch.as_tensor(x, dtype=like.dtype, device=like.device) for x in (weight, loss))
    seen = weight > 0  # the mean over no sample is NaN, and counts for nothing
    fine = tree.all_finite(buffers).to(like.device) & (tree.all_finite((loss, grads)) | ~seen)
    weighted = [torch.where(seen, x * weight, 0.0) for x in (*parts, loss)]
    return [*weighted[:-1], torch.stack([weighted[-1], weight, (~fine).to(like.dtype)])]


def means(total: Tensor) -> tuple[Tensor, Tensor]:
    """Of the sum of what `counted` has counted: the mean of the parts (NaN if something was bad), and of the loss."""
    weight, bad = total[-2], total[-1]
    share = 1 / torch.where(weight > 0, weight, 1.0)
    return total[:-3] * torch.where(bad > 0, torch.nan, share), total[-3] * share


def over_ranks(opt_state: PyTree, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The loss and gradient norm that a step reports: of this rank, or of all ranks if it averages gradients.

    They are the rank's own with `holofunc.optim.multi_steps`, where there is an average per window and not per call,
    and of an update that was refused.

    Args:
        opt_state: after the update.
        own: ``loss`` and ``grad_norm`` of this rank, 0-d.

    Raises:
        ValueError: an `apply_if_finite` around a `multi_steps` around the average.

    Example:
        >>> import torch
        >>> from holofunc import distributed, optim
        >>> state = distributed.average_gradients().init({"w": torch.zeros(2)})
        >>> distributed.over_ranks(state, {"loss": torch.tensor(2.0)})
        {'loss': tensor(2.)}
    """
    averages = find(opt_state, AverageGradientsState)
    if world_size() == 1 or not averages:
        return dict(own)
    if any(find(guard, Accumulates) for guard in find(opt_state, CanSkip)):
        raise ValueError(
            "apply_if_finite around multi_steps would look at the micro-batch of one rank, and ranks count different "
            "windows: write multi_steps(apply_if_finite(chain(average_gradients(), ...)), every)"
        )
    if find(opt_state, Accumulates):
        return dict(own)
    refused, whole = skipped(opt_state), averages[0]._asdict()
    return {n: whole[n] if refused is None else torch.where(refused, x, whole[n].to(x.dtype)) for n, x in own.items()}


def fold(merge: Callable[[PyTree, PyTree], PyTree], value: PyTree, group: Any = None) -> PyTree:
    """Merge the trees of all ranks, in the order of the ranks: the result is the same on every rank.

    Args:
        merge: ``merge(a, b)``, such as the ``merge`` of a `holofunc.metrics.Metric`; ``torch.add`` for a tensor.
        value: a tree of tensors of one structure, shapes and dtypes on all ranks. A rank that has seen nothing brings
            the start value of its metric.
        group: as for `psum`.

    Example:
        >>> import torch
        >>> from holofunc import distributed, metrics
        >>> loss = metrics.mean()
        >>> state = loss.update(loss.init(), torch.tensor([1.0, 3.0]))
        >>> loss.compute(distributed.fold(loss.merge, state)).item()
        2.0
    """
    if world_size(group) == 1:
        return value
    parts = tree.unstack(tree.map(lambda x: all_gather(x[None], group), value))
    return functools.reduce(merge, parts)
