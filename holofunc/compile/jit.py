"""`jit`: `torch.compile` for pure functions of a state, with donation."""

import functools
import os
import shutil
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any, Generic, ParamSpec, TypeVar, cast, overload

import torch
from torch import Tensor, nn

from holofunc import tree
from holofunc.compile import torch_internals
from holofunc.compile.arguments import Flat, flatten, rebuild, unhashable
from holofunc.compile.dispatch import Dispatch, Vector
from holofunc.compile.donation import split_result, write_back, written
from holofunc.compile.opaque import asks_for_shapes
from holofunc.compile.program import Program, circumstances
from holofunc.tree import flat
from holofunc.tree.traced import Trace, current_trace
from holofunc.typing import PyTree

__all__ = ["Checked", "Compiled", "jit"]

PLAIN = (Tensor, nn.Parameter)

MODES = [None, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]

P = ParamSpec("P")
R = TypeVar("R")


@overload
def jit(
    fn: Callable[P, R], *, donate: bool = False, fullgraph: bool = True, mode: str | None = None
) -> "Compiled[P, R]": ...


@overload
def jit(
    fn: None = None, *, donate: bool = False, fullgraph: bool = True, mode: str | None = None
) -> Callable[[Callable[P, R]], "Compiled[P, R]"]: ...


def jit(fn: Any = None, *, donate: bool = False, fullgraph: bool = True, mode: str | None = None) -> Any:
    """Compile a pure function of trees of tensors.

    Args:
        fn: any function. With ``donate`` its first argument is its state. Without it, a decorator is
            returned: ``@jit(donate=True)``.
        donate: write the new state, which ``fn`` returns (alone, or first in a tuple), into the memory of the state
            passed in. Do not use that state afterwards, but the one returned.
        fullgraph: a graph break is an error.
        mode: as in `torch.compile`, e.g. ``"reduce-overhead"`` for CUDA graphs.

    Returns:
        A function of the same arguments. Each new shape of the inputs is compiled once; values never recompile. Inside
        another jitted function, of a transformation of `torch.func`, and of a dispatch mode (of fake tensors, say), it
        is ``fn`` itself. Where no C++ compiler is installed it warns once, and is ``fn``. Tensors of a class of their
        own, which says what operations on them do, are left to `torch.compile`.

    Raises:
        TypeError: ``fn`` is not callable. ValueError: an unknown ``mode``; when called, with ``donate=True``, a new
            state that is not of the old one's structure, shapes and dtypes.

    Example:
        >>> import torch
        >>> from holofunc import jit
        >>> def step(state, batch):
        ...     return {"mean": 0.9 * state["mean"] + 0.1 * batch.mean()}, batch.max()
        >>> state, top = jit(step, donate=True)({"mean": torch.zeros(())}, torch.ones(3))
        >>> state["mean"], top
        (tensor(0.1000), tensor(1.))
    """
    if fn is None:
        return functools.partial(jit, donate=donate, fullgraph=fullgraph, mode=mode)
    if not callable(fn):
        raise TypeError(f"fn must be callable, got {fn!r}")
    if isinstance(fn, Compiled):
        fn = fn.fn
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
    if _compiler_missing():
        _warn_no_compiler()
    return Compiled(fn, donate, fullgraph, mode)


class Checked(ABC):
    """A function with a check of its arguments that reads values, as a graph cannot.

    A call runs the check and then the function. `holofunc.jit` compiles only ``run``, and runs ``check`` before the
    graph at each call.
    """

    @abstractmethod
    def check(self, *inputs: Any) -> None:
        """Raise a ValueError or a TypeError unless the function can be called with ``inputs``."""

    @abstractmethod
    def run(self, *inputs: Any) -> Any:
        """The function."""

    def __call__(self, *inputs: Any) -> Any:
        if not being_traced():
            self.check(*inputs)
        return self.run(*inputs)


