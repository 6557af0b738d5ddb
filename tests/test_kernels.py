"""Kernels that share a C++ file compute what each computes in a file of its own."""

import pytest
import sympy
import torch

from holofunc import jit
from holofunc.compile import blocks, kernels

SOURCE = """
#include <torch/csrc/inductor/cpp_prefix.h>
extern "C"  void  kernel(const float* in_ptr0,
                       float* out_ptr0)
{
    out_ptr0[0] = in_ptr0[0];
}
"""


def chain(x):
    """Each sort parts one kernel from the next; they differ in what they take and in their dtypes."""
    found = []
    for i in range(20):
        x, order = torch.sort(torch.sin(x) + (x.mean() if i % 3 else 0.1 * i), stable=True)
        found.append(order.float() * x.float().exp() if i % 2 else (order > i) & (x > 0))
    return x, found


@pytest.fixture
def files(monkeypatch):
    """How many kernels each file held."""
    found, write = [], kernels._file
    monkeypatch.setattr(kernels, "_file", lambda held: found.append(len(held)) or write(held))
    return found


def test_many_kernels_are_few_files(files):
    x = torch.linspace(-2, 3, 77, dtype=torch.float64)
    torch.testing.assert_close(jit(chain)(x), chain(x))
    assert sum(files) >= 2 * kernels.ENOUGH
    assert len(files) == max(1, min(torch._inductor.config.compile_threads, sum(files) // kernels.ENOUGH))
    assert max(files) - min(files) <= 1


@pytest.mark.parametrize("threads", [1, 3])
def test_bits_do_not_depend_on_the_files(files, threads):
    x = torch.linspace(-2, 3, 101)
    with torch._inductor.config.patch(compile_threads=threads, fx_graph_cache=False):
        together = jit(chain)(x)
        assert len(files) == min(threads, sum(files) // kernels.ENOUGH)
        files.clear()
        alone = torch.compile(chain, fullgraph=True, dynamic=False)(x)
    assert not files  # torch.compile elsewhere in the process is left as it is
    torch.testing.assert_close(together, alone, rtol=0, atol=0)


def test_every_kernel_has_one_file():
    held = {f"k{i}": kernels._Kernel.of(["float*"], SOURCE + " " * i * i) for i in range(40)}
    for at_once in (1, 2, 3, 64):
        shares = kernels._shares(held, at_once)
        assert sorted(name for share in shares for name in share) == sorted(held)
        assert len(shares) == min(at_once, 5)
        lengths = [sum(len(held[name].definition) for name in share) for share in shares]
        assert max(lengths) < 1.5 * min(lengths)
    assert kernels._shares({}, 2) == []


def test_kernels_of_another_form_keep_their_file():
    assert kernels._Kernel.of(["const float*", "float*"], SOURCE) is not None
    assert kernels._Kernel.of(["const float*", "int64_t"], SOURCE) is None  # a size
    assert kernels._Kernel.of([], SOURCE) is None
    assert kernels._Kernel.of(["float*"], SOURCE.replace('extern "C"', 'template <int n> int f();\nextern "C"')) is None
    assert kernels._Kernel.of(["float*"], SOURCE.replace("void  kernel", "__declspec(dllexport) void kernel")) is None


def test_indices_without_divisions_are_simple():
    from torch._inductor import sizevars

    simplify = getattr(sizevars, "simplify_index_in_vec_range", None)
    if simplify is None:
        pytest.skip("torch simplifies indices elsewhere")
    x, y, k = sympy.symbols("x y k", integer=True, nonnegative=True)
    floor, modulo = sizevars.FloorDiv, sizevars.ModularIndexing
    indices = [x, 3 * x + 64 * y + 5, x * k + y, floor(x, 16), 2 * x + modulo(y, 1, 32), 7 + floor(x, 64) * k]
    with kernels._simple_indices():
        quick = sizevars.simplify_index_in_vec_range
        assert quick is not simplify
        for index in indices:
            for variable in (x, y):
                assert quick(index, variable, 16) == simplify(index, variable, 16)
    assert sizevars.simplify_index_in_vec_range is simplify


def test_what_fails_leaves_the_compiler_as_it_was(monkeypatch):
    from torch._inductor import async_compile, compile_fx

    def broken(graph, inputs):
        assert async_compile.AsyncCompile is kernels._compiler()
        raise RuntimeError("broken")

    before = async_compile.AsyncCompile
    monkeypatch.setattr(compile_fx, "compile_fx_inner", broken)
    with pytest.raises(RuntimeError, match="broken"):
        kernels.inductor(None, [])
    assert async_compile.AsyncCompile is before


def test_a_file_is_compiled_while_the_next_one_is_written(monkeypatch):
    """Nobody waits for it before it is called, and then once."""
    from torch._inductor.async_compile import AsyncCompile

    waited, compiled = [], AsyncCompile.cpp_pybinding

    class Compiling:
        def __init__(self, found):
            self.found = found

        def result(self):
            waited.append(self.found)
            return self.found.result() if hasattr(self.found, "result") else self.found

    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", lambda *args: Compiling(compiled(*args)))
    x = torch.linspace(-2, 3, 77)
    written, write = [], blocks.inductor

    def inductor(*args, **options):
        program = write(*args, **options)
        written.append(len(waited))
        return program

    monkeypatch.setattr(blocks, "inductor", inductor)
    triple = jit(lambda x: torch.sin(x) * 3)
    for _ in range(2):
        torch.testing.assert_close(triple(x), torch.sin(x) * 3)
    assert (written, len(waited)) == ([0], 1)
