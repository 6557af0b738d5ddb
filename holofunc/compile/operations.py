"""Operations that stand for programs: parts of a graph that the compiler of the whole does not look into."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from holofunc import random

__all__ = ["Meta", "apart", "as_it_is", "copied", "leafwise_of", "operation", "register", "undisturbed"]


class Meta(NamedTuple):
    """What is known of a tensor without its elements."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, x: Tensor) -> "Meta":
        return cls(tuple(x.shape), tuple(x.stride()), x.dtype, x.device)

    def cut(self, rows: int) -> "Meta":
        """That of the first rows."""
        return self._replace(shape=(rows, *self.shape[1:]))

    def empty(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


class _Program(NamedTuple):
    run: Callable[..., Sequence[Tensor]]
    outputs: tuple[Meta, ...]
    leafwise: Any


_PROGRAMS: dict[str, _Program] = {}

torch.library.define(
    "holofunc::program",
    "(str name, Tensor[] inputs) -> Tensor[]",
    # a program may look at a number on the device, or send some there, which no CUDA graph can record
    tags=(torch.Tag.needs_exact_strides, torch.Tag.cudagraph_unsafe),
)


@torch.library.impl("holofunc::program", "CompositeExplicitAutograd")
def _run(name: str, inputs: list[Tensor]) -> list[Tensor]:
    with as_it_is(inputs[0].device.type):
        return apart(_PROGRAMS[name].run(*inputs), inputs)


@contextlib.contextmanager
def as_it_is(device: str) -> Iterator[None]:
    """Run a program on tensors that have values: casts are part of it, it is not differentiated, and nobody looks on
    (in a graph's first run torch does, and then no number seems to be known: `tree.is_known`).
    """
    with torch.no_grad(), torch.autocast(device, enabled=False), _disable_current_modes():
        yield


def apart(results: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """``results``, each in memory of its own, as those of an operation must be: cloned where they are not."""
    taken, own = {x.untyped_storage()._cdata for x in inputs}, []
    for x in results:
        memory = x.untyped_storage()._cdata
        own.append(x.clone() if memory in taken else x)
        taken.add(memory)
    return own


torch.library.define("holofunc::copied", "(Tensor x) -> Tensor")
copied: Callable[[Tensor], Tensor] = torch.ops.holofunc.copied
"""``clone`` that the compiler does not see: Inductor (torch 2.14) drops those of inputs that are written to later."""


@torch.library.impl("holofunc::copied", "CompositeExplicitAutograd")
def _copied(x: Tensor) -> Tensor:
    return x.clone()


@torch.library.register_fake("holofunc::copied")
def _copied_shape(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("holofunc::program")
def _shapes(name: str, inputs: list[Tensor]) -> list[Tensor]:
    return [meta.empty() for meta in _PROGRAMS[name].outputs]


operation: Callable[[str, list[Tensor]], list[Tensor]] = torch.ops.holofunc.program


def register(name: str, run: Callable[..., Sequence[Tensor]], outputs: Sequence[Meta], leafwise: Any = None) -> None:
    """Have ``operation(name, inputs)`` call ``run(*inputs)``, which returns tensors like ``outputs``.

    ``leafwise`` is another form of the program, for those who find it in a graph.
    """
    _PROGRAMS[name] = _Program(run, tuple(outputs), leafwise)


def leafwise_of(node: fx.Node) -> Any:
    """The form for some leaves at a time of the program that a node of a graph stands for; None without."""
    return _PROGRAMS[str(node.args[0])].leafwise if node.target is torch.ops.holofunc.program.default else None


def undisturbed(task: Callable[[], Any]) -> Any:
    """The result of ``task`` run in a thread of its own, where no transformation and no tracing is under way.

    Random draws enter a graph there as they do here.
    """
    drawing = random.drawing()
    done: list[tuple[Any, BaseException | None]] = []

    def run() -> None:
        try:
            with random.drawing_by(drawing):
                done.append((task(), None))
        except BaseException as error:
            done.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    result, error = done[0]
    if error is not None:
        raise error
    return result
