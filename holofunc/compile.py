"""`jit`: `torch.compile` for pure functions of a state, with donation and packed trees.

What it adds, and why:

- The flat dicts of the state (parameters, moments, buffers) enter the graph as one vector per dtype and are cut into
  views there (`holofunc.Arena`). A compiled optimizer update is then one kernel instead of one per tensor.
- ``donate=True`` ends the graph by writing the new state into the old one's memory: no second copy of the state, and
  addresses that never change, which CUDA graphs need.
- Memory that a donating step frees stays with the process for the next step (`keep_freed_memory`).
- A function made of two stages (`Staged`) becomes two graphs. A training step starts and runs faster that way: the
  update neither delays the backward pass's last uses of the parameters nor is compiled together with it.
- Errors raised while tracing reach the caller as they are in eager code.
"""

import ctypes
import functools
import os
import shutil
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from holofunc import arena, tree
from holofunc.arena import Arena, Layout
from holofunc.typing import PyTree

__all__ = ["Staged", "jit"]


class Staged(NamedTuple):
    """``second(state, first(state, *inputs))`` as one function, which `jit` compiles as two graphs.

    ``check(*inputs)`` runs before, outside any graph: it may read values, and raises on bad ones. ``finish(state)``,
    if there is one, closes what calls have left open (a window of accumulated gradients) at the end of an epoch. Where
    ``rereads(state)`` holds, ``second`` takes ``*inputs`` too.
    """

    first: Callable[..., Any]
    second: Callable[..., Any]
    check: Callable[..., None] | None = None
    finish: Callable[[PyTree], PyTree] | None = None
    rereads: Callable[[PyTree], bool] | None = None

    def __call__(self, state: PyTree, *inputs: PyTree) -> Any:
        if self.check is not None and not _being_traced():
            self.check(*inputs)
        return self.second(state, self.first(state, *inputs), *(inputs if self.reread(state) else ()))

    def reread(self, state: PyTree) -> bool:
        return self.rereads is not None and self.rereads(state)


def jit(
    fn: Callable[..., Any], *, donate: bool = False, fullgraph: bool = True, mode: str | None = None
) -> Callable[..., Any]:
    """Compile a pure function of trees of tensors.

    Args:
        fn: any function; its first argument is its state. A `Staged` one becomes two graphs. One with a true attribute
            ``leafwise`` gets its tensors as they are: right for a forward pass, whose weights are better not cut out of
            a vector in the graph.
        donate: write the new state, which ``fn`` returns (alone, or first in a tuple), into the memory of the state
            passed in. That state must not be used afterwards; the one returned takes its place. On Linux the process
            then keeps memory that a step has freed for the next step.
        fullgraph: a graph break is an error.
        mode: as in `torch.compile`, e.g. ``"reduce-overhead"`` for CUDA graphs.

    Returns:
        A function of the same arguments. Each new shape of the inputs is compiled once; values never recompile.

    Raises:
        ValueError: ``donate=True`` and the new state is not of the old one's structure, shapes and dtypes.

    Example:
        >>> import torch
        >>> from holofunc import jit
        >>> def step(state, batch):
        ...     return {"mean": 0.9 * state["mean"] + 0.1 * batch.mean()}, batch.max()
        >>> state, top = jit(step, donate=True)({"mean": torch.zeros(())}, torch.ones(3))
        >>> state["mean"], top
        (tensor(0.1000), tensor(1.))
    """
    if not callable(fn):
        raise TypeError(f"fn must be callable, got {fn!r}")
    if _compiler_missing():
        _warn_no_compiler()
        return fn
    if donate:
        keep_freed_memory()
    settings = _Settings(mode)
    if not fullgraph:
        run = _with_breaks(fn, settings, donate)
    else:
        run = _staged(fn, settings, donate) if isinstance(fn, Staged) else _single(fn, settings, donate)
    return functools.update_wrapper(run, fn)


class _Settings(NamedTuple):
    mode: str | None


def _single(fn: Callable[..., Any], settings: _Settings, donate: bool) -> Callable[..., Any]:
    program, leafwise = _Program(fn, settings, donate), getattr(fn, "leafwise", False)
    scratch = _Scratch()

    def run(*args: Any, **kwargs: Any) -> Any:
        if _being_traced():
            return fn(*args, **kwargs)
        if not donate:
            inputs = (args, kwargs) if leafwise else _packed_alike((args, kwargs), scratch)
            return _unpacked(scratch.without(program(list(inputs[0]), inputs[1])))
        state, packed = _adopt(args[0])
        others, named = _packed_like(packed, (args[1:], kwargs), scratch)
        return _with_state(state, scratch.without(program([packed, *others], named)))

    return run


