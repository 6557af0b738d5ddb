"""What the raw outputs of detectors mean: the seam between a network, its loss and its decoding; what heads share."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from holofunc.ops.arithmetic import upcast
from holofunc.ops.targets import Targets

__all__ = [
    "Head",
    "Lambdas",
    "Predictions",
    "check_multiple",
    "check_share",
    "corners",
    "one_hot",
    "read_anchors",
    "total",
]


class Predictions(NamedTuple):
    """All boxes that a detector predicts for each image, P of them.

    Attributes:
        boxes: (N, P, 4), xyxy as fractions of the image, not cut off at its borders.
        objectness: (N, P), in [0, 1]: whether there is an object.
        classes: (N, P, K), in [0, 1]: of which class, if there is one.
    """

    boxes: Tensor
    objectness: Tensor
    classes: Tensor


class Head(Protocol):
    """What a detector's raw outputs mean."""

    @property
    def num_classes(self) -> int:
        """K."""

    def predictions(self, out: Any) -> Predictions:
        """All predicted boxes."""

    def losses(self, out: Any, targets: Targets) -> dict[str, Tensor]:
        """The terms of the loss by name, each of shape (N,): weighted sums over the boxes, or slots, of an image.

        Targets are constants in derivatives; where their mask is False they are zeros.
        """


@dataclass(frozen=True, kw_only=True)
class Lambdas:
    """The weights of a loss's terms, under Holocron's names.

    Raises:
        ValueError: one that is no finite number of at least 0.
    """

    lambda_obj: float = 1.0
    lambda_noobj: float = 0.5
    lambda_class: float = 1.0
    lambda_coords: float = 5.0

    def __post_init__(self) -> None:
        for name in ("lambda_obj", "lambda_noobj", "lambda_class", "lambda_coords"):
            value = getattr(self, name)
            if not isinstance(value, Real) or not 0 <= float(value) < float("inf"):
                raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")

    def weighted(self, *, obj: Tensor, noobj: Tensor, bbox: Tensor, clf: Tensor) -> dict[str, Tensor]:
        """The terms, each with its weight."""
        return {
            "obj_loss": self.lambda_obj * obj,
            "noobj_loss": self.lambda_noobj * noobj,
            "bbox_loss": self.lambda_coords * bbox,
            "clf_loss": self.lambda_class * clf,
        }


def corners(centers: Tensor, sizes: Tensor) -> Tensor:
    """Boxes as xyxy from their centres and sizes, (..., 2) each."""
    return torch.cat([centers - sizes / 2, centers + sizes / 2], -1)


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """bool (..., K); torch's reads values, and does not map."""
    return labels[..., None] == torch.arange(num_classes, device=labels.device)


def total(values: Tensor, mask: Tensor) -> Tensor:
    """The sum over an image of the values where ``mask`` is True, (N, ...) to (N,); the rest may be anything."""
    return torch.where(mask, values, 0).flatten(1).sum(1)


# --- what can be refused -----------------------------------------------------------------------------------------


def check_share(name: str, value: float) -> None:
    """Refuse what is no number in [0, 1]."""
    if not isinstance(value, Real) or not 0 <= value <= 1:  # of whatever library
        raise ValueError(f"{name} must be in [0, 1], got {value!r}")


def check_multiple(x: Tensor, stride: int) -> None:
    """Refuse images whose sides no grid divides."""
    if any(side % stride or side == 0 for side in x.shape[2:]):
        raise ValueError(f"the sides of images must be multiples of {stride}, got shape {tuple(x.shape)}")


def read_anchors(anchors: Any, shape: Sequence[int | None]) -> tuple[tuple[float, ...], ...]:
    """Anchors as a flat tuple of pairs (width, height).

    Raises:
        ValueError: another shape, or numbers that are not in (0, 1].
    """
    values = torch.as_tensor(anchors, dtype=torch.float64)
    fits = values.ndim == len(shape) and all(want in (None, got) for want, got in zip(shape, values.shape, strict=True))
    if not fits or values.numel() == 0:
        wanted = ", ".join("A" if n is None else str(n) for n in shape)
        raise ValueError(f"anchors must have shape ({wanted}), got {tuple(values.shape)}")
    if not ((values > 0) & (values <= 1)).all():
        raise ValueError(f"anchors must be widths and heights in (0, 1], fractions of the image, got {values.tolist()}")
    return tuple(tuple(pair) for pair in upcast(values).reshape(-1, 2).tolist())
