"""Find and replace parts of a state by name, and map over the leaves that belong to parameters."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from holofunc.tree.maps import map as map_leaves
from holofunc.tree.nodes import (
    children,
    is_node,
    leaves_with_path,
    rebuild,
    shortened,
    structure_error,
    with_children,
)
from holofunc.typing import Params, PyTree

__all__ = ["get", "get_all_with_path", "map_params", "set", "with_current_names"]

_REQUIRED = object()


def get_all_with_path(tree: PyTree, name: str) -> list[tuple[str, Any]]:
    """``(path, part)`` of each part of ``tree`` named ``name``, outer ones first.

    Args:
        tree: any tree, usually the state of an optimizer.
        name: a dict key or a field, the type of a NamedTuple (``"AdamState"``), or the end of a path
            (``"adam/step"``). Parts may be leaves or trees.

    Example:
        >>> import torch
        >>> from holofunc import optim, tree
        >>> state = optim.chain(optim.ema(0.9), optim.sgd(0.1)).init({"w": torch.ones(2)})
        >>> tree.get_all_with_path(state, "step")
        [('0/step', tensor(0)), ('1/learning_rate/step', tensor(0))]
    """
    return [(path, part) for path, part in _parts(tree, "") if _is_called(name, path, part)]


def get(tree: PyTree, name: str, default: Any = _REQUIRED) -> Any:
    """The only part of ``tree`` named ``name``, as in `get_all_with_path`; of several, the only tensor.

    Args:
        tree: any tree.
        name: a key, a field, a type or the end of a path.
        default: returned if there is no such part; without a default, that is an error.

    Raises:
        ValueError: no part, or more than one, has this name; the message lists the candidates.

    Example:
        >>> import torch
        >>> from holofunc import optim, tree
        >>> state = optim.chain(optim.clip_by_global_norm(1.0), optim.adam(0.1)).init({"w": torch.ones(2)})
        >>> tree.get(state, "mu"), tree.get(state, "adam/step")
        ({'w': tensor([0., 0.])}, tensor(0))
    """
    if default is not _REQUIRED and not get_all_with_path(tree, name):
        return default
    return _only(tree, name)[1]


def set(tree: PyTree, /, **values: Any) -> PyTree:
    """``tree`` with new values for named parts. Each name must identify one part.

    Args:
        tree: any tree; it is not changed.
        values: by name as in `get`, trees with the structure and shapes of the parts that they replace; a number fills
            the tensor that it replaces. Dtypes and devices do not change.

    Raises:
        ValueError: a name identifies no part or several, or a value has another structure or shape.

    Example:
        >>> import torch
        >>> from holofunc import optim, tree
        >>> state = optim.adam(0.1).init({"w": torch.ones(2)})
        >>> state = tree.set(state, mu={"w": torch.ones(2)}, **{"adam/step": 5})
        >>> state["adam"].mu, state["adam"].step
        ({'w': tensor([1., 1.])}, tensor(5))
    """
    for name, value in values.items():
        path, part = _only(tree, name)
        tree = _with_part(tree, "", path, _in_place_of(name, part, value))
    return tree


def map_params(
    fn: Callable[[Tensor, Tensor], Any],
    state: PyTree,
    params: Params,
    *,
    others: Callable[[Tensor], Any] | None = None,
) -> PyTree:
    """``state`` with ``fn(leaf, param)`` in place of each leaf that belongs to a parameter, such as a moment.

    These are the leaves of every part with the structure and shapes of ``params``, or of a flat dict of some of them.

    Args:
        fn: function of a leaf and its parameter.
        state: made by ``init(params)``.
        params: the parameters.
        others: function of each other leaf (counts, keys, factored moments); None leaves them unchanged.

    Example:
        >>> import torch
        >>> from holofunc import optim, tree
        >>> params = {"w": torch.ones(2)}
        >>> state = tree.map_params(lambda x, p: x.to(torch.bfloat16), optim.adam(0.1).init(params), params)
        >>> state["adam"].nu["w"].dtype, state["adam"].step.dtype
        (torch.bfloat16, torch.int64)
    """
    by_path = dict(leaves_with_path(params))
    if _are_params(state, params, by_path):
        return rebuild(state, [fn(leaf, by_path[path]) for path, leaf in leaves_with_path(state)])
    if state is None or not is_node(state):
        return state if state is None or others is None else others(state)
    return with_children(state, [map_params(fn, child, params, others=others) for child in children(state).values()])


def _parts(node: PyTree, path: str) -> Iterator[tuple[str, Any]]:
    yield path, node
    if node is not None and is_node(node):
        for name, child in children(node).items():
            yield from _parts(child, f"{path}/{name}" if path else name)


def _is_called(name: str, path: str, part: PyTree) -> bool:
    return f"/{path}".endswith(f"/{name}") or (hasattr(part, "_fields") and type(part).__name__ == name)


def _only(tree: PyTree, name: str) -> tuple[str, Any]:
    found = get_all_with_path(tree, name)
    if not found:
        names = {path.rpartition("/")[2]: None for path, _ in _parts(tree, "") if path}
        raise ValueError(f"nothing is called {name!r}; there are {shortened(names, 20)}")
    if len(found) > 1:  # an injected value and a link of a chain may share a name
        found = [pair for pair in found if isinstance(pair[1], Tensor)] or found
    if len(found) > 1:
        raise ValueError(f"name must be that of one part, got {name!r} of {shortened(path for path, _ in found)}")
    return found[0]


def _with_part(node: PyTree, path: str, target: str, part: PyTree) -> PyTree:
    if path == target:
        return part
    values = {}
    for name, child in children(node).items():
        at = f"{path}/{name}" if path else name
        inside = at == target or (target.startswith(f"{at}/") and is_node(child))
        values[name] = _with_part(child, at, target, part) if inside else child
    return with_children(node, values.values())


def _in_place_of(name: str, old: PyTree, new: PyTree) -> PyTree:
    if problem := structure_error(name, new, old, "what it replaces"):
        raise ValueError(problem)

    def leaf(before: Any, after: Any) -> Any:
        if not isinstance(before, Tensor):
            return after
        if not isinstance(after, Tensor):
            return torch.full_like(before, after)
        if after.shape != before.shape:
            raise ValueError(f"{name} must have shape {tuple(before.shape)}, got {tuple(after.shape)}")
        return after.to(before, copy=True)

    return map_leaves(leaf, old, new)


def _are_params(node: PyTree, params: Params, by_path: Mapping[str, Tensor]) -> bool:
    flat = dict(leaves_with_path(node))
    fit = all(
        path in by_path and isinstance(x, Tensor) and x.is_floating_point() and x.shape == by_path[path].shape
        for path, x in flat.items()
    )
    if not flat or not fit:
        return False
    some = isinstance(node, Mapping) and flat.keys() == children(node).keys()
    return some or structure_error("state", node, params, "params") is None


# --- old checkpoints ---------------------------------------------------------------------------------------------


RENAMED = {"count": "step", "window": "mini_step", "b1": "interpolation"}
"""Current names of renamed state fields, by their old names."""


def with_current_names(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """``stored`` with old names of fields replaced, where ``wanted`` has a leaf under the current name only.

    Args:
        stored: saved leaves by path.
        wanted: leaves by path of a newly initialized state.
    """

    def current(path: str) -> str:
        node, slash, last = path.rpartition("/")
        new = f"{node}{slash}{RENAMED.get(last, last)}"
        return new if path not in wanted and new in wanted and new not in stored else path

    return {current(path): leaf for path, leaf in stored.items()}
