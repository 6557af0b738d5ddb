"""Figures of a training run: curves, schedules, and the learning rate search."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from holofunc.plots.drawing import COLORS, FAINT, grid, numbers
from holofunc.train import smoothed
from holofunc.typing import Schedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["curves", "image_sizes", "lr_search", "schedule"]


def curves(history: Sequence[Mapping[str, Any]], *, names: Sequence[str] | None = None) -> "Figure":
    """Draw the curves of a training run, one panel per metric.

    Metrics of one name share a panel: `loss`, ``val/loss`` and ``test/loss`` are three lines, labelled `train`, `val`
        and `test` with their last values. A key that a record lacks is a point that its line lacks.

    Args:
        history: records such as ``{"step": 10, "epoch": 0, "loss": 0.3, "val/loss": 0.4}``.
        names: the panels to draw, in this order; by default, all, the loss first.

    Raises:
        ValueError: if the history has no numbers to draw, or no metric of one of the names.

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
    if not panels:
        raise ValueError(f"history must hold numbers to draw, got none in {len(history)} records")
    missing = [name for name in names if name not in panels]
    if missing or not names:
        raise ValueError(f"names must be among the metrics of the history, {sorted(panels)}, got {missing or names}")
    with grid(len(names), size=(4.4, 3.1), columns=3) as (figure, cells):
        for name, axes in zip(names, cells, strict=True):
            lines = panels[name]
            _draw_lines(axes, lines)
            axes.set(title=name, xlabel="step")
    return figure


def schedule(fn: Schedule | Mapping[str, Schedule], steps: int) -> "Figure":
    """Draw the values of a schedule over its steps, with the final value (and the maximum of a single schedule).

    Args:
        fn: ``fn(step) -> value``, or several by name.
        steps: number of steps, at least 1.

    Raises:
        ValueError: if ``steps`` is below 1.

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
    with grid(1, size=(6.4, 3.2)) as (figure, (axes,)):
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
    """Draw the sizes of a dataset's images, one point each, with the medians of both sides.

    Args:
        heights: in pixels, as `data.find_image_size` returns them.
        widths: as many.

    Raises:
        ValueError: if there are none, or more of one than of the other.

    Example:
        >>> from holofunc import plots
        >>> figure = plots.image_sizes([20, 40, 30], [30, 30, 60])
        >>> figure.axes[0].get_title(loc="left")
        'median: 30 x 30 (height x width), 3 images'
    """
    if not len(heights) or len(heights) != len(widths):
        raise ValueError(f"heights and widths must be as many, at least one, got {len(heights)} and {len(widths)}")
    height, width = (float(np.median(sides)) for sides in (heights, widths))
    with grid(1, size=(4.4, 3.6)) as (figure, (axes,)):
        axes.scatter(widths, heights, s=12, alpha=0.4, color=COLORS[0], linewidths=0)
        axes.axhline(height, color=FAINT, linewidth=0.8)
        axes.axvline(width, color=FAINT, linewidth=0.8)
        title = f"median: {height:g} x {width:g} (height x width), {len(heights)} images"
        axes.set(title=title, xlabel="width", ylabel="height", xlim=(0, None), ylim=(0, None))
    return figure


def lr_search(result: Any, *, beta: float = 0.95) -> "Figure":
    """Draw the raw and smoothed losses over the learning rates of a search, and the suggestion.

    Args:
        result: `lrs` and `losses` of equal length and a `suggestion`, as `train.find_lr` returns.
        beta: of the moving average, in [0, 1), as in `train.find_lr`; 0 draws the losses as they are.

    Raises:
        ValueError: if `lrs` and `losses` differ in length, or ``beta`` is out of range.

    Example:
        >>> from types import SimpleNamespace
        >>> from holofunc import plots
        >>> found = SimpleNamespace(lrs=[1e-4, 1e-3, 1e-2], losses=[2.0, 1.0, 4.0], suggestion=5e-4)
        >>> plots.lr_search(found).axes[0].get_xscale()
        'log'
    """
    if not 0 <= beta < 1:
        raise ValueError(f"beta must be in [0, 1), got {beta}")
    lrs, raw = numbers(result.lrs), numbers(result.losses)
    if len(lrs) != len(raw):
        raise ValueError(f"lrs and losses must have the same length, got {len(lrs)} and {len(raw)}")
    losses = np.array(smoothed(raw.tolist(), beta))
    with grid(1, size=(6.4, 3.4)) as (figure, (axes,)):
        if beta:
            axes.plot(lrs, raw, color=FAINT, linewidth=0.9)
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


# --- drawing ---------------------------------------------------------------------------------------------------------


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
        panels.setdefault(panel, {})[label] = (numbers([x for x, _ in points]), numbers([y for _, y in points]))
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
    """Ascending places moved apart to at least ``gap``, without moving their mean."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + gap) if moved else place)
    shift = (sum(places) - sum(moved)) / max(1, len(places))
    return [place + shift for place in moved]


def _colors(lines: Mapping[str, Any]) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(len(lines))]


def _is_number(value: Any) -> bool:
    return value.ndim == 0 if isinstance(value, Tensor) else type(value) in (int, float)
