"""A report on the samples of a dataset and their labels, as one table."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from holofunc.analysis.dynamics import Track, track_summary
from holofunc.analysis.gradients import per_sample_grad_norms
from holofunc.analysis.samples import in_eval_mode, per_sample_losses, score_dataset, top_losses
from holofunc.train.objective import Supervised
from holofunc.typing import Batch, Buffers, Objective, Params

__all__ = ["Report", "explain", "label_error_recall", "to_csv"]


class Report(NamedTuple):
    """The result of `explain`.

    Attributes:
        stats: a row per sample, tensors (N, ...) by name; ``index`` is the sample's place in its dataset.
        worst: for each score in the stats, the rows of the most suspicious samples, the first one first.
        summary: numbers by name: samples, mean loss, accuracy, and of each score its mean and highest value.
    """

    stats: dict[str, Tensor]
    worst: dict[str, dict[str, Tensor]]
    summary: dict[str, float]


SUSPICIOUS = {
    "loss": True,
    "el2n": True,
    "grad_norm": True,
    "forgetting": True,
    "entropy": True,
    "margin": False,
    "probability": False,
    "iou": False,
}
"""Scores, and whether high ones are the suspicious ones."""


def explain(
    objective: Objective,
    params: Params,
    buffers: Buffers,
    data: Iterable[Batch],
    *,
    track: Track | None = None,
    grad_norms: bool = True,
    count: int = 24,
    progress: bool = False,
) -> Report:
    """Scores of all samples of a dataset and the most suspicious ones by each score, as in ``holofunc explain``.

    Of classifiers, what `per_sample_losses` says; of segmentation, the IoU of each image too; of detectors, each term
    of the loss.

    Args:
        objective: of `holofunc.train.supervised`, evaluated in eval mode; or any, evaluated as it is.
        params: of the trained model.
        buffers: its statistics.
        data: as for `score_dataset`.
        track: of the run that trained the model; adds ``forgetting``, ``variability`` and ``correctness``.
        grad_norms: whether to add the norm of each sample's gradient, for one batch gradient more per batch.
        count: rows per score.
        progress: show a bar.

    Raises:
        ValueError: as `score_dataset`; a track of fewer samples than the data.

    Example:
        >>> from holofunc import analysis, data, losses, models, random, train
        >>> model = models.smallnet(in_channels=1)
        >>> objective = train.supervised(model, losses.cross_entropy)
        >>> batches = data.Batches(data.digits("test"), 128)
        >>> report = analysis.explain(objective, *model.init(random.key(0)), batches, grad_norms=False)
        >>> sorted(report.worst)
        ['el2n', 'entropy', 'loss', 'margin', 'probability']
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if isinstance(objective, Supervised):
        objective = in_eval_mode(objective)

    def score(params: Params, buffers: Buffers, batch: Batch, indices: Tensor) -> dict[str, Tensor]:
        stats = per_sample_losses(objective, params, buffers, batch, indices=indices)
        if grad_norms:
            stats["grad_norm"] = per_sample_grad_norms(objective, params, buffers, batch)
        return stats

    stats = score_dataset(objective, params, buffers, data, progress=progress, score=score)
    if track is not None:
        if int(stats["index"].max()) >= len(track.seen):
            raise ValueError(
                f"track must cover all samples, got {len(track.seen)} for index {int(stats['index'].max())}"
            )
        told = track_summary(Track(*(x.cpu() for x in track)))
        stats.update({n: told[n][stats["index"]] for n in ("forgetting", "variability", "correctness")})
    parts = {name: True for name in stats if name.startswith("loss/")}
    scores = {name: high for name, high in {**SUSPICIOUS, **parts}.items() if name in stats}
    rows = min(count, len(stats["loss"]))
    worst = {name: top_losses(stats, rows, by=name, largest=high) for name, high in scores.items()}
    return Report(stats, worst, _summary(stats, scores))


def _summary(stats: Mapping[str, Tensor], scores: Iterable[str]) -> dict[str, float]:
    numbers = {"samples": float(len(stats["loss"]))}
    if "prediction" in stats and stats["prediction"].ndim == 1:
        numbers["accuracy"] = float((stats["prediction"] == stats["label"]).double().mean())
    for name in scores:
        values = stats[name].double()
        values = values[values.isfinite()]
        if len(values):
            numbers[f"{name}/mean"], numbers[f"{name}/max"] = float(values.mean()), float(values.max())
    return numbers


def to_csv(stats: Mapping[str, Tensor], class_names: Sequence[str] | None = None) -> str:
    """The stats as CSV text, one line per sample; values that are not one number per sample are left out.

    Args:
        stats: of `score_dataset`, `explain` or `top_losses`.
        class_names: written instead of numbers for ``label`` and ``prediction``; a label that is ignored has none.

    Example:
        >>> import torch
        >>> from holofunc import analysis
        >>> print(analysis.to_csv({"index": torch.tensor([3]), "label": torch.tensor([1])}, ["cat", "dog"]))
        index,label
        3,dog
        <BLANKLINE>
    """
    columns = {name: x.tolist() for name, x in stats.items() if x.ndim == 1}
    if class_names is not None:
        for name in {"label", "prediction"} & set(columns):
            columns[name] = [class_names[i] if 0 <= i < len(class_names) else i for i in map(int, columns[name])]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return text.getvalue()


def label_error_recall(scores: Tensor, wrong: Tensor, share: float = 0.1) -> float:
    """The fraction of wrong labels among the samples with the highest scores.

    Args:
        scores: the more suspicious the higher, (N,).
        wrong: which labels are wrong, bool (N,).
        share: of the samples to inspect, in (0, 1].

    Example:
        >>> import torch
        >>> from holofunc import analysis
        >>> wrong = torch.tensor([True, True, False, False])
        >>> analysis.label_error_recall(torch.tensor([3.0, 1.0, 2.0, 0.0]), wrong, 0.5)
        0.5
    """
    if scores.shape != wrong.shape or not bool(wrong.any()):
        raise ValueError(f"wrong must mark some of the {len(scores)} samples, got {int(wrong.sum())} of {len(wrong)}")
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")
    inspected = torch.argsort(scores, descending=True, stable=True)[: round(share * len(scores))]
    return float(wrong[inspected].sum() / wrong.sum())
