"""Compiling pure functions of trees of tensors: `jit`, and `opaque` for parts that stay as they are."""

from holofunc.compile.jit import Checked, Compiled, jit
from holofunc.compile.memory import keep_freed_memory
from holofunc.compile.opaque import opaque

__all__ = ["Checked", "Compiled", "jit", "keep_freed_memory", "opaque"]
