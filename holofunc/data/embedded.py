"""The handwritten digits that are part of the package."""

from importlib import resources

import numpy as np
import torch
from torch import Tensor

from holofunc.data.splits import holdout

__all__ = ["digits"]


def digits(split: str = "train") -> tuple[Tensor, Tensor]:
    """Load 1,797 handwritten digits of 8x8 pixels, from a file of 45 kB in the package.

    Each pixel is the share of dark points in a 4x4 block of the scanned 32x32 bitmap, a multiple of 1/16. A fifth of
    each class (355 digits) is held out for testing; the split is fixed.

    Args:
        split: ``"train"`` (1,442 digits), ``"test"`` (355) or ``"all"``.

    Returns:
        Images (N, 1, 8, 8), float32 in [0, 1], and labels (N,), int64 in [0, 10).

    Raises:
        ValueError: if ``split`` has another value.

    Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository,
    1998, https://doi.org/10.24432/C50P49, licensed under CC BY 4.0; its test part, pixel values divided by 16.

    Example:
        >>> from holofunc import data
        >>> images, labels = data.digits("train")
        >>> images.shape, images.dtype, labels.shape
        (torch.Size([1442, 1, 8, 8]), torch.float32, torch.Size([1442]))
    """
    with resources.files("holofunc.data").joinpath("digits.npz").open("rb") as file:
        stored = np.load(file, allow_pickle=False)
        images, labels = torch.from_numpy(stored["images"]), torch.from_numpy(stored["labels"]).long()
    part = holdout(labels, split)
    return images[part].unsqueeze(1) / 16, labels[part]
