"""A transformation's boundary: parameters, gradients that do not belong to them, states; functions of parameters."""

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from holofunc import tree
from holofunc.tree.nodes import alike
from holofunc.typing import Params, PyTree

__all__ = [
    "SECOND", "builder_of", "check_condition", "check_function", "check_one_number", "check_params", "check_paths",
    "check_state", "check_transformation", "check_updates", "checking_its_state", "functions_of_part", "in_dtypes_of",
    "need_loss", "need_params", "of_another_state", "of_other_shapes",
]  # fmt: skip

SECOND = "the gradients of grad_fn"


def check_transformation(name: str, tx: Any) -> None:
    """Raise a TypeError unless ``tx`` is a transformation."""
    functions = (getattr(tx, name, None) for name in ("init", "update"))
    if isinstance(tx, type) or not all(map(callable, functions)):
        raise TypeError(f"{name} must be a GradientTransformation, got {tx!r}")


def check_function(**values: Any) -> None:
    """Raise a TypeError unless each value can be called."""
    for name, value in values.items():
        if not callable(value):
            raise TypeError(f"{name} must be a function, got {value!r}")


def builder_of(fn: Any) -> str:
    """The public function that made ``fn``, for messages: ``scale_by_adam``, of its ``update``; none for chains."""
    name, local, _ = getattr(fn, "__qualname__", "").partition(".<locals>.")
    return name if local and not name.startswith("_") and name not in ("chain", "named_chain", "with_adam") else ""


def check_params(params: PyTree, name: str = "") -> None:
    """Raise unless ``params`` is a tree of real floating tensors: what every ``init`` begins with.

    Args:
        params: any tree.
        name: of the transformation, for the message.

    Raises:
        TypeError: naming the path of the first leaf that is something else.
    """
    _check_floating(f"{name}: params" if name else "params", params)


def _check_floating(name: str, values: PyTree) -> None:
    for path, leaf in tree.leaves_with_path(values):
        if not isinstance(leaf, Tensor):
            where = f" at {path!r}" if path else ""
            raise TypeError(f"{name} must hold tensors, got {type(leaf).__name__}{where}")
        if not leaf.is_floating_point():
            raise TypeError(f"{name} must hold real floating tensors, got {leaf.dtype} at {path!r}")


def need_params(params: PyTree, name: str) -> None:
    """Raise a ValueError if ``update`` was called without the parameters that its rule needs."""
    if params is None:
        raise ValueError(f"{name} needs the parameters: call update(updates, state, params)")


def need_loss(loss: Any, name: str) -> None:
    """Raise if ``update`` was called without the loss that its rule needs, or with several."""
    if loss is None:
        raise TypeError(f"{name} needs the loss: call update(updates, state, params, loss=...)")
    check_one_number(loss=loss)


def check_one_number(**values: Any) -> None:
    """Raise a ValueError for a tensor of several numbers, or of one with axes, which would change a state's shapes."""
    for name, value in values.items():
        if isinstance(value, Tensor) and value.ndim:
            raise ValueError(f"{name} must be a number or a 0-d tensor, got shape {tuple(value.shape)}")


def check_condition(name: str, holds: Any) -> Tensor:
    """What a condition has returned, if that is a 0-d bool tensor.

    Raises:
        TypeError: otherwise.
    """
    if not isinstance(holds, Tensor) or holds.dtype != torch.bool or holds.ndim:
        raise TypeError(f"{name}: condition must return a 0-d bool tensor, got {holds!r}")
    return holds


def check_updates(updates: PyTree, params: Params | None, name: str = "updates") -> None:
    """Raise unless ``updates`` are floating tensors, in the structure and the shapes of ``params`` if given."""
    if params is None:
        _check_floating(name, updates)
        return
    if _fits(updates, params):
        return
    if error := tree.structure_error(name, updates, params, "params"):
        raise ValueError(error)
    _check_floating(name, updates)
    for (path, u), p in zip(tree.leaves_with_path(updates), _in_order(params, updates), strict=True):
        if u.shape != p.shape:
            raise ValueError(
                f"{name} must have the shapes of params, got {tuple(u.shape)} at {path!r} for {tuple(p.shape)}"
            )


def _fits(updates: PyTree, params: PyTree) -> bool:
    if isinstance(params, Tensor):
        return isinstance(updates, Tensor) and updates.is_floating_point() and updates.shape == params.shape
    if not tree.is_node(params) or not alike(updates, params):
        return False
    if params is None:
        return True
    others = tree.children(updates)
    return all(_fits(others[name], p) for name, p in tree.children(params).items())


