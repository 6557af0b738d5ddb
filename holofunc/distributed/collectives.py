"""Collectives as pure functions: they differentiate, go through `vmap` and into compiled graphs.

A tensor is *replicated* if every rank has the same, *partial* if the whole is the sum of what the ranks have, and
*sharded* if the ranks' tensors are the whole when they are joined along the first axis. Derivatives are those of the
sum of all ranks' losses: what a rank's gradient is after the backward passes of all of them. All ranks have to call
the same collectives in the same order. In one process each of them is the identity.

Each is an operation of the dispatcher (eager code and graphs call the same one) inside of a `torch.autograd.Function`
with rules for all transformations of `torch.func`, which graphs take up whole.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["all_gather", "pmean", "psum", "reduce_scatter"]


def psum(x: Tensor, group: Any = None) -> Tensor:
    """The sum of all ranks' ``x``: partial in, replicated out; its derivative is the sum of all ranks' cotangents.

    Args:
        x: of one shape and dtype on all ranks.
        group: a process group of `torch.distributed`; None is all ranks.

    Example:
        >>> import torch
        >>> from holofunc import distributed
        >>> distributed.psum(torch.tensor(3.0))
        tensor(3.)
    """
    name = handle(group)
    return _psum(x, name, None) if name else x


def pmean(x: Tensor, group: Any = None) -> Tensor:
    """The mean of all ranks' ``x``: partial in, replicated out; its derivative is the mean of all ranks' cotangents.

    A mean over samples is the mean of the ranks' means only where all ranks have as many: otherwise divide the `psum`
    of the sums by that of the numbers.

    Args:
        x: of one shape and floating dtype on all ranks.
        group: as for `psum`.

    Example:
        >>> import torch
        >>> from holofunc import distributed
        >>> distributed.pmean(torch.tensor(3.0))
        tensor(3.)
    """
    name = handle(group)
    return _psum(x, name, None) / _size(name) if name else x


def all_gather(x: Tensor, group: Any = None, *, ragged: bool = False) -> Tensor:
    """All ranks' ``x``, joined: sharded in, replicated out; its derivative is `reduce_scatter` of the cotangents.

    Args:
        x: (N, ...), of one shape and dtype on all ranks.
        group: as for `psum`.
        ragged: N may differ (and be 0): the numbers of rows are gathered first, on the host, so not inside of graphs.

    Returns:
        (N_0 + N_1 + ..., ...), in the order of the ranks.

    Raises:
        ValueError: ``x`` is 0-d.

    Example:
        >>> import torch
        >>> from holofunc import distributed
        >>> distributed.all_gather(torch.ones(2, 3)).shape
        torch.Size([2, 3])
    """
    _check_rows(x)
    if not ragged or not handle(group):
        return rows_if(None, x, group, gathers=True)
    rows = rows_if(None, torch.tensor([x.shape[0]], device=x.device), group, gathers=True).tolist()
    padding = x.new_zeros(max(rows) - x.shape[0], *x.shape[1:])
    padded = rows_if(None, torch.cat([x, padding]), group, gathers=True).unflatten(0, (len(rows), max(rows)))
    return torch.cat([part[:n] for part, n in zip(padded, rows, strict=True)])


def reduce_scatter(x: Tensor, group: Any = None) -> Tensor:
    """This rank's rows of the sum of all ranks' ``x``: partial in, sharded out; its derivative is `all_gather`.

    Args:
        x: (W N, ...) on W ranks, of one shape and dtype.
        group: as for `psum`.

    Returns:
        (N, ...)

    Raises:
        ValueError: the first axis cannot be divided among the ranks.

    Example:
        >>> import torch
        >>> from holofunc import distributed
        >>> distributed.reduce_scatter(torch.ones(2, 3)).shape
        torch.Size([2, 3])
    """
    _check_rows(x)
    name = handle(group)
    if not name:
        return x
    if x.shape[0] % _size(name):
        raise ValueError(f"x must have a multiple of {_size(name)} rows, one share per rank, got {tuple(x.shape)}")
    return rows_if(None, x, group, gathers=False)


def _check_rows(x: Tensor) -> None:
    if x.ndim == 0:
        raise ValueError("x must have a first axis along which ranks share it, got a 0-d tensor")


def psum_if(due: Tensor | None, x: Tensor, group: Any = None) -> Tensor:
    """`psum` where the 0-d ``due`` (equal on all ranks; None is true) holds, otherwise ``x``, without a collective."""
    name = handle(group)
    return _psum(x, name, due) if name else x


def rows_if(
    due: Tensor | None, x: Tensor, group: Any = None, *, gathers: bool, weight: float = 1.0, divisor: float = 1.0
) -> Tensor:
    """`all_gather` or `reduce_scatter`; zeros, without a collective, where ``due`` does not hold.

    The derivative of what is gathered counts each rank's loss ``weight`` times, the number of samples that it is a mean
    of, and is divided by ``divisor``.
    """
    name = handle(group)
    return _rows(x, due, gathers, name, float(weight), float(divisor)) if name else x


# --- groups ------------------------------------------------------------------------------------------------------

WORLD = "world"
_groups: dict[str, Any] = {}
"""Groups by the name that stands for them in graphs, where arguments are tensors, numbers and strings."""


def handle(group: Any = None) -> str:
    """The name of a group for the functions below; empty for one of a single process, which needs no collective."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
        return ""
    if torch.compiler.is_compiling() and not _marked:
        raise RuntimeError("call holofunc.distributed.init() before compiling what calls collectives")
    if group is None:
        return WORLD
    _groups[group.group_name] = group
    return group.group_name


