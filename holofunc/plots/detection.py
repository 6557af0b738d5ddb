"""Images with boxes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from holofunc.ops.targets import Detections, Targets
from holofunc.plots.drawing import COLORS, grid, named, show, unit_pixels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["detections"]


def detections(
    images: Tensor,
    found: Detections | None = None,
    truth: Targets | None = None,
    *,
    class_names: Sequence[str] | None = None,
    columns: int = 4,
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 1.0,
) -> "Figure":
    """Draw images with predicted boxes, coloured by class, with class and score; true boxes are dashed.

    Args:
        images: (N, C, H, W) with 1 or 3 channels, uint8 or floating in [0, 1] once ``mean`` and ``std`` are undone.
        found: what `Detector.decode` returns for them.
        truth: what there is to find.
        class_names: names of the classes; by default, their indices.
        columns: images in a row.
        mean: what was subtracted from the images, to be added again.
        std: what the images were divided by after that.

    Raises:
        ValueError: if the images have another shape, or the boxes are not of as many images.

    Example:
        >>> from holofunc import data, plots, random
        >>> images, targets = data.canvases(random.key(0), 4, size=64)
        >>> len(plots.detections(images, truth=targets).axes)
        4
    """
    shown = unit_pixels(images, mean, std)
    for name, boxes in (("found", found), ("truth", truth)):
        if boxes is not None and len(boxes.boxes) != len(images):
            raise ValueError(f"{name} must be of {len(images)} images, got {len(boxes.boxes)}")
    with grid(len(shown), size=(2.4, 2.4), columns=columns) as (figure, cells):
        for i, axes in enumerate(cells):
            show(axes, shown[i])
            if truth is not None:
                for box, _ in _rows(truth.boxes, truth.labels, truth.mask, i):
                    _draw(axes, box, shown[i].shape, "white", linestyle=(0, (2, 2)), linewidth=0.9)
            if found is not None:
                scores = found.scores[i][found.mask[i]].tolist()
                for (box, label), score in zip(_rows(found.boxes, found.labels, found.mask, i), scores, strict=True):
                    color = COLORS[label % len(COLORS)]
                    x, y = _draw(axes, box, shown[i].shape, color, linewidth=1.4)
                    text = f"{named(label, class_names)} {score:.2f}"
                    above = y > 0.07 * len(shown[i])  # or there is no room there
                    axes.text(x, y, text, color="white", fontsize=6.5, va="bottom" if above else "top", clip_on=True,
                              parse_math=False, bbox={"facecolor": color, "edgecolor": "none", "pad": 0.8})  # fmt: skip
    return figure


def _rows(boxes: Tensor, labels: Tensor, mask: Tensor, image: int) -> list[tuple[list[float], int]]:
    kept = mask[image].cpu()
    rows = boxes[image].detach().cpu()[kept].tolist(), labels[image].cpu()[kept].tolist()
    return list(zip(*rows, strict=True))


def _draw(axes: "Axes", box: list[float], shape: Sequence[int], color: str, **line: Any) -> tuple[float, float]:
    """The outline of a box; returns its upper left corner, in pixels."""
    from matplotlib.patches import Rectangle

    height, width = shape[:2]
    x1, y1, x2, y2 = box[0] * width - 0.5, box[1] * height - 0.5, box[2] * width - 0.5, box[3] * height - 0.5
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, **line))
    return x1, y1
