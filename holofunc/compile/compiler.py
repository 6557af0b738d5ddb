"""`jit`: `torch.compile` for pure functions of a state, with donation and packed trees.

What it adds, and why:

- The flat dicts of the state (parameters, moments, buffers) become one vector per dtype in the graph, of which the
  leaves are views there (`holofunc.arena`). A compiled optimizer update is then one kernel instead of one per tensor.
- What a rule for some of the parameters needs are vectors of its own: where a state turns out to lie otherwise, it is
  laid out anew.
- What ``torch.where`` selects by a condition on numbers of the state is all that is computed, on a CPU
  (`holofunc.compile.branches`).
- ``donate=True`` ends the graph by writing the new state into the old one's memory: no second copy of the state, and
  addresses that never change, which CUDA graphs need.
- Memory that a donating step frees stays with the process for the next step (`keep_freed_memory`).
- A function made of two stages (`Staged`) becomes two graphs. A training step starts and runs faster that way: the
  update neither delays the backward pass's last uses of the parameters nor is compiled together with it.
- Errors raised while tracing reach the caller as they are in eager code.
"""

import functools
import os
import shutil
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from holofunc.arena import InseparableError
from holofunc.compile.memory import keep_freed_memory
from holofunc.compile.packing import adopt, packed_alike, packed_like, unpacked
from holofunc.compile.programs import Program, write_back
from holofunc.compile.tracing import being_inlined, being_traced
from holofunc.typing import Checked, PyTree

__all__ = ["Compiled", "Staged", "jit"]


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
        if self.check is not None and not being_traced():
            self.check(*inputs)
        return self.second(state, self.first(state, *inputs), *(inputs if self.reread(state) else ()))

    def reread(self, state: PyTree) -> bool:
        return self.rereads is not None and self.rereads(state)


class Compiled:
    """What `jit` returns."""

    def __init__(self, fn: Callable[..., Any], run: Callable[..., Any]) -> None:
        self.fn, self.run = fn, run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)


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
        A function of the same arguments. Each new shape of the inputs is compiled once; values never recompile. Inside
        another jitted function, and inside a transformation of `torch.func`, it is ``fn`` itself.

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
    if mode not in (modes := [None, *torch._inductor.list_mode_options()]):
        raise ValueError(f"mode must be one of {modes}, got {mode!r}")
    if _compiler_missing():
        _warn_no_compiler()
        return fn
    if donate:
        keep_freed_memory()
    if not fullgraph:
        run = _with_breaks(fn, mode, donate)
    else:
        run = _staged(fn, mode, donate) if isinstance(fn, Staged) else _single(fn, mode, donate)
    return functools.update_wrapper(Compiled(fn, run), fn)


def _single(fn: Callable[..., Any], mode: str | None, donate: bool) -> Callable[..., Any]:
    program, leafwise = Program(fn, mode, donate), getattr(fn, "leafwise", False)

    @_laying_out
    def run(anew: bool, *args: Any, **kwargs: Any) -> Any:
        if being_inlined():
            return fn(*args, **kwargs)
        if isinstance(fn, Checked):
            fn.check(*args)
        if not donate:
            inputs = (args, kwargs) if leafwise else packed_alike((args, kwargs))
            return unpacked(program(list(inputs[0]), inputs[1]))
        state, packed = adopt(args[0], anew)
        others, named = packed_like(packed, (args[1:], kwargs))
        return _with_state(state, program([packed, *others], named))

    return run


def _laying_out(call: Callable[..., Any]) -> Callable[..., Any]:
    """``call(False, ...)``, and ``call(True, ...)`` to lay the state out anew where a rule needs other leaves apart."""

    def run(*args: Any, **kwargs: Any) -> Any:
        anew = False
        while True:
            try:
                return call(anew, *args, **kwargs)
            except InseparableError:
                anew = True

    return run


def _with_breaks(fn: Callable[..., Any], mode: str | None, donate: bool) -> Callable[..., Any]:
    """Graphs, and Python where the compiler cannot follow: nothing is packed, the state is written back afterwards."""
    compiled = torch.compile(lambda *args, **kwargs: fn(*args, **kwargs), dynamic=False, mode=mode)

    def run(*args: Any, **kwargs: Any) -> Any:
        out = compiled(*args, **kwargs)
        if not donate:
            return out
        with torch.no_grad():
            rest = write_back(args[0], out)
        return _with_state(args[0], rest)

    return run


def _staged(fn: Staged, mode: str | None, donate: bool) -> Callable[..., Any]:
    first, second = Program(fn.first, mode, False, gradient=True), Program(fn.second, mode, donate)
    reread = None

    @_laying_out
    def run(anew: bool, state: PyTree, *inputs: PyTree) -> Any:
        nonlocal reread
        if being_inlined():
            return fn(state, *inputs)
        if fn.check is not None:
            fn.check(*inputs)
        reread = fn.reread(state) if reread is None else reread  # a matter of the state's structure, which stays
        again = inputs if reread else ()
        if not donate:
            inner = packed_alike((state, first([state, *inputs], {})))
            return unpacked(second([*inner, *again], {}))
        state, packed = adopt(state, anew)
        between = first([state, *inputs], {})  # leaf by leaf: convolutions are slower on weights cut out in the graph
        between = packed_like(packed, between)
        return _with_state(state, second([packed, between, *again], {}))

    return run


def _with_state(state: PyTree, rest: Any) -> Any:
    return state if rest is None else (state, *unpacked(rest))


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
