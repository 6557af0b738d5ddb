"""Batches in an order that is a function of a key and the epoch number."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from holofunc import random, tree
from holofunc.data.fingerprints import described, digest
from holofunc.data.samples import Epoch, Samples
from holofunc.data.samples import collate as stacked
from holofunc.ops.checks import check_counts
from holofunc.typing import Batch, Key

__all__ = ["Batches"]


class Batches:
    """Split a dataset into batches ``(images, labels)``, in an order that is a pure function of ``(key, epoch)``.

    Nothing is drawn while iterating and nothing is remembered, so that any position is reached at once:
    ``epoch(e, start=i)`` continues where batch ``i - 1`` of epoch `e` ended. ``iter(batches)`` is epoch 0.

    Images arrive as float32: uint8 as ``(image / 255 - mean) / std``, floating ones as ``(image - mean) / std``. Labels
    arrive as int64; class probabilities, and numbers to be predicted, as float32.

    A dataset that draws from the global generator of torch (as torchvision's transforms do), numpy or Python sees it
    seeded per sample and epoch, and afterwards it stands where it stood. Inside `prefetch`, which is a thread, let such
    a dataset have workers of its own.

    Args:
        data: a pair ``(images, labels)`` of tensors or arrays in memory, images (N, C, H, W); or a dataset with
            ``len()`` whose items are pairs ``(image, label)``, an image being a tensor (C, H, W), a PIL image or an
            array (H, W, C). Labels are class indices, class probabilities (num_classes,), masks of class indices (H,
            W), or floating numbers of any shape.
        batch_size: samples in a batch, at least 1.
        key: random key of the order and of ``augment``.
        shuffle: whether to visit the samples in random order; by default, if there is a key.
        drop_last: whether to leave out a last, shorter batch.
        mean: what to subtract from the pixels, a number or one per channel.
        std: what to divide by after that, a number or one per channel.
        num_classes: if given, labels are checked to lie in [0, num_classes), or to be probabilities of so many.
        ignore_index: the one label outside that range that is allowed.
        transform: ``transform(image) -> image``, applied to each image tensor (C, H, W).
        augment: ``augment(image, key) -> image``, applied after ``transform``. The key belongs to the sample and the
            epoch: neither the batch it is in nor the number of workers changes it.
        collate: ``collate(samples) -> (images, targets)`` for samples that do not stack, such as boxes.
        num_workers: processes that load samples; 0 loads in this one. Data in memory need none.
        timeout: seconds after which a worker that delivers nothing is an error.

    Raises:
        TypeError: if ``data`` is no pair of arrays and no dataset, or images or labels have a dtype that cannot be
            used.
        ValueError: if lengths, rank, channels, labels or options do not fit, or uint8 images are (N, H, W, C) without
            doubt; all of it is checked here, with the first sample of a dataset. The labels of a dataset are checked
            batch by batch.

    Example:
        >>> from holofunc import data, random
        >>> train = data.Batches(data.digits("train"), 128, key=random.key(0), mean=0.305, std=0.376)
        >>> len(train)
        12
        >>> for images, labels in train.epoch(3, start=11):
        ...     print(images.shape, labels.dtype)
        torch.Size([34, 1, 8, 8]) torch.int64
    """

    def __init__(
        self,
        data: Any,
        batch_size: int,
        *,
        key: Key | None = None,
        shuffle: bool | None = None,
        drop_last: bool = False,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
        num_classes: int | None = None,
        ignore_index: int = -100,
        transform: Callable[[Tensor], Tensor] | None = None,
        augment: Callable[[Tensor, Key], Tensor] | None = None,
        collate: Callable[[list[Any]], Batch] | None = None,
        num_workers: int = 0,
        timeout: float = 120.0,
    ) -> None:
        check_counts(batch_size=batch_size)
        check_counts(0, num_workers=num_workers)
        for option, given in (("shuffle=True", shuffle), ("augment", augment)):
            if given and key is None:
                raise ValueError(f"{option} needs a key, got key=None")
        self._label_check = (num_classes, ignore_index)
        self._normalization = _normalization(mean, std)
        self._arrays = _arrays(data)
        if self._arrays is not None:
            images, labels = self._arrays
            self._arrays = images, _checked_labels(labels, num_classes, ignore_index)
            data = TensorDataset(*self._arrays)
        self._in_memory = self._arrays is not None and not any((transform, augment, collate))
        self._samples = Samples(data, transform, augment, collate or stacked)
        self._num_samples = _length(data)
        self._batch_size = int(batch_size)
        self._drop_last = drop_last
        self._shuffle = key is not None if shuffle is None else shuffle
        self._key = random.key(0) if key is None else key
        self._num_workers = num_workers
        self._timeout = timeout
        self._rank, self._world = 0, 1
        if len(self) == 0:
            raise ValueError(
                f"data must hold at least one batch, got {self._num_samples} samples"
                + (f" for drop_last=True and batch_size={batch_size}" if self._num_samples else "")
            )
        self._first = self._finished(self._batch(torch.tensor([0]), self._key))

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        whole, rest = divmod(self._num_samples, self._batch_size)
        last = rest > 0 and not self._drop_last and self._own(range(rest))
        return whole * bool(self._own(range(self._batch_size))) + bool(last)

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch(0)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Iterate over the batches of an epoch, from batch ``start`` on.

        Args:
            epoch: number of the epoch, 0-based.
            start: batches to skip, at no cost, in [0, len(self)].

        Raises:
            ValueError: if a number is outside its range.
        """
        check_counts(0, epoch=epoch)
        if not 0 <= start <= len(self):
            raise ValueError(f"start must lie in [0, {len(self)}], the number of batches in an epoch, got {start}")
        return self._iterate(epoch, start)

    def order(self, epoch: int) -> Tensor:
        """Indices of the samples in the order in which an epoch visits them: int64 (N,)."""
        order_key, _ = self._epoch_keys(epoch)
        return random.permutation(order_key, self._num_samples) if self._shuffle else torch.arange(self._num_samples)

    def fingerprint(self) -> dict[str, Any]:
        """What batches depend on, by name, as plain data: a run that is resumed notices other data by it."""
        found = {
            "samples": self._num_samples,
            "batch_size": self._batch_size,
            "drop_last": self._drop_last,
            "shuffle": self._shuffle,
            "key": self._key.tolist(),
            "mean": self._normalization[0].flatten().tolist(),
            "std": self._normalization[1].flatten().tolist(),
            "transform": described(self._samples.transform),
            "augment": described(self._samples.augment),
        }
        if self._arrays is not None:
            found["contents"] = digest(*[array[:: max(1, len(array) // 64)] for array in self._arrays])
        else:  # pixels may be decoded otherwise elsewhere
            labels = [x for x in tree.leaves(self._first[1]) if isinstance(x, Tensor) and not x.is_floating_point()]
            found |= {"shape": list(self._first[0].shape[1:]), "label of sample 0": digest(*labels)}
        return found

    def shard(self, rank: int, world: int, *, uneven: bool = False) -> "Batches":
        """This rank's part of each batch, so that ``world`` ranks see together what one process sees, in the same
        order.

        ``batch_size`` stays that of all ranks together; a rank gets its consecutive share of a batch, as even as they
        can be. What is drawn for a sample (``augment``) depends on the sample and the epoch alone.

        Args:
            rank: number of this rank, in [0, world).
            world: number of ranks, at least 1.
            uneven: whether a rank may have fewer batches than another: right for evaluation, where ranks meet at the
                end only. In training every step is one of all ranks.

        Raises:
            ValueError: if a number is out of range, or a batch has fewer samples than there are ranks and ``uneven`` is
                not set.

        Example:
            >>> import torch
            >>> from holofunc import data
            >>> whole = data.Batches((torch.zeros(6, 1, 2, 2), torch.arange(6)), 4)
            >>> [[labels.tolist() for _, labels in whole.shard(rank, 2)] for rank in range(2)]
            [[[0, 1], [4]], [[2, 3], [5]]]
        """
        check_counts(world=world)
        if not isinstance(rank, int) or not 0 <= rank < world:
            raise ValueError(f"rank must be an integer in [0, {world}), got {rank!r}")
        if self._world > 1:
            raise ValueError(f"batches must be those of all ranks, got the part of rank {self._rank} of {self._world}")
        least = self._num_samples % self._batch_size if not self._drop_last else 0
        least = least if 0 < least < self._batch_size else self._batch_size
        if least < world and not uneven:
            raise ValueError(
                f"batches must have a sample for each of {world} ranks, got one of {least}: use drop_last=True or "
                "another batch_size, or for evaluation uneven=True"
            )
        part = copy.copy(self)
        part._rank, part._world = rank, world
        return part

    def _own(self, batch: Any) -> Any:
        """This rank's share of a batch's samples."""
        size = len(batch)
        return batch[-(-self._rank * size // self._world) : -(-(self._rank + 1) * size // self._world)]

    def _epoch_keys(self, epoch: int) -> tuple[Key, Key]:
        order_key, sample_key = random.split(random.fold_in(self._key, epoch))
        return order_key, sample_key

    def _iterate(self, epoch: int, start: int) -> Iterator[Batch]:
        order, key = self.order(epoch), self._epoch_keys(epoch)[1]
        size = self._batch_size
        chunks = [self._own(order[i * size : (i + 1) * size]) for i in range(start, len(self))]
        if self._num_workers and not self._in_memory:
            loaded: Any = DataLoader(
                Epoch(self._samples, key),
                batch_size=None,
                sampler=[chunk.tolist() for chunk in chunks],
                num_workers=self._num_workers,
                collate_fn=_unchanged,
                timeout=self._timeout,
                generator=torch.Generator(),  # or the loader would draw its seed from the global one
            )
        else:
            loaded = (self._batch(chunk, key) for chunk in chunks)
        try:
            for batch in loaded:
                yield self._finished(batch)
        except (ConnectionError, EOFError) as error:  # what torch says if one is killed while it hands a batch over
            if "in DataLoader worker process" in str(error):  # the dataset's own
                raise
            raise RuntimeError("a DataLoader worker exited unexpectedly") from error

    def _batch(self, indices: Tensor, key: Key) -> Batch:
        if self._in_memory and self._arrays is not None:
            images, labels = self._arrays
            return images.index_select(0, indices.to(images.device)), labels.index_select(0, indices.to(labels.device))
        return self._samples.batch(indices.tolist(), key)

    def _finished(self, batch: Batch) -> Batch:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise TypeError(f"collate must return a pair (images, targets), got {type(batch).__name__}")
        images, targets = batch
        _check_images(images)
        if not self._in_memory and isinstance(targets, Tensor):
            targets = _checked_labels(targets, *self._label_check)
        return _normalized(images, *self._normalization), targets


def _arrays(data: Any) -> tuple[Tensor, Tensor] | None:
    """The pair of tensors, if ``data`` is data in memory."""
    kinds = [isinstance(part, (Tensor, np.ndarray)) for part in data] if isinstance(data, (tuple, list)) else []
    if not kinds or not all(kinds):
        return None
    if len(data) != 2:
        raise ValueError(f"data in memory must be a pair (images, labels), got {len(data)} arrays")
    images, labels = (torch.as_tensor(part.copy() if _is_awkward(part) else part) for part in data)
    if images.shape[:1] != labels.shape[:1]:
        raise ValueError(
            f"images and labels must have the same length, got {tuple(images.shape)} and {tuple(labels.shape)}"
        )
    return images, labels


def _is_awkward(part: Any) -> bool:
    """Whether torch cannot share the memory of an array: views backwards, what must not be written to."""
    return isinstance(part, np.ndarray) and (min(part.strides, default=0) < 0 or not part.flags.writeable)


def _length(data: Any) -> int:
    if isinstance(data, Mapping) or not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        raise TypeError(f"data must be a pair of arrays or a dataset with len() and indices, got {type(data).__name__}")
    return len(data)


def _check_images(images: Any) -> None:
    if not isinstance(images, Tensor) or not (images.dtype == torch.uint8 or images.is_floating_point()):
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images must be a tensor of uint8 or floating dtype, got {got}")
    if images.ndim != 4:
        raise ValueError(f"images must have shape (N, C, H, W), got {tuple(images.shape)}")
    _, *sides, channels = images.shape
    if images.dtype == torch.uint8 and channels in (1, 3, 4) and min(sides) > 4:  # nobody's pictures are so narrow
        raise ValueError(
            f"images must have shape (N, C, H, W), got {tuple(images.shape)}, channels last: move them with "
            "images.permute(0, 3, 1, 2), or in numpy images.transpose(0, 3, 1, 2)"
        )


def _checked_labels(labels: Tensor, num_classes: int | None, ignore_index: int) -> Tensor:
    """Class indices as int64, floating targets as float32, or an error that says what is wrong with them."""
    if labels.is_floating_point():
        if num_classes is not None and labels.shape[1:] != (num_classes,):
            raise TypeError(
                f"labels must be integer class indices, or class probabilities (N, {num_classes}), got {labels.dtype} "
                f"of shape {tuple(labels.shape)}"
            )
        return labels.float()
    if labels.dtype == torch.bool or labels.is_complex() or labels.ndim == 0:
        raise TypeError(f"labels must be integer class indices (N,), got {labels.dtype} of shape {tuple(labels.shape)}")
    labels = labels.long()
    if num_classes is not None:
        wrong = ((labels < 0) | (labels >= num_classes)) & (labels != ignore_index)
        if wrong.any():
            values = labels[wrong].unique()[:5].tolist()
            raise ValueError(f"labels must lie in [0, {num_classes}) for num_classes={num_classes}, got {values}")
    return labels


def _normalization(mean: float | Sequence[float], std: float | Sequence[float]) -> tuple[Tensor, Tensor]:
    columns = []
    for name, value in (("mean", mean), ("std", std)):
        column = torch.as_tensor(value, dtype=torch.float32)
        if column.ndim > 1 or not column.isfinite().all() or (name == "std" and not (column > 0).all()):
            raise ValueError(
                f"{name} must be a finite{' positive' if name == 'std' else ''} number or one per channel, got {value}"
            )
        columns.append(column.reshape(-1, 1, 1))
    return columns[0], columns[1]


def _normalized(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    for name, column in (("mean", mean), ("std", std)):
        if len(column) not in (1, images.shape[1]):
            raise ValueError(f"{name} must hold 1 or {images.shape[1]} numbers, one per channel, got {len(column)}")
    scale = 255.0 if images.dtype == torch.uint8 else 1.0
    images = images.to(torch.float32)
    if scale == 1 and not mean.any() and (std == 1).all():
        return images
    return images.sub((mean * scale).to(images.device)).div((std * scale).to(images.device))


def _unchanged(batch: Batch) -> Batch:
    return batch
