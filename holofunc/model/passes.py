"""Evaluation of a module on given values: keyed random draws, copies of tensors that it writes into, new buffers.

`Skeleton` evaluates a module. A `Pass`, one evaluation, intercepts calls of torch functions: random functions draw from
keys, and writes into the caller's tensors raise `Overwritten`, after which the evaluation starts again on copies.
"""

import copy
import threading
import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from holofunc import random
from holofunc.model import recomputing
from holofunc.model.draws import DRAWS
from holofunc.model.drop import Drop
from holofunc.model.generators import Generators
from holofunc.model.given import copied_inputs, each
from holofunc.model.layers import LAYERS
from holofunc.model.references import TORCH, named, reached, tensors
from holofunc.model.restoring import containers, restored
from holofunc.model.writes import WRITES
from holofunc.typing import Buffers, Key, Params

__all__ = ["Overwritten", "Pass", "Skeleton"]

CHECKPOINTED = ("saved tensor hooks", "must override the setup_context staticmethod")
"""Parts of error messages that torch.utils.checkpoint may cause."""
RULES = {**WRITES, **LAYERS, **DRAWS}


class Overwritten(BaseException):
    """The module would write into these tensors of the caller. Not an Exception, so that no forward pass catches it."""

    def __init__(self, names: set[str]) -> None:
        super().__init__(names)
        self.names = names


