"""Activations that are computed again in the backward pass instead of being kept (activation checkpointing).

`torch.utils.checkpoint` hooks what autograd saves, which the transformations of `torch.func` do not allow. Here a part
of a forward pass is one operation with derivatives of its own: it keeps its inputs, and its backward pass evaluates it
once more. Both times it draws the same numbers; statistics are renewed by the first.

Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost" (arXiv 1604.06174).
"""

import contextlib
import functools
import inspect
import itertools
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from holofunc import tree
from holofunc.typing import Key, PyTree

__all__ = ["Checkpoints", "Slots", "recomputed"]


class Slots:
    """The places of a module's parameters and buffers, by which a part of a forward pass becomes a function of them."""

    def __init__(self, module: nn.Module) -> None:
        self.places: list[tuple[dict[str, Any], str]] = []
        for kind in ("_parameters", "_buffers"):
            for part in module.modules():
                store = getattr(part, kind)
                self.places += [(store, leaf) for leaf, x in store.items() if x is not None]
            if kind == "_parameters":
                self.num_parameters = len(self.places)

    def values(self) -> list[Tensor]:
        """What is in them now, buffers last."""
        return [store[leaf] for store, leaf in self.places]

    def put(self, values: list[Tensor], *, start: int = 0) -> None:
        for (store, leaf), value in zip(self.places[start:], values, strict=True):
            store[leaf] = value

    @contextlib.contextmanager
    def holding(self, values: list[Tensor]) -> Iterator[None]:
        """Have other values in them for a while."""
        before = self.values()
        self.put(values)
        try:
            yield
        finally:
            self.put(before)


class _Call(NamedTuple):
    """``run(*tensors) -> tensors``: those of the result, then ``num_buffers`` renewed ones; the function to repeat."""

    run: Callable[..., tuple[Tensor, ...]]
    num_buffers: int


def recomputed(run: Callable[..., PyTree], slots: Slots, key: Key | None, *given: Any) -> PyTree:
    """``run(key, *given)``, whose gradient computes it once more instead of keeping what it needs of it.

    Args:
        run: gives the same result whenever it is called; it may read the values in ``slots`` besides its arguments.
        slots: of the module that it belongs to; buffers in them are renewed, once.
        key: for what it draws.
        given: trees of tensors and other things.
    """
    structure: list[PyTree] = []
    tensors, own = _tensors(given), slots.values()
    keys = [] if key is None else [key]
    autocast = _autocast(tensors)
    num = len(own)

    def pure(*flat: Tensor) -> tuple[Tensor, ...]:
        held = [*flat[: slots.num_parameters], *[x.clone() for x in flat[slots.num_parameters : num]]]
        own_key = flat[num] if keys else None
        rest = iter(flat[num + len(keys) :])
        with autocast(), slots.holding(held):
            out = run(own_key, *_with_tensors(given, rest))
            buffers = slots.values()[slots.num_parameters :]
        structure[:] = [_with_tensors(out, itertools.repeat(PLACE))]
        return (*_tensors(out), *buffers)

    results = _Recomputed.apply(_Call(pure, num - slots.num_parameters), *own, *keys, *tensors)
    count = len(results) - (num - slots.num_parameters)
    slots.put(list(results[count:]), start=slots.num_parameters)
    return _with_tensors(structure[0], iter(results[:count]))


