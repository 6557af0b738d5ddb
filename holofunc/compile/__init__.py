"""Compiling pure functions of trees of tensors: `jit`."""

from holofunc.compile.compiler import Compiled, Staged, jit
from holofunc.compile.draws import philox as philox
from holofunc.compile.leafwise import alone

__all__ = ["Compiled", "Staged", "alone", "jit"]