def _with_breaks(fn: Callable[..., Any], settings: _Settings, donate: bool) -> Callable[..., Any]:
    """Graphs, and Python where the compiler cannot follow: nothing is packed, the state is written back afterwards."""
    compiled = torch.compile(lambda *args, **kwargs: fn(*args, **kwargs), dynamic=False, mode=settings.mode)

    def run(*args: Any, **kwargs: Any) -> Any:
        out = compiled(*args, **kwargs)
        if not donate:
            return out
        new, rest = _new_state(args[0], out)
        with torch.no_grad():
            _write_back("state", args[0], new)
        return _with_state(args[0], rest)

    return run


def _staged(fn: Staged, settings: _Settings, donate: bool) -> Callable[..., Any]:
    first, second = _Program(fn.first, settings, False, gradient=True), _Program(fn.second, settings, donate)
    scratch, reread = _Scratch(), None

    def run(state: PyTree, *inputs: PyTree) -> Any:
        nonlocal reread
        if _being_traced():
            return fn(state, *inputs)
        if fn.check is not None:
            fn.check(*inputs)
        reread = fn.reread(state) if reread is None else reread  # a matter of the state's structure, which stays
        again = inputs if reread else ()
        if not donate:
            inner = _packed_alike((state, first([state, *inputs], {})), scratch)
            return _unpacked(scratch.without(second([*inner, *again], {})))
        state, packed = _adopt(state)
        between = first([state, *inputs], {})  # leaf by leaf: convolutions are slower on weights cut out in the graph
        between = _packed_like(packed, between, scratch)
        return _with_state(state, scratch.without(second([packed, between, *again], {})))

    return run


# --- packed trees: dicts of tensors as vectors, outside the graph ------------------------------------------------


class Packed(NamedTuple):
    """An arena as it crosses the border of a graph."""

    vectors: tuple[Tensor, ...]
    layout: Layout


class _Scratch:
    """Memory that loose dicts are gathered in, from call to call: fresh pages for large vectors cost more than filling
    them. Each dict of a call has its own.
    """

    def __init__(self) -> None:
        self._free: dict[Any, list[tuple[Tensor, ...]]] = {}
        self._used: list[tuple[Any, tuple[Tensor, ...]]] = []

    def gathered(self, flat: Mapping[str, Tensor], layout: Layout) -> Packed:
        leaves = list(flat.values())
        kind = (layout, tuple([(leaves[i].dtype, leaves[i].device) for i in layout.firsts]))
        free = self._free.setdefault(kind, [])
        if free:
            layout.join_into(vectors := free.pop(), flat)
        else:
            vectors = layout.join(flat)
        self._used.append((kind, vectors))
        return Packed(vectors, layout)

    def without(self, result: PyTree) -> PyTree:
        """``result``, with what was lent out free again, but for what ``result`` itself holds: that is the caller's."""
        held = {x.untyped_storage().data_ptr() for x in _tensors(result)} if self._used else set()
        for kind, vectors in self._used:
            if held.isdisjoint(v.untyped_storage().data_ptr() for v in vectors):
                self._free[kind].append(vectors)
        self._used.clear()
        return result


def _tensors(node: PyTree) -> list[Tensor]:
    tensors: list[Tensor] = []
    _flatten(node, tensors)
    return tensors


def _packed(node: PyTree) -> PyTree:
    """``node`` with the dicts that lie in arenas (as the states made here do) as `Packed`."""
    return tree.map_flat(lambda flat: Packed(*parts) if (parts := arena.parts(flat)) else flat, node)


def _packed_alike(node: PyTree, scratch: _Scratch) -> PyTree:
    """`_packed`, with dicts of the same names and shapes (parameters, moments, gradients) brought into one layout."""
    families: dict[Any, list[dict[str, Tensor]]] = {}
    tree.map_flat(lambda flat: families.setdefault(arena.family(flat), []).append(flat), node)
    layouts = {}
    for family, flats in families.items():
        if len(flats) > 1:
            known = next((parts[1] for flat in flats if (parts := arena.parts(flat))), None)
            layouts[family] = known or arena.layout_of(flats)
    return tree.map_flat(_packer(layouts, scratch), node)


def _packed_like(packed: PyTree, node: PyTree, scratch: _Scratch) -> PyTree:
    """``node`` with the dicts (gradients, say) that have a counterpart in a packed state brought into its layout."""
    return tree.map_flat(_packer({layout.family: layout for layout in _layouts(packed)}, scratch), node)


