"""holofunc: computer vision research in PyTorch as pure functions over pytrees.

Submodules are imported on first use, so ``import holofunc`` is fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from holofunc import (
        analysis,
        checkpoint,
        compile,
        data,
        distributed,
        losses,
        metrics,
        model,
        models,
        nn,
        ops,
        optim,
        plots,
        random,
        train,
        transforms,
        tree,
        typing,
    )
    from holofunc.compile.jit import jit
    from holofunc.model import Model, from_module, lift

    __version__: str

__all__ = [
    "Model",
    "__version__",
    "analysis",
    "checkpoint",
    "compile",
    "data",
    "distributed",
    "from_module",
    "jit",
    "lift",
    "losses",
    "metrics",
    "model",
    "models",
    "nn",
    "ops",
    "optim",
    "plots",
    "random",
    "train",
    "transforms",
    "tree",
    "typing",
]

_HOMES = {"Model": "model", "from_module": "model", "jit": "compile", "lift": "model"}

if not TYPE_CHECKING:  # a type checker would accept any attribute

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module 'holofunc' has no attribute {name!r}")
        if name == "__version__":
            value = _version()
        elif name in _HOMES:
            value = getattr(import_module(f"holofunc.{_HOMES[name]}"), name)
        else:
            value = import_module(f"holofunc.{name}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return __all__


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("holofunc")
    except metadata.PackageNotFoundError as error:
        raise AttributeError("holofunc.__version__ needs an installed package: pip install -e .") from error
