"""Resizing of single samples before collation: PIL images, tensors and torchvision's tv_tensors."""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from holofunc import random
from holofunc.transforms.composing import is_size
from holofunc.typing import Key

__all__ = ["RandomZoomOut", "Resize"]


class Resize:
    """Resize to a height and width, by stretching ("squish") or with the aspect ratio kept and padding ("pad").

    ``resize(image)`` takes a PIL image, a tensor (..., C, H, W), or a structure of torchvision's tv_tensors: images,
    boxes and masks change together, all else stays. A tuple or dict of them comes back as one.

    Args:
        size: height and width of the result.
        mode: "squish" or "pad": scaled until it just fits, in the middle, by the pixel.
        pad_mode: what is padded: "constant", "edge", "reflect" or "symmetric".
        fill: the constant.
        interpolation: "bilinear", "nearest", "nearest-exact", "bicubic", ...; as torchvision names them.
        antialias: average over pixels when shrinking.

    Raises:
        ValueError: if an option is not one of its choices.

    Example:
        >>> import torch
        >>> from holofunc import transforms
        >>> resize = transforms.Resize((32, 32), mode="pad")
        >>> wide = resize(torch.ones(3, 16, 32))
        >>> wide.shape, wide[0, :8].sum().item(), wide[0, 8:24].mean().item()
        (torch.Size([3, 32, 32]), 0.0, 1.0)
    """

    def __init__(
        self,
        size: tuple[int, int],
        mode: Literal["squish", "pad"] = "squish",
        *,
        pad_mode: Literal["constant", "edge", "reflect", "symmetric"] = "constant",
        fill: float = 0,
        interpolation: str = "bilinear",
        antialias: bool = True,
    ) -> None:
        if not is_size(size):
            raise ValueError(f"size must be a height and a width, integers of at least 1, got {size}")
        if mode not in ("squish", "pad"):
            raise ValueError(f"mode must be 'squish' or 'pad', got {mode!r}")
        if pad_mode not in ("constant", "edge", "reflect", "symmetric"):
            raise ValueError(f"pad_mode must be 'constant', 'edge', 'reflect' or 'symmetric', got {pad_mode!r}")
        from torchvision.transforms import InterpolationMode  # not at import time: it costs as much as torch

        known = [kind.value for kind in InterpolationMode]
        if interpolation not in known:
            raise ValueError(f"interpolation must be one of {', '.join(known)}, got {interpolation!r}")
        self.size, self.mode, self.pad_mode, self.fill = (size[0], size[1]), mode, pad_mode, fill
        self.options: dict[str, Any] = {"interpolation": InterpolationMode(interpolation), "antialias": antialias}

    def __repr__(self) -> str:
        rest = {"pad_mode": self.pad_mode, "fill": self.fill, **self.options}
        rest["interpolation"] = self.options["interpolation"].value
        return f"Resize({self.size}, mode={self.mode!r}, {', '.join(f'{n}={x!r}' for n, x in rest.items())})"

    def __call__(self, inputs: Any) -> Any:
        """The resized sample."""
        return self.placed(inputs, self.inner(_size(inputs)))

    def window(self, size: tuple[int, int]) -> Tensor:
        """Where an image lies in the result: `view_boxes` by this window brings boxes back to the image.

        Args:
            size: height and width of the image.

        Returns:
            (x1, y1, x2, y2), relative to the result.

        Example:
            >>> import torch
            >>> from holofunc import transforms
            >>> window = transforms.Resize((32, 32), mode="pad").window((100, 200))
            >>> window
            tensor([0.0000, 0.2500, 1.0000, 0.7500])
            >>> found = torch.tensor([[0.5, 0.25, 1.0, 0.5]]), torch.tensor([True])
            >>> transforms.view_boxes(*found, window)[0]
            tensor([[0.5000, 0.0000, 1.0000, 0.5000]])
        """
        inner = self.inner(size)
        top, left = _corner(self.size, inner)
        height, width = self.size
        return torch.tensor([left / width, top / height, (left + inner[1]) / width, (top + inner[0]) / height])

    def inner(self, size: tuple[int, int], share: float = 1.0) -> tuple[int, int]:
        """Height and width that an image of this size has in the result; padded, a share of the area that it could."""
        if self.mode == "squish":
            return self.size
        scale = min(most / n for most, n in zip(self.size, size, strict=True)) * share**0.5
        height, width = (min(max(round(scale * n), 1), most) for n, most in zip(size, self.size, strict=True))
        return height, width

    def placed(self, inputs: Any, inner: tuple[int, int]) -> Any:
        """Everything with a place in the image resized to ``inner``, and padded around it."""
        from torchvision.transforms import v2

        top, left = _corner(self.size, inner)
        border = [left, top, self.size[1] - inner[1] - left, self.size[0] - inner[0] - top]
        pads = [_pad(own, mode, self.fill) for mode, own in _borders(inner, border, self.pad_mode)]
        return v2.Compose([v2.Resize(list(inner), **self.options), *pads])(inputs)


