"""Operations that stand for programs: parts of a graph that the compiler of the whole does not look into."""

import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from holofunc import random, tree
from holofunc.arena import Layout, family
from holofunc.compile.packing import Packed, arenas_in, flatten, rebuild, strip
from holofunc.compile.tracing import update_being_traced
from holofunc.typing import PyTree

__all__ = ["Meta", "alone", "operation", "register", "undisturbed"]


class Meta(NamedTuple):
    """What is known of a tensor without its elements."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, x: Tensor) -> "Meta":
        return cls(tuple(x.shape), tuple(x.stride()), x.dtype, x.device)

    def empty(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


class _Program(NamedTuple):
    run: Callable[..., Sequence[Tensor]]
    outputs: tuple[Meta, ...]


_PROGRAMS: dict[str, _Program] = {}

torch.library.define(
    "holofunc::program", "(str name, Tensor[] inputs) -> Tensor[]", tags=(torch.Tag.needs_exact_strides,)
)


@torch.library.impl("holofunc::program", "CompositeExplicitAutograd")
def _run(name: str, inputs: list[Tensor]) -> list[Tensor]:
    with torch.autocast(inputs[0].device.type, enabled=False):  # casts are part of the program
        return list(_PROGRAMS[name].run(*inputs))


@torch.library.register_fake("holofunc::program")
def _shapes(name: str, inputs: list[Tensor]) -> list[Tensor]:
    return [meta.empty() for meta in _PROGRAMS[name].outputs]


operation: Callable[[str, list[Tensor]], list[Tensor]] = torch.ops.holofunc.program


def register(name: str, run: Callable[..., Sequence[Tensor]], outputs: Sequence[Meta]) -> None:
    """Have ``operation(name, inputs)`` call ``run(*inputs)``, which returns fresh tensors like ``outputs``."""
    _PROGRAMS[name] = _Program(run, tuple(outputs))


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


# --- parts of updates --------------------------------------------------------------------------------------------


def alone(fn: Callable[..., PyTree], *args: PyTree) -> PyTree:
    """``fn(*args)``, which in a jitted update becomes one operation that runs as it is.

    For what treats every leaf by its shape: compiled with the rest, each would get code of its own, in minutes.
    Flat dicts in the result that have the names and shapes of an arena among ``args`` become arenas.

    Args:
        fn: a pure function of trees of tensors and numbers to such trees. Tensors must not be captured: while it is
            being traced, none has values.
    """
    tensors: list[Tensor] = []
    spec = flatten(strip(args), tensors)
    layouts = {layout.family: layout for layout in arenas_in(args)}

    def run(*inputs: Tensor) -> tuple[Any, list[Tensor]]:
        out = fn(*rebuild(spec, iter(inputs), wrap=lambda vectors, layout: layout.cut(vectors)))
        results: list[Tensor] = []
        return flatten(tree.map_flat(lambda flat: _joined(flat, layouts), out), results), results

    if not tensors or not update_being_traced() or any(x.requires_grad for x in tensors):
        structure, results = run(*tensors)
        return rebuild(structure, iter(results))
    metas = [Meta.of(x) for x in tensors]

    devices = {meta.device for meta in metas}

    def trial() -> tuple[Any, list[Meta]]:
        if len(devices) > 1:
            with FakeTensorMode(), torch.no_grad():
                structure, results = run(*(meta.empty() for meta in metas))
                return structure, [Meta.of(x) for x in results]
        nowhere = torch.device("meta")  # knows no devices, and is ten times as fast
        with nowhere, torch.no_grad():
            structure, results = run(*(meta._replace(device=nowhere).empty() for meta in metas))
            return structure, [Meta.of(x)._replace(device=metas[0].device) for x in results]

    structure, outputs = undisturbed(trial)
    name = uuid.uuid4().hex  # a compiled graph that is kept on disk must not find another program
    register(name, lambda *inputs: _fresh(run(*inputs)[1], inputs), outputs)
    return rebuild(structure, iter(operation(name, tensors)))


def _joined(flat: Mapping[str, Tensor], layouts: Mapping[Any, Layout]) -> PyTree:
    layout = layouts.get(family(flat))
    return Packed(layout.join(flat), layout) if layout is not None and layout.fits(flat) else flat


def _fresh(results: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """``results``, each in memory of its own."""
    taken, own = {x.untyped_storage().data_ptr() for x in inputs}, []
    for x in results:
        own.append(x.clone() if x.untyped_storage().data_ptr() in taken else x)
        taken.add(x.untyped_storage().data_ptr())
    return own
