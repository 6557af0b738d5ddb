"""Deterministic splits of labelled samples."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["holdout", "part_of"]


def holdout(labels: Tensor | Sequence[int], split: str, *, every: int = 5) -> Tensor:
    """Indices of one part of a stratified split: of each class, every ``every``-th sample is held out for testing.

    The split depends only on the order of the labels, so it is the same in every run and on every machine.

    Args:
        labels: class indices (N,).
        split: ``"train"``, ``"test"`` (the held-out samples) or ``"all"``.
        every: one of this many samples is held out, at least 2.

    Returns:
        Indices of the part, int64, ascending.

    Raises:
        ValueError: if ``split`` has another value or ``every`` is below 2.

    Example:
        >>> from holofunc import data
        >>> data.holdout([0, 0, 1, 0, 1, 1, 0], "test", every=3)
        tensor([3, 5])
    """
    if split not in ("train", "test", "all"):
        raise ValueError(f"split must be 'train', 'test' or 'all', got {split!r}")
    if every < 2:
        raise ValueError(f"every must be at least 2, got {every}")
    values = np.asarray(labels)
    order = np.argsort(values, kind="stable")  # grouped by class, in the original order
    counts = np.unique(values, return_counts=True)[1]
    rank = np.empty(len(values), dtype=np.int64)
    rank[order] = np.concatenate([np.arange(count) for count in counts]) if len(counts) else []
    held_out = rank % every == every - 1
    part = {"train": ~held_out, "test": held_out, "all": np.ones_like(held_out)}[split]
    return torch.from_numpy(np.flatnonzero(part))


def part_of(path: Path, split: str) -> tuple[Path, bool]:
    """The folder of a split: `train` or `val` (or `test`) inside, if both exist; and whether they do.

    Raises:
        ValueError: if there is no such folder, or ``split`` is neither ``"train"`` nor ``"test"``.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("train", "val"):
        ...         pathlib.Path(folder, name).mkdir()
        ...     place, whole = part_of(pathlib.Path(folder), "test")
        ...     place.name, whole
        ('val', True)
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    if not path.is_dir():
        raise ValueError(f"folder {str(path)!r} does not exist")
    test = next((path / name for name in ("val", "test") if (path / name).is_dir()), None)
    if test is None or not (path / "train").is_dir():
        return path, False
    return (path / "train" if split == "train" else test), True
