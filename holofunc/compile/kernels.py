"""Kernels of a graph compiled together: a few C++ files instead of one for each kernel.

Inductor writes a file for every kernel on a CPU, and a C++ compiler spends half a second on any of them, on headers
for the most part, but a tenth of that on a kernel. A ResNet-18's 33 kernels take 24 s of compiler one by one, and 3 s
in one file. So they are brought together, in as many files as the compiler works on at a time.
"""

import contextlib
import functools
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import fx

__all__ = ["inductor"]

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

    with _LOCK:
        names = vars(async_compile)
        before, names["AsyncCompile"] = names["AsyncCompile"], _compiler()
        try:
            yield
        finally:
            names["AsyncCompile"] = before


@functools.cache
def _compiler() -> Any:
    """Inductor's compiler of kernels. A module names its kernels to it one by one, then waits for all of them."""
    from torch._inductor import config
    from torch._inductor.async_compile import AsyncCompile

    class Together(AsyncCompile):  # type: ignore[misc, unused-ignore]
        def cpp_pybinding(self, argtypes: list[str], source_code: str) -> Any:
            return _Kernel.of(argtypes, source_code) or super().cpp_pybinding(argtypes, source_code)

        def wait(self, scope: dict[str, Any]) -> None:
            kernels = {name: value for name, value in scope.items() if isinstance(value, _Kernel)}
            files = _shares(kernels, config.compile_threads or 1)
            runs: dict[str, Any] = {}
            for i, share in enumerate(files):
                runs[str(i)] = super().cpp_pybinding(*_file([kernels[name] for name in share]))
            super().wait(runs)
            for share, run in zip(files, runs.values(), strict=True):
                scope.update(_bound([kernels[name] for name in share], share, run))
            super().wait(scope)

    return Together


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


def _file(kernels: Sequence[_Kernel]) -> tuple[list[str], str]:
    """A function ``kernel(which, pointers)`` that calls one of many; its arguments' types, and its source."""
    most = max(len(kernel.argtypes) for kernel in kernels)
    includes = dict.fromkeys(line for kernel in kernels for line in kernel.includes)
    parts = [f"static void kernel_{i}{kernel.definition}" for i, kernel in enumerate(kernels)]
    cases = []
    for i, kernel in enumerate(kernels):
        args = ", ".join(f"static_cast<{argtype}>(p{j})" for j, argtype in enumerate(kernel.argtypes))
        cases.append(f"    case {i}: return kernel_{i}({args});")
    pointers = "".join(f", void* p{j}" for j in range(most))
    choice = [f'extern "C" void kernel(int64_t which{pointers})', "{", "    switch (which) {", *cases, "    }", "}", ""]
    return ["int64_t", *["void*"] * most], "\n".join([*includes, *parts, *choice])


def _bound(kernels: Sequence[_Kernel], names: Sequence[str], run: Run) -> dict[str, Run]:
    """The single functions; what a function does not take is its first argument over again."""
    most = max(len(kernel.argtypes) for kernel in kernels)
    return {
        name: _choose(run, i, most - len(k.argtypes)) for i, (name, k) in enumerate(zip(names, kernels, strict=True))
    }


def _choose(run: Run, which: int, lacking: int) -> Run:
    return lambda *args: run(which, *args, *(args[:1] * lacking))
