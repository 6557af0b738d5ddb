"""One evaluation of a skeleton: keys for its draws, copies for what it would write into, and what it renewed.

`Skeleton` evaluates a module on values. A `Pass`, one evaluation, watches its calls: random functions draw from keys,
writes into the caller's tensors raise `Overwritten`, whereupon the evaluation starts again on copies.
"""

import contextlib
import copy
import itertools
import operator
import random as python_random
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from holofunc import random
from holofunc.model import recomputing
from holofunc.model.draws import DRAWS
from holofunc.model.drop import Drop
from holofunc.model.layers import LAYERS
from holofunc.model.skeleton import OWN
from holofunc.model.writes import WRITES
from holofunc.typing import Buffers, Key, Params

__all__ = ["Pass", "Skeleton"]

TORCH = "torch.nn.modules."
REFUSED = ("saved tensor hooks", "setup_context staticmethod")
"""What `torch.func` says of `torch.utils.checkpoint`, in its two forms."""
RULES = {**WRITES, **LAYERS, **DRAWS}


class Overwritten(Exception):
    """These of the caller's tensors would have been written into."""

    def __init__(self, names: set[str]) -> None:
        super().__init__(names)
        self.names = names


class Pass(TorchFunctionMode):
    """What watches one evaluation.

    Args:
        model: its name, for messages.
        key: the caller's.
        hashes: of the paths of the modules that may draw.
        known: keys of sites that are sure to draw, by path.
        guarded: the tensors that must not be written into, by name.
    """

    def __init__(
        self,
        model: str,
        key: Key | None,
        hashes: Mapping[str, int],
        known: Mapping[str, Key],
        guarded: Mapping[str, Tensor],
    ) -> None:
        super().__init__()
        self.model, self.base, self.hashes, self.known, self.guarded = model, key, hashes, known, guarded
        self.path = [""]
        self.calls: dict[str, int] = {}
        self.owners: list[tuple[Tensor, set[str]]] = []  # Dynamo knows a tensor again, but no `id` of it in torch 2.11
        self.replaced: dict[int, tuple[Tensor, Tensor]] = {}
        self.renewed: dict[str, Tensor] = {}
        self.generators: Generators | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.replaced:
            args = tuple(self.replaced.get(id(a), (a, a))[1] for a in args)
        rule = RULES.get(func)
        if rule is not None:
            out = rule(self, *args, **kwargs)
            if out is not NotImplemented:
                return out
        elif "out" in kwargs:
            self.writes(*(kwargs["out"] if isinstance(kwargs["out"], (tuple, list)) else (kwargs["out"],)))
        return func(*args, **kwargs)

    # --- what rules ask for (`sites.Site`)

    def key(self) -> Key:
        path = self.path[-1]
        if self.base is None:
            raise ValueError(f"{self.model} draws random numbers{path and f' in {path}'}: key must be given, got None")
        number = self.calls.get(path, 0)
        self.calls[path] = number + 1
        if number == 0 and path in self.known:
            return self.known[path]
        return random.fold_in(self.base, (self.hashes[path] + number * 0x9E3779B9) % 2**32)

    def write(self, target: Tensor, value: Tensor) -> Tensor:
        self.writes(target)
        try:
            return target.copy_(value)
        except RuntimeError as error:  # one draw per sample into one tensor for all of them
            if "vmap" not in str(error):
                raise
            self.replaced[id(target)] = (target, value)
            return value

    def writes(self, *targets: Any) -> None:
        if names := {n for t in targets if isinstance(t, Tensor) for n in self._owners_of(t)}:
            raise Overwritten(names)

    def alias(self, new: Tensor, old: Tensor) -> Tensor:
        if names := self._owners_of(old):
            self.owners.append((new, names))
        return new

    def _owners_of(self, x: Tensor) -> set[str]:
        """The names of the guarded tensors that have the memory of ``x``."""
        if self.guarded and not self.owners:
            self.owners += [(_memory(tensor), {name}) for name, tensor in self.guarded.items()]
        memory = _memory(x)
        return {name for owned, names in self.owners if owned is memory for name in names}

    def refuse(self, what: str, way_out: str) -> Any:
        part = self.path[-1]
        raise ValueError(f"{self.model} cannot be a pure function: {part or 'its forward'} {what}. Way out: {way_out}")

    # --- modules

    def enter(self, path: str) -> None:
        self.path.append(path)

    def leave(self) -> None:
        if self.generators is not None and (moved := self.generators.moved()):
            self.refuse(
                f"draws from {moved}, which no key reaches",
                "switch that off, or draw with holofunc.random and holofunc.model.site_key",
            )
        self.path.pop()


