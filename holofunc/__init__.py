"""holofunc: computer vision research in PyTorch as pure functions over pytrees."""

from importlib import import_module
from typing import Any

from holofunc.compile import jit
from holofunc.model import Model, from_module, lift

__all__ = ["Model", "from_module", "jit", "lift"]
