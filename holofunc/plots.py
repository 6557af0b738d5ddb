"""Pictures of what others computed: each function takes plain data and returns a matplotlib `Figure`.

Nothing is shown or saved, and matplotlib's global state (`pyplot`) is never touched, so that figures can be made in a
thread, on a machine without a screen, and in the middle of somebody else's drawing. A figure is the value of a notebook
cell, or `figure.savefig("curves.png")`.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from holofunc.typing import Schedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["confusion", "curves", "image_sizes", "images", "lr_search", "schedule", "top_losses"]

INK, FAINT = "#333333", "#9a9a9a"
COLORS = ("#1f6feb", "#d9480f", "#2b8a3e", "#9c36b5", "#c92a2a", "#0b7285")
STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
}


def curves(history: Sequence[Mapping[str, Any]], *, names: Sequence[str] | None = None) -> "Figure":
    """Draw the course of a training run, a panel per metric.

    Metrics of one name share a panel: `loss`, `val/loss` and `test/loss` are three lines, labelled `train`, `val` and
    `test` with their last values. A key that a record lacks is a point that its line lacks.

    Args:
        history: Records such as `{"step": 10, "epoch": 0, "loss": 0.3, "val/loss": 0.4}`.
        names: The panels to draw, in this order; by default, all, the loss first.

    Raises:
        ValueError: If the history has no numbers to draw, or no metric of one of the names.

    Example:
        >>> from holofunc import plots
        >>> history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "val/loss": 1.5}]
        >>> figure = plots.curves(history)
        >>> [axes.get_title(loc="left") for axes in figure.axes]
        ['loss']
    """
    panels = _panels(history)
    if names is None:
        names = sorted(panels, key=lambda name: name != "loss")  # stable: the others stay in their order
    missing = [name for name in names if name not in panels]
    if missing or not names:
        raise ValueError(f"names must be among the metrics of the history, {sorted(panels)}, got {missing or names}")
    with _grid(len(names), size=(4.4, 3.1), columns=3) as (figure, cells):
        for name, axes in zip(names, cells, strict=True):
            lines = panels[name]
            _draw_lines(axes, lines)
            axes.set(title=name, xlabel="step")
    return figure


def confusion(matrix: Tensor, class_names: Sequence[str] | None = None) -> "Figure":
    """Draw a confusion matrix: each row is a true class, shaded by the share of it that was predicted as the column.

    The counts are written into the cells (up to 25 classes), the recall of each class beside its row.

    Args:
        matrix: Counts (C, C), rows true, columns predicted, as `metrics.confusion` computes.
        class_names: Names of the classes; by default, their indices.

    Raises:
        ValueError: If the matrix is not square, or there are more or fewer names than classes.

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
    with _grid(1, size=(side + 0.7, side)) as (figure, (axes,)):
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