def _captures(function: Any) -> bool:
    """Whether a function refers to tensors beside its arguments, whose derivatives would be lost."""
    held: list[Any] = []
    if isinstance(function, functools.partial):
        held = [function.func, *function.args, *function.keywords.values()]
    elif inspect.isfunction(function):
        held = list(inspect.getclosurevars(function).nonlocals.values())
    return any(_tensors(each) or _captures(each) for each in held)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        return call.run(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call, *tensors = inputs
        ctx.set_materialize_grads(False)  # what does not move has no tangent, rather than one of zeros
        count = len(output) - ctx.call.num_buffers
        ctx.moves = [i < count and x.is_floating_point() for i, x in enumerate(output)]
        ctx.mark_non_differentiable(*[x for x, moves in zip(output, ctx.moves, strict=True) if not moves])
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        tensors, wanted = ctx.saved_tensors, ctx.needs_input_grad[1:]
        moving = [i for i, x in enumerate(tensors) if wanted[i] and x.is_floating_point()]
        given = [g for g, moves in zip(grads, ctx.moves, strict=True) if moves]
        with contextlib.nullcontext() if _differentiated_further(tensors) else torch.no_grad():
            out, pull, *_ = torch.func.vjp(_of(ctx, tensors, moving), *[tensors[i] for i in moving])
            slopes = [torch.zeros_like(x) if g is None else g for x, g in zip(out, given, strict=True)]
            found = dict(zip(moving, pull(tuple(slopes)), strict=True))
        return (None, *[found.get(i) for i in range(len(tensors))])

    @staticmethod
    def jvp(ctx: Any, call: None, *tangents: Any) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        moving = [i for i, t in enumerate(tangents) if t is not None and tensors[i].is_floating_point()]
        primals, directions = tuple([tensors[i] for i in moving]), tuple([tangents[i] for i in moving])
        changes: Any = iter(torch.func.jvp(_of(ctx, tensors, moving), primals, directions)[1])
        return tuple([next(changes) if moves else None for moves in ctx.moves])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], call: _Call, *tensors: Tensor) -> tuple[Any, Any]:
        run = torch.vmap(call.run, in_dims=in_dims[1:], randomness="different")
        results = _Recomputed.apply(call._replace(run=run), *tensors)
        return results, (0,) * len(results)


def _of(ctx: Any, tensors: tuple[Tensor, ...], moving: list[int]) -> Callable[..., tuple[Tensor, ...]]:
    """The results that have derivatives, as a function of the inputs that are ``moving``."""

    def of_moving(*values: Tensor) -> tuple[Tensor, ...]:
        filled = list(tensors)
        for i, value in zip(moving, values, strict=True):
            filled[i] = value
        return tuple([x for x, moves in zip(ctx.call.run(*filled), ctx.moves, strict=True) if moves])

    return of_moving


def _differentiated_further(tensors: tuple[Tensor, ...]) -> bool:
    """Whether another derivative is being taken around the one whose backward pass this is."""
    for x in tensors:
        inner = torch.func.debug_unwrap(x, recurse=False)
        while inner is not x:
            if inner.requires_grad:
                return True
            x, inner = inner, torch.func.debug_unwrap(inner, recurse=False)
    return False


def _autocast(tensors: list[Tensor]) -> Callable[[], Any]:
    """Autocast as it is now, for the second time."""
    device = tensors[0].device.type if tensors else "cpu"
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype=dtype, enabled=enabled) if enabled else contextlib.nullcontext()


