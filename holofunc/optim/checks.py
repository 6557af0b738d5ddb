"""Checks at a transformation's boundary: parameters, and gradients that do not belong to them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from holofunc import tree
from holofunc.typing import Params, PyTree

__all__ = ["SECOND", "check_params", "check_paths", "check_updates", "need_loss", "need_params", "of_another_state"]

SECOND = "the gradients of grad_fn"


def check_params(params: PyTree, name: str = "") -> None:
    """Raise unless ``params`` is a tree of real floating tensors: what `init` of every transformation calls first.

    Args:
        params: any tree.
        name: of the transformation, for the message; chains leave it out, as theirs is not known to them.

    Raises:
        TypeError: naming the path of the first leaf that is something else.
    """
    _check_floating(f"{name}: params" if name else "params", params)


def _check_floating(name: str, values: PyTree) -> None:
    for path, leaf in tree.leaves_with_path(values):
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{name} must hold tensors, got {type(leaf).__name__} at {path!r}")
        if not leaf.is_floating_point():
            raise TypeError(f"{name} must hold real floating tensors, got {leaf.dtype} at {path!r}")


def need_params(params: PyTree, name: str) -> None:
    """Raise a ValueError if ``update`` was called without the parameters that its rule needs."""
    if params is None:
        raise ValueError(f"{name} needs the parameters: call update(updates, state, params)")


def need_loss(loss: Any, name: str) -> None:
    """Raise a TypeError if ``update`` was called without the loss that its rule needs."""
    if loss is None:
        raise TypeError(f"{name} needs the loss: call update(updates, state, params, loss=...)")


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
    if isinstance(params, Mapping):
        return (
            isinstance(updates, Mapping)
            and updates.keys() == params.keys()
            and all(_fits(updates[name], p) for name, p in params.items())
        )
    return type(updates) is type(params) and (
        params is None or (len(updates) == len(params) and all(map(_fits, updates, params)))
    )


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