class Pass(TorchFunctionMode):
    """One evaluation, which intercepts the calls of torch functions.

    Args:
        model: name of the model, for messages.
        key: the caller's key.
        hashes: hashes of the paths of modules that may draw.
        known: precomputed keys of modules that certainly draw, by path.
        guarded: tensors that must not be written into, by name.
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
        self.owners: list[tuple[Tensor, set[str]]] = []  # no dict by id: Dynamo in torch 2.11 has no ids
        self.replaced: dict[int, tuple[Tensor, Tensor]] = {}
        self.renewed: dict[str, Tensor | None] = {}
        self.held: list[tuple[str, Tensor]] = []
        self.trial: Trial | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.trial is not None:
            self.trial.look_at(self, args, kwargs)
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

    # --- the interface of rules (`sites.Site`)

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
        except RuntimeError as error:  # one draw per sample into a tensor shared by all samples
            if "vmap" not in str(error):
                raise
            self.replaced[id(target)] = (target, value)
            return value

    def writes(self, *targets: Any) -> None:
        if names := {n for t in targets if isinstance(t, Tensor) for n in self._owners_of(t)}:
            if held := [n for n, _ in self.held if n in names]:
                self.refuse(
                    f"writes into a tensor that {held[0]} holds, and would find it changed the next time",
                    "register it as a buffer, or write into a copy",
                )
            raise Overwritten(names)

    def alias(self, new: Tensor, old: Tensor) -> Tensor:
        if names := self._owners_of(old):
            self.owners.append((new, names))
        return new

    def _owners_of(self, x: Tensor) -> set[str]:
        """The names of the guarded tensors that share memory with ``x``."""
        if not self.owners:
            self.owners += [(_memory(tensor), {name}) for name, tensor in (*self.guarded.items(), *self.held)]
        memory = _memory(x)
        return {name for owned, names in self.owners if owned is memory for name in names}

    def refuse(self, what: str, way_out: str) -> Any:
        part = self.path[-1]
        raise ValueError(
            f"{self.model} cannot be a pure function: {part or 'its forward'} {what}. Workaround: {way_out}"
        )

    # --- modules

    def enter(self, path: str) -> None:
        self.path.append(path)

    def leave(self) -> None:
        if self.trial is not None:
            self.trial.leave(self)
        self.path.pop()


class Trial:
    """Additional checks of the first pass in each mode.

    Args:
        module: its own tensors have no values, so reading one of them is an error.
        guarded: tensors that must not be written into, by name.
    """

    def __init__(self, module: nn.Module, guarded: Mapping[str, Tensor]) -> None:
        self.module = module
        self.generators = Generators()
        self.names = {id(x): name for name, x in named(module)}
        self.parameters = {name for name, _ in module.named_parameters()}
        self.versions = {n: (x, x._version) for n, x in guarded.items() if not x.is_inference()}

    def look_at(self, watch: Pass, args: Any, kwargs: Mapping[str, Any]) -> None:
        if stray := [self.names[id(x)] for x in tensors((args, kwargs)) if id(x) in self.names]:
            watch.refuse(
                f"reads {stray[0]} by a reference to the tensor, where values handed to apply do not reach it",
                "refer to the module that has it",
            )

    def leave(self, watch: Pass) -> None:
        """Called at the end of a submodule."""
        if moved := self.generators.moved():
            watch.refuse(
                f"draws from {moved}, which no key reaches",
                "switch that off, or draw with holofunc.random and holofunc.model.site_key",
            )

    def end(self, watch: Pass) -> None:
        self.leave(watch)
        if late := [n for n, _ in self.module.named_parameters() if n not in self.parameters]:
            watch.refuse(
                f"makes parameters while it runs ({late[0]}), of which init does not know",
                "make them in the constructor, or run one batch through the module and use from_module",
            )
        if written := [n for n, (x, version) in self.versions.items() if x._version != version]:
            watch.refuse(f"writes into {written[0]} by an operator that is not known to write", "write into a copy")


class Skeleton:
    """A module on the meta device, in one mode, as a function of values.

    Args:
        module: owned by this object from now on.
        name: of the model.
        persistent: names of the buffers in the state dict.
        remat: paths of the modules whose activations are recomputed in the backward pass.
    """

    def __init__(self, module: nn.Module, name: str, persistent: Iterable[str], remat: Iterable[str] = ()) -> None:
        self.module, self.name = module, name
        self.now: Pass | None = None
        self.lock = threading.RLock()
        self.overwritten: set[str] = set()
        self.proved = False
        parts = list(module.named_modules())
        self.own = [part for _, part in parts if part._forward_pre_hooks or not type(part).__module__.startswith(TORCH)]
        self.hashes = {path: zlib.crc32(path.encode()) for path, part in parts if part in self.own or _may_draw(part)}
        self.hashes.setdefault("", zlib.crc32(b""))
        self.sites = {p: self.hashes[p] for p, part in parts if module.training and _draws(part)}
        self.places = {n: (module.get_submodule(n.rpartition(".")[0]), n.rpartition(".")[2]) for n in persistent}
        self.checkpoints = recomputing.Checkpoints(self._again, module)
        names = {id(x) for _, x in named(module)}
        self.held = [(n, x) for n, x in reached(module) if isinstance(x, Tensor) and id(x) not in names]
        contents = list(containers(module))
        for path in remat:
            part = module.get_submodule(path)
            part.forward = partial(self._again, part, part.forward)
        for path, part in parts:
            if path in self.hashes:
                part.register_forward_pre_hook(self._entering(path))
                part.register_forward_hook(self._leaving)
        module.register_forward_hook(self._collect)
        self.contents = [(x, copy.copy(x)) for x in contents]

    def __call__(
        self,
        params: Params,
        buffers: Buffers,
        constants: Mapping[str, Tensor],
        inputs: tuple[Any, ...],
        options: dict[str, Any],
        key: Key | None,
    ) -> tuple[Any, Buffers]:
        """The output and the buffers, which are the caller's own if the module does not update them."""
        values = {**params, **constants, **buffers}
        if torch.compiler.is_dynamo_compiling():  # it cannot restart; needless copies cost nothing there
            return self._evaluate(values, buffers, set(buffers), each(Tensor.clone, (inputs, options)), key, {})
        with self.lock:  # all threads put their values into one module
            while True:
                copies = self.overwritten | set(buffers) if self.module.training else self.overwritten
                given, guarded = copied_inputs((inputs, options), copies)
                guarded.update({n: x for n, x in values.items() if n not in copies})
                try:
                    with restored(self.own if self.proved else self.module.modules(), self.contents) as changed:
                        out = self._evaluate(values, buffers, copies, given, key, guarded)
                    self.own += [part for part in changed if part not in self.own]
                    return out
                except RuntimeError as error:
                    if not any(words in str(error) for words in CHECKPOINTED) or not self.checkpoints.found():
                        raise
                except Overwritten as found:
                    self.overwritten = self.overwritten | found.names

    def part_of(self, error: BaseException) -> str:
        """The path of the innermost submodule through which an error passed."""
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
        watch.held = self.held
        if not self.proved and not torch.compiler.is_compiling():
            watch.trial = Trial(self.module, guarded)
        before, self.now = self.now, watch
        try:
            with watch, self.checkpoints.replaced():
                out = torch.func.functional_call(self.module, state, *given)
        finally:
            self.now = before
        if watch.trial is not None:
            watch.trial.end(watch)
            self.proved = True
        if all(watch.renewed[n] is x for n, x in buffers.items()):
            return out, buffers
        renewed = {n: x for n in buffers if (x := watch.renewed[n]) is not None}
        if len(renewed) < len(buffers):
            gone = next(n for n in buffers if n not in renewed)
            watch.refuse(f"takes the buffer {gone} away", "have it hold zeros, or something like that")
        return out, renewed

    def _known(self, key: Key | None) -> dict[str, Key]:
        """The keys of the first calls of modules that certainly draw, computed at once."""
        if key is None or not self.sites:
            return {}
        return dict(zip(self.sites, random.fold_in_each(key, list(self.sites.values())).unbind(), strict=True))

    # --- activation checkpointing

    def _again(self, owner: nn.Module, function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
        """Call a function that the backward pass will repeat with the current state of this pass."""
        watch = self.now
        if watch is None:
            return function(*inputs, **options)
        path, calls = list(watch.path), dict(watch.calls)

        def run(key: Key | None, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
            given, guarded = copied_inputs((inputs, options), self.overwritten, f" of a part of {path[-1]}")
            inner = Pass(self.name, key, self.hashes, {}, guarded)
            inner.path, inner.calls = list(path), dict(calls)
            before, self.now = self.now, inner
            first = before is watch
            try:
                with inner, self.checkpoints.replaced(), restored(self.own, () if first else self.contents):
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
            found = {n: part._buffers.get(leaf) for n, (part, leaf) in self.places.items()}
            self.now.renewed = {n: self.now.replaced.get(id(x), (x, x))[1] for n, x in found.items()}


def _draws(part: nn.Module) -> bool:
    """Whether a module certainly draws in train mode."""
    return isinstance(part, DROPOUT) and isinstance(part.p, float) and part.p > 0


def _may_draw(part: nn.Module) -> bool:
    """Whether one of torch's modules may draw."""
    return isinstance(part, (*DROPOUT, nn.MultiheadAttention, nn.RNNBase, nn.RReLU, nn.FractionalMaxPool2d))


DROPOUT = (
    *(Drop, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
)  # fmt: skip


def _memory(x: Tensor) -> Tensor:
    """The base of a view."""
    return x if x._base is None else x._base
