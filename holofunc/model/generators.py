"""The global generators of torch, its accelerator, Python and NumPy: saving, seeding, and detecting use."""

import contextlib
import random as python_random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Generators", "kept"]


class Generators:
    """A snapshot of the global generators."""

    def __init__(self) -> None:
        self.before = self.states()

    def states(self) -> dict[str, Any]:
        states: dict[str, Any] = {
            "torch's global generator": torch.default_generator.get_state(),
            "Python's global generator": python_random.getstate(),
            "NumPy's global generator": np.random.get_state(),  # noqa: NPY002 (the one that modules draw from)
        }
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            states["CUDA's global generator"] = torch.cuda.get_rng_state()
        return states

    def moved(self) -> str:
        """The first generator whose state has changed."""
        pairs = zip(self.before.items(), self.states().values(), strict=False)
        return next((name for (name, then), now in pairs if not _equal(then, now)), "")

    def put_back(self) -> None:
        torch.default_generator.set_state(self.before["torch's global generator"])
        python_random.setstate(self.before["Python's global generator"])
        np.random.set_state(self.before["NumPy's global generator"])  # noqa: NPY002


@contextlib.contextmanager
def kept(seed: int | None = None) -> Iterator[None]:
    """Seed the global generators, if ``seed`` is given, and restore them on exit."""
    generators = Generators()
    try:
        if seed is not None:
            torch.default_generator.manual_seed(seed)
            python_random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
        yield
    finally:
        generators.put_back()


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else repr(a) == repr(b)
