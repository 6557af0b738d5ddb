"""Kernels of a graph compiled together: a few C++ files instead of one for each kernel.

Inductor writes a file for every kernel on a CPU, and a C++ compiler spends half a second on any of them, on headers
for the most part, but a tenth of that on a kernel. A ResNet-18's 33 kernels take 24 s of compiler one by one, and 3 s
in one file. So they are brought together, in as many files as the compiler works on at a time. A file also holds a loop
that makes calls of its kernels block by block (`holofunc.compile.loops`). Nobody waits for a file until a kernel in it
is called: meanwhile the next one is written.
"""

import contextlib
import functools
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, fx

__all__ = ["Call", "NotRecordedError", "Run", "inductor", "recorded"]

Run = Callable[..., Any]

ENOUGH = 8
"""Kernels in a file, from which on another file shortens the wait."""


def inductor(graph: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
    """Inductor's program for a graph of operations on tensors, its kernels compiled together."""
    from torch._inductor.compile_fx import compile_fx_inner

    with _together():
        return compile_fx_inner(graph, inputs, **options)


_LOCK = threading.RLock()


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Let the modules that Inductor writes and loads meanwhile hand their kernels to `_compiler`."""
    from torch._inductor import async_compile

    with _LOCK, _replaced(async_compile, "AsyncCompile", _compiler()), _simple_indices():
        yield


@contextlib.contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _simple_indices() -> contextlib.AbstractContextManager[None]:
    """Spare Inductor (torch 2.14) a tenth of its time: most indices that it simplifies, over and over, are sums of
    products. Nothing can be simplified in them.
    """
    from torch._inductor import sizevars

    simplify = getattr(sizevars, "simplify_index_in_vec_range", None)
    if simplify is None:
        return contextlib.nullcontext()

    def simplified(index: Any, variable: Any, length: Any) -> Any:
        if index.has(sizevars.FloorDiv, sizevars.ModularIndexing):
            return simplify(index, variable, length)
        return index

    return _replaced(sizevars, "simplify_index_in_vec_range", simplified)


@functools.cache
def _compiler() -> Any:
    """Inductor's compiler of kernels. A module names its kernels one by one, then waits until it can call them."""
    from torch._inductor import config
    from torch._inductor.async_compile import AsyncCompile

    class Together(AsyncCompile):  # type: ignore[misc, unused-ignore]
        def cpp_pybinding(self, argtypes: list[str], source_code: str) -> Any:
            return _Kernel.of(argtypes, source_code) or _Alone(super().cpp_pybinding(argtypes, source_code))

        def wait(self, scope: dict[str, Any]) -> None:
            kernels = {name: value for name, value in scope.items() if isinstance(value, _Kernel)}
            alone = {name: value.run for name, value in scope.items() if isinstance(value, _Alone)}
            for share in _shares(kernels, config.compile_threads or 1):
                run = _Later(super().cpp_pybinding(*_file([kernels[name] for name in share])))
                scope.update(_bound([kernels[name] for name in share], share, run))
            super().wait(alone)
            scope.update({name: _unrecordable(run) for name, run in alone.items()})
            super().wait(scope)

    return Together


class _Later:
    """A function that is still being compiled, while others are written, until it is called."""

    def __init__(self, found: Any) -> None:
        self._found, self._run = found, None if hasattr(found, "result") else found

    def __call__(self, *args: Any) -> Any:
        if self._run is None:
            self._run = self._found.result()
        return self._run(*args)


class _Alone(NamedTuple):
    """A kernel in a file of its own."""

    run: Any


class _Kernel(NamedTuple):
    """A function ``kernel`` of pointers, as Inductor writes it: what it includes, and the rest."""

    argtypes: tuple[str, ...]
    includes: tuple[str, ...]
    definition: str
    """What follows the name: arguments and body."""

    @classmethod
    def of(cls, argtypes: Sequence[str], source: str) -> "_Kernel | None":
        """None if it is of another form: it keeps a file of its own."""
        found = re.fullmatch(r'((?:\s*#include [^\n]*\n)*)\s*extern "C"\s+void\s+kernel(\(.*)', source, re.DOTALL)
        if found is None or not all(argtype.endswith("*") for argtype in argtypes) or not argtypes:
            return None
        return cls(tuple(argtypes), tuple(found[1].split("\n")), found[2])


def _shares(kernels: dict[str, _Kernel], at_once: int) -> list[list[str]]:
    """The names of kernels, for files of about the same length."""
    count = max(1, min(at_once, len(kernels) // ENOUGH))
    longest_first = sorted(kernels, key=lambda name: -len(kernels[name].definition))
    return [longest_first[i::count] for i in range(count)] if kernels else []


LOOP = """
static void loop(const int64_t* plan, const int64_t* addresses, const int64_t* copies)
{
    const int64_t threads = plan[0], blocks = plan[1], at_once = plan[2];
    const int64_t columns = plan[3], bytes = plan[4], calls = plan[5];
    #pragma omp parallel num_threads(threads)
    {
        std::vector<char> scratch(bytes);
        #pragma omp for schedule(dynamic, at_once)
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t* const given = addresses + block * columns;
            for (int64_t i = given[columns - 2]; i < given[columns - 1]; i++) {
                void* const to = reinterpret_cast<void*>(copies[3 * i]);
                const void* const from = reinterpret_cast<const void*>(copies[3 * i + 1]);
                if (from) std::memcpy(to, from, copies[3 * i + 2]);
                else std::memset(to, 0, copies[3 * i + 2]);
            }
            const int64_t* step = plan + 6;
            for (int64_t i = 0; i < calls; i++) {
                const int64_t which = *step++, args = *step++;
                void* p[MOST];
                for (int64_t j = 0; j < args; j++, step++) {
                    p[j] = *step < 0 ? scratch.data() - 1 - *step : reinterpret_cast<void*>(given[*step]);
                }
                call(which, p);
            }
        }
    }
}
"""
"""Runs calls of kernels for each of many blocks. The plan says how many threads and blocks there are, how many blocks a
thread takes at once, how many columns ``addresses`` has, how many bytes of memory there are between kernels, how many
calls, and for each call which kernel, how many arguments, and the column of each: -1 - n is byte n of that memory."""


def _file(kernels: Sequence[_Kernel]) -> tuple[list[str], str]:
    """A function ``kernel(which, pointers)`` that calls one, or (-1) loops: its arguments' types, its source."""
    most = _most(kernels)
    includes = dict.fromkeys([*(line for kernel in kernels for line in kernel.includes), "#include <cstring>"])
    parts = [f"static void kernel_{i}{kernel.definition}" for i, kernel in enumerate(kernels)]
    parts += ["static void call(int64_t which, void* const* p)", "{", "    switch (which) {"]
    for i, kernel in enumerate(kernels):
        args = ", ".join(f"static_cast<{argtype}>(p[{j}])" for j, argtype in enumerate(kernel.argtypes))
        parts.append(f"    case {i}: return kernel_{i}({args});")
    pointers = [f"p{j}" for j in range(most)]
    parts += ["    }", "}", LOOP.replace("MOST", str(most))]
    parts += [f'extern "C" void kernel(int64_t which, {", ".join(f"void* {p}" for p in pointers)})', "{"]
    parts += [f"    void* const p[] = {{{', '.join(pointers)}}};", "    if (which >= 0) return call(which, p);"]
    tables = ", ".join(f"static_cast<const int64_t*>({p})" for p in pointers[:TABLES])
    parts += [f"    loop({tables});", "}", ""]
    return ["int64_t", *["void*"] * most], "\n".join([*includes, *parts])


TABLES = 3
"""What `LOOP` takes."""


def _most(kernels: Sequence[_Kernel]) -> int:
    return max(TABLES, *(len(kernel.argtypes) for kernel in kernels))


def _bound(kernels: Sequence[_Kernel], names: Sequence[str], run: Run) -> dict[str, Run]:
    """The single functions of a file."""
    most = _most(kernels)

    def padded(which: int, *args: Tensor) -> None:  # what a function does not take is its first argument over again
        run(which, *args, *args[:1] * (most - len(args)))

    return {name: _recordable(padded, which) for which, name in enumerate(names)}


# --- which kernels a program calls --------------------------------------------------------------------------------


class Call(NamedTuple):
    """``run(which, *args)``: kernel ``which`` of the file whose function ``run`` is."""

    run: Run
    which: int
    args: tuple[Tensor, ...]


class NotRecordedError(Exception):
    """A program calls a kernel that has a file of its own."""


@contextlib.contextmanager
def recorded() -> Iterator[list[Call]]:
    """The calls of kernels that programs of `inductor` make meanwhile in this thread, instead of making them."""
    _recording.calls = calls = list[Call]()
    try:
        yield calls
    finally:
        _recording.calls = None


class _Recording(threading.local):
    calls: list[Call] | None = None


_recording = _Recording()


def _recordable(run: Run, which: int) -> Run:
    def kernel(*args: Tensor) -> None:
        if _recording.calls is None:
            run(which, *args)
        else:
            _recording.calls.append(Call(run, which, args))

    return kernel


def _unrecordable(run: Run) -> Run:
    def kernel(*args: Any) -> None:
        if _recording.calls is not None:
            raise NotRecordedError
        run(*args)

    return kernel
