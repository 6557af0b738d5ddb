"""Partitions, masks, freezing: different rules for different parameters."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from holofunc import tree
from holofunc.optim.base import (
    EmptyState,
    GradientTransformation,
    MaybeParams,
    as_transformation,
    composed,
    identity,
    stateless,
)
from holofunc.optim.capabilities import ChoosesByName, KeepsProgress
from holofunc.optim.checks import SECOND, check_updates, functions_of_part
from holofunc.optim.labels import Mask, check_labels, dividing, resolve
from holofunc.optim.ranges import check_finite
from holofunc.optim.scalars import zero_count
from holofunc.typing import Params, PyTree

__all__ = [
    "UnfreezeState", "freeze", "frozen_layers", "layers", "masked", "partition", "scale_leaves", "set_to_zero",
    "unfreeze", "up_to",
]  # fmt: skip


# --- parts of the parameters -------------------------------------------------------------------------------------


def partition(transforms: Mapping[str, GradientTransformation], labels: Any) -> GradientTransformation:
    """Give each parameter to the transformation that its label names.

    Args:
        transforms: transformations by label. Each sees, and keeps state for, its own parameters only: a flat dict of
            them by path.
        labels: a label for each parameter (`label_by_path`), or a function of the parameters that returns them.

    Returns:
        A transformation whose state is ``{label: state}``. Its ``init`` raises a ValueError if a label names no
        transformation or a transformation gets no parameters, listing both sides.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> params = {"body.w": torch.ones(2), "head.w": torch.ones(2)}
        >>> labels = optim.label_by_path(params, [("body", "slow"), ("head", "fast")])
        >>> tx = optim.partition({"slow": optim.sgd(0.1), "fast": optim.sgd(1.0)}, labels)
        >>> tx.update(params, tx.init(params))[0]
        {'body.w': tensor([-0.1000, -0.1000]), 'head.w': tensor([-1., -1.])}
    """
    if not isinstance(transforms, Mapping):
        raise TypeError(f"transforms must be a dict of transformations by label, got {type(transforms).__name__}")
    transforms = {name: as_transformation(f"transforms[{name!r}]", tx) for name, tx in transforms.items()}

    def groups(params: Params) -> list[list[str]]:
        label_of = dict(tree.leaves_with_path(resolve(labels, params)))
        return [[path for path in tree.paths(params) if label_of[path] == name] for name in transforms]

    def init(params: Params) -> dict[str, PyTree]:
        check_labels("labels", labels, params, str)
        used = set(tree.leaves(resolve(labels, params)))
        if used != set(transforms):
            raise ValueError(f"labels must name the transformations {sorted(transforms)}, got {sorted(used)}")
        parts = tree.partition(params, groups(params))
        with dividing(params):
            return {name: tx.init(part) for (name, tx), part in zip(transforms.items(), parts, strict=True)}

    def update(
        updates: PyTree, state: dict[str, PyTree], params: MaybeParams = None, **extra: Any
    ) -> tuple[PyTree, dict[str, PyTree]]:
        _check_unlabelled("labels", labels, updates, params)
        paths, states = groups(updates if params is None else params), [state[name] for name in transforms]
        updates, states = _each(list(transforms.values()), paths, updates, states, params, extra)
        return updates, dict(zip(transforms, states, strict=True))

    return composed(init, update, *transforms.values(), adds=(ChoosesByName,))


def _check_unlabelled(name: str, labels: Any, updates: PyTree, params: MaybeParams) -> None:
    """Without parameters to compare them with, gradients are compared with the labels."""
    if params is None and not callable(labels) and (error := tree.structure_error("updates", updates, labels, name)):
        raise ValueError(error)


def _each(
    txs: Sequence[GradientTransformation],
    groups: Sequence[Sequence[str]],
    updates: PyTree,
    states: Sequence[PyTree],
    params: MaybeParams,
    extra: Mapping[str, Any],
) -> tuple[PyTree, list[PyTree]]:
    """The updates by a transformation for each group of paths, and their states."""
    parts = tree.partition(updates, groups)
    own: Sequence[Any] = [None] * len(parts) if params is None else tree.partition(params, groups)
    done, new = [], []
    for i, (tx, part, state) in enumerate(zip(txs, parts, states, strict=True)):
        more = extra if params is None else _extra_of_part(extra, params, groups, i)
        with dividing(updates if params is None else params):
            part, state = tx.update(part, state, own[i], **more)
        done.append(part)
        new.append(state)
    return tree.combine(done, updates), new


def _extra_of_part(
    extra: Mapping[str, Any], params: Params, groups: Sequence[Sequence[str]], i: int
) -> Mapping[str, Any]:
    """``extra`` for the parameters of one group: functions of them leave the others alone."""

    def whole(part: Params) -> Params:
        parts = tree.partition(params, groups)
        return tree.combine([*parts[:i], part, *parts[i + 1 :]], params)

    def part_of(grads: PyTree) -> PyTree:
        check_updates(grads, params, SECOND)
        return tree.partition(grads, groups)[i]

    return functions_of_part(extra, whole, part_of)


def masked(tx: GradientTransformation, mask: Mask) -> GradientTransformation:
    """Apply ``tx`` where ``mask`` is True; the other updates pass through, and no state is kept for them.

    Args:
        tx: sees a flat dict of its parameters by path.
        mask: a bool for each parameter, or a function of the parameters that returns them.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> params = {"w": torch.ones(2), "b": torch.ones(2)}
        >>> tx = optim.masked(optim.scale(0.5), {"w": True, "b": False})
        >>> tx.update(params, tx.init(params))[0]
        {'w': tensor([0.5000, 0.5000]), 'b': tensor([1., 1.])}
    """
    return _of_some(tx, mask, True, identity())


def _of_some(
    tx: GradientTransformation, mask: Mask, value: bool, otherwise: GradientTransformation
) -> GradientTransformation:
    """``tx`` where ``mask`` is ``value``, and what has no state ``otherwise``."""
    tx = as_transformation("tx", tx)

    def groups(params: Params) -> list[list[str]]:
        flags = dict(tree.leaves_with_path(resolve(mask, params)))
        return [[path for path in tree.paths(params) if (flags[path] is value) == chosen] for chosen in (True, False)]

    def init(params: Params) -> PyTree:
        check_labels("mask", mask, params, bool)
        with dividing(params):
            return tx.init(tree.partition(params, groups(params))[0])

    def update(updates: PyTree, state: PyTree, params: MaybeParams = None, **extra: Any) -> tuple[PyTree, PyTree]:
        _check_unlabelled("mask", mask, updates, params)
        paths = groups(updates if params is None else params)
        updates, states = _each([tx, otherwise], paths, updates, [state, EmptyState()], params, extra)
        return updates, states[0]

    return composed(init, update, tx, adds=(ChoosesByName,))


def set_to_zero() -> GradientTransformation:
    """Updates of zero, whatever the gradients are."""
    return stateless(lambda updates, params: tree.elementwise(torch.zeros_like, updates))


# --- freezing ----------------------------------------------------------------------------------------------------


def freeze(mask: Mask, tx: GradientTransformation | None = None) -> GradientTransformation:
    """No updates where ``mask`` is True.

    Args:
        mask: True: frozen. A bool for each parameter, or a function of the parameters that returns them.
        tx: what the other parameters are given to; no state is kept for a frozen one. Without ``tx`` the updates of
            the others pass through: ``chain(tx, freeze(mask))`` freezes too, but ``tx`` keeps state for everything.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> params = {"body.w": torch.ones(2), "head.w": torch.ones(2)}
        >>> mask = optim.label_by_path(params, [("body", True)], default=False)
        >>> tx = optim.freeze(mask, optim.adam(0.1))
        >>> state = tx.init(params)
        >>> list(state["adam"].mu)
        ['head.w']
        >>> tx.update(params, state)[0]["body.w"]
        tensor([0., 0.])
    """

    if tx is not None:
        return _of_some(tx, mask, False, set_to_zero())

    def zero_frozen(updates: PyTree, params: MaybeParams) -> PyTree:
        frozen = tree.leaf_values(resolve(mask, updates if params is None else params), updates)
        return tree.elementwise(lambda u, f: torch.where(f > 0, torch.zeros_like(u), u), updates, frozen)

    zero = stateless(zero_frozen)

    def init(params: Params) -> PyTree:
        check_labels("mask", mask, params, bool)
        return zero.init(params)

    return composed(init, zero.update, adds=(ChoosesByName,))


class _Unfreeze(NamedTuple):
    step: Tensor


class UnfreezeState(_Unfreeze, KeepsProgress):
    """Updates so far."""

    __slots__ = ()


def unfreeze(starts: Any) -> GradientTransformation:
    """No updates for a parameter before update number ``starts`` of its own: gradual unfreezing.

    Stands at the end of a chain, after weight decay and learning rate.

    Args:
        starts: an int for each parameter (`label_by_path` makes them): 0 trains from the first update on.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> params = {"body.w": torch.ones(1), "head.w": torch.ones(1)}
        >>> starts = optim.label_by_path(params, [("head", 0), ("body", 100)])
        >>> tx = optim.chain(optim.sgd(1.0), optim.unfreeze(starts))
        >>> tx.update(params, tx.init(params))[0]
        {'body.w': tensor([0.]), 'head.w': tensor([-1.])}
    """

    def init(params: Params) -> UnfreezeState:
        check_labels("starts", starts, params, int)
        return UnfreezeState(zero_count(params))

    def update(updates: PyTree, state: UnfreezeState, params: MaybeParams = None) -> tuple[PyTree, UnfreezeState]:
        start = tree.leaf_values(resolve(starts, updates if params is None else params), updates)
        updates = tree.elementwise(lambda u, s: torch.where(s > state.step, torch.zeros_like(u), u), updates, start)
        return updates, UnfreezeState(state.step + 1)

    return GradientTransformation(init, update)


def frozen_layers(params: Params, which: int | slice | Iterable[int], *, depth: int = 1) -> dict[str, bool]:
    """A mask for `freeze`: True for the parameters of the layers with these numbers in `layers`.

    Args:
        params: the parameters.
        which: a number, a slice, or numbers; negative ones count from the end.
        depth: as for `layers`.

    Raises:
        ValueError: there is no such layer; the message lists those that there are.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> params = {"stem.weight": torch.ones(1), "body.weight": torch.ones(1), "head.weight": torch.ones(1)}
        >>> optim.frozen_layers(params, slice(0, 2))
        {'stem.weight': True, 'body.weight': True, 'head.weight': False}
    """
    names = layers(params, depth)
    if isinstance(which, (str, bool)):
        raise TypeError(f"which must be numbers of layers, got {which!r}; a mask by name is made by label_by_path")
    numbers = range(len(names))[which] if isinstance(which, slice) else [which] if isinstance(which, int) else which
    try:
        chosen = {names[i] for i in numbers}
    except IndexError:
        raise ValueError(f"which must be among the {len(names)} layers {names}, got {which!r}") from None
    return {path: any(tree.matches(path, name) for name in chosen) for path in tree.paths(params)}


def layers(params: Params, depth: int = 1) -> list[str]:
    """The names of the layers, in the order of the network: the first ``depth`` parts of the parameters' names.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> params = {"stem.weight": torch.ones(1), "body.0.weight": torch.ones(1), "body.1.weight": torch.ones(1)}
        >>> optim.layers(params), optim.layers(params, depth=2)
        (['stem', 'body'], ['stem', 'body.0', 'body.1'])
    """
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
    modules = [path.split(".")[:-1] or [path] for path in tree.paths(params)]
    return list(dict.fromkeys(".".join(parts[:depth]) for parts in modules))


def up_to(params: Params, last: str) -> dict[str, bool]:
    """A mask for `freeze`: True for everything up to and including a layer, in the order of the network.

    Args:
        params: the parameters.
        last: a module (``"layer2"``, ``"layer2.0.conv1"``) or a parameter.

    Raises:
        ValueError: nothing is called so; the message lists the layers.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> params = {"stem.weight": torch.ones(1), "body.weight": torch.ones(1), "head.weight": torch.ones(1)}
        >>> optim.up_to(params, "body")
        {'stem.weight': True, 'body.weight': True, 'head.weight': False}
    """
    paths = tree.paths(params)
    ends = [i for i, path in enumerate(paths) if tree.matches(path, last)]
    if not ends:
        raise ValueError(f"last must be a layer, such as {layers(params)}, got {last!r}")
    return {path: i <= ends[-1] for i, path in enumerate(paths)}


# --- factors -----------------------------------------------------------------------------------------------------


def scale_leaves(factors: Any) -> GradientTransformation:
    """Multiply each parameter's update by a number of its own, for instance those of `layer_decay`.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> params = {"stem.w": torch.ones(1), "head.w": torch.ones(1)}
        >>> tx = optim.chain(optim.sgd(1.0), optim.scale_leaves(optim.layer_decay(params, ["stem", "head"], 0.5)))
        >>> tx.update(params, tx.init(params))[0]
        {'stem.w': tensor([-0.5000]), 'head.w': tensor([-1.])}
    """

    def fn(updates: PyTree, params: MaybeParams) -> PyTree:
        values = tree.leaf_values(resolve(factors, updates if params is None else params), updates)
        return tree.elementwise(lambda u, f: tree.upcast(u) * f, updates, values)

    inner = stateless(fn)

    def init(params: Params) -> PyTree:
        check_labels("factors", factors, params, (int, float))
        check_finite(**{f"factors[{path!r}]": f for path, f in tree.leaves_with_path(resolve(factors, params))})
        return inner.init(params)

    return GradientTransformation(init, inner.update)
