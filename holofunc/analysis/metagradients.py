"""Gradients through training, with respect to sample weights and hyperparameters."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from holofunc import tree
from holofunc.analysis.mapped import Replaced, floats, num_samples, plain_batch_norm, with_floats
from holofunc.analysis.samples import sample_losses
from holofunc.compile import Compiled
from holofunc.ops.arithmetic import safe_divide
from holofunc.train import Aux
from holofunc.typing import Batch, Buffers, Key, Objective, Params, PyTree

__all__ = ["Metagradient", "datamodeling_score", "metagradient", "weighted"]


class Metagradient(NamedTuple):
    """The result of `metagradient`.

    Attributes:
        loss: after the last step, 0-d.
        meta: its derivative with respect to ``meta``, of the same structure; None without one.
        state: its derivative with respect to the state before the first step: of its structure, with zeros for what is
            not floating. Hyperparameters of `holofunc.optim.inject_hyperparams` are in ``opt_state``.
        final: the state after the last step.
    """

    loss: Tensor
    meta: PyTree
    state: PyTree
    final: PyTree


def metagradient(
    step: Callable[..., tuple[PyTree, Any]],
    state: PyTree,
    batches: Iterable[Batch],
    loss: Callable[[PyTree], Tensor],
    *,
    meta: PyTree = None,
    segment: int | None = None,
) -> Metagradient:
    """The exact derivative of ``loss(final state)`` through training, by replaying the steps backwards.

    The steps are run once, and every ``segment``-th state is kept. Then each segment, the last one first, is run again
    from its state, and its steps are differentiated one after the other. With k steps, about ``2 * sqrt(k)`` states are
    in memory, and the activations of one step. Costs 5 to 7 times the training itself.

    BatchNorm, whose statistics are in the state, is made of sums and products here: to rounding, it is torch's.

    As a forecast of other trainings it is as good as they are close to this one: where they leave out a share of the
    samples, ask at their mean weight, ``meta=torch.full((n,), 1 - share)``. `datamodeling_score` says how good.

    Args:
        step: ``step(state, batch) -> (state, metrics)``, pure, such as `holofunc.train.make_train_step` makes; with
            ``meta``, ``step(state, batch, meta)``. Its own gradient is differentiated: smooth activations tell more
            than ReLU, and Adam needs an ``eps_root``, without which roots near zero have huge derivatives. Of one
            that is jitted, the function is taken: `holofunc.jit` the whole derivative instead. Not with
            ``precision="fp16"``, which scales gradients within the network: their derivatives are wrong.
        state: before the first step.
        batches: one per step, in order.
        loss: of the final state, 0-d, for instance the loss on a validation set.
        meta: floating tensors that every step reads: weights of the samples, labels, augmentation strengths.
        segment: steps between kept states; by default the root of their number.

    Raises:
        ValueError: no batches; a segment below 1; a meta that is not floating.
        RuntimeError: a step that is not deterministic, because running it again gave another state.

    Source: Maclaurin et al., "Gradient-based hyperparameter optimization through reversible learning" (ICML 2015);
        Engstrom et al., "Optimizing ML training with metagradient descent" (2025): their replay, with two levels.

    Example:
        >>> import torch
        >>> from holofunc import analysis
        >>> def step(state, batch, meta):  # gradient descent on (state - batch)**2 / 2, with a rate
        ...     return state - meta * (state - batch), {}
        >>> targets = [torch.tensor(1.0)] * 3
        >>> result = analysis.metagradient(step, torch.tensor(0.0), targets, lambda s: s, meta=torch.tensor(0.5))
        >>> result.loss, result.meta  # 1 - (1 - rate)**3 and 3 (1 - rate)**2
        (tensor(0.8750), tensor(0.7500))
    """
    batches = list(batches)
    step = step.fn if isinstance(step, Compiled) else step  # whose results differ from those it is differentiated at
    if not batches:
        raise ValueError("batches must hold at least one batch, got none")
    segment = max(1, math.isqrt(len(batches))) if segment is None else segment
    if segment < 1:
        raise ValueError(f"segment must be at least 1, got {segment}")
    wrong = [path for path, x in tree.leaves_with_path(meta) if not x.is_floating_point()]
    if wrong:
        raise ValueError(f"meta must hold floating tensors, what is at {wrong} is none")

    def advance(state: PyTree, batch: Batch, meta: PyTree) -> PyTree:
        with Replaced({F.batch_norm: plain_batch_norm}):
            return step(state, batch)[0] if meta is None else step(state, batch, meta)[0]

    def last(values: list[Tensor]) -> Tensor:
        with Replaced({F.batch_norm: plain_batch_norm}):
            return loss(with_floats(final, values))

    kept, final = [], state
    for i, batch in enumerate(batches):
        if i % segment == 0:
            kept.append(final)
        final = advance(final, batch, meta)

    slopes, end = torch.func.grad_and_value(last)(floats(final))
    of_meta = [torch.zeros_like(x) for x in tree.leaves(meta)]
    after = final
    for number, start in reversed(list(enumerate(kept))):
        part = batches[number * segment : (number + 1) * segment]
        states = [start]
        for batch in part[:-1]:
            states.append(advance(states[-1], batch, meta))
        for batch, before in zip(reversed(part), reversed(states), strict=True):
            again, pull, others = _differentiated(advance, before, batch, meta)
            if before is states[-1]:
                _check_replayed(again, others, after)
            slopes, more = pull(slopes)
            of_meta = [x + y for x, y in zip(of_meta, more, strict=True)]
        after = start
    zeros = tree.map(torch.zeros_like, state)
    return Metagradient(end, None if meta is None else tree.rebuild(meta, of_meta), with_floats(zeros, slopes), final)


def _differentiated(advance: Callable[..., PyTree], state: PyTree, batch: Batch, meta: PyTree) -> Any:
    """The floating leaves after a step, the map from their cotangents to those of state and meta, and other leaves."""

    def run(values: list[Tensor], metas: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        new = advance(with_floats(state, values), batch, None if meta is None else tree.rebuild(meta, metas))
        return floats(new), [x for x in tree.leaves(new) if not x.is_floating_point()]

    return torch.func.vjp(run, floats(state), tree.leaves(meta), has_aux=True)


def _check_replayed(again: list[Tensor], others: list[Tensor], expected: PyTree) -> None:
    wanted = [x for x in tree.leaves(expected) if not x.is_floating_point()]
    pairs = [*zip(again, floats(expected), strict=True), *zip(others, wanted, strict=True)]
    if not all(bool(((x == y) | (x.isnan() & y.isnan())).all()) for x, y in pairs if tree.is_known(x)):
        raise RuntimeError(
            "running a segment again gave another state: step must be a deterministic function of its arguments, on a "
            "device that computes deterministically (torch.use_deterministic_algorithms)"
        )


def weighted(objective: Objective) -> Objective:
    """An objective for batches with a weight per sample: the mean of ``weight * loss`` over the batch.

    With weights of one it is the objective itself, if that is a mean over samples; also one in which some count more
    or not at all, as losses of `holofunc.losses` do with weighted classes and ignored labels. Batches are ``(images,
    targets, weights)``, or ``(batch, weights)`` where the objective's own are no tuples.

    Args:
        objective: of `holofunc.train.supervised` (the model sees the batch at once, BatchNorm included), or any
            (samples are evaluated as batches of one, and the buffers stay as they are).

    Example:
        >>> import torch
        >>> from holofunc import analysis, lift, losses, random, train
        >>> model = lift(torch.nn.Linear, 3, 2)
        >>> objective = analysis.weighted(train.supervised(model, losses.cross_entropy))
        >>> batch = torch.ones(4, 3), torch.tensor([0, 1, 0, 1]), torch.zeros(4)
        >>> objective(*model.init(random.key(0)), batch, None)[0]
        tensor(0.)
    """

    def loss(params: Params, buffers: Buffers, batch: Batch, key: Key) -> tuple[Tensor, Aux]:
        *parts, weights = batch
        if weights.shape != (num_samples(parts),):
            raise ValueError(f"a batch must end with a weight per sample, got shape {tuple(weights.shape)}")
        losses, aux = sample_losses(objective, params, buffers, parts[0] if len(parts) == 1 else tuple(parts), key)
        if isinstance(aux.weight, Tensor):
            mass = aux.weight.sum()
            return safe_divide((weights * aux.weight * losses).sum(), mass), aux._replace(weight=mass)
        return (weights * losses).mean(), aux

    return loss


def datamodeling_score(scores: Tensor, subsets: Tensor, outcomes: Tensor) -> Tensor:
    """How well scores of samples predict training on subsets of them: the linear datamodeling score, 0-d.

    Args:
        scores: of each sample (N,), such as the derivative of a loss by its weight.
        subsets: (M, N), the weight of each sample in each of M trainings, often 0 or 1.
        outcomes: (M,), the loss after each of them.

    Returns:
        The rank correlation (Spearman) of ``subsets @ scores`` and ``outcomes``, in [-1, 1]; NaN where one of them is
        constant.

    Source: Park et al., "TRAK: attributing model behavior at scale" (ICML 2023).

    Example:
        >>> import torch
        >>> from holofunc import analysis
        >>> score = analysis.datamodeling_score(torch.tensor([1.0, 2.0]), torch.eye(2), torch.tensor([0.1, 0.7]))
        >>> round(score.item(), 6)
        1.0
    """
    predicted = subsets.to(scores) @ scores
    if outcomes.shape != predicted.shape or len(outcomes) < 2:
        raise ValueError(f"outcomes must have shape {tuple(predicted.shape)}, at least 2, got {tuple(outcomes.shape)}")
    x, y = (ranks - ranks.mean() for ranks in (_ranks(predicted), _ranks(outcomes)))
    return (x @ y) / (torch.linalg.vector_norm(x) * torch.linalg.vector_norm(y))


def _ranks(x: Tensor) -> Tensor:
    """The place of each value among all; equal ones have the mean of theirs."""
    return ((x[:, None] > x).double().sum(1) + (x[:, None] >= x).double().sum(1)) / 2