def schedule(fn: Schedule | Mapping[str, Schedule], steps: int) -> "Figure":
    """Draw a schedule's values over its steps, and write the last one (and a single schedule's highest) at its place.

    Args:
        fn: `fn(step) -> value`, or several by name.
        steps: Number of steps, at least 1.

    Raises:
        ValueError: If `steps` is below 1.

    Example:
        >>> from holofunc import plots
        >>> figure = plots.schedule(lambda step: 0.1 * (1 - step / 100), 100)
        >>> figure.axes[0].get_xlabel()
        'step'
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    schedules = dict(fn) if isinstance(fn, Mapping) else {"": fn}
    at = np.unique(np.linspace(0, steps - 1, min(steps, 1000)).round().astype(int))
    lines = {name: (at, np.array([float(each(int(step))) for step in at])) for name, each in schedules.items()}
    with _grid(1, size=(6.4, 3.2)) as (figure, (axes,)):
        _draw_lines(axes, lines)
        axes.set(xlabel="step", ylabel="value")
        if len(lines) == 1:
            ((x, y),) = lines.values()
            peak = int(np.argmax(np.nan_to_num(y, nan=-np.inf)))
            if y[peak] > y[-1]:
                text, place = f"{y[peak]:.3g} at step {x[peak]}", (x[peak], y[peak])
                axes.annotate(text, place, (0, 5), textcoords="offset points", color=COLORS[0], fontweight="bold")
    return figure


def image_sizes(heights: Sequence[int], widths: Sequence[int]) -> "Figure":
    """Draw the sizes of a dataset's images, a point each, with the medians of both sides.

    Args:
        heights: In pixels, as `data.find_image_size` returns them.
        widths: As many.

    Raises:
        ValueError: If there are none, or more of one than of the other.

    Example:
        >>> from holofunc import plots
        >>> figure = plots.image_sizes([20, 40, 30], [30, 30, 60])
        >>> figure.axes[0].get_title(loc="left")
        'median: 30 x 30 (height x width), 3 images'
    """
    if not len(heights) or len(heights) != len(widths):
        raise ValueError(f"heights and widths must be as many, at least one, got {len(heights)} and {len(widths)}")
    height, width = (float(np.median(sides)) for sides in (heights, widths))
    with _grid(1, size=(4.4, 3.6)) as (figure, (axes,)):
        axes.scatter(widths, heights, s=12, alpha=0.4, color=COLORS[0], linewidths=0)
        axes.axhline(height, color=FAINT, linewidth=0.8)
        axes.axvline(width, color=FAINT, linewidth=0.8)
        title = f"median: {height:g} x {width:g} (height x width), {len(heights)} images"
        axes.set(title=title, xlabel="width", ylabel="height", xlim=(0, None), ylim=(0, None))
    return figure


def lr_search(result: Any) -> "Figure":
    """Draw the loss over the learning rates of a search, and the suggested one.

    Args:
        result: `lrs` and `losses` of equal length and a `suggestion`, as `train.find_lr` returns.

    Raises:
        ValueError: If `lrs` and `losses` differ in length.

    Example:
        >>> from types import SimpleNamespace
        >>> from holofunc import plots
        >>> found = SimpleNamespace(lrs=[1e-4, 1e-3, 1e-2], losses=[2.0, 1.0, 4.0], suggestion=5e-4)
        >>> plots.lr_search(found).axes[0].get_xscale()
        'log'
    """
    lrs, losses = _numbers(result.lrs), _numbers(result.losses)
    if len(lrs) != len(losses):
        raise ValueError(f"lrs and losses must have the same length, got {len(lrs)} and {len(losses)}")
    with _grid(1, size=(6.4, 3.4)) as (figure, (axes,)):
        axes.plot(lrs, losses, color=COLORS[0], linewidth=1.8)
        axes.set_xscale("log")
        finite = losses[np.isfinite(losses)]
        if len(finite):  # the explosion at the end would flatten the part that matters
            low, high = finite.min(), min(finite.max(), max(finite[: max(1, len(finite) // 2)].max(), finite[0]) * 1.3)
            axes.set_ylim(low - 0.08 * (high - low) - 1e-9, high + 0.08 * (high - low) + 1e-9)
        suggestion = None if result.suggestion is None else float(result.suggestion)
        if suggestion is not None and math.isfinite(suggestion):
            axes.axvline(suggestion, color=COLORS[1], linewidth=1.2, linestyle=(0, (4, 3)))
            loss = float(np.interp(math.log(suggestion), np.log(lrs), losses))
            axes.plot([suggestion], [loss], "o", color=COLORS[1], markersize=5)
            axes.annotate(
                f"suggested {suggestion:.2g}",
                (suggestion, 0.96),
                (-5, 0),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                ha="right",
                va="top",
                color=COLORS[1],
            )
        axes.set(xlabel="learning rate", ylabel="loss")
        axes.grid()
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
        titles: A title for each image.
        columns: Images in a row.
        mean: What was subtracted from the images, to be added again.
        std: What the images were divided by after that.

    Raises:
        ValueError: If the images have another shape, or there are more or fewer titles than images.

    Example:
        >>> from holofunc import data, plots
        >>> pixels, labels = data.digits("test")
        >>> figure = plots.images(pixels[:16], titles=[str(int(label)) for label in labels[:16]])
        >>> len(figure.axes)
        16
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
        raise ValueError(f"images must have shape (N, 1, H, W) or (N, 3, H, W), got {tuple(images.shape)}")
    if titles is not None and len(titles) != len(images):
        raise ValueError(f"titles must hold {len(images)} texts, one per image, got {len(titles)}")
    pixels = images.detach().cpu()
    pixels = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()
    pixels = pixels * _per_channel(std) + _per_channel(mean)
    shown = pixels.clamp(0, 1).permute(0, 2, 3, 1).numpy()
    lines = 0 if titles is None else max(title.count("\n") + 1 for title in titles)
    with _grid(len(shown), size=(1.25, 1.25 + 0.17 * lines), columns=columns) as (figure, cells):
        for i, axes in enumerate(cells):
            axes.imshow(shown[i].squeeze(-1) if shown.shape[-1] == 1 else shown[i], cmap="gray", vmin=0, vmax=1)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
            if titles is not None:
                axes.set_title(titles[i], fontsize=8, fontweight="normal", loc="center", pad=3)
    return figure


def top_losses(
    pixels: Tensor,
    losses: Tensor,
    predictions: Tensor,
    labels: Tensor,
    *,
    class_names: Sequence[str] | None = None,
    count: int = 16,
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 1.0,
) -> "Figure":
    """Draw the samples with the highest losses, the worst first: true class → predicted class, and the loss.

    Args:
        pixels: Images (N, C, H, W) as in `images`.
        losses: Loss of each (N,).
        predictions: Predicted class of each (N,).
        labels: True class of each (N,).
        class_names: Names of the classes; by default, their indices.
        count: How many to draw.
        mean: As in `images`.
        std: As in `images`.

    Raises:
        ValueError: If the lengths differ, or there are no images.

    Example:
        >>> import torch
        >>> from holofunc import data, plots
        >>> pixels, labels = data.digits("test")
        >>> losses = torch.arange(len(labels)) / 100
        >>> figure = plots.top_losses(pixels, losses, (labels + 1) % 10, labels, count=4)
        >>> figure.axes[0].get_title()
        '9 → 0\\nloss 3.54'
    """
    lengths = [len(pixels), len(losses), len(predictions), len(labels)]
    if len(set(lengths)) > 1:
        raise ValueError(f"pixels, losses, predictions and labels must have the same length, got {lengths}")
    worst = torch.argsort(torch.as_tensor(losses).detach().cpu().float(), descending=True, stable=True)[:count].tolist()

    def name(label: Any) -> str:
        return str(int(label)) if class_names is None else class_names[int(label)]

    titles = [f"{name(labels[i])} → {name(predictions[i])}\nloss {float(losses[i]):.2f}" for i in worst]
    figure = images(pixels[worst], titles=titles, mean=mean, std=std)
    for axes, i in zip(figure.axes, worst, strict=True):
        axes.title.set_color(COLORS[1] if int(labels[i]) != int(predictions[i]) else INK)
    return figure


# --- drawing -----------------------------------------------------------------------------------------------------


@contextmanager
def _grid(cells: int, *, size: tuple[float, float], columns: int = 1) -> Iterator[tuple["Figure", list["Axes"]]]:
    """A figure of so many axes of this size in inches, in rows of `columns`, drawn in our style."""
    import matplotlib
    from matplotlib.figure import Figure

    columns = max(1, min(columns, cells))
    rows = math.ceil(cells / columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(size[0] * columns, size[1] * rows), dpi=110, layout="constrained", facecolor="white")
        # What makes a figure the picture of a notebook cell although pyplot does not know of it.
        figure._repr_png_ = partial(_png, figure)  # type: ignore[attr-defined]
        grid = figure.subplots(rows, columns, squeeze=False).flatten()
        for unused in grid[cells:]:
            unused.remove()
        yield figure, list(grid[:cells])


def _png(figure: "Figure") -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _panels(history: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """For each panel its lines, `train` first: label -> (steps, values)."""
    keys = list(dict.fromkeys(key for record in history for key in record if key not in ("step", "epoch")))
    rests = Counter(key.partition("/")[2] for key in keys)
    panels: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for key in sorted(keys, key=lambda key: "/" in key):
        points = [
            (record.get("step", i), record[key]) for i, record in enumerate(history) if _is_number(record.get(key))
        ]
        if not points:
            continue
        first, _, rest = key.partition("/")
        shared = rest in keys or rests[rest] > 1  # the same metric of several sets
        panel, label = (rest, first) if rest and shared else (key, "train")
        panels.setdefault(panel, {})[label] = (_numbers([x for x, _ in points]), _numbers([y for _, y in points]))
    return panels


def _draw_lines(axes: "Axes", lines: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Lines over steps, with their last values, and their names if there are several, written at their ends."""
    for color, (name, (x, y)) in zip(_colors(lines), lines.items(), strict=True):
        behind = name == "train" and len(lines) > 1  # noisy and dense: it stands back
        marker = "o" if len(x) == 1 or (len(x) <= 30 and not behind) else None
        width, alpha = (1.1, 0.7) if behind else (1.8, 1.0)
        axes.plot(x, y, color=color, marker=marker, markersize=3.5, linewidth=width, alpha=alpha)
    axes.grid(axis="y")
    axes.margins(y=0.1)
    low, high = axes.get_ylim()
    height = axes.bbox.height * 72 / axes.figure.dpi  # in points, as far as it is known before the layout
    ends = []
    for color, (name, (x, y)) in zip(_colors(lines), lines.items(), strict=True):
        drawn = np.flatnonzero(np.isfinite(y))
        if len(drawn):
            end = drawn[-1]
            text = f"{name} {y[end]:.3g}" if len(lines) > 1 else f"{y[end]:.3g}"
            ends.append(((y[end] - low) / (high - low) * height, (x[end], y[end]), text, color))
    ends.sort(key=lambda end: end[0])
    for (place, point, text, color), shifted in zip(ends, _spread([end[0] for end in ends], 11.0), strict=True):
        offset = (6, shifted - place)
        axes.annotate(text, point, offset, textcoords="offset points", va="center", color=color, fontweight="bold")


def _spread(places: Sequence[float], gap: float) -> list[float]:
    """Ascending places moved apart to at least `gap`, without moving their mean."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + gap) if moved else place)
    shift = (sum(places) - sum(moved)) / max(1, len(places))
    return [place + shift for place in moved]


def _colors(lines: Mapping[str, Any]) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(len(lines))]


def _is_number(value: Any) -> bool:
    return value.ndim == 0 if isinstance(value, Tensor) else type(value) in (int, float)


def _numbers(values: Any) -> np.ndarray:
    return np.array([float(value) for value in values])


def _per_channel(value: float | Sequence[float]) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float32).reshape(-1, 1, 1)
