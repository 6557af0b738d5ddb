"""Kernels of a graph compiled together: a few C++ files instead of one for each kernel. An accelerator of first steps.

Inductor writes a file for every kernel on a CPU, and a C++ compiler spends half a second on each, mostly on headers,
but a tenth of that on the kernel itself. A ResNet-18's 33 kernels take 24 s of compiler one by one, and 3 s in one
file. So kernels share files, as many as are compiled in parallel. A file is awaited only when one of its kernels is
called. ``holofunc.compile.kernels.enabled = False`` switches this off; so does a torch without this class.
"""

import contextlib
import functools
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from holofunc.compile import torch_internals

__all__ = ["enabled", "shared_files"]

enabled = True

ENOUGH = 8
"""Kernels in a file, from which on another file shortens the wait."""

_mine = threading.local()


@contextlib.contextmanager
def shared_files() -> Iterator[None]:
    """Let the modules that Inductor writes and loads meanwhile, in this thread, share files."""
    if not enabled:
        yield
        return
    with torch_internals.async_compile(_sharing):
        _mine.sharing = True
        try:
            yield
        finally:
            _mine.sharing = False


@functools.cache
def _sharing(base: type) -> type:
    """Inductor's compiler of kernels. A module names its kernels one by one, then waits until it can call them."""

    class Sharing(base):  # type: ignore[misc, unused-ignore]
        def cpp_pybinding(self, argtypes: list[str], source_code: str) -> Any:
            kernel = _Kernel.of(argtypes, source_code) if getattr(_mine, "sharing", False) else None
            return kernel or super().cpp_pybinding(argtypes, source_code)

        def wait(self, scope: dict[str, Any]) -> None:
            kernels = {name: value for name, value in scope.items() if isinstance(value, _Kernel)}
            for names in _shares(kernels, torch_internals.compile_threads()):
                run = _Later(super().cpp_pybinding(*_file([kernels[name] for name in names])))
                scope.update(_bound([kernels[name] for name in names], names, run))
            super().wait(scope)

    return Sharing


class _Later:
    """A function that is still being compiled, while others are written, until it is called."""

    def __init__(self, found: Any) -> None:
        self._found, self._run = found, None if hasattr(found, "result") else found

    def __call__(self, *args: Any) -> Any:
        if self._run is None:
            self._run = self._found.result()
        return self._run(*args)


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
    """A function ``kernel(which, pointers)`` that calls one of several: its arguments' types, its source."""
    pointers = [f"p{j}" for j in range(max(len(kernel.argtypes) for kernel in kernels))]
    parts = list(dict.fromkeys(line for kernel in kernels for line in kernel.includes))
    parts += [f"static void kernel_{i}{kernel.definition}" for i, kernel in enumerate(kernels)]
    parts += [f'extern "C" void kernel(int64_t which, {", ".join(f"void* {p}" for p in pointers)})', "{"]
    parts += ["    switch (which) {"]
    for i, kernel in enumerate(kernels):
        args = ", ".join(f"static_cast<{argtype}>({p})" for argtype, p in zip(kernel.argtypes, pointers, strict=False))
        parts.append(f"    case {i}: return kernel_{i}({args});")
    return ["int64_t", *["void*"] * len(pointers)], "\n".join([*parts, "    }", "}", ""])


def _bound(kernels: Sequence[_Kernel], names: Sequence[str], run: Callable[..., Any]) -> dict[str, Callable[..., None]]:
    """The single functions of a file."""
    most = max(len(kernel.argtypes) for kernel in kernels)

    def kernel(which: int, *args: Tensor) -> None:  # what a function does not take is its first argument over again
        run(which, *args, *args[:1] * (most - len(args)))

    return {name: functools.partial(kernel, which) for which, name in enumerate(names)}
