"""Figures for classifiers: confusion, images, and the samples with the largest loss."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from holofunc.plots.drawing import COLORS, FAINT, INK, grid, named, show, unit_pixels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["confusion", "images", "top_losses"]


def confusion(matrix: Tensor, class_names: Sequence[str] | None = None) -> "Figure":
    """Draw a confusion matrix: rows are true classes, shaded by the fraction predicted as the column.

    The counts are written into the cells (up to 25 classes), the recall of each class beside its row.

    Args:
        matrix: counts (C, C), rows true, columns predicted, as `metrics.confusion` computes.
        class_names: names of the classes; by default, their indices.

    Raises:
        ValueError: if the matrix is not square, or there are more or fewer names than classes.

    Example:
        >>> import torch
        >>> from holofunc import plots
        >>> figure = plots.confusion(torch.tensor([[8, 2], [0, 10]]), ["cat", "dog"])
        >>> figure.axes[0].get_title(loc="left")
        'accuracy 90.0 % (18 of 20)'
    """
    counts = torch.as_tensor(matrix).detach().cpu().double().numpy()
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or counts.size == 0:
        raise ValueError(f"matrix must have shape (C, C), got {counts.shape}")
    names = [str(i) for i in range(len(counts))] if class_names is None else list(class_names)
    if len(names) != len(counts):
        raise ValueError(f"class_names must hold {len(counts)} names, one per class, got {len(names)}")
    totals = counts.sum(1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)
    side = min(max(3.2, 1.6 + 0.42 * len(counts)), 12.0)
    with grid(1, size=(side + 0.7, side)) as (figure, (axes,)):
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1.15)  # the darkest blue stays readable
        if len(counts) <= 25:
            for (row, column), count in np.ndenumerate(counts):
                if count:
                    color = "white" if shares[row, column] > 0.6 else INK
                    axes.text(column, row, f"{count:g}", ha="center", va="center", color=color, fontsize=8)
        ticks = range(0, len(names), math.ceil(len(names) / 40))
        shown = [names[i] for i in ticks]
        axes.set_xticks(ticks, shown)
        if max(map(len, shown)) > 3:
            for label in axes.get_xticklabels():
                label.set(rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(ticks, shown)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        if len(counts) <= 40:
            recalls = [f"{share:.0%}" if total else "" for share, total in zip(shares.diagonal(), totals, strict=True)]
            for row, recall in enumerate(recalls):
                axes.annotate(
                    recall, (1.01, row), xycoords=("axes fraction", "data"), va="center", color=FAINT, fontsize=8
                )
            axes.annotate("recall", (1.01, 1.01), xycoords="axes fraction", color=FAINT, fontsize=8)
        right, total = counts.trace(), counts.sum()
        accuracy = f"accuracy {100 * right / total:.1f} % ({right:g} of {total:g})" if total else "nothing counted"
        axes.set(xlabel="predicted", ylabel="true")
        axes.set_title(accuracy, pad=14)
    return figure


def images(
    images: Tensor,
    *,
    titles: Sequence[str] | None = None,
    columns: int = 8,
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 1.0,
) -> "Figure":
    """Draw images in a grid.

    Args:
        images: (N, C, H, W) with 1 or 3 channels, uint8 or floating in [0, 1]; what lies outside is cut off.
        titles: a title for each image.
        columns: images in a row.
        mean: what was subtracted from the images, to be added again.
        std: what the images were divided by after that.

    Raises:
        ValueError: if the images have another shape, or there are more or fewer titles than images.

    Example:
        >>> from holofunc import data, plots
        >>> pixels, labels = data.digits("test")
        >>> figure = plots.images(pixels[:16], titles=[str(int(label)) for label in labels[:16]])
        >>> len(figure.axes)
        16
    """
    shown = unit_pixels(images, mean, std)
    if titles is not None and len(titles) != len(images):
        raise ValueError(f"titles must hold {len(images)} texts, one per image, got {len(titles)}")
    lines = 0 if titles is None else max(title.count("\n") + 1 for title in titles)
    with grid(len(shown), size=(1.25, 1.25 + 0.17 * lines), columns=columns) as (figure, cells):
        for i, axes in enumerate(cells):
            show(axes, shown[i])
            if titles is not None:
                axes.set_title(titles[i], fontsize=8, fontweight="normal", loc="center", pad=3, parse_math=False)
    return figure


def top_losses(
    pixels: Tensor,
    losses: Tensor,
    predictions: Tensor,
    labels: Tensor,
    *,
    probabilities: Tensor | None = None,
    class_names: Sequence[str] | None = None,
    count: int = 16,
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 1.0,
) -> "Figure":
    """Draw the samples with the highest losses, worst first: true class → predicted class, and the loss.

    All of it comes from `holofunc.analysis.score_dataset`, or from the rows of `holofunc.analysis.top_losses`.

    Args:
        pixels: images (N, C, H, W) as in `images`.
        losses: loss of each (N,).
        predictions: predicted class of each (N,).
        labels: True class of each (N,).
        probabilities: of each prediction (N,), such as ``confidence``; said beside it.
        class_names: names of the classes; by default, their indices.
        count: how many to draw.
        mean: as in `images`.
        std: as in `images`.

    Raises:
        ValueError: if the lengths differ, or there are no images.

    Example:
        >>> import torch
        >>> from holofunc import data, plots
        >>> pixels, labels = data.digits("test")
        >>> losses = torch.arange(len(labels)) / 100
        >>> figure = plots.top_losses(pixels, losses, (labels + 1) % 10, labels, count=4)
        >>> figure.axes[0].get_title()
        '9 → 0\\nloss 3.54'
    """
    given = [pixels, losses, predictions, labels, *([] if probabilities is None else [probabilities])]
    lengths = [len(x) for x in given]
    if len(set(lengths)) > 1:
        raise ValueError(f"pixels, losses, predictions and labels must have the same length, got {lengths}")
    worst = torch.argsort(torch.as_tensor(losses).detach().cpu().float(), descending=True, stable=True)[:count].tolist()

    sure = {i: "" if probabilities is None else f" ({float(probabilities[i]):.0%})" for i in worst}
    titles = [
        f"{named(labels[i], class_names)} → {named(predictions[i], class_names)}{sure[i]}\nloss {float(losses[i]):.2f}"
        for i in worst
    ]
    figure = images(pixels[worst], titles=titles, mean=mean, std=std)
    for axes, i in zip(figure.axes, worst, strict=True):
        axes.title.set_color(COLORS[1] if int(labels[i]) != int(predictions[i]) else INK)
    return figure