class RandomZoomOut:
    """Shrink to a random fraction of the area with the same aspect ratio, and pad to a height and width.

    ``zoom(inputs, key)`` takes what `Resize` does, and a key: it serves as `augment` of `holofunc.data.Batches`.

    Args:
        size: height and width of the result.
        scale: range of the share of the largest area that fits, in (0, 1].
        **options: of `Resize`: pad_mode, fill, interpolation, antialias.

    Raises:
        ValueError: if an option is out of range.

    Source: Holocron's transform of this name, which draws from the global generator and leaves its input as it is for a
        range that begins at 1.

    Example:
        >>> import torch
        >>> from holofunc import random, transforms
        >>> zoom = transforms.RandomZoomOut((32, 32), scale=(0.25, 0.25))
        >>> zoom(torch.ones(3, 64, 64), random.key(0)).sum((1, 2))
        tensor([256., 256., 256.])
    """

    def __init__(self, size: tuple[int, int], scale: tuple[float, float] = (0.5, 1.0), **options: Any) -> None:
        self.resize = Resize(size, "pad", **options)
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale must be two numbers in (0, 1], the lower first, got {scale}")
        self.scale = scale

    def __repr__(self) -> str:
        return f"RandomZoomOut({self.scale}, {self.resize})"

    def __call__(self, inputs: Any, key: Key) -> Any:
        """The shrunk sample."""
        share = float(random.uniform(key, low=self.scale[0], high=self.scale[1]))
        return self.resize.placed(inputs, self.resize.inner(_size(inputs), share))


def _corner(size: tuple[int, int], inner: tuple[int, int]) -> tuple[int, int]:
    """Pixels above and left of what lies in the middle."""
    return (size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2


def _pad(border: list[int], mode: str, fill: float) -> Any:
    """Padding with any border, for boxes, too, where torchvision takes constants only."""
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    class Pad(v2.Pad):
        def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
            if isinstance(inpt, tv_tensors.BoundingBoxes):
                return v2.functional.pad(inpt, padding=self.padding)
            return super().transform(inpt, params)

    return Pad(border, fill=fill, padding_mode=mode)


def _borders(inner: tuple[int, int], border: list[int], mode: str) -> Iterator[tuple[str, list[int]]]:
    """Borders [left, top, right, bottom] in steps: what is mirrored is at most as wide as what it mirrors."""
    own, sides = int(mode == "reflect"), [inner[1], inner[0]]
    while any(border):
        alone = [own * (side == 1) * min(n, 1) for side, n in zip(sides * 2, border, strict=True)]
        if mode in ("constant", "edge"):
            step = border
        elif any(alone):  # a single pixel has no other one to mirror
            step = alone
        else:
            step = [min(n, side - own) for side, n in zip(sides * 2, border, strict=True)]
        yield "symmetric" if step is alone else mode, step
        border = [n - done for n, done in zip(border, step, strict=True)]
        sides = [sides[0] + step[0] + step[2], sides[1] + step[1] + step[3]]


def _size(inputs: Any) -> tuple[int, int]:
    """Height and width of the image among the inputs."""
    from PIL import Image
    from torchvision import tv_tensors

    def leaves(x: Any) -> list[Any]:
        if isinstance(x, dict):
            return [leaf for value in x.values() for leaf in leaves(value)]
        return [leaf for value in x for leaf in leaves(value)] if isinstance(x, (tuple, list)) else [x]

    found = leaves(inputs)
    images = [x for x in found if isinstance(x, (Image.Image, tv_tensors.Image))]
    plain = [x for x in found if isinstance(x, Tensor) and not isinstance(x, tv_tensors.TVTensor) and x.ndim >= 3]
    if not images and not plain:
        raise TypeError(f"inputs must hold a PIL image or an image tensor (..., C, H, W), got {type(inputs).__name__}")
    image = (images or plain)[0]
    return (image.height, image.width) if isinstance(image, Image.Image) else (image.shape[-2], image.shape[-1])