def _in_order(values: PyTree, like: PyTree) -> list[Any]:
    by_path = dict(tree.leaves_with_path(values))
    return [by_path[path] for path in tree.paths(like)]


def check_paths(updates: PyTree, kept: Mapping[str, Any]) -> None:
    """Raise a StructureError unless ``updates`` has the paths of what a state keeps by path."""
    if not torch.compiler.is_compiling() and kept.keys() != set(tree.paths(updates)):
        raise tree.StructureError(dict(tree.leaves_with_path(updates)), kept)


def of_another_state(updates: PyTree, error: tree.StructureError) -> str | None:
    """What to say of gradients that do not fit the state, if that is what ``error`` met."""
    paths = set(tree.paths(updates))
    for got, expected in ((error.left, error.right), (error.right, error.left)):
        if set(tree.paths(got)) == paths:
            return tree.structure_error("updates", got, expected, "the parameters that state was made for")
    return None


# --- states ------------------------------------------------------------------------------------------------------


def of_other_shapes(state: PyTree, init: Callable[[Params], PyTree] | None, params: Params | None) -> str | None:
    """What to say of a state that was made for parameters of other shapes, if it was."""
    if init is None or params is None:
        return None
    try:
        made = dict(tree.leaves_with_path(init(tree.map(lambda p: torch.empty_like(p, device="meta"), params))))
    except Exception:  # a user's own init may read values
        return None
    for path, x in tree.leaves_with_path(state):
        if path in made and isinstance(x, Tensor) and x.shape != made[path].shape:
            wanted = tuple(made[path].shape)
            return f"state must be that of parameters of these shapes: {path} has {tuple(x.shape)} in place of {wanted}"
    return None


def check_state(name: str, state: PyTree) -> None:
    """Raise a TypeError unless ``state`` holds nothing but tensors: what wrappers that choose between states call."""
    for path, leaf in tree.leaves_with_path(state):
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"{name}: the state of tx must hold tensors, got {type(leaf).__name__} at {path!r}: write "
                "torch.tensor(...) in its init"
            )


def checking_its_state(update: Callable[..., Any]) -> Callable[..., Any]:
    """``update``, which raises for a state of another type than the NamedTuple that it is annotated with."""
    kind: Any = getattr(update, "__annotations__", {}).get("state")
    if not getattr(kind, "_fields", ()):
        return update

    @functools.wraps(update)
    def of_state(updates: PyTree, state: PyTree, params: Any = None, **extra: Any) -> tuple[PyTree, PyTree]:
        if not isinstance(state, kind):
            raise ValueError(f"state must be {kind.__name__}, as init makes it, got {type(state).__name__}")
        return update(updates, state, params, **extra)

    return of_state


def in_dtypes_of(old: PyTree, new: PyTree, *, in_shapes: bool = False) -> PyTree:
    """``new`` itself, unless something of it has another dtype than in ``old``.

    ``in_shapes``: a RuntimeError for another shape, as a state of other parameters gets by broadcasting.
    """
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        if in_shapes and old.shape != new.shape:
            raise RuntimeError(f"a state must keep its shapes, got {tuple(new.shape)} for {tuple(old.shape)}")
        return new.to(old.dtype)
    if old is None or new is None or not (tree.is_node(old) and tree.is_node(new)):
        return new
    olds, news = tree.children(old), tree.children(new)
    if list(olds) != list(news):
        return new
    done = [in_dtypes_of(x, y, in_shapes=in_shapes) for x, y in zip(olds.values(), news.values(), strict=True)]
    return new if all(map(operator.is_, done, news.values())) else tree.with_children(new, done)


# --- functions of parameters, among the extra arguments ------------------------------------------------------------


def functions_of_part(
    extra: Mapping[str, Any], whole: Callable[[Params], Params], part_of: Callable[[PyTree], PyTree]
) -> dict[str, Any]:
    """``extra``, whose functions of all parameters become functions of a part of them.

    Args:
        extra: may hold ``grad_fn``, ``value_fn`` and ``value_and_grad_fn``.
        whole: all parameters, of those of the part.
        part_of: the gradients of the part, of all gradients.
    """
    grad_fn, value_fn, both = (extra.get(name) for name in ("grad_fn", "value_fn", "value_and_grad_fn"))
    changed = dict(extra)
    if grad_fn is not None:
        changed["grad_fn"] = lambda part: part_of(grad_fn(whole(part)))
    if value_fn is not None:
        changed["value_fn"] = lambda part: value_fn(whole(part))
    if both is not None:

        def value_and_grad_fn(part: Params) -> tuple[Any, PyTree]:
            loss, grads = both(whole(part))
            return loss, part_of(grads)

        changed["value_and_grad_fn"] = value_and_grad_fn
    return changed