class Checkpoints:
    """Calls of `torch.utils.checkpoint` in a forward pass, once one has failed.

    The function is looked up by whoever calls it, in the namespace of a module or in an attribute, and torch offers no
    way to be told of a call: a mode sees no Python functions, `context_fn` is the caller's, and hooks on saved tensors
    are what `torch.func` forbids. So while a pass is under way its names stand for `_instead`, which is the function
    itself wherever no pass of the same thread is under way. Dynamo knows the function by itself, and is left alone.

    Args:
        again: ``again(owner, function, *args, **options)`` calls a function that reads the values in a module,
            and whose activations are computed again.
        module: where it is not known which module that is.
    """

    def __init__(self, again: Callable[..., Any], module: nn.Module) -> None:
        self._again, self._module = again, module
        self._places: list[_Name] = []

    def found(self) -> bool:
        """See to such calls from now on; whether there may be any that were not seen to."""
        modules = [vars(room) for room in list(sys.modules.values()) if isinstance(room, ModuleType)]
        spaces = [*modules, *map(vars, self._module.modules())]
        before = len(self._places)
        with LOCK:  # other threads' passes replace names and put them back
            found = [_name(space, name, x) for space in spaces for name, x in list(space.items())]
        self._places = [each for each in found if each is not None]
        return len(self._places) > before

    @contextlib.contextmanager
    def replaced(self) -> Iterator[None]:
        if not self._places or torch.compiler.is_dynamo_compiling():
            yield
            return
        token = UNDER_WAY.set(self)
        _hold(self._places, 1)
        try:
            yield
        finally:
            _hold(self._places, -1)
            UNDER_WAY.reset(token)

    def call(
        self, function: Callable[..., Any], *args: Any, use_reentrant: Any = None, context_fn: Any = None,
        determinism_check: Any = None, debug: Any = None, early_stop: Any = None, preserve_rng_state: Any = None,
        **options: Any,
    ) -> Any:  # fmt: skip
        """What `torch.utils.checkpoint.checkpoint` does, with its arguments."""
        if _captures(function):
            return function(*args, **options)
        owner = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
        return self._again(owner if isinstance(owner, nn.Module) else self._module, function, *args, **options)


class _Name(NamedTuple):
    """A name in a namespace, what it stands for, and what it stands for while a pass is under way."""

    space: dict[str, Any]
    name: str
    usual: Any
    other: Any


UNDER_WAY: ContextVar[Checkpoints | None] = ContextVar("the pass of this thread whose checkpoints are seen to")
CHECKPOINT = [torch.utils.checkpoint.checkpoint]
"""In a list, where no name stands for it that `Checkpoints` would find."""
HOLDERS: Counter[tuple[int, str]] = Counter()
"""How many passes, of all threads, hold a name."""
HELD: dict[tuple[int, str], _Name] = {}
"""The names that some pass holds."""
LOCK = threading.Lock()


def _hold(names: list[_Name], passes: int) -> None:
    with LOCK:
        for each in names:
            key = id(each.space), each.name
            HOLDERS[key] += passes
            if HOLDERS[key]:
                each.space[each.name] = HELD.setdefault(key, each).other
            else:
                each.space[each.name] = HELD.pop(key).usual


def _name(space: dict[str, Any], name: str, value: Any) -> _Name | None:
    """A name that stands for the function, or would if no pass held it."""
    held = HELD.get((id(space), name))
    if held is not None and value is held.other:
        return held
    return _Name(space, name, value, _standing_in(value)) if _is_meant(value) else None


@functools.wraps(CHECKPOINT[0])
def _instead(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    now = UNDER_WAY.get(None)
    return (CHECKPOINT[0] if now is None else now.call)(function, *args, **options)


def _is_meant(value: Any) -> bool:
    """Whether a value is the function, or a partial of it."""
    return value is CHECKPOINT[0] or (type(value) is functools.partial and value.func is CHECKPOINT[0])


def _standing_in(value: Any) -> Any:
    return functools.partial(_instead, *value.args, **value.keywords) if value is not CHECKPOINT[0] else _instead


class _Place:
    """Where a tensor was."""


PLACE: Any = _Place()


def _tensors(node: PyTree) -> list[Tensor]:
    if isinstance(node, Tensor):
        return [node]
    if node is None or not tree.is_node(node):
        return []
    return [x for child in tree.children(node).values() for x in _tensors(child)]


def _with_tensors(node: PyTree, tensors: Iterator[Tensor]) -> PyTree:
    """``node`` with other tensors in the places of its own, in the order of `_tensors`."""
    if isinstance(node, (Tensor, _Place)):
        return next(tensors)
    if node is None or not tree.is_node(node):
        return node
    children = [_with_tensors(child, tensors) for child in tree.children(node).values()]
    return dict(zip(node, children, strict=True)) if isinstance(node, Mapping) else tree.with_children(node, children)