def _packer(layouts: Mapping[Any, Layout], scratch: _Scratch) -> Callable[[dict[str, Tensor]], PyTree]:
    def pack(flat: dict[str, Tensor]) -> PyTree:
        layout, found = layouts.get(arena.family(flat)), arena.parts(flat)
        if found is not None and (layout is None or found[1] is layout):
            return Packed(*found)
        if layout is None or not layout.fits(flat):
            return flat
        return scratch.gathered(flat, layout)

    return pack


def _layouts(node: PyTree) -> Iterator[Layout]:
    if isinstance(node, Packed):
        yield node.layout
    elif node is not None and tree.is_node(node):
        for child in tree.children(node).values():
            yield from _layouts(child)


def _adopt(state: PyTree) -> tuple[PyTree, PyTree]:
    """A donated state and its packed form; what does not lie in arenas yet is moved there."""
    state = tree.lay_out(state)
    return state, _packed(state)


def _unpacked(node: PyTree) -> PyTree:
    if isinstance(node, Packed):
        return arena.views(node.vectors, node.layout)
    if node is None or not tree.is_node(node):
        return node
    return tree.with_children(node, [_unpacked(v) for v in tree.children(node).values()])


def _with_state(state: PyTree, rest: Any) -> Any:
    return state if rest is None else (state, *_unpacked(rest))


# --- programs: one graph per signature ---------------------------------------------------------------------------


class _Program:
    """``fn`` as one graph for each structure of its arguments, which may hold `Packed` nodes, as may its results.

    The function is traced by running it, once, on tensors without values, as a JAX user would expect: what it does to
    Python objects is part of the trace, what it captured is read then. `torch.compile` sees a single operation.
    """

    def __init__(self, fn: Callable[..., Any], settings: _Settings, donate: bool, gradient: bool = False) -> None:
        self._fn, self._settings, self._donate, self._gradient = fn, settings, donate, gradient
        self._graphs: dict[Any, _Graph] = {}

    def __call__(self, args: list[Any], kwargs: Mapping[str, Any]) -> Any:
        tensors: list[Tensor] = []
        spec = _flatten((args, dict(kwargs)), tensors)
        graph = self._graphs.get(spec)
        if graph is None:
            graph = self._graphs[spec] = _Graph(self._fn, spec, self._settings, self._donate, self._gradient)
        return graph(tensors)


class _Graph:
    def __init__(self, fn: Callable[..., Any], spec: Any, settings: _Settings, donate: bool, gradient: bool) -> None:
        self._error: Exception | None = None
        self._result: Any = None  # structure of what ``fn`` returns, known once it was traced

        def traced(*tensors: Tensor) -> tuple[Tensor, ...]:
            args, kwargs = _rebuild(spec, iter(tensors))
            try:
                _captured_tensors_become_constants()
                _tracing.active, _tracing.gradient = True, gradient
                out = fn(*args, **kwargs)
                if donate:
                    new, out = _new_state(args[0], out)
                    _write_back("state", args[0], new)
            except (TypeError, ValueError) as error:
                self._error = error
                raise
            finally:
                _tracing.active = _tracing.gradient = False
            results: list[Tensor] = []
            self._result = _flatten(_strip(out), results)
            return tuple(results)

        operation = torch.compiler.allow_in_graph(traced)

        def program(tensors: list[Tensor]) -> tuple[Tensor, ...]:
            return operation(*tensors)

        name = f"jit_{getattr(fn, '__name__', type(fn).__name__)}"
        own = program.__code__.replace(co_name=name)  # Dynamo counts graphs, against its limit, per code object
        program = types.FunctionType(own, globals(), name, None, program.__closure__)
        self._run = torch.compile(program, fullgraph=True, dynamic=False, mode=settings.mode)

    def __call__(self, tensors: list[Tensor]) -> Any:
        try:
            results = self._run(tensors)
        except torch._dynamo.exc.TorchDynamoException:
            if self._error is None:
                raise
        else:
            return _rebuild(self._result, iter(results), wrap=Packed)
        error, self._error = self._error, None
        raise error  # what the caller did wrong, as eager code says it


def compile_graph(graph: torch.fx.GraphModule) -> Callable[..., Any]:
    """A graph of tensors, as what was traced already, compiled when it first runs."""
    return torch.compile(graph, fullgraph=True, dynamic=False)


_tracing = threading.local()


def _being_traced() -> bool:
    """Whether this is on its way into a graph: by `torch.compile`, or by `jit`, which torch 2.11 does not tell."""
    return torch.compiler.is_compiling() or getattr(_tracing, "active", False)


