"""Figures of the results of `holofunc.analysis`: samples, curvature, landscapes and influence."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from holofunc.plots.drawing import COLORS, FAINT, INK, grid, show, unit_pixels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["agreement", "data_map", "heat", "landscape", "neighbours", "recall", "spectrum"]


def data_map(summary: Mapping[str, Tensor], *, marked: Tensor | None = None) -> "Figure":
    """Draw a data map: each sample at its variability and confidence over training, in the colour of its correctness.

    Hard or wrongly labelled samples lie at the lower left, ambiguous ones on the right, easy ones at the upper left.

    Args:
        summary: of `analysis.track_summary`.
        marked: samples to draw with a ring, bool (N,).

    Raises:
        ValueError: if the summary lacks one of the three numbers, or no sample has been seen.

    Example:
        >>> import torch
        >>> from holofunc.plots import analysis
        >>> summary = {name: torch.rand(20) for name in ("confidence", "variability", "correctness")}
        >>> analysis.data_map(summary).axes[0].get_xlabel()
        'variability'
    """
    missing = [name for name in ("confidence", "variability", "correctness") if name not in summary]
    if missing:
        raise ValueError(f"summary must be that of analysis.track_summary, it has no {missing}")
    x, y, color = (_array(summary[name]) for name in ("variability", "confidence", "correctness"))
    seen = np.isfinite(x) & np.isfinite(y)
    if not seen.any():
        raise ValueError("summary must hold a sample that has been seen, got none")
    with grid(1, size=(5.2, 4.2)) as (figure, (axes,)):
        points = axes.scatter(x[seen], y[seen], c=color[seen], cmap="coolwarm_r", s=10, vmin=0, vmax=1, linewidths=0)
        if marked is not None:
            ring = _array(marked).astype(bool) & seen
            axes.scatter(x[ring], y[ring], s=32, facecolors="none", edgecolors=INK, linewidths=0.8)
        figure.colorbar(points, ax=axes, label="correctness")
        axes.set(xlabel="variability", ylabel="confidence", ylim=(-0.03, 1.03))
        axes.grid()
    return figure


def spectrum(density: Any, *, eigenvalues: Tensor | None = None) -> "Figure":
    """Draw a spectral density on a logarithmic scale, and the largest eigenvalues as lines.

    Args:
        density: ``(grid, density)``, of `analysis.spectral_density`.
        eigenvalues: eigenvalues to mark, (k,).

    Example:
        >>> import torch
        >>> from holofunc.plots import analysis
        >>> analysis.spectrum((torch.linspace(0, 1, 50), torch.ones(50))).axes[0].get_yscale()
        'log'
    """
    places, values = (_array(x) for x in density)
    with grid(1, size=(5.6, 3.4)) as (figure, (axes,)):
        axes.plot(places, np.maximum(values, values.max() * 1e-7), color=COLORS[0], linewidth=1.5)
        for value in [] if eigenvalues is None else _array(eigenvalues):
            axes.axvline(value, color=COLORS[1], linewidth=1.0, linestyle=(0, (4, 3)))
        axes.set(yscale="log", xlabel="eigenvalue", ylabel="density", ylim=(values.max() * 1e-6, values.max() * 2))
        axes.grid()
    return figure


def landscape(landscape: Any, *, names: Sequence[str] = ("here",)) -> "Figure":
    """Draw the loss along a line, or over a plane as contours.

    Args:
        landscape: of `analysis.loss_landscape` or `analysis.interpolation`.
        names: what to call the middle of a plane; the two ends of a line may be named instead.

    Example:
        >>> import torch
        >>> from holofunc.plots import analysis
        >>> places = torch.linspace(-1, 1, 5)
        >>> analysis.landscape((places, places**2, ())).axes[0].get_ylabel()
        'loss'
    """
    places, losses = _array(landscape[0]), _array(landscape[1])
    with grid(1, size=(4.8, 4.0 if losses.ndim == 2 else 3.2)) as (figure, (axes,)):
        if losses.ndim == 1:
            axes.plot(places, losses, color=COLORS[0], marker="o", markersize=3.5, linewidth=1.8)
            for name, place in zip(names, (places[0], places[-1]), strict=False) if len(names) == 2 else ():
                axes.annotate(name, (place, losses.max()), ha="center", color=FAINT)
            axes.set(xlabel="place", ylabel="loss")
            axes.grid()
        else:
            drawn = axes.contourf(places, places, losses.T, levels=_levels(losses), cmap="Blues_r", extend="both")
            figure.colorbar(drawn, ax=axes, label="loss", format="%.3g")
            axes.plot([0], [0], "o", color=COLORS[1], markersize=5)
            axes.annotate(names[0], (0, 0), (5, 5), textcoords="offset points", color=COLORS[1])
            axes.set(xlabel="first direction", ylabel="second direction", aspect="equal")
    return figure


def _levels(losses: np.ndarray) -> np.ndarray:
    """Sixteen losses from the lowest to the highest, as factors where all are positive; far out some may be NaN."""
    known = losses[np.isfinite(losses)]
    low, high = (known.min(), known.max()) if known.size else (0.0, 1.0)
    high = max(high, low + 1e-6 * max(1.0, abs(low)))
    return np.geomspace(low, high, 16) if low > 0 else np.linspace(low, high, 16)


def heat(
    pixels: Tensor,
    maps: Tensor,
    *,
    titles: Sequence[str] | None = None,
    columns: int = 8,
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 1.0,
) -> "Figure":
    """Draw images under heat maps, red for positive and blue for negative values.

    Args:
        pixels: images (N, C, H, W) with 1 or 3 channels.
        maps: of the same size, (N, H, W), or (N, C, H, W), whose channels are summed: of `analysis.grad_cam` or
            `analysis.integrated_gradients`.
        titles: one per image.
        columns: images in a row.
        mean: what was subtracted from the images, to be added again.
        std: what the images were divided by after that.

    Raises:
        ValueError: if the sizes differ, or there are more or fewer titles than images.

    Example:
        >>> import torch
        >>> from holofunc.plots import analysis
        >>> len(analysis.heat(torch.rand(3, 1, 8, 8), torch.rand(3, 8, 8)).axes)
        3
    """
    maps = maps.sum(1) if maps.ndim == 4 else maps
    if maps.shape != (len(pixels), *pixels.shape[2:]):
        raise ValueError(f"maps must have the size of the images, {tuple(pixels.shape)}, got {tuple(maps.shape)}")
    if titles is not None and len(titles) != len(pixels):
        raise ValueError(f"titles must hold {len(pixels)} texts, one per image, got {len(titles)}")
    shown, values = unit_pixels(pixels, mean, std), _array(maps)
    with grid(len(shown), size=(1.3, 1.5), columns=columns) as (figure, cells):
        for i, axes in enumerate(cells):
            show(axes, shown[i])
            limit = max(abs(values[i]).max(), 1e-12)
            axes.imshow(values[i], cmap="RdBu_r", vmin=-limit, vmax=limit, alpha=0.6)
            if titles is not None:
                axes.set_title(titles[i], fontsize=8, fontweight="normal", loc="center", pad=3)
    return figure


def neighbours(
    pixels: Tensor,
    others: Tensor,
    found: Any,
    *,
    labels: Tensor | None = None,
    other_labels: Tensor | None = None,
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 1.0,
) -> "Figure":
    """Draw test images, each with the training images of the highest influence.

    Args:
        pixels: test images (T, C, H, W).
        others: all training images (N, C, H, W).
        found: ``(indices, values)``, each (T, k), of `analysis.nearest`.
        labels: of the test images, (T,).
        other_labels: of the training images, (N,).
        mean: what was subtracted from the images, to be added again.
        std: what the images were divided by after that.

    Example:
        >>> import torch
        >>> from holofunc.plots import analysis
        >>> found = torch.tensor([[4, 2], [0, 1]]), torch.ones(2, 2)
        >>> len(analysis.neighbours(torch.rand(2, 1, 8, 8), torch.rand(5, 1, 8, 8), found).axes)
        6
    """
    indices, values = found
    if len(indices) != len(pixels):
        raise ValueError(f"found must hold a row per test image, {len(pixels)}, got {len(indices)}")
    rows, k = indices.shape
    left, right = unit_pixels(pixels, mean, std), unit_pixels(others[indices.cpu().flatten()], mean, std)
    with grid(rows * (k + 1), size=(1.3, 1.5), columns=k + 1) as (figure, cells):
        for row in range(rows):
            axes = cells[row * (k + 1)]
            show(axes, left[row])
            title = "" if labels is None else f"{int(labels[row])}"
            axes.set_title(f"test {title}", fontsize=8, loc="center", color=COLORS[0], pad=3)
            for i in range(k):
                axes = cells[row * (k + 1) + 1 + i]
                show(axes, right[row * k + i])
                title = "" if other_labels is None else f"{int(other_labels[indices[row, i]])}: "
                text = f"{title}{float(values[row, i]):.2g}"
                axes.set_title(text, fontsize=8, fontweight="normal", loc="center", pad=3)
    return figure


def recall(scores: Mapping[str, Tensor], wrong: Tensor) -> "Figure":
    """Draw the fraction of wrong labels found over the fraction of samples inspected, worst first.

    Args:
        scores: by name, the more suspicious the higher, each (N,).
        wrong: which labels are wrong, bool (N,).

    Raises:
        ValueError: if no label is wrong.

    Example:
        >>> import torch
        >>> from holofunc.plots import analysis
        >>> figure = analysis.recall({"loss": torch.arange(4.0)}, torch.tensor([False, False, True, True]))
        >>> figure.axes[0].get_xlabel()
        'share inspected'
    """
    marks = _array(wrong).astype(bool)
    if not marks.any():
        raise ValueError(f"wrong must mark some of the {len(marks)} samples, got none")
    share = np.arange(1, len(marks) + 1) / len(marks)
    with grid(1, size=(5.2, 3.8)) as (figure, (axes,)):
        for i, (name, values) in enumerate(scores.items()):
            found = marks[np.argsort(-_array(values), kind="stable")].cumsum() / marks.sum()
            axes.plot(share, found, color=COLORS[i % len(COLORS)], linewidth=1.6, label=name)
        best = np.minimum(share * len(marks) / marks.sum(), 1)
        axes.plot(share, best, color=FAINT, linewidth=1, linestyle=(0, (4, 3)), label="best possible")
        axes.set(xlabel="share inspected", ylabel="share of wrong labels found", xlim=(0, 1), ylim=(0, 1.02))
        axes.legend(frameon=False, loc="lower right")
        axes.grid()
    return figure


def agreement(predicted: Tensor, actual: Tensor, *, name: str = "loss") -> "Figure":
    """Draw predicted against actual values, one point per case, with their rank correlation.

    Args:
        predicted: (M,).
        actual: (M,).
        name: what they are.

    Raises:
        ValueError: if the lengths differ.

    Example:
        >>> import torch
        >>> from holofunc.plots import analysis
        >>> analysis.agreement(torch.arange(3.0), torch.tensor([1.0, 2.0, 9.0])).axes[0].get_title(loc="left")
        'rank correlation 1.000'
    """
    x, y = _array(predicted), _array(actual)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"predicted and actual must have one length, got {x.shape} and {y.shape}")
    ranks = [((v[:, None] > v).sum(1) + (v[:, None] >= v).sum(1)) / 2 for v in (x, y)]  # equal ones share theirs
    with np.errstate(invalid="ignore"):  # of what is constant there is no correlation
        correlation = np.corrcoef(*ranks)[0, 1]
    with grid(1, size=(4.2, 3.8)) as (figure, (axes,)):
        axes.scatter(x, y, s=10, color=COLORS[0], linewidths=0, alpha=0.7)
        axes.set(xlabel=f"predicted {name}", ylabel=f"actual {name}", title=f"rank correlation {correlation:.3f}")
        axes.grid()
    return figure


def _array(values: Any) -> np.ndarray:
    return torch.as_tensor(values).detach().cpu().double().numpy()
