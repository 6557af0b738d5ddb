"""Statistics of each sample during training: forgetting, data maps, and EL2N over epochs."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from holofunc.analysis.samples import per_sample_losses, split_indices
from holofunc.data import Batches
from holofunc.train import TrainState
from holofunc.typing import Batch, Buffers, Key, Objective, Params, PyTree, Step

__all__ = ["Indexed", "Track", "TrackedState", "track_init", "track_step", "track_summary", "track_update"]

MEANS = ("probability", "el2n", "loss")


class Track(NamedTuple):
    """Statistics of each of N samples: tensors (N,), saved and resumed like any state.

    Attributes:
        seen: how often, int64.
        correct: how often predicted correctly, int64.
        forgotten: how often predicted wrongly right after correctly, int64.
        last: whether the latest prediction was correct, bool.
        probability: mean of the target's probability.
        el2n: mean of `EL2N`.
        loss: mean.
        spread: sum of squared deviations of the target's probability from its mean.
    """

    seen: Tensor
    correct: Tensor
    forgotten: Tensor
    last: Tensor
    probability: Tensor
    el2n: Tensor
    loss: Tensor
    spread: Tensor


def track_init(n: int, *, device: torch.device | str | None = None) -> Track:
    """A `Track` of ``n`` samples that have not been seen yet.

    Example:
        >>> from holofunc import analysis
        >>> analysis.track_init(3).seen
        tensor([0, 0, 0])
    """
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"n must be the number of samples in the dataset, at least 1, got {n!r}")
    kinds = {"seen": torch.int64, "correct": torch.int64, "forgotten": torch.int64, "last": torch.bool}
    return Track(**{f: torch.zeros(n, dtype=kinds.get(f, torch.float32), device=device) for f in Track._fields})


def track_update(track: Track, indices: Tensor, stats: Mapping[str, Tensor]) -> Track:
    """The track after a batch. Pure and of fixed size, so it can be part of a compiled step.

    Args:
        track: of `track_init`.
        indices: places of the samples in the dataset, integers (B,), each at most once.
        stats: of `per_sample_losses` on these samples: ``probability, prediction, label, el2n, loss`` are read.

    Raises:
        ValueError: no indices, or not one per sample; scores that are not there.

    Source: the mean and its spread as in Welford (1962).

    Example:
        >>> import torch
        >>> from holofunc import analysis
        >>> one = torch.ones(1)
        >>> stats = {"probability": one, "el2n": one, "loss": one, "prediction": one, "label": one}
        >>> analysis.track_update(analysis.track_init(3), torch.tensor([1]), stats).correct
        tensor([0, 1, 0])
    """
    missing = [name for name in (*MEANS, "prediction", "label") if name not in stats]
    if missing:
        raise ValueError(f"stats must hold the scores of per_sample_losses for a classifier, got none for {missing}")
    label, prediction = stats["label"], stats["prediction"]
    if not isinstance(indices, Tensor) or indices.is_floating_point() or indices.shape != label.shape:
        got = f"{indices.dtype} of shape {tuple(indices.shape)}" if isinstance(indices, Tensor) else repr(indices)
        raise ValueError(f"indices must be integers of shape {tuple(label.shape)}, one per sample, got {got}")
    indices = indices.to(track.seen.device, torch.int64)
    old = Track(*(x[indices] for x in track))
    seen = old.seen + 1
    right = (prediction == label).to(track.seen.device)
    means = {}
    for name in MEANS:
        mean = getattr(old, name)
        means[name] = mean + (stats[name].to(mean) - mean) / seen
    probability = stats["probability"].to(old.probability)
    spread = old.spread + (probability - old.probability) * (probability - means["probability"])
    new = Track(seen, old.correct + right, old.forgotten + (old.last & ~right), right, **means, spread=spread)
    return Track(*(x.index_copy(0, indices, y) for x, y in zip(track, new, strict=True)))


def track_summary(track: Track) -> dict[str, Tensor]:
    """Summary statistics of each sample, tensors (N,) by name.

    Returns:
        ``confidence`` and ``variability`` (mean and standard deviation of the target's probability, the axes of a data
        map), ``correctness`` (share of correct predictions), ``forgetting`` (times forgotten; infinite for samples that
        were never predicted correctly), ``el2n`` and ``loss`` (means) and ``seen``. NaN for samples not seen.

    Source: Toneva et al., "An empirical study of example forgetting" (ICLR 2019); Swayamdipta et al., "Dataset
        cartography" (EMNLP 2020).

    Example:
        >>> from holofunc import analysis
        >>> sorted(analysis.track_summary(analysis.track_init(1)))
        ['confidence', 'correctness', 'el2n', 'forgetting', 'loss', 'seen', 'variability']
    """
    count = torch.where(track.seen > 0, track.seen.to(track.loss.dtype), torch.nan)
    known = count / count  # 1, or NaN
    forgotten = torch.where(track.correct > 0, track.forgotten.to(track.loss.dtype), torch.inf)
    return {
        "confidence": track.probability * known,
        "variability": (track.spread / count).sqrt(),
        "correctness": track.correct / count,
        "forgetting": forgotten * known,
        "el2n": track.el2n * known,
        "loss": track.loss * known,
        "seen": track.seen,
    }


# --- inside a run --------------------------------------------------------------------------------------------------


class TrackedState(NamedTuple):
    """A `holofunc.train.TrainState` with a `Track`; `holofunc.train.fit` runs it, and its checkpoints hold both."""

    step: Tensor
    params: Params
    buffers: Buffers
    opt_state: PyTree
    key: Key
    track: Track


def track_step(step: Step, objective: Objective) -> Step:
    """A training step that also tracks the predictions for its samples before the update.

    Costs one more forward pass, in eval mode. The track is part of the state, so a resumed run has the same one.

    Args:
        step: of `holofunc.train.make_train_step`.
        objective: the scores are those of its `per_sample_losses`.

    Returns:
        ``step(state, batch) -> (state, metrics)`` of a `TrackedState` and a batch ``(images, targets, indices)``, such
        as `Indexed` yields.

    Example:
        >>> import torch
        >>> from holofunc import analysis, lift, losses, optim, random, train
        >>> model, tx = lift(torch.nn.Linear, 3, 2), optim.sgd(0.1)
        >>> objective = train.supervised(model, losses.cross_entropy)
        >>> step = analysis.track_step(train.make_train_step(objective, tx), objective)
        >>> state = analysis.TrackedState(*train.create_state(model, tx, random.key(0)), analysis.track_init(4))
        >>> batch = torch.ones(2, 3), torch.tensor([0, 1]), torch.tensor([3, 0])
        >>> step(state, batch)[0].track.seen
        tensor([1, 0, 0, 1])
    """

    def tracked(state: TrackedState, batch: Batch) -> tuple[TrackedState, dict[str, Tensor]]:
        batch, indices = split_indices(batch)
        stats = per_sample_losses(objective, state.params, state.buffers, batch)
        new, metrics = step(TrainState(*state[:5]), batch)
        return TrackedState(**new._asdict(), track=track_update(state.track, indices, stats)), metrics

    return tracked


class Indexed:
    """`holofunc.data.Batches` with the indices of the samples: ``(images, targets, indices)``.

    Example:
        >>> from holofunc import analysis, data, random
        >>> batches = analysis.Indexed(data.Batches(data.digits("test"), 100, key=random.key(0)))
        >>> images, labels, indices = next(iter(batches))
        >>> bool((labels == data.digits("test")[1][indices]).all())
        True
    """

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return self.epoch(0)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """The batches of an epoch from number ``start`` on."""
        order: Callable[[int], Tensor] = self.batches.order
        places, done = order(epoch), 0
        for i, (images, targets) in enumerate(self.batches.epoch(epoch)):
            count = len(images)
            if i >= start:
                yield images, targets, places[done : done + count].to(images.device)
            done += count