def gradient_being_traced() -> bool:
    """Whether this is the first stage of a `Staged` function on its way into a graph, under one plain `grad`."""
    if not getattr(_tracing, "gradient", False):
        return False
    transformations = torch._C._functorch.get_interpreter_stack() or []
    return [t.key() for t in transformations] == [torch._C._functorch.TransformType.Grad]


def _captured_tensors_become_constants() -> None:
    """Let tensors with values, which a function has captured, meet those without on which it is being traced."""
    fake = torch._guards.detect_fake_mode()
    if fake is not None:
        fake.allow_non_fake_inputs = True


def _flatten(node: Any, tensors: list[Tensor]) -> Any:
    """Append the tensors in ``node`` to ``tensors`` and return the rest of it, hashable."""
    if isinstance(node, Tensor):
        tensors.append(node)
        return Tensor
    if isinstance(node, Packed):
        tensors.extend(node.vectors)
        return (Packed, node.layout, len(node.vectors))
    if isinstance(node, dict):
        return (dict, tuple(node), tuple([_flatten(v, tensors) for v in node.values()]))
    if isinstance(node, (tuple, list)):
        return (type(node), None, tuple([_flatten(v, tensors) for v in node]))
    return (None, type(node), node)


def _rebuild(spec: Any, tensors: Iterator[Tensor], wrap: Callable[..., Any] = Arena) -> Any:
    if spec is Tensor:
        return next(tensors)
    kind, names, children = spec
    if kind is None:
        return children
    if kind is Packed:
        return wrap(tuple([next(tensors) for _ in range(children)]), names)
    parts = [_rebuild(child, tensors, wrap) for child in children]
    if kind is dict:
        return dict(zip(names, parts, strict=True))
    return kind(*parts) if hasattr(kind, "_fields") else kind(parts)


def _strip(node: Any) -> Any:
    """``node`` with its arenas as `Packed`."""
    if isinstance(node, Arena):
        return dict(node) if node.per_leaf else Packed(node.vectors, node.layout)
    if node is None or not tree.is_node(node):
        return node
    return tree.with_children(node, [_strip(v) for v in tree.children(node).values()])


def _new_state(old: PyTree, out: Any) -> tuple[PyTree, tuple[Any, ...] | None]:
    """The new state in what a function returned, and the rest: the state is alone, or first in a tuple."""
    if type(out) is not tuple or tree.paths(out) == tree.paths(old):
        return out, None
    return out[0], tuple(out[1:])


def _write_back(path: str, old: Any, new: Any) -> None:
    """Copy ``new`` into the memory of ``old``, in the graph."""
    if isinstance(old, Tensor):
        if not isinstance(new, Tensor) or new.shape != old.shape or new.dtype != old.dtype:
            raise ValueError(f"donate=True: {path} was {_kind(old)}, the new state has {_kind(new)}")
        if new is not old:
            old.copy_(new)
    elif old is None or not tree.is_node(old):
        if old != new:
            raise ValueError(f"donate=True: {path} was {old!r}, which is no tensor and cannot become {new!r}")
    elif isinstance(old, Arena) and isinstance(new, Arena) and old.layout is new.layout:
        for before, after in zip(old.vectors, new.vectors, strict=True):
            _write_back(path, before, after)
    else:
        olds, news = tree.children(old), tree.children(new) if new is not None and tree.is_node(new) else {}
        if list(olds) != list(news):
            raise ValueError(f"donate=True: {path} held {list(olds)}, the new state has {list(news) or _kind(new)}")
        for name, value in olds.items():
            _write_back(f"{path}/{name}", value, news[name])


def _kind(x: Any) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


# --- memory ------------------------------------------------------------------------------------------------------


@functools.cache
def keep_freed_memory() -> None:
    """Have the C library keep what a step frees, gradients and activations, for the next one.

    By default glibc returns it to the system, and a training step of ResNet-18 spends a tenth of its time on having it
    back page by page. Concerns the whole process, on Linux only, and speed only; whoever sets a ``MALLOC_...`` variable
    in the environment decides instead.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        mallopt(mmap_threshold, 2**25)  # the largest that is accepted
        mallopt(trim_threshold, 2**31 - 1)


# --- the compiler ------------------------------------------------------------------------------------------------


@functools.cache
def _compiler_missing() -> bool:
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "c++", "cl"]
    return not any(shutil.which(name) for name in names)


@functools.cache
def _warn_no_compiler() -> None:
    warnings.warn(
        "holofunc.jit runs eagerly: no C++ compiler was found. Install one (Debian/Ubuntu: apt install g++; macOS: "
        "xcode-select --install; Windows: the C++ build tools of Visual Studio) and start Python again",
        RuntimeWarning,
        stacklevel=4,
    )
