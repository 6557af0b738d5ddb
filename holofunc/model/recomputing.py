"""Activation checkpointing: activations are recomputed in the backward pass instead of being kept.

`torch.utils.checkpoint` hooks the tensors that autograd saves, which `torch.func` does not allow. Here a part of a
forward pass is one operation with its own derivatives: it keeps its inputs, and its backward pass evaluates it again.
Both evaluations draw the same random numbers; only the first updates statistics.

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
    """The parameters and buffers of a module, as arguments of a part of a forward pass."""

    def __init__(self, module: nn.Module) -> None:
        self.places: list[tuple[dict[str, Any], str]] = []
        for kind in ("_parameters", "_buffers"):
            for part in module.modules():
                store = getattr(part, kind)
                self.places += [(store, leaf) for leaf, x in store.items() if x is not None]
            if kind == "_parameters":
                self.num_parameters = len(self.places)

    def values(self) -> list[Tensor]:
        """The current values, buffers last."""
        return [store[leaf] for store, leaf in self.places]

    def put(self, values: list[Tensor], *, start: int = 0) -> None:
        for (store, leaf), value in zip(self.places[start:], values, strict=True):
            store[leaf] = value

    @contextlib.contextmanager
    def holding(self, values: list[Tensor]) -> Iterator[None]:
        """Replace the values temporarily."""
        before = self.values()
        self.put(values)
        try:
            yield
        finally:
            self.put(before)


class _Call(NamedTuple):
    """The function to repeat: ``run(*tensors) -> tensors``, the results and then ``num_buffers`` new buffers."""

    run: Callable[..., tuple[Tensor, ...]]
    num_buffers: int


def recomputed(run: Callable[..., PyTree], slots: Slots, key: Key | None, *given: Any) -> PyTree:
    """``run(key, *given)``, whose gradient calls it again instead of keeping activations.

    Args:
        run: a deterministic function; it may also read the values in ``slots``.
        slots: of its module; their buffers are updated once.
        key: for its random draws.
        given: trees of tensors and other objects.
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
    """Whether a function refers to tensors other than its arguments, whose derivatives would be lost."""
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
        ctx.set_materialize_grads(False)  # inputs without a tangent get None instead of zeros
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
    """The differentiable results as a function of the inputs with tangents (``moving``)."""

    def of_moving(*values: Tensor) -> tuple[Tensor, ...]:
        filled = list(tensors)
        for i, value in zip(moving, values, strict=True):
            filled[i] = value
        return tuple([x for x, moves in zip(ctx.call.run(*filled), ctx.moves, strict=True) if moves])

    return of_moving


def _differentiated_further(tensors: tuple[Tensor, ...]) -> bool:
    """Whether this backward pass is itself being differentiated."""
    for x in tensors:
        inner = torch.func.debug_unwrap(x, recurse=False)
        while inner is not x:
            if inner.requires_grad:
                return True
            x, inner = inner, torch.func.debug_unwrap(inner, recurse=False)
    return False


def _autocast(tensors: list[Tensor]) -> Callable[[], Any]:
    """The current autocast state, for the second evaluation."""
    device = tensors[0].device.type if tensors else "cpu"
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype=dtype, enabled=enabled) if enabled else contextlib.nullcontext()


class Checkpoints:
    """Support for calls of `torch.utils.checkpoint` in a forward pass, activated when one has failed.

    Torch offers no way to intercept these calls: a mode does not see Python functions, `context_fn` belongs to the
    caller, and hooks on saved tensors are not allowed in `torch.func`. So during a pass all names that refer to the
    function, in namespaces of modules and in attributes, are replaced by `_instead`, which behaves like the function
    unless the same thread is in a pass. Dynamo handles the function itself.

    Args:
        again: ``again(owner, function, *args, **options)`` calls a function that reads the values in a module, and
            recomputes its activations in the backward pass.
        module: used if the owner is unknown.
    """

    def __init__(self, again: Callable[..., Any], module: nn.Module) -> None:
        self._again, self._module = again, module
        self._places: list[_Name] = []

    def found(self) -> bool:
        """Handle these calls from now on. Returns whether there may be calls that were not handled before."""
        modules = [vars(room) for room in list(sys.modules.values()) if isinstance(room, ModuleType)]
        spaces = [*modules, *map(vars, self._module.modules())]
        before = len(self._places)
        with LOCK:  # passes of other threads replace and restore names too
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
        """The replacement of `torch.utils.checkpoint.checkpoint`, with its arguments."""
        if _captures(function):
            return function(*args, **options)
        owner = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
        return self._again(owner if isinstance(owner, nn.Module) else self._module, function, *args, **options)


class _Name(NamedTuple):
    """A name in a namespace, its value, and its value during a pass."""

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
    """A name that refers to the function, or would outside a pass."""
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
    """A placeholder for a tensor."""


PLACE: Any = _Place()


def _tensors(node: PyTree) -> list[Tensor]:
    if isinstance(node, Tensor):
        return [node]
    if node is None or not tree.is_node(node):
        return []
    return [x for child in tree.children(node).values() for x in _tensors(child)]


def _with_tensors(node: PyTree, tensors: Iterator[Tensor]) -> PyTree:
    """``node`` with its tensors replaced, in the order of `_tensors`."""
    if isinstance(node, (Tensor, _Place)):
        return next(tensors)
    if node is None or not tree.is_node(node):
        return node
    children = [_with_tensors(child, tensors) for child in tree.children(node).values()]
    return dict(zip(node, children, strict=True)) if isinstance(node, Mapping) else tree.with_children(node, children)