class Compiled(Generic[P, R]):
    """What `jit` returns: a compiled function.

    Attributes:
        fn: the function that was compiled.
        num_graphs: how many structures and shapes of arguments it was compiled for so far.
    """

    def __init__(self, fn: Callable[P, R], donate: bool, fullgraph: bool, mode: str | None) -> None:
        functools.update_wrapper(self, fn, updated=())
        self.fn = fn
        self._donate, self._mode = donate, mode
        self._check = fn.check if isinstance(fn, Checked) else None
        traced = fn.run if isinstance(fn, Checked) else fn
        self._program = Program(traced, mode, donate)
        self._dispatches: dict[Any, Dispatch] = {}
        self._traced, self._fullgraph = traced, fullgraph

    @functools.cached_property
    def _by_torch(self) -> Callable[..., Any]:
        fn = _with_own_code(self._traced)
        return torch.compile(fn, dynamic=False, fullgraph=self._fullgraph, mode=self._mode)

    @property
    def num_graphs(self) -> int:
        return len(self._program)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if being_traced() or torch_internals.transforming() or torch_internals.dispatching() or _compiler_missing():
            return self.fn(*args, **kwargs)
        if self._check is not None:
            self._check(*args, **kwargs)
        return self._run(args, kwargs) if self._fullgraph else self._run_by_torch(args, kwargs)

    def __get__(self, instance: Any, owner: type | None = None) -> Callable[..., R]:
        """A method, where it is a function in the body of a class."""
        return self if instance is None else cast(Callable[..., R], MethodType(self, instance))

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors: list[Tensor] = []
        key = (flatten([args, kwargs], tensors), circumstances(tensors))
        try:
            dispatch = self._dispatches.get(key)
        except TypeError as error:
            raise TypeError(unhashable({**dict(enumerate(args)), **kwargs}) or str(error)) from error
        inputs = dispatch.inputs(tensors) if dispatch is not None else None
        if dispatch is None and any(type(x) not in PLAIN for x in tensors):
            return self._run_by_torch(args, kwargs)
        if dispatch is None or inputs is None:
            args, dispatch, inputs = self._dispatched(args, kwargs)
        rest = dispatch.graph(inputs)
        if not self._donate:
            return rest
        return args[0] if rest is None else (args[0], *rest)

    def _dispatched(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], Dispatch, list[Tensor]]:
        """The arguments with the donated state in vectors, the dispatch of such calls, and the graph's inputs."""
        if self._donate:
            args = (flat.lay_out(args[0]), *args[1:])
            layouts = flat.layouts_of(list(flat.dicts_in(args[0])))
        else:
            layouts = flat.layouts_of([*flat.dicts_in(args), *flat.dicts_in(kwargs)], shared=True)
        tensors: list[Tensor] = []
        key = (flatten([args, kwargs], tensors), circumstances(tensors))
        sources: dict[int, int | Vector] = {id(x): i for i, x in enumerate(tensors)}
        state = set(map(id, tree.leaves(args[0]))) if self._donate else set[int]()
        packed = self._packed([args, kwargs], layouts, state, sources)
        graph, inputs = self._program.graph_of(packed)
        dispatch = Dispatch(graph, tuple([sources[id(x)] for x in inputs]))
        if len(set(map(id, tensors))) == len(tensors):  # otherwise it is not known which one an input is
            self._dispatches[key] = dispatch
        return args, dispatch, inputs

    def _run_by_torch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `torch.compile` alone makes of it, for functions with breaks, and tensors of classes that say what an
        operation on them does; the state is written back afterwards.
        """
        out = self._by_torch(*args, **kwargs)
        if not self._donate:
            return out
        state = args[0]
        new, rest = split_result(state, out)
        results: list[Tensor] = []
        spec = flatten(rest, results)
        with torch.no_grad():
            results = write_back(list(written(Trace({}), state, new)), tree.leaves(state), results)
        return state if rest is None else (state, *rebuild(spec, iter(results)))

    def _packed(
        self,
        node: PyTree,
        layouts: Mapping[Any, Sequence[flat.Group]],
        state: set[int],
        sources: dict[int, int | Vector],
    ) -> PyTree:
        """``node`` with `Flat` nodes for its dicts that are stored in vectors, or copied into vectors here.

        Args:
            state: ids of the tensors of a donated state.
            sources: the position of each tensor, by id; the vectors are added to it.
        """
        leaves_too = self._mode is None

        def pack(found: dict[str, Tensor]) -> PyTree:
            groups = layouts.get(flat.family(found))
            if groups is None:
                return found
            lies = flat.found_in(found)
            if lies is not None and {group for group, _ in lies} == set(groups):
                groups, vectors = zip(*lies, strict=True)
            elif all(flat.fits(found, group) for group in groups):
                with torch.no_grad():
                    vectors = tuple([flat.join([found[n] for n in g.names], g.layout) for g in groups])
            else:
                return found
            for group, vector in zip(groups, vectors, strict=True):
                members = [id(found[name]) for name in group.names]
                numbers = tuple([cast(int, sources[x]) for x in members])
                sources[id(vector)] = Vector(numbers, group.layout, joined=members[0] not in state)
            own = leaves_too and all(x.device.type == "cpu" for x in vectors)
            return Flat(tuple(found), tuple(groups), tuple(vectors), tuple(found.values()) if own else ())

        return flat.map_dicts(pack, node)


def being_traced() -> bool:
    """Whether this code is being traced, by `torch.compile` or by `jit`."""
    return torch.compiler.is_compiling() or current_trace() is not None or asks_for_shapes()


def _with_own_code(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn`` behind a code object of its own, of which `torch.compile` compiles a few versions only, then none."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    call.__code__ = call.__code__.replace()
    return call


# --- the compiler --------------------------------------------------------------------------------------------------


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
        stacklevel=3,
    )
