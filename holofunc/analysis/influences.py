"""Influence of training samples on a prediction: dot products of gradients, over one or several checkpoints."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from holofunc import random, tree
from holofunc.analysis.gradients import Where, chosen, per_sample_grad_norms, per_sample_grads
from holofunc.analysis.mapped import jvp, over_samples, unfused, value
from holofunc.analysis.samples import sample_losses
from holofunc.typing import Batch, Buffers, Key, Objective, Params

__all__ = ["Neighbours", "influence", "nearest", "self_influence", "tracin"]


def influence(
    objective: Objective,
    params: Params,
    buffers: Buffers,
    batch: Batch,
    test_batch: Batch,
    *,
    projection: int | None = None,
    where: Where = None,
    chunk_size: int | None = 16,
    key: Key | None = None,
) -> Tensor:
    """How much a small step on each training sample lowers the loss of each test sample: gradient dot products.

    The gradients of a batch are never kept. Exact products cost one forward derivative (1.5 batch gradients) per test
    sample; projections cost `per_sample_grads` of both batches once.

    Args:
        objective: as for `per_sample_grads`.
        params: of the model.
        buffers: its statistics.
        batch: N training samples.
        test_batch: T samples whose predictions are to be explained.
        projection: None for exact products; or the length to which gradients are projected inside the map, at random,
            at which products have an error of about ``|a| |b| / sqrt(projection)``.
        where: count only these parameters, for instance the last layers.
        chunk_size: samples at a time.
        key: of the projection, which needs one, and of an objective that draws.

    Returns:
        (T, N): positive where the training sample helps the test sample.

    Raises:
        ValueError: a projection without a key, or below 1; otherwise as `per_sample_grads`.

    Source: Pruthi et al., "Estimating training data influence by tracing gradient descent" (NeurIPS 2020); the
        projection is that of Charikar et al. (count sketch, 2002).

    Example:
        >>> import torch
        >>> from holofunc import analysis, lift, losses, random, train
        >>> model = lift(torch.nn.Linear, 3, 2)
        >>> objective, state = train.supervised(model, losses.cross_entropy), model.init(random.key(0))
        >>> batch = torch.ones(4, 3), torch.tensor([0, 1, 0, 1])
        >>> analysis.influence(objective, *state, batch, (torch.ones(1, 3), torch.tensor([0]))) > 0
        tensor([[ True, False,  True, False]])
    """
    names = chosen(params, where)
    if projection is None:
        return _exact(objective, params, buffers, batch, test_batch, names, chunk_size, key)
    if key is None or projection < 1:
        raise ValueError(f"projection must be at least 1 and needs a key, got projection={projection}, key={key}")
    sketch = Sketch.draw(key, {name: params[name] for name in names}, projection)
    of_train, of_test = (
        per_sample_grads(
            objective,
            params,
            buffers,
            samples,
            reduce=sketch.apply,
            where=lambda name: name in names,
            chunk_size=chunk_size,
            key=key,
        )
        for samples in (batch, test_batch)
    )
    return of_test @ of_train.mT


def _exact(
    objective: Objective,
    params: Params,
    buffers: Buffers,
    batch: Batch,
    test_batch: Batch,
    names: list[str],
    chunk_size: int | None,
    key: Key | None,
) -> Tensor:
    part = {name: params[name] for name in names}

    def losses(part: Params) -> Tensor:
        with unfused():
            return sample_losses(objective, {**params, **part}, buffers, batch, key)[0]

    def products(sample: Batch, key: Key | None) -> Tensor:
        def loss(part: Params) -> Tensor:
            return value(objective, {**params, **part}, buffers, sample, key)

        return jvp(losses, part, torch.func.grad(loss)(part))[1]

    return over_samples(products, test_batch, key, chunk_size=1 if chunk_size is None else min(chunk_size, 4))


def self_influence(
    objective: Objective,
    params: Params,
    buffers: Buffers,
    batch: Batch,
    *,
    where: Where = None,
    chunk_size: int | None = None,
    key: Key | None = None,
) -> Tensor:
    """The influence of each sample on itself, (N,): the squared norm of its gradient, at the price of one gradient.

    High where nothing else in the data supports a sample's label, as with wrong labels.

    Example:
        >>> import torch
        >>> from holofunc import analysis, lift, losses, random, train
        >>> model = lift(torch.nn.Linear, 3, 2)
        >>> objective = train.supervised(model, losses.cross_entropy)
        >>> batch = torch.ones(4, 3), torch.tensor([0, 1, 0, 1])
        >>> analysis.self_influence(objective, *model.init(random.key(0)), batch).shape
        torch.Size([4])
    """
    return per_sample_grad_norms(
        objective, params, buffers, batch, where=where, chunk_size=chunk_size, key=key
    ).square()


def tracin(
    objective: Objective,
    checkpoints: Sequence[tuple[Params, Buffers]],
    batch: Batch,
    test_batch: Batch,
    *,
    learning_rates: Sequence[float] | None = None,
    projection: int | None = None,
    where: Where = None,
    chunk_size: int | None = 16,
    key: Key | None = None,
) -> Tensor:
    """`influence` summed over checkpoints of a run, times their learning rates: (T, N).

    Args:
        objective: as for `influence`, like all that is not listed.
        checkpoints: ``(params, buffers)`` of each.
        batch: N training samples.
        test_batch: T samples.
        learning_rates: of the steps after each checkpoint; 1 by default.
        projection: as for `influence`.
        where: likewise.
        chunk_size: likewise.
        key: likewise.

    Raises:
        ValueError: no checkpoint, or not one learning rate for each.

    Example:
        >>> import torch
        >>> from holofunc import analysis, lift, losses, random, train
        >>> model = lift(torch.nn.Linear, 3, 2)
        >>> objective = train.supervised(model, losses.cross_entropy)
        >>> batch = torch.ones(4, 3), torch.tensor([0, 1, 0, 1])
        >>> checkpoints = [model.init(random.key(seed)) for seed in (0, 1)]
        >>> analysis.tracin(objective, checkpoints, batch, batch).shape
        torch.Size([4, 4])
    """
    rates = [1.0] * len(checkpoints) if learning_rates is None else list(learning_rates)
    if not checkpoints or len(rates) != len(checkpoints):
        raise ValueError(
            "there must be at least one checkpoint, and a learning rate for each, got "
            f"{len(checkpoints)} checkpoints and {len(rates)} learning rates"
        )
    options = {"projection": projection, "where": where, "chunk_size": chunk_size, "key": key}
    scores = [
        rate * influence(objective, params, buffers, batch, test_batch, **options)  # type: ignore[arg-type]
        for rate, (params, buffers) in zip(rates, checkpoints, strict=True)
    ]
    return torch.stack(scores).sum(0)


class Neighbours(NamedTuple):
    """The result of `nearest`: ``indices`` of training samples and their ``values``, each (T, k)."""

    indices: Tensor
    values: Tensor


def nearest(scores: Tensor, k: int, *, harmful: bool = False) -> Neighbours:
    """The ``k`` training samples with the highest influence on each test sample, highest first.

    Args:
        scores: (T, N), of `influence` or `tracin`.
        k: in [1, N].
        harmful: the lowest instead: those that raise the loss.

    Example:
        >>> import torch
        >>> from holofunc import analysis
        >>> analysis.nearest(torch.tensor([[0.1, 0.9, -0.5]]), 2).indices
        tensor([[1, 0]])
    """
    if not 1 <= k <= scores.shape[-1]:
        raise ValueError(f"k must be in [1, {scores.shape[-1]}], the number of training samples, got {k}")
    values, indices = torch.topk(scores, k, dim=-1, largest=not harmful)
    return Neighbours(indices, values)


class Sketch(NamedTuple):
    """A random projection that needs no matrix: every coordinate goes, with a random sign, into a random bucket."""

    buckets: Tensor
    signs: Tensor
    zeros: Tensor

    @staticmethod
    def draw(key: Key, like: Params, size: int) -> "Sketch":
        zeros = tree.upcast(torch.cat([p.new_zeros(0) for p in like.values()])).new_zeros(size)
        count = sum(math.prod(p.shape) for p in like.values())
        place, sign = random.split(key.to(zeros.device))
        signs = random.bernoulli(sign, (count,), 0.5).to(zeros.dtype) * 2 - 1
        return Sketch(random.randint(place, (count,), 0, size), signs, zeros)

    def apply(self, grads: Params) -> Tensor:
        """(size,) of the gradients of one sample."""
        flat = torch.cat([g.reshape(-1) for g in grads.values()])
        return self.zeros.index_add(0, self.buckets, flat * self.signs)
