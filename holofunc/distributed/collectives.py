"""Collectives as pure functions that support differentiation, `vmap` and compilation.

A tensor is *replicated* if every rank has the same, *partial* if the whole is the sum of what the ranks have, and
*sharded* if the ranks' tensors are the whole when they are joined along the first axis. Derivatives are those of the
sum of all ranks' losses: what a rank's gradient is after the backward passes of all of them. All ranks have to call
the same collectives in the same order. In one process each of them is the identity.

They are one operation of the dispatcher (eager code and graphs call the same) inside of a `torch.autograd.Function`
with rules for all transformations of `torch.func`, which graphs take up whole.
"""

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from holofunc.distributed.ranks import explained, world_size

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
    return collective("sum", x, group)


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
    total = psum(x, group)
    return total / world_size(group) if world_size(group) > 1 else total


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
    if not ragged or world_size(group) == 1:
        return collective("gather", x, group)
    rows = collective("gather", torch.tensor([x.shape[0]], device=x.device), group).tolist()
    padding = x.new_zeros(max(rows) - x.shape[0], *x.shape[1:])
    padded = collective("gather", torch.cat([x, padding]), group).unflatten(0, (len(rows), max(rows)))
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
    if x.shape[0] % world_size(group):
        raise ValueError(
            f"x must have a multiple of {world_size(group)} rows, one share per rank, got {tuple(x.shape)}"
        )
    return collective("scatter", x, group)


def _check_tensor(x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}: take tree.map for the tensors of a tree")


def _check_rows(x: Tensor) -> None:
    _check_tensor(x)
    if x.ndim == 0:
        raise ValueError("x must have a first axis along which ranks share it, got a 0-d tensor")


def collective(
    kind: str, x: Tensor, group: Any = None, *, due: Tensor | None = None, weight: float = 1.0, divisor: float = 1.0
) -> Tensor:
    """A ``"sum"``, ``"gather"`` or ``"scatter"`` of the ranks' ``x``; the identity in one process.

    Args:
        kind: which; a scatter is one of the sum.
        x: of one shape and dtype on all ranks: they are compared where the first of its kind is run.
        group: as for `psum`.
        due: 0-d bool, equal on all ranks. Where it does not hold there is no collective, and what comes back is ``x``
            of a sum and zeros of others. None is true.
        weight: of this rank's cotangent: the number of samples that its loss is a mean of.
        divisor: of the derivative.
    """
    _check_tensor(x)
    if (world := world_size(group)) == 1:
        return x
    if world < 1:
        raise ValueError("group must be one that this rank belongs to, got another one")
    if torch.compiler.is_compiling() and not _marked:
        raise RuntimeError("call holofunc.distributed.init() before compiling what calls collectives")
    name = WORLD if group is None else group.group_name
    if group is not None:
        _groups[name] = group
    return _applied(x, due, kind, name, float(weight), float(divisor))


# --- the operation -----------------------------------------------------------------------------------------------

WORLD = "world"
_groups: dict[str, Any] = {WORLD: None}
"""Groups by the name that stands for them in graphs, where arguments are tensors, numbers and strings."""

_RUN: dict[str, Any] = {
    "sum": lambda y, x, group: dist.all_reduce(y.copy_(x), group=group),
    "gather": getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None),
    "scatter": getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None),
}
"""By the names that torch 2.14 gave them, or by those before."""


@torch.library.custom_op("holofunc::collective", mutates_args=())
def _collective_op(x: Tensor, kind: str, group: str, due: Tensor | None) -> Tensor:
    y = _result(x, kind, group, due)
    if due is None or bool(due):
        what = f"{kind} of {str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
        with explained(what, _groups[group]):
            _RUN[kind](y, x.contiguous(), group=_groups[group])
    elif kind == "sum":
        y.copy_(x)
    return y


@_collective_op.register_fake
def _result(x: Tensor, kind: str, group: str, due: Tensor | None) -> Tensor:
    if kind == "sum":
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    world = world_size(_groups[group])
    rows = x.shape[0] * world if kind == "gather" else x.shape[0] // world
    return x.new_zeros(rows, *x.shape[1:])


# --- its derivatives ---------------------------------------------------------------------------------------------

TRANSPOSED = {"sum": "sum", "gather": "scatter", "scatter": "gather"}


class _Collective(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, due: Tensor | None, kind: str, group: str, weight: float, divisor: float) -> Tensor:
        return _collective_op(x, kind, group, due)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.due, *ctx.options = inputs

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        kind, group, weight, divisor = ctx.options
        g = g if weight == 1.0 else g * weight
        g = _Collective.apply(g, ctx.due, TRANSPOSED[kind], group, 1.0, 1.0)
        return g if divisor == 1.0 else g / divisor, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, t: Tensor, *_: None) -> Tensor:
        return _Collective.apply(t, ctx.due, *ctx.options)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, due: Tensor | None, kind: str, *options: Any
    ) -> tuple[Any, Any]:
        axis, of_due = in_dims[:2]
        due = due if of_due is None or due is None else due.any()
        if axis is None:
            return _Collective.apply(x, due, kind, *options), None
        to = 0 if kind == "sum" else 1  # rows come first
        return _Collective.apply(x.movedim(axis, to), due, kind, *options), to


def _applied(x: Tensor, due: Tensor | None, kind: str, group: str, weight: float, divisor: float) -> Tensor:
    return _Collective.apply(x, due, kind, group, weight, divisor)


_marked = False


@functools.cache
def differentiable_in_graphs() -> None:
    """Have graphs take up the function above whole: traced into, its derivative would be lost, silently."""
    global _applied, _marked
    _applied, _marked = torch.compiler.allow_in_graph(_applied), True
