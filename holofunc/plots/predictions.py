"""Figures of predictions: masks over images, texts below them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from holofunc.plots.drawing import COLORS, INK, grid, show, unit_pixels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["recognition", "segmentation"]


def segmentation(
    images: Tensor,
    masks: Tensor,
    targets: Tensor | None = None,
    *,
    class_names: Sequence[str] | None = None,
    ignore_index: int = -100,
    columns: int = 4,
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 1.0,
) -> "Figure":
    """Draw images with masks over them and, with targets, the true mask beside each.

    Every class but the first has a color. In the true mask, pixels that are predicted otherwise are black, and ignored
    ones white.

    Args:
        images: (N, C, H, W) with 1 or 3 channels, uint8 or floating in [0, 1].
        masks: class of each pixel (N, H, W), integers; or scores (N, K, H, W), whose highest is taken.
        targets: true class of each pixel (N, H, W).
        class_names: names of the classes, the first that of the ground; drawn as a legend.
        ignore_index: target of pixels that do not count.
        columns: images in a row, each with its masks.
        mean: what was subtracted from the images, to be added again.
        std: what the images were divided by after that.

    Raises:
        ValueError: if the masks or targets are of other sizes than the images, or there are none.

    Example:
        >>> from holofunc import data, plots, random
        >>> drawn = data.draw_shapes(random.key(0), 3)
        >>> figure = plots.segmentation(drawn.images, drawn.masks, class_names=("ground", *data.SHAPES))
        >>> len(figure.axes)
        3
    """
    pixels = unit_pixels(images, mean, std)
    predicted = (masks.argmax(1) if masks.is_floating_point() and masks.ndim == 4 else masks).detach().cpu()
    layers = {"predicted": _checked("masks", predicted, images)}
    if targets is not None:
        layers["true"] = _checked("targets", targets.detach().cpu(), images)
    columns = min(columns, len(pixels)) * len(layers)
    with grid(len(pixels) * len(layers), size=(1.5, 1.65), columns=columns) as (figure, cells):
        places = iter(cells)
        for i, image in enumerate(pixels):
            for name, masks in layers.items():
                axes, shown = next(places), _overlaid(image, masks[i], ignore_index)
                if name == "true":
                    shown[((masks != predicted) & (masks != ignore_index))[i].numpy()] = 0
                show(axes, shown)
                axes.set_title(name, fontsize=8, fontweight="normal", loc="center", pad=3)
        if class_names is not None and len(class_names) > 1:
            from matplotlib.patches import Patch

            handles = [Patch(color=_color(k), label=name) for k, name in enumerate(class_names) if k > 0]
            figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def recognition(
    images: Tensor,
    texts: Sequence[str],
    targets: Sequence[str] | None = None,
    *,
    columns: int = 4,
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 1.0,
) -> "Figure":
    """Draw lines of text with the predictions above them; wrong ones are red, with the true text.

    Args:
        images: (N, C, H, W) with 1 or 3 channels, uint8 or floating in [0, 1].
        texts: what was read in each.
        targets: what is written in each.
        columns: images in a row.
        mean: what was subtracted from the images, to be added again.
        std: what the images were divided by after that.

    Raises:
        ValueError: if there are more or fewer texts or targets than images, or no images.

    Example:
        >>> from holofunc import data, plots, random
        >>> images, texts = data.draw_text_lines(random.key(0), 4)
        >>> plots.recognition(images, ["?", *texts[1:]], texts).axes[0].get_title()
        '? (true: tb7he)'
    """
    pixels = unit_pixels(images, mean, std)
    for name, given in (("texts", texts), ("targets", targets)):
        if given is not None and len(given) != len(pixels):
            raise ValueError(f"{name} must hold {len(pixels)} texts, one per image, got {len(given)}")
    true = texts if targets is None else targets
    height, width = pixels.shape[1:3]
    size = (2.4, 2.4 * height / width + 0.3)
    with grid(len(pixels), size=size, columns=columns) as (figure, axes):
        for at, shown, text, target in zip(axes, pixels, texts, true, strict=True):
            show(at, shown)
            title = text if text == target else f"{text} (true: {target})"
            color = INK if text == target else COLORS[4]
            at.set_title(title, fontsize=8, fontweight="normal", loc="center", pad=3, color=color, parse_math=False)
    return figure


def _checked(name: str, masks: Tensor, images: Tensor) -> Tensor:
    expected = (len(images), *images.shape[2:])
    if masks.is_floating_point() or tuple(masks.shape) != expected:
        raise ValueError(
            f"{name} must be integers of shape {expected} for images {tuple(images.shape)}, got {masks.dtype} "
            f"{tuple(masks.shape)}"
        )
    return masks


def _overlaid(pixels: np.ndarray, mask: Tensor, ignore_index: int) -> np.ndarray:
    """An image (H, W, C) in greys, its mask (H, W) in colors over it."""
    from matplotlib.colors import to_rgb

    shown = np.repeat(pixels.mean(-1, keepdims=True), 3, -1)
    for label in torch.unique(mask).tolist():
        inside = (mask == label).numpy()
        if label == ignore_index:
            shown[inside] = 1.0
        elif label > 0:
            shown[inside] = 0.35 * shown[inside] + 0.65 * np.array(to_rgb(_color(label)))
    return shown


def _color(label: int) -> str:
    return COLORS[(label - 1) % len(COLORS)]
