"""Per-sample losses and scores, of a batch or a whole dataset."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from holofunc import tree
from holofunc.analysis.mapped import num_samples, over_samples
from holofunc.data import Batches
from holofunc.ops.arithmetic import upcast
from holofunc.train.objective import Aux, Supervised, pair, run_model, total_loss
from holofunc.typing import Batch, Buffers, Key, Objective, Params, PyTree

__all__ = ["in_eval_mode", "per_sample_losses", "score_dataset", "top_losses"]


class EvalMode(Supervised):
    """What `in_eval_mode` returns."""

    def __call__(self, params: Params, buffers: Buffers, batch: Batch, key: Key | None = None) -> tuple[Tensor, Aux]:
        images, targets = pair(batch)
        outputs, buffers = run_model(self.model, self.precision, params, buffers, images)
        loss, parts = total_loss(self.loss, outputs, targets)
        return loss, Aux(buffers, parts, outputs)


def in_eval_mode(objective: Objective) -> EvalMode:
    """A supervised objective with its model in eval mode: statistics from the buffers, no dropout, no key needed.

    What is asked of single samples is asked in this mode, or of a model without BatchNorm: one sample has no batch to
    normalize over. Which statistics are in the buffers is the caller's choice; `calibrate` puts those of a batch there.

    Args:
        objective: of `holofunc.train.supervised`. Others choose the mode by what they pass to `Model.apply`.

    Raises:
        TypeError: another objective.

    Example:
        >>> import torch
        >>> from holofunc import analysis, losses, models, random, train
        >>> model = models.smallnet()
        >>> params, buffers = model.init(random.key(0))
        >>> objective = analysis.in_eval_mode(train.supervised(model, losses.cross_entropy))
        >>> loss, aux = objective(params, buffers, (torch.zeros(2, 3, 8, 8), torch.tensor([0, 1])))
        >>> aux.buffers is buffers
        True
    """
    if not isinstance(objective, Supervised):
        raise TypeError(
            f"objective must come from train.supervised, got {objective!r}; in one of your own, call model.apply with "
            "train=False"
        )
    return EvalMode(*(getattr(objective, field.name) for field in dataclasses.fields(objective)))


# --- losses and scores ---------------------------------------------------------------------------------------------


def sample_losses(
    objective: Objective, params: Params, buffers: Buffers, batch: Batch, key: Key | None = None
) -> tuple[Tensor, Aux]:
    """The loss of each sample as a batch of its own, (N,), with its named parts and the outputs, (N, ...), and what
    each counts in the mean over the batch, where that is known.

    The model of a supervised objective sees the whole batch at once: one forward pass.
    """
    num_samples(batch)
    if not isinstance(objective, Supervised):

        def one(sample: Batch, key: Key | None) -> tuple[Tensor, PyTree]:
            loss, aux = objective(params, buffers, sample, key)  # type: ignore[arg-type]
            return loss, (_row(aux.outputs), aux.weight) if isinstance(aux, Aux) else ((), ())

        losses, (outputs, mass) = over_samples(one, batch, key)
        return losses, Aux(buffers, {}, outputs, mass)
    images, targets = pair(batch)
    train = not isinstance(objective, EvalMode)
    outputs, buffers = run_model(objective.model, objective.precision, params, buffers, images, train=train, key=key)
    axis = objective.criterion.batch_axis

    def loss_of(sample: Batch, key: Key | None) -> tuple[Tensor, dict[str, Tensor], Tensor | tuple[()]]:
        output, target = sample
        loss, parts, mass = objective.criterion(tree.map(lambda x: x.movedim(0, axis), output), target, key)
        return loss, parts, () if mass is None else mass

    outputs = tree.map(lambda x: x.movedim(axis, 0), outputs)  # of sequences, frames come first
    losses, parts, mass = over_samples(loss_of, (outputs, targets), key if train else None)
    return losses, Aux(buffers, parts, outputs, mass)


def _row(outputs: PyTree) -> PyTree:
    """The one row of a batch of one; nothing of what has no rows."""
    leaves = tree.leaves(outputs)
    rows = all(isinstance(x, Tensor) and x.shape[:1] == (1,) for x in leaves)
    return tree.map(lambda x: x[0], outputs) if leaves and rows else ()


def per_sample_losses(
    objective: Objective,
    params: Params,
    buffers: Buffers,
    batch: Batch,
    *,
    indices: Tensor | None = None,
    key: Key | None = None,
) -> dict[str, Tensor]:
    """The loss and confidence of each sample. Costs one forward pass, half a batch gradient.

    A supervised objective is evaluated in eval mode, as in evaluation, so that no score depends on its neighbours.

    Args:
        objective: of `holofunc.train.supervised`, or any; of one that is not supervised, each sample is evaluated as a
            batch of one under `vmap`, in the mode that it chooses.
        params: of the model.
        buffers: its statistics.
        batch: N samples, usually ``(images, targets)``.
        indices: places of the samples in their dataset, int64 (N,); returned as ``index``.
        key: for an objective that draws.

    Returns:
        Tensors (N,) by name: ``loss``, and ``loss/<part>`` where the loss has parts. Of outputs (N, K, ...) with labels
        or class probabilities, and of outputs (N,) or (N, 1) with targets of 0 or 1, also ``prediction`` (the class;
        for segmentation a map), ``label``, ``confidence`` (highest probability), ``probability`` (of the target),
        ``margin`` (probability of the target minus that of the best other class), ``entropy`` (in nats) and ``el2n``
        (distance of probabilities and target). For segmentation these are means over the pixels that count, and
        ``iou`` is the image's mean IoU over the classes in it. All that is said of the target is NaN where there is
        none: for labels that are ignored, and numbers that are no probabilities.

    Raises:
        ValueError: tensors of different lengths in the batch; indices of another length.

    Source: Paul et al., "Deep learning on a data diet" (NeurIPS 2021), for EL2N.

    Example:
        >>> import torch
        >>> from holofunc import analysis, lift, losses, random, train
        >>> model = lift(torch.nn.Linear, 3, 2)
        >>> objective = train.supervised(model, losses.cross_entropy)
        >>> batch = torch.ones(4, 3), torch.tensor([0, 1, 0, 1])
        >>> stats = analysis.per_sample_losses(objective, *model.init(random.key(0)), batch)
        >>> stats["loss"].shape, sorted(stats)
        (torch.Size([4]), ['confidence', 'el2n', 'entropy', 'label', 'loss', 'margin', 'prediction', 'probability'])
    """
    if isinstance(objective, Supervised):
        objective = in_eval_mode(objective)
    losses, aux = sample_losses(objective, params, buffers, batch, key)
    stats = {"loss": losses, **{f"loss/{name}": part for name, part in aux.metrics.items()}}
    sequences = isinstance(objective, Supervised) and objective.criterion.batch_axis > 0
    if isinstance(batch, (tuple, list)) and len(batch) >= 2 and not sequences:
        stats.update(_scores(aux.outputs, batch[1]))
    if indices is None:
        return stats
    if indices.shape != losses.shape:
        raise ValueError(f"indices must have shape {tuple(losses.shape)}, one per sample, got {tuple(indices.shape)}")
    return {"index": indices, **stats}


def _scores(outputs: Any, targets: Any) -> dict[str, Tensor]:
    """What can be said of these outputs; nothing, if they are no class scores with targets that fit them."""
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor) or not outputs.is_floating_point():
        return {}
    if outputs.shape == targets.shape and outputs.shape[1:] in ((), (1,)):
        logits = outputs.reshape(-1, 1)
        return _class_scores(torch.cat([torch.zeros_like(logits), logits], 1), _as_label(targets.reshape(-1)))
    if outputs.ndim < 2:
        return {}
    hard = targets.shape == (outputs.shape[0], *outputs.shape[2:]) and not targets.is_floating_point()
    soft = targets.shape == outputs.shape and targets.is_floating_point()
    return _class_scores(outputs, targets) if hard or soft else {}


def _as_label(targets: Tensor) -> Tensor:
    if not targets.is_floating_point():
        return targets
    return torch.stack([1 - targets, targets], 1)


def _class_scores(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    classes = logits.shape[1]
    p = torch.softmax(upcast(logits), 1)
    if targets.is_floating_point():
        wanted, label = targets.to(p.dtype), targets.argmax(1)
        counts = ((wanted >= 0) & (wanted <= 1)).all(1)
    else:
        label = targets.long()
        wanted = _one_hot(label, classes).to(p.dtype)
        counts = wanted.sum(1) > 0  # an ignored label has no class
    best, prediction = p.max(1)
    of_target = _one_hot(label, classes)
    others = torch.where(of_target, -torch.inf, p).amax(1)
    scores = {
        "confidence": best,
        "probability": (p * wanted).sum(1),
        "margin": torch.where(of_target, p, 0.0).sum(1) - others,
        "entropy": -torch.special.xlogy(p, p).sum(1),  # 0 log 0 is 0
        "el2n": (p - wanted).square().sum(1).sqrt(),
    }
    named = {"prediction": prediction, "label": label}
    if logits.ndim == 2:
        return {**named, **{n: s if n in OF_OUTPUTS else torch.where(counts, s, torch.nan) for n, s in scores.items()}}
    counted = counts.flatten(1)
    pixels = counted.sum(1)
    means = {n: torch.where(counted, s.flatten(1), 0.0).sum(1) / pixels for n, s in scores.items()}
    return {**named, **means, "iou": _image_iou(prediction, label, counts, classes)}


OF_OUTPUTS = ("confidence", "entropy")
"""Scores that need no target."""


def _one_hot(labels: Tensor, classes: int) -> Tensor:
    """Bool, the classes in dimension 1."""
    shape = (1, classes, *[1] * (labels.ndim - 1))
    return labels.unsqueeze(1) == torch.arange(classes, device=labels.device).view(shape)


def _image_iou(prediction: Tensor, label: Tensor, counts: Tensor, classes: int) -> Tensor:
    counts = counts.unsqueeze(1)
    predicted, true = _one_hot(prediction, classes) & counts, _one_hot(label, classes) & counts
    shared, either = (predicted & true).flatten(2).sum(2), (predicted | true).flatten(2).sum(2)
    return (shared / either.clamp_min(1)).sum(1) / (either > 0).sum(1)


def score_dataset(
    objective: Objective,
    params: Params,
    buffers: Buffers,
    data: Iterable[Batch],
    *,
    progress: bool = False,
    score: Callable[..., dict[str, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """`per_sample_losses` over a dataset; row i of each tensor is the sample with the i-th lowest index.

    Args:
        objective: as for `per_sample_losses`.
        params: of the model.
        buffers: its statistics.
        data: `holofunc.data.Batches` (in any order: it knows its indices), or batches whose last element are indices,
            ``(images, targets, indices)``, or ``(batch, indices)`` where the objective's batches are dicts.
        progress: show a bar.
        score: ``score(params, buffers, batch, indices) -> dict``, for instance compiled; by default
            `per_sample_losses`.

    Returns:
        The tensors of all batches on the CPU, (N, ...) by name, among them ``index``.

    Raises:
        ValueError: batches without indices; no batch at all.

    Example:
        >>> from holofunc import analysis, data, losses, models, random, train
        >>> model = models.smallnet(in_channels=1)
        >>> objective = train.supervised(model, losses.cross_entropy)
        >>> batches = data.Batches(data.digits("test"), 128, key=random.key(1))
        >>> stats = analysis.score_dataset(objective, *model.init(random.key(0)), batches)
        >>> stats["index"][:3], stats["loss"].shape
        (tensor([0, 1, 2]), torch.Size([355]))
    """
    if score is None:

        def score(params: Params, buffers: Buffers, batch: Batch, indices: Tensor) -> dict[str, Tensor]:
            return per_sample_losses(objective, params, buffers, batch, indices=indices)

    rows: list[dict[str, Tensor]] = []
    done = 0
    for batch in _shown(data, progress):
        if isinstance(data, Batches):
            count = num_samples(batch)
            indices = data.order(0)[done : done + count]
            done += count
        else:
            batch, indices = split_indices(batch)
        with torch.no_grad():
            rows.append({n: x.cpu() for n, x in score(params, buffers, batch, indices).items()})
    if not rows:
        raise ValueError("data must hold at least one batch, got none")
    stats = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    order = torch.argsort(stats["index"], stable=True)
    return {name: values[order] for name, values in stats.items()}


def _shown(data: Iterable[Batch], progress: bool) -> Iterable[Batch]:
    if not progress:
        return data
    from tqdm.auto import tqdm

    return tqdm(data, desc="scoring", unit="batch")


def split_indices(batch: Batch) -> tuple[Batch, Tensor]:
    """A batch ``(*parts, indices)``, or ``(dict, indices)``, without the indices, and these."""
    named = isinstance(batch, Sequence) and len(batch) == 2 and isinstance(batch[0], Mapping)
    last = batch[-1] if named or (isinstance(batch, Sequence) and len(batch) > 2) else None
    if not isinstance(last, Tensor) or last.ndim != 1 or last.is_floating_point():
        raise ValueError(
            "the index of the samples is missing: batches must end with it, (images, targets, indices), as those of "
            "analysis.Indexed, or come from holofunc.data.Batches, which knows it"
        )
    return batch[0] if named else tuple(batch[:-1]), last


def top_losses(stats: Mapping[str, Tensor], k: int, *, by: str = "loss", largest: bool = True) -> dict[str, Tensor]:
    """The ``k`` samples with the highest loss, worst first.

    Args:
        stats: of `per_sample_losses` or `score_dataset`: tensors (N, ...) by name. Images and labels may be added to
            them, and stay with their rows.
        k: in [1, N].
        by: which of the scores to sort by.
        largest: False for the lowest first. A NaN counts as the highest loss; as another score it comes last.

    Returns:
        ``stats`` at these rows, with ``index``: the places of the rows where the stats have no index of their own.

    Raises:
        ValueError: ``by`` is not there, or ``k`` is out of range.

    Example:
        >>> import torch
        >>> from holofunc import analysis
        >>> analysis.top_losses({"loss": torch.tensor([1.0, 3.0, 2.0])}, 2)
        {'index': tensor([1, 2]), 'loss': tensor([3., 2.])}
    """
    if by not in stats:
        raise ValueError(f"by must be one of {', '.join(map(repr, stats))}, got {by!r}")
    values = stats[by]
    if not 1 <= k <= len(values):
        raise ValueError(f"k must be in [1, {len(values)}], the number of samples, got {k}")
    if by != "loss" and values.is_floating_point():
        values = values.nan_to_num(-torch.inf if largest else torch.inf, torch.inf, -torch.inf)
    rows = torch.argsort(values, descending=largest, stable=True)[:k]
    places = stats.get("index", torch.arange(len(values), device=values.device))
    return {"index": places[rows], **{name: x[rows] for name, x in stats.items() if name != "index"}}
