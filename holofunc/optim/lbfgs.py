"""L-BFGS, with a line search that finds a step for the strong Wolfe conditions."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from holofunc import tree
from holofunc.compile import opaque
from holofunc.optim.base import GradientTransformation, MaybeParams, composed, named_chain
from holofunc.optim.capabilities import TakesSecondGradient
from holofunc.optim.checks import need_params
from holofunc.optim.numerics import far_norm, in_shapes_of, scalar_dtype
from holofunc.optim.ranges import check_count, check_finite, check_flags, check_positive
from holofunc.optim.scalars import zero_count, zero_scalar
from holofunc.optim.transforms import scale, scale_by_learning_rate
from holofunc.typing import Params, PyTree, Scalar, Schedule

Evaluation: TypeAlias = Callable[[Params], tuple[Tensor, Params]]
"""Loss and gradients at some parameters."""

__all__ = ["LbfgsState", "ZoomState", "lbfgs", "scale_by_lbfgs", "scale_by_zoom_linesearch"]


class LbfgsState(NamedTuple):
    """Updates so far; the latest parameters and gradients, all tensors in a row; the memory of their differences,
    oldest first (zeros: not there yet).
    """

    step: Tensor
    params: Tensor
    grads: Tensor
    moves: Tensor
    changes: Tensor


def scale_by_lbfgs(memory_size: int = 10, *, scale_initial: bool = True) -> GradientTransformation:
    """The gradient times the inverse Hessian that the last ``memory_size`` steps imply, by the two-loop recursion:

        s = p - previous p,  y = g - previous g,  kept where <s, y> > 0
        H = (I - s y.T / <s, y>) H (I - y s.T / <s, y>) + s s.T / <s, y>  # from H = <s, y> / <y, y> I

    For gradients of one function, not of minibatches: differences of noise are no curvature.

    Args:
        memory_size: pairs kept, at least 1.
        scale_initial: False begins with ``H = I``. The first update of all is the gradient over its norm, if that is
            above 1.

    Source: Liu and Nocedal, "On the limited memory BFGS method for large scale optimization" (1989); Nocedal and
    Wright, "Numerical optimization", algorithm 7.4.
    """
    check_count(memory_size=memory_size)
    check_flags(scale_initial=scale_initial)

    def init(params: Params) -> LbfgsState:
        size = tree.size(params)
        step = zero_count(params)
        vector = torch.zeros(size, dtype=scalar_dtype(params), device=step.device)
        memory = vector.new_zeros((memory_size, size))
        return LbfgsState(step, vector, vector.clone(), memory, memory.clone())

    def update(updates: PyTree, state: LbfgsState, params: MaybeParams = None) -> tuple[PyTree, LbfgsState]:
        need_params(params, "scale_by_lbfgs")
        return opaque(_direction_scaled if scale_initial else _direction, updates, params, state)

    return GradientTransformation(init, update)


def _direction_scaled(updates: PyTree, params: PyTree, state: LbfgsState) -> tuple[PyTree, LbfgsState]:
    return _direction(updates, params, state, scale_initial=True)


def _direction(
    updates: PyTree, params: PyTree, state: LbfgsState, scale_initial: bool = False
) -> tuple[PyTree, LbfgsState]:
    p, g = _vector(params, state.params), _vector(updates, state.params)
    move, change = p - state.params, g - state.grads
    product = move @ change
    use = (state.step > 0) & (product >= torch.finfo(product.dtype).tiny)  # whose inverse is finite

    def pushed(memory: Tensor, new: Tensor) -> Tensor:
        return torch.where(use, torch.cat([memory[1:], new[None]]), memory)

    moves, changes = pushed(state.moves, move), pushed(state.changes, change)
    products = (moves * changes).sum(1)
    inverses = torch.where(products > 0, 1 / torch.where(products > 0, products, 1.0), 0.0)
    direction, weights = g, []
    for s, y, r in reversed(list(zip(moves, changes, inverses, strict=True))):
        weights.append(r * (s @ direction))
        direction = direction - weights[-1] * y
    if scale_initial:
        curvature = inverses[-1] * (changes[-1] @ changes[-1])
        latest = curvature > 0
        first = 1 / far_norm(lambda g: tree.safe_sqrt(g @ g), g).clamp_min(1.0)
        direction = direction * torch.where(latest, 1 / torch.where(latest, curvature, 1.0), first)
    for s, y, r, w in zip(moves, changes, inverses, reversed(weights), strict=True):
        direction = direction + (w - r * (y @ direction)) * s
    return in_shapes_of(direction, updates), LbfgsState(state.step + 1, p, g, moves, changes)


def _vector(values: PyTree, like: Tensor) -> Tensor:
    """All elements in a row, in the order of the sorted paths: gradients may come in another one than parameters."""
    return torch.cat([x.to(like.dtype).reshape(-1) for _, x in sorted(tree.leaves_with_path(values))] or [like])


class _Zoom(NamedTuple):
    step: Tensor
    loss: Tensor
    evaluations: Tensor


class ZoomState(_Zoom, TakesSecondGradient):
    """The step that the latest search found, the loss there, and how many evaluations it took."""

    __slots__ = ()


class _Search(NamedTuple):
    """The step to try; the ends of the interval, loss and slope there; whether they bracket, and are done."""

    step: Tensor
    low: tuple[Tensor, Tensor, Tensor]
    high: tuple[Tensor, Tensor, Tensor]
    zooms: Tensor
    done: Tensor
    evaluations: Tensor


def scale_by_zoom_linesearch(
    max_steps: int = 20,
    *,
    first_step: float = 1.0,
    growth: float = 2.0,
    decrease: float = 1e-4,
    curvature: float = 0.9,
    value_fn: Callable[[Params], Tensor] | None = None,
) -> GradientTransformation:
    """Multiply updates, which descend, by a step ``t`` that fulfils the strong Wolfe conditions: with ``f(t)`` the loss
    at ``p + t * u``,

        f(t) <= f(0) + decrease * t * f'(0)   and   abs(f'(t)) <= curvature * abs(f'(0))

    First the step grows until an interval holds such a point, then the interval shrinks around it. Eager code stops
    as soon as it is found; graphs hold ``max_steps`` evaluations. After these, the best step that decreases enough is
    taken.

    ``update`` needs one of the extra arguments ``value_fn(params) -> loss``, which is differentiated, and
    ``value_and_grad_fn(params) -> (loss, gradients)``. `holofunc.train.make_train_step` and the ``step(closure)`` of
    `to_torch` hand over the latter.

    Args:
        max_steps: evaluations of loss and gradient at most, beside that at ``t = 0``.
        first_step: the first ``t``.
        growth: factor of ``t`` while the interval is looked for, above 1.
        decrease, curvature: the constants of the conditions, ``0 < decrease < curvature < 1``.
        value_fn: used where ``update`` gets none.

    Source: Nocedal and Wright, "Numerical optimization", algorithms 3.5 and 3.6, with steps halfway where a parabola
    through both ends is of no help.
    """
    check_count(max_steps=max_steps)
    check_positive(first_step=first_step)
    check_finite(growth=growth, decrease=decrease, curvature=curvature)
    if not growth > 1:
        raise ValueError(f"growth must be above 1, got {growth}")
    check_positive(decrease=decrease, curvature=curvature)
    if not 0 < decrease < curvature < 1:
        raise ValueError(f"decrease and curvature must be 0 < decrease < curvature < 1, got {decrease} and {curvature}")
    if value_fn is not None and not callable(value_fn):
        raise TypeError(f"value_fn must be a function of the parameters, got {value_fn!r}")
    own = value_fn

    def init(params: Params) -> ZoomState:
        return ZoomState(zero_scalar(params) + first_step, zero_scalar(params), zero_count(params))

    def update(
        updates: PyTree,
        state: ZoomState,
        params: MaybeParams = None,
        *,
        value_fn: Callable[[Params], Tensor] | None = None,
        value_and_grad_fn: Evaluation | None = None,
    ) -> tuple[PyTree, ZoomState]:
        need_params(params, "scale_by_zoom_linesearch")
        evaluate = _value_and_grad(value_fn or own, value_and_grad_fn)
        zero = torch.zeros_like(state.loss)

        def at(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            moved = tree.elementwise(lambda p, u: (tree.upcast(p) + t * tree.upcast(u)).to(p.dtype), params, updates)
            loss, grads = evaluate(moved)
            slope = tree.total(tree.elementwise(lambda g, u: tree.upcast(g) * tree.upcast(u), grads, updates))
            return t, torch.as_tensor(loss, dtype=zero.dtype, device=zero.device), slope.to(zero.dtype)

        start = at(zero)
        search = _Search(
            zero + first_step, start, start, zero > 0, ~(start[2] < 0), torch.zeros_like(state.evaluations)
        )
        for _ in range(max_steps):
            if tree.is_known(search.done) and bool(search.done):
                break
            search = _searched(search, start, at(search.step), growth, decrease, curvature)
        t, loss, _ = search.low
        out = tree.elementwise(lambda u: tree.upcast(u) * t, updates)
        return out, ZoomState(t, loss, search.evaluations)

    return composed(init, update, adds=(TakesSecondGradient,))


def _value_and_grad(value_fn: Callable[[Params], Tensor] | None, both: Evaluation | None) -> Evaluation:
    if value_fn is None:
        if both is None:
            raise TypeError(
                "scale_by_zoom_linesearch needs the loss as a function: build it with value_fn=, call update(updates, "
                "state, params, value_fn=...) or optimizer.step(closure), or give lbfgs a learning_rate"
            )
        return both
    differentiate = torch.func.grad_and_value(value_fn)

    def evaluate(params: Params) -> tuple[Tensor, Params]:
        grads, loss = differentiate(params)
        return loss, grads

    return evaluate


def _searched(
    search: _Search,
    start: tuple[Tensor, Tensor, Tensor],
    now: tuple[Tensor, Tensor, Tensor],
    growth: float,
    decrease: float,
    curvature: float,
) -> _Search:
    """One evaluation later. A finished search stays; ``low`` is always the best point that decreases enough."""
    t, loss, slope = now
    low, high = search.low, search.high
    too_high = ~(loss <= start[1] + decrease * t * start[2]) | ((loss >= low[1]) & (low[0] > 0))
    found = ~too_high & (slope.abs() <= curvature * start[2].abs())
    turns = torch.where(search.zooms, slope * (high[0] - low[0]) >= 0, slope >= 0)  # the minimum lies behind

    def choice(condition: Tensor, a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> Any:
        return tuple(torch.where(condition, x, y) for x, y in zip(a, b, strict=True))

    new_high = choice(too_high, now, choice(turns, low, high))
    new_low = choice(too_high, low, now)
    zooms = search.zooms | too_high | turns
    step = torch.where(zooms, _inside(new_low, new_high), t * growth)
    after = _Search(step, new_low, new_high, zooms, found, search.evaluations + 1)
    return tree.where(search.done, search, after)


def _inside(low: tuple[Tensor, Tensor, Tensor], high: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The minimum of the parabola through both ends with the slope of the first, unless near an end: then halfway."""
    width = high[0] - low[0]
    bend = 2 * (high[1] - low[1] - low[2] * width)
    bends = (bend > 0) & bend.isfinite()
    share = torch.where(bends, -low[2] * width / torch.where(bends, bend, 1.0), 0.5)
    share = torch.where((share > 0.1) & (share < 0.9), share, 0.5)
    return low[0] + share * width


def lbfgs(
    learning_rate: Scalar | Schedule | None = None,
    *,
    memory_size: int = 10,
    max_linesearch_steps: int = 20,
    value_fn: Callable[[Params], Tensor] | None = None,
) -> GradientTransformation:
    """L-BFGS for full batches: `scale_by_lbfgs`, then a line search for the step ``t``, or a learning rate:

        p = p - t * H @ g

    Args:
        learning_rate: None searches; a number, a 0-d tensor or a schedule is the step.
        memory_size: as `scale_by_lbfgs`.
        max_linesearch_steps, value_fn: as `scale_by_zoom_linesearch`, there ``max_steps``.

    Raises:
        ValueError: both a learning rate and a ``value_fn``.
        TypeError: in the first ``update``, for a search that is given no loss to evaluate.

    Source: Liu and Nocedal (1989).

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> def loss(params):
        ...     x, y = params["w"]
        ...     return (1 - x) ** 2 + 100 * (y - x * x) ** 2
        >>> tx, params = optim.lbfgs(value_fn=loss), {"w": torch.tensor([-0.5, 1.0], dtype=torch.float64)}
        >>> state = tx.init(params)
        >>> for _ in range(40):
        ...     updates, state = tx.update(torch.func.grad(loss)(params), state, params)
        ...     params = optim.apply_updates(params, updates)
        >>> params["w"].round(decimals=6)
        tensor([1., 1.], dtype=torch.float64)
    """
    rule = scale_by_lbfgs(memory_size)
    if learning_rate is not None:
        if value_fn is not None:
            raise ValueError("value_fn must be None where there is a learning_rate, and no line search")
        return named_chain(lbfgs=rule, learning_rate=scale_by_learning_rate(learning_rate))
    search = scale_by_zoom_linesearch(max_linesearch_steps, value_fn=value_fn)
    return named_chain(lbfgs=rule, descent=scale(-1.0), linesearch=search)
