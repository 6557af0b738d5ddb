"""Every private name of torch that the library uses, each with a public fallback that may be slower, but never wrong.

Names are imported on first use. Where one is missing, in an older or future torch, the callers fall back.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any

from torch import Tensor, fx
from torch.autograd import forward_ad

__all__ = [
    "async_compile",
    "compile_inner",
    "compile_threads",
    "compile_with",
    "data_dependent_errors",
    "dispatching",
    "forward_differentiating",
    "reaches_compiler",
    "transforming",
]


def _find(module: str, name: str) -> Any:
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError):
        return None


def transforming() -> bool:
    """Whether a `torch.func` transformation is active in this thread; False where torch does not say."""
    stack = _find("torch._C._functorch", "get_interpreter_stack")
    return bool(stack()) if stack is not None else False


def dispatching() -> bool:
    """Whether a dispatch mode (fake tensors, a flop counter) is active in this thread; False if torch does not say."""
    modes = _find("torch._C", "_len_torch_dispatch_stack")
    return bool(modes()) if modes is not None else False


def forward_differentiating() -> bool:
    """Whether forward-mode differentiation is active in this thread; True where torch does not say."""
    return getattr(forward_ad, "_current_level", 0) >= 0  # Dynamo follows this, and not `_find`


def reaches_compiler() -> bool:
    """Whether `compile_with` and `compile_inner` can be called."""
    names = [("torch._inductor.compile_fx", "compile_fx"), ("torch._inductor.compile_fx", "compile_fx_inner")]
    names += [("torch._guards", "TracingContext"), ("torch._guards", "tracing")]
    return all(_find(*name) is not None for name in names)


def compile_with(
    graph: fx.GraphModule, inputs: Sequence[Tensor], lower: Callable[..., Callable[..., Any]]
) -> Callable[..., Any]:
    """A graph made functional and taken apart into simple operations, then given to ``lower(graph, inputs,
    **options)``.

    The fallback is `torch.compile`, which traces the graph again and checks its arguments at each call.
    """
    return _find("torch._inductor.compile_fx", "compile_fx")(graph, inputs, inner_compile=lower)


def compile_inner(graph: fx.GraphModule, inputs: Sequence[Any], options: dict[str, Any]) -> Callable[..., Any]:
    """What `torch.compile` makes of a functional graph; only called by what `compile_with` has called."""
    context, current = _find("torch._guards", "TracingContext"), _find("torch._guards", "tracing")
    with current(context(_mode_of(inputs))):
        return _find("torch._inductor.compile_fx", "compile_fx_inner")(graph, inputs, **options)


def _mode_of(inputs: Sequence[Any]) -> Any:
    return next((x.fake_mode for x in inputs if hasattr(x, "fake_mode")), None)


@contextlib.contextmanager
def async_compile(replace: Callable[[type], type]) -> Iterator[None]:
    """Let Inductor compile with ``replace`` of its own class; without such a class, unchanged."""
    module = "torch._inductor.async_compile"
    before = _find(module, "AsyncCompile")
    if before is None:
        yield
        return
    import_module(module).AsyncCompile = replace(before)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        import_module(module).AsyncCompile = before  # type: ignore[attr-defined]


def compile_threads() -> int:
    """How many kernels Inductor compiles at a time."""
    return getattr(_find("torch._inductor", "config"), "compile_threads", None) or 1


def data_dependent_errors() -> tuple[type[Exception], ...]:
    """What torch raises where a traced function reads a value."""
    known = (
        _find("torch.fx.experimental.symbolic_shapes", "GuardOnDataDependentSymNode"),
        _find("torch._subclasses.fake_tensor", "DataDependentOutputException"),
        _find("torch._subclasses.fake_tensor", "DynamicOutputShapeException"),
    )
    return tuple(error for error in known if error is not None)