class Generators:
    """The global generators as they were: of torch, of its accelerator, of Python and of NumPy."""

    def __init__(self) -> None:
        self.before = self.states()

    def states(self) -> dict[str, Any]:
        states: dict[str, Any] = {
            "torch's global generator": torch.default_generator.get_state(),
            "Python's global generator": python_random.getstate(),
            "NumPy's global generator": repr(np.random.get_state()),  # noqa: NPY002 (looked at, not used)
        }
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            states["CUDA's global generator"] = torch.cuda.get_rng_state()
        return states

    def moved(self) -> str:
        """The first one that is no longer what it was."""
        pairs = zip(self.before.items(), self.states().values(), strict=False)
        return next((name for (name, then), now in pairs if not _equal(then, now)), "")


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


class Skeleton:
    """A module on the meta device, in one mode, as a function of values.

    Args:
        module: belongs to this from now on.
        name: of the model.
        persistent: the names of the buffers that are a state.
        remat: paths of the modules whose activations are computed again in a backward pass.
    """

    def __init__(self, module: nn.Module, name: str, persistent: Iterable[str], remat: Iterable[str] = ()) -> None:
        self.module, self.name = module, name
        self.now: Pass | None = None
        self.overwritten: set[str] = set()
        self.proved = False
        parts = list(module.named_modules())
        self.own = [part for _, part in parts if part._forward_pre_hooks or not type(part).__module__.startswith(TORCH)]
        self.hashes = {path: zlib.crc32(path.encode()) for path, part in parts if part in self.own or _may_draw(part)}
        self.hashes.setdefault("", zlib.crc32(b""))
        self.sites = {p: self.hashes[p] for p, part in parts if module.training and _draws(part)}
        self.places = {n: (module.get_submodule(n.rpartition(".")[0]), n.rpartition(".")[2]) for n in persistent}
        self.checkpoints = recomputing.Checkpoints(self._again, module)
        for path in remat:
            part = module.get_submodule(path)
            part.forward = partial(self._again, part, part.forward)
        for path, part in parts:
            if path in self.hashes:
                part.register_forward_pre_hook(self._entering(path))
                part.register_forward_hook(self._leaving)
        module.register_forward_hook(self._collect)
        self.contents = [(x, copy.copy(x)) for x in _containers(module, self.own)]

    def __call__(
        self,
        params: Params,
        buffers: Buffers,
        constants: Mapping[str, Tensor],
        inputs: tuple[Any, ...],
        options: dict[str, Any],
        key: Key | None,
    ) -> tuple[Any, Buffers]:
        """The output, and the buffers: the caller's own where the module renews none."""
        values = {**params, **constants, **buffers}
        if torch.compiler.is_dynamo_compiling():  # it cannot start again; what is copied in vain costs nothing there
            return self._evaluate(values, buffers, set(buffers), _each(Tensor.clone, (inputs, options)), key, {})
        while True:
            copies = self.overwritten | set(buffers) if self.module.training else self.overwritten
            numbers = itertools.count()
            names = _each(lambda x: f"input {next(numbers)}", (inputs, options))  # noqa: B023 (called here)
            given = _each(lambda x, n: x.clone() if n in copies else x, (inputs, options), names)  # noqa: B023
            guarded = {n: x for n, x in (*values.items(), *_pairs(names, given)) if n not in copies}
            try:
                with _as_they_were(self.own, self.contents):
                    return self._evaluate(values, buffers, copies, given, key, guarded)
            except RuntimeError as error:
                if not any(words in str(error) for words in REFUSED) or not self.checkpoints.found():
                    raise
            except Overwritten as found:
                self.overwritten = self.overwritten | found.names

    def part_of(self, error: BaseException) -> str:
        """The path of the innermost part whose code an error has come through."""
        paths = {id(part): path for path, part in self.module.named_modules()}
        found, trace = "", error.__traceback__
        while trace is not None:
            found = paths.get(id(trace.tb_frame.f_locals.get("self")), "") or found
            trace = trace.tb_next
        return found

    def _evaluate(
        self,
        values: dict[str, Tensor],
        buffers: Buffers,
        copies: set[str],
        given: tuple[tuple[Any, ...], dict[str, Any]],
        key: Key | None,
        guarded: Mapping[str, Tensor],
    ) -> tuple[Any, Buffers]:
        state = {n: x.clone() if n in copies else x for n, x in values.items()}
        watch = Pass(self.name, key, self.hashes, self._known(key), guarded)
        if not self.proved and not torch.compiler.is_compiling():
            watch.generators = Generators()
        before, self.now = self.now, watch
        try:
            with watch, self.checkpoints.replaced():
                out = torch.func.functional_call(self.module, state, *given)
        finally:
            self.now = before
        if watch.generators is not None:
            watch.leave()
            self.proved = True
        renewed = {n: watch.renewed[n] for n in buffers}
        same = all(renewed[n] is x for n, x in buffers.items())
        return out, buffers if same else renewed

    def _known(self, key: Key | None) -> dict[str, Key]:
        """The keys of the first calls of what is sure to draw, computed as one."""
        if key is None or not self.sites:
            return {}
        return dict(zip(self.sites, random.fold_in_each(key, list(self.sites.values())).unbind(), strict=True))

    # --- activations that are computed again

    def _again(self, owner: nn.Module, function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
        """A call that a backward pass will repeat, with this pass as it is now."""
        watch = self.now
        if watch is None:
            return function(*inputs, **options)
        path, calls = list(watch.path), dict(watch.calls)

        def run(key: Key | None, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
            numbers = itertools.count()
            names = _each(lambda x: f"input {next(numbers)} of a part of {path[-1]}", (inputs, options))
            given = _each(lambda x, n: x.clone() if n in self.overwritten else x, (inputs, options), names)
            guarded = {n: x for n, x in _pairs(names, given) if n not in self.overwritten}
            inner = Pass(self.name, key, self.hashes, {}, guarded)
            inner.path, inner.calls = list(path), dict(calls)
            before, self.now = self.now, inner
            first = before is watch
            try:
                with inner, self.checkpoints.replaced(), _as_they_were(self.own, () if first else self.contents):
                    out = function(*given[0], **given[1])
            finally:
                self.now = before
            if first:
                watch.calls.update(inner.calls)
            return out

        return recomputing.recomputed(run, recomputing.Slots(owner), watch.base, inputs, options)

    # --- hooks

    def _entering(self, path: str) -> Callable[..., None]:
        def enter(module: nn.Module, inputs: Any) -> None:
            if self.now is not None:
                self.now.enter(path)

        return enter

    def _leaving(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self.now is not None:
            self.now.leave()

    def _collect(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self.now is not None:
            self.now.renewed = {n: part._buffers[leaf] for n, (part, leaf) in self.places.items()}  # type: ignore[misc]


def _draws(part: nn.Module) -> bool:
    """Whether a module is sure to draw in train mode."""
    return isinstance(part, DROPOUT) and isinstance(part.p, float) and part.p > 0


def _may_draw(part: nn.Module) -> bool:
    """Whether a module of torch may draw."""
    return isinstance(part, (*DROPOUT, nn.MultiheadAttention, nn.RNNBase, nn.RReLU, nn.FractionalMaxPool2d))


DROPOUT = (
    *(Drop, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
)  # fmt: skip


@contextlib.contextmanager
def _as_they_were(modules: Iterable[nn.Module], contents: Iterable[tuple[Any, Any]] = ()) -> Iterator[None]:
    """Attributes that a forward sets are gone afterwards, and so is what it put into lists and dicts."""
    before = [(vars(module), dict(vars(module))) for module in modules]
    try:
        yield
    finally:
        for now, attributes in before:
            now.clear()
            now.update(attributes)
        for container, kept in contents:
            if len(container) != len(kept) or any(map(operator.is_not, _values(container), _values(kept))):
                _refill(container, kept)


def _containers(module: nn.Module, own: Iterable[nn.Module]) -> Iterator[Any]:
    """What a forward may put something into: the lists, dicts and sets of modules of others, and all modules' hooks."""
    for part in module.modules():
        yield from (part._forward_hooks, part._forward_pre_hooks)
    for part in own:
        yield from (part._parameters, part._buffers, part._modules)
    held = [value for part in own for name, value in vars(part).items() if name not in OWN]
    while held:
        value = held.pop()
        if isinstance(value, (list, dict, set, deque)):
            yield value
        if isinstance(value, (list, dict, tuple)):
            held.extend(_values(value))


def _values(container: Any) -> Iterable[Any]:
    return container.values() if isinstance(container, dict) else container


def _refill(container: Any, kept: Any) -> None:
    container.clear()
    (container.extend if isinstance(container, (list, deque)) else container.update)(kept)


def _memory(x: Tensor) -> Tensor:
    """The tensor that a view is a view of."""
    return x if x._base is None else x._base


def _each(fn: Callable[..., Any], given: Any, names: Any = None) -> Any:
    """``given`` with ``fn`` applied to the tensors in its tuples, lists and dicts."""
    if isinstance(given, Tensor):
        return fn(given) if names is None else fn(given, names)
    if isinstance(given, dict):
        return type(given)((n, _each(fn, x, names and names[n])) for n, x in given.items())
    if type(given) in (tuple, list):
        return type(given)(_each(fn, x, names and names[i]) for i, x in enumerate(given))
    return given


def _pairs(names: Any, given: Any) -> list[tuple[str, Tensor]]:
    found: list[tuple[str, Tensor]] = []
    _each(lambda x, n: found.append((n, x)), given, names)
    return found