def _group(name: str) -> Any:
    return None if name == WORLD else _groups[name]


def _size(name: str) -> int:
    return dist.get_world_size(_group(name))


_explained: Callable[[], AbstractContextManager[None]] = nullcontext
_teller: Callable[[str], None] | None = None


def explaining(context: Callable[[], AbstractContextManager[None]], teller: Callable[[str], None]) -> None:
    """Run collectives in ``context()``, which turns what they raise into an error that names a rank."""
    global _explained, _teller
    _explained, _teller = context, teller


def explained() -> AbstractContextManager[None]:
    """Where a collective is run: what it raises names the ranks that are the cause."""
    return _explained()


def tell(what: str) -> None:
    """Leave word for the other ranks of how this one ended."""
    if _teller is not None:
        _teller(what)


_gathered: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_scattered: Any = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)
"""By the names that torch 2.14 gave them, or by those before."""

# --- operations --------------------------------------------------------------------------------------------------


@torch.library.custom_op("holofunc::all_reduce", mutates_args=())
def _all_reduce_op(x: Tensor, group: str, due: Tensor | None) -> Tensor:
    y = x.clone(memory_format=torch.contiguous_format)
    if due is None or bool(due):
        with explained():
            dist.all_reduce(y, group=_group(group))
    return y


@torch.library.custom_op("holofunc::all_gather", mutates_args=())
def _all_gather_op(x: Tensor, group: str, due: Tensor | None) -> Tensor:
    y = x.new_zeros(_size(group) * x.shape[0], *x.shape[1:])
    if due is None or bool(due):
        with explained():
            _gathered(y, x.contiguous(), group=_group(group))
    return y


@torch.library.custom_op("holofunc::reduce_scatter", mutates_args=())
def _reduce_scatter_op(x: Tensor, group: str, due: Tensor | None) -> Tensor:
    y = x.new_zeros(x.shape[0] // _size(group), *x.shape[1:])
    if due is None or bool(due):
        with explained():
            _scattered(y, x.contiguous(), group=_group(group))
    return y


@_all_reduce_op.register_fake
def _(x: Tensor, group: str, due: Tensor | None) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_all_gather_op.register_fake
def _(x: Tensor, group: str, due: Tensor | None) -> Tensor:
    return x.new_empty(_size(group) * x.shape[0], *x.shape[1:])


@_reduce_scatter_op.register_fake
def _(x: Tensor, group: str, due: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0] // _size(group), *x.shape[1:])


# --- derivatives -------------------------------------------------------------------------------------------------


class _PSum(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, group: str, due: Tensor | None) -> Tensor:
        return _all_reduce_op(x, group, due)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.group, ctx.due = inputs

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return _PSum.apply(g, ctx.group, ctx.due), None, None

    @staticmethod
    def jvp(ctx: Any, t: Tensor, *_: None) -> Tensor:
        return _PSum.apply(t, ctx.group, ctx.due)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, group: str, due: Tensor | None) -> tuple[Any, Any]:
        return _PSum.apply(x, group, due if in_dims[2] is None or due is None else due.any()), in_dims[0]


class _Rows(torch.autograd.Function):
    """`all_gather` or `reduce_scatter`: each is the other's transpose."""

    @staticmethod
    def forward(x: Tensor, due: Tensor | None, gathers: bool, group: str, weight: float, divisor: float) -> Tensor:
        return (_all_gather_op if gathers else _reduce_scatter_op)(x, group, due)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.due, ctx.gathers, ctx.group, ctx.weight, ctx.divisor = inputs

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        g = g if ctx.weight == 1.0 else g * ctx.weight
        g = _Rows.apply(g, ctx.due, not ctx.gathers, ctx.group, 1.0, 1.0)
        return g if ctx.divisor == 1.0 else g / ctx.divisor, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, t: Tensor, *_: None) -> Tensor:
        return _Rows.apply(t, ctx.due, ctx.gathers, ctx.group, ctx.weight, ctx.divisor)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, due: Tensor | None, *options: Any
    ) -> tuple[Any, Any]:
        axis, of_due = in_dims[:2]
        due = due if of_due is None or due is None else due.any()
        return _Rows.apply(x if axis is None else x.movedim(axis, 1), due, *options), None if axis is None else 1


def _psum(x: Tensor, group: str, due: Tensor | None) -> Tensor:
    return _PSum.apply(x, group, due)


def _rows(x: Tensor, due: Tensor | None, gathers: bool, group: str, weight: float, divisor: float) -> Tensor:
    return _Rows.apply(x, due, gathers, group, weight, divisor)


_marked = False


@functools.cache
def differentiable_in_graphs() -> None:
    """Have graphs take up the two functions above whole: traced into, their derivative would be lost, silently."""
    global _psum, _rows, _marked
    _psum, _rows = torch.compiler.allow_in_graph(_psum), torch.compiler.allow_in_graph(_rows)
    _marked = True
