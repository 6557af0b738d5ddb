"""Loading samples by index, with a key per sample, in this process or in workers, and collation."""

import random as python_random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from holofunc import random
from holofunc.data.pictures import plain
from holofunc.typing import Batch, Key

__all__ = ["Epoch", "Samples", "collate"]


class Samples:
    """Fetch samples by index, in the same way here and in a worker process."""

    def __init__(self, dataset: Any, transform: Any, augment: Any, collate: Callable[[list[Any]], Batch]) -> None:
        self.dataset, self.transform, self.augment, self.collate = dataset, transform, augment, collate

    def batch(self, indices: Sequence[int], key: Key) -> Batch:
        return self.collate([self.sample(index, random.fold_in(key, index)) for index in indices])

    def sample(self, index: int, key: Key) -> tuple[Any, Any]:
        try:
            with _global_generator_seeded(key):
                item = self.dataset[index]
                if not isinstance(item, (tuple, list)) or len(item) != 2:
                    raise TypeError(f"a dataset's item must be a pair (image, label), got {type(item).__name__}")
                image = _image_tensor(item[0])
                if self.transform is not None:
                    image = _image_tensor(self.transform(image))
                if self.augment is not None:
                    image = self.augment(image, key)
                return image, item[1]
        except StopIteration as error:  # which would end a worker's epoch without a word
            raise RuntimeError(f"the dataset raised StopIteration for sample {index}") from error
        except Exception as error:
            error.add_note(f"while loading sample {index}")
            raise


class Epoch(Dataset[Batch]):
    """The batches of an epoch by their samples' indices: what a worker process is handed."""

    def __init__(self, samples: Samples, key: Key) -> None:
        self.samples, self.key = samples, key

    def __getitem__(self, indices: Sequence[int]) -> Batch:
        return self.samples.batch(indices, self.key)


def collate(samples: Sequence[tuple[Tensor, Any]]) -> tuple[Tensor, Tensor]:
    """Stack samples ``(image, label)`` to a batch ``(images, labels)``.

    Raises:
        ValueError: if the images, or the labels, differ in shape.

    Example:
        >>> import torch
        >>> from holofunc import data
        >>> images, labels = data.collate([(torch.zeros(3, 4, 4), 1), (torch.ones(3, 4, 4), 0)])
        >>> images.shape, labels
        (torch.Size([2, 3, 4, 4]), tensor([1, 0]))
    """
    images, labels = zip(*samples, strict=True)
    return _stacked("images", images), _stacked("labels", [_label(label) for label in labels])


def _label(label: Any) -> Tensor:
    try:
        return torch.as_tensor(label)
    except (RuntimeError, TypeError, ValueError):
        raise TypeError(f"labels must be numbers or tensors, or collate must stack them, got {label!r:.100}") from None


def _stacked(name: str, tensors: Sequence[Tensor]) -> Tensor:
    shapes = sorted({tuple(tensor.shape) for tensor in tensors})
    if len(shapes) > 1:
        raise ValueError(
            f"{name} of a batch must have one shape, got {shapes}: use a transform that resizes, or collate"
        )
    return torch.stack(list(tensors))


def _image_tensor(image: Any) -> Tensor:
    if isinstance(image, Tensor):
        return image
    if isinstance(image, Image.Image):
        image = plain(image)
    array = np.array(image)  # a copy, because PIL's memory is read-only
    if array.ndim not in (2, 3) or array.dtype == object:
        raise TypeError(f"an image must be a tensor, a PIL image or an array (H, W, C), got {type(image).__name__}")
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1)


@contextmanager
def _global_generator_seeded(key: Key) -> Iterator[None]:
    """Let code that draws from the generators of torch, numpy and Python draw what the key says."""
    seed = int(key[0])
    states = torch.default_generator.get_state(), np.random.get_state(), python_random.getstate()  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002
    python_random.seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        python_random.setstate(states[2])
