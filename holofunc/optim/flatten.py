"""Flattening: all parameters as one vector per dtype."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from holofunc import tree
from holofunc.optim.base import GradientTransformation, MaybeParams, composed, inside
from holofunc.optim.capabilities import KeepsWeights, averaged
from holofunc.optim.checks import SECOND, check_updates, functions_of_part
from holofunc.optim.labels import dtype_name
from holofunc.optim.numerics import ABSENT
from holofunc.typing import Params, PyTree

__all__ = ["FlattenState", "flatten"]


class _Flatten(NamedTuple):
    inner: PyTree
    names: dict[str, tuple[()]]


class FlattenState(_Flatten, KeepsWeights):
    """The state of the inner transformation, whose parameters are one vector per dtype, and their names (no values)."""

    __slots__ = ()

    def averaged(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        own = {path: params[path] for path in self.names}
        found = averaged(self.inner, _vectors(own))
        return _cut(found, {path: p for path, p in own.items() if dtype_name(p) in found})


def flatten(tx: GradientTransformation) -> GradientTransformation:
    """Give ``tx`` one vector per dtype, all tensors in a row, in the order of their paths.

    In eager code this saves time where tensors are many and small. Code compiled by `holofunc.jit` does so by itself
    for element-wise rules. A rule with a scalar per tensor sees one tensor; what chooses parameters by name (masks,
    labels, `muon`) wraps ``flatten``, and is an error inside.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.flatten(optim.adam(0.1)), {"a": torch.ones(2), "b": torch.ones(1, 2)}
        >>> list(tx.init(params).inner["adam"].mu)
        ['float32']
        >>> tx.update(params, tx.init(params))[0]
        {'a': tensor([-0.1000, -0.1000]), 'b': tensor([[-0.1000, -0.1000]])}
    """
    tx = inside("flatten", tx)

    def init(params: Params) -> FlattenState:
        flat = dict(tree.leaves_with_path(params))
        return FlattenState(tx.init(_vectors(flat)), dict.fromkeys(flat, ABSENT))

    def update(
        updates: PyTree, state: FlattenState, params: MaybeParams = None, **extra: Any
    ) -> tuple[PyTree, FlattenState]:
        flat = dict(tree.leaves_with_path(updates))
        if flat.keys() != state.names.keys():
            raise tree.StructureError(flat, dict.fromkeys(state.names, 0))
        like = flat if params is None else dict(tree.leaves_with_path(params))
        own = None if params is None else _vectors(like)

        def whole(vectors: Mapping[str, Tensor]) -> Params:
            pieces = _cut(vectors, like)
            return tree.rebuild(params, [pieces[path] for path in like])

        def vectors_of(grads: PyTree) -> dict[str, Tensor]:
            check_updates(grads, params, SECOND)
            return _vectors(dict(tree.leaves_with_path(grads)), like)

        extra = extra if params is None else functions_of_part(extra, whole, vectors_of)
        out, inner = tx.update(_vectors(flat, like), state.inner, own, **extra)
        done = _cut(out, like)
        updates = tree.rebuild(updates, [done[path] for path in flat])
        return updates, FlattenState(inner, state.names)

    return composed(init, update, tx)


def _groups(flat: Mapping[str, Tensor]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for path in sorted(flat):
        groups.setdefault(dtype_name(flat[path]), []).append(path)
    return groups


def _vectors(flat: Mapping[str, Tensor], like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """A vector for each dtype of ``like`` (None: of ``flat`` itself)."""
    groups = _groups(flat if like is None else like)
    return {kind: torch.cat([flat[path].reshape(-1) for path in paths]) for kind, paths in groups.items()}


def _cut(vectors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for kind, paths in _groups(like).items():
        pieces = vectors[kind].split([like[path].numel() for path in paths])
        found.update({path: piece.view(like[path].shape) for path, piece in zip(paths, pieces, strict=True)})
    return found
