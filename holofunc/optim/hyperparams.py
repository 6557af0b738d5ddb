"""Injected hyperparameters: in the state, readable, settable, schedulable, and never a reason to compile again."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from types import UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin

import torch
from torch import Tensor

from holofunc import tree
from holofunc.optim.base import GradientTransformation, MaybeParams, composed
from holofunc.optim.capabilities import KeepsCopies, KeepsProgress, ReportsHyperparams
from holofunc.optim.checks import check_function
from holofunc.optim.numerics import scalar_dtype
from holofunc.optim.ranges import check_finite, first_value
from holofunc.optim.scalars import value_at, zero_count
from holofunc.typing import Params, PyTree

__all__ = ["HyperparamsState", "get_hyperparams", "inject_hyperparams", "set_hyperparams"]


class _Hyperparams(NamedTuple):
    step: Tensor
    hyperparams: dict[str, Tensor]
    scheduled: dict[str, Tensor]
    inner: PyTree


class HyperparamsState(_Hyperparams, KeepsProgress, ReportsHyperparams):
    """Hyperparameters beside the state of the transformation built from them.

    Attributes:
        step: updates so far, for the schedules.
        hyperparams: 0-d tensors that `set_hyperparams` may change.
        scheduled: 0-d tensors, the values of the schedules in the latest update.
        inner: the state of the transformation.
    """

    __slots__ = ()

    @property
    def progress(self) -> tuple[str, ...]:
        return ("step", "hyperparams", "scheduled")

    @property
    def hyperparameters(self) -> dict[str, Tensor]:
        return _values(self)


def inject_hyperparams(
    builder: Callable[..., GradientTransformation], *, static: str | Sequence[str] = ("mask",)
) -> Callable[..., GradientTransformation]:
    """``builder`` with hyperparameters in the state: floats, 0-d tensors and schedules among its keyword arguments.

    Values are kept in fp32 (fp64 if a parameter is), whatever the dtype of the parameters. Ints, bools, strings and
    what is not passed stay constants: write ``learning_rate=1.0``, not ``1``, to have it in the state. So does what
    the builder's annotations have no number for (functions that return masks or labels, keys).

    ``builder`` is called in each update: a value out of its range raises there, outside of compiled code. What it
    uses in ``init`` alone (``d0`` of `prodigy`, say) has no effect when it changes later.

    Args:
        builder: of a transformation, e.g. `adamw`.
        static: further arguments, or one, that stay as they are even though they are functions.

    Returns:
        A builder of the same arguments, all by keyword (the first one may be given by position).

    Raises:
        ValueError: a name in ``static`` that is no argument; a value that ``builder`` does not take, when building, as
            without `inject_hyperparams`.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> params = {"w": torch.zeros(2)}
        >>> tx = optim.inject_hyperparams(optim.sgd)(learning_rate=0.5)
        >>> state = optim.set_hyperparams(tx.init(params), learning_rate=0.25)
        >>> optim.get_hyperparams(state)
        {'learning_rate': tensor(0.2500)}
        >>> tx.update({"w": torch.ones(2)}, state)[0]
        {'w': tensor([-0.2500, -0.2500])}
    """

    check_function(builder=builder)
    parameters, static = inspect.signature(builder).parameters, (static,) if isinstance(static, str) else static
    unknown = sorted(set(static) - {"mask", *parameters})
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise ValueError(f"static must name arguments of the builder, {sorted(parameters)}, got {unknown}")

    def build(*args: Any, **kwargs: Any) -> GradientTransformation:
        names = [*inspect.signature(builder).parameters, *map(str, range(len(args)))]
        by_position = dict(zip(names, args, strict=False))
        given = {**by_position, **kwargs}
        numbers = {n: v for n, v in given.items() if n not in static and _takes_numbers(builder, n)}
        schedules = {n: v for n, v in numbers.items() if callable(v)}
        values = {n: v for n, v in numbers.items() if isinstance(v, float) or (isinstance(v, Tensor) and not v.ndim)}
        constants = {n: v for n, v in given.items() if n not in schedules and n not in values}
        at_first = {n: first_value(n, v) if n in schedules else v for n, v in given.items()}
        built = builder(  # raises with the builder's words
            *(at_first[n] for n in by_position), **{n: at_first[n] for n in kwargs}
        )

        def now(step: Tensor, like: Params) -> dict[str, Tensor]:
            dtype = scalar_dtype(like)
            return {n: _as_tensor(value_at(n, v, step, like), dtype, step.device) for n, v in schedules.items()}

        def init(params: Params) -> HyperparamsState:
            step, dtype = zero_count(params), scalar_dtype(params)
            hyperparams = {n: _as_tensor(v, dtype, step.device).clone() for n, v in values.items()}
            scheduled = tree.map(torch.clone, now(step, params))  # a schedule may return a tensor of the user's
            inner = builder(**constants, **hyperparams, **scheduled).init(params)
            return HyperparamsState(step, hyperparams, scheduled, inner)

        def update(
            updates: PyTree, state: HyperparamsState, params: MaybeParams = None, **extra: Any
        ) -> tuple[PyTree, HyperparamsState]:
            scheduled = now(state.step, updates)
            tx = builder(**constants, **state.hyperparams, **scheduled)
            updates, inner = tx.update(updates, state.inner, params, **extra)
            return updates, HyperparamsState(state.step + 1, state.hyperparams, scheduled, inner)

        return composed(init, update, built)

    return build


def _takes_numbers(builder: Callable[..., Any], name: str) -> bool:
    """Whether the annotation of an argument has room for a float or a tensor; or says nothing that can be read."""
    parameters = inspect.signature(builder).parameters
    others = (p for p in parameters.values() if p.kind is p.VAR_KEYWORD)
    parameter = parameters.get(name) or next(others, None)
    if parameter is None or parameter.annotation is parameter.empty or isinstance(parameter.annotation, str):
        return True
    is_union = get_origin(parameter.annotation) in (Union, UnionType)
    kinds = get_args(parameter.annotation) if is_union else (parameter.annotation,)
    return any(kind in (float, Tensor) for kind in kinds)


def _as_tensor(value: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.as_tensor(value, dtype=dtype, device=device)


def get_hyperparams(state: PyTree) -> dict[str, Tensor]:
    """The hyperparameters that `inject_hyperparams` keeps anywhere in ``state``, those of schedules included.

    Returns:
        0-d tensors by name; by path where several parts of the state use one name, e.g. ``"head/learning_rate"``.
    """
    found = [(path, name, value) for path, holder in _holders(state, "") for name, value in _values(holder).items()]
    names = [name for _, name, _ in found]
    return {name if names.count(name) == 1 else f"{path}{name}": value for path, name, value in found}


def set_hyperparams(state: PyTree, **values: Any) -> PyTree:
    """``state`` with other hyperparameters: numbers or tensors, by the names of `get_hyperparams`.

    A plain name sets every hyperparameter of that name.

    Raises:
        ValueError: a name that is not there, or that follows a schedule (the message lists what can be set); a number
            that is not finite, or a tensor of another shape.
    """
    settable = {p for path, holder in _holders(state, "") for n in holder.hyperparams for p in (n, path + n)}
    scheduled = {p for path, holder in _holders(state, "") for n in holder.scheduled for p in (n, path + n)}
    for name in values:
        if name not in settable:
            why = "follows a schedule" if name in scheduled else "is not in the state"
            raise ValueError(f"hyperparameter {name!r} {why}; there are {sorted(get_hyperparams(state))}")
    check_finite(**{n: v for n, v in values.items() if not isinstance(v, Tensor) or not v.ndim})
    return _with_values(state, "", values)


def _values(holder: HyperparamsState) -> dict[str, Tensor]:
    return {**holder.hyperparams, **holder.scheduled}


def _holders(node: PyTree, prefix: str) -> Iterator[tuple[str, HyperparamsState]]:
    if isinstance(node, HyperparamsState):
        yield prefix, node
        yield from _holders(node.inner, f"{prefix}inner/")
    elif node is not None and tree.is_node(node):
        for name, child in tree.children(node).items():
            if name in (node.copies if isinstance(node, KeepsCopies) else ()):
                continue
            yield from _holders(child, f"{prefix}{name}/")


def _with_values(node: PyTree, prefix: str, values: dict[str, Any]) -> PyTree:
    if node is None or not tree.is_node(node):
        return node
    if isinstance(node, HyperparamsState):
        new = {}
        for name, old in node.hyperparams.items():
            value = values.get(prefix + name, values.get(name))
            if isinstance(value, Tensor) and value.ndim and value.shape != old.shape:
                raise ValueError(f"{name} must have shape {tuple(old.shape)}, got {tuple(value.shape)}")
            new[name] = old if value is None else _as_tensor(value, old.dtype, old.device).expand_as(old).clone()
        return node._replace(hyperparams=new, inner=_with_values(node.inner, f"{prefix}inner/", values))
    copies = node.copies if isinstance(node, KeepsCopies) else ()
    pairs = tree.children(node).items()
    children = [x if n in copies else _with_values(x, f"{prefix}{n}/", values) for n, x in pairs]
    return tree.with_children(node, children)
