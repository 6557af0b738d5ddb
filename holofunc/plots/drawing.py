"""Shared by all figures: style, panels, and conversion to numpy."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLORS", "FAINT", "INK", "grid", "named", "numbers", "show", "unit_pixels"]

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


@contextmanager
def grid(cells: int, *, size: tuple[float, float], columns: int = 1) -> Iterator[tuple["Figure", list["Axes"]]]:
    """A figure of so many axes of this size in inches, in rows of ``columns``, drawn in our style."""
    import matplotlib
    from matplotlib.figure import Figure

    columns = max(1, min(columns, cells))
    rows = math.ceil(cells / columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(size[0] * columns, size[1] * rows), dpi=110, layout="constrained", facecolor="white")
        # What makes a figure the picture of a notebook cell although pyplot does not know of it.
        figure._repr_png_ = partial(_png, figure)  # type: ignore[attr-defined]
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for unused in axes[cells:]:
            unused.remove()
        yield figure, list(axes[:cells])


def _png(figure: "Figure") -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def numbers(values: Any) -> np.ndarray:
    """Numbers or 0-d tensors as an array."""
    return np.array([float(value) for value in values])


def unit_pixels(images: Tensor, mean: float | Sequence[float] = 0.0, std: float | Sequence[float] = 1.0) -> np.ndarray:
    """Images (N, 1 or 3, H, W) as (N, H, W, 1 or 3) in [0, 1]: uint8 scaled, a normalization undone, the rest cut off.

    Raises:
        ValueError: if they have another shape, or there are none.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
        raise ValueError(f"images must have shape (N, 1, H, W) or (N, 3, H, W), got {tuple(images.shape)}")
    pixels = images.detach().cpu()
    pixels = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()
    scale, offset = (torch.as_tensor(value, dtype=torch.float32).reshape(-1, 1, 1) for value in (std, mean))
    for name, value in (("std", scale), ("mean", offset)):
        if len(value) not in (1, images.shape[1]):
            raise ValueError(
                f"{name} must be a number, or one for each of {images.shape[1]} channels, got {len(value)}"
            )
    return (pixels * scale + offset).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def named(label: Any, class_names: Sequence[str] | None) -> str:
    """A class's name, or its number where it has none, as an ignored label has not."""
    number = int(label)
    return class_names[number] if class_names and 0 <= number < len(class_names) else str(number)


def show(axes: "Axes", pixels: np.ndarray) -> None:
    """An image (H, W, 1 or 3) in [0, 1], without ticks and frame."""
    axes.imshow(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels, cmap="gray", vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
