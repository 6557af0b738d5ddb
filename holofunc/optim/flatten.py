"""Wrappers that change what a transformation sees or returns: SAM, cautious masks, one flat vector, measurements."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from holofunc import tree
from holofunc.optim.base import (
    GradientTransformation,
    MaybeParams,
    check_params,
    check_transformation,
    check_updates,
    composed,
    held_by,
    need_params,
)
from holofunc.optim.capabilities import Descends, KeepsProgress, KeepsWeights, TakesSecondGradient, UsersOwn, averaged
from holofunc.optim.checks import SECOND
from holofunc.optim.labels import dtype_name
from holofunc.optim.layerwise import sizes
from holofunc.optim.nesting import check_inside, init_inside
from holofunc.optim.numerics import ABSENT, check_decay, check_flags, check_nonnegative, scalar_dtype, zero_count
from holofunc.typing import Params, PyTree, Scalar

__all__ = ["FlattenState", "MonitorState", "SamState", "cautious", "flatten", "monitor", "sam"]


class _Sam(NamedTuple):
    inner: PyTree


class SamState(_Sam, TakesSecondGradient):
    """The state of the optimizer, marked as one whose updates look at a second gradient (`looks_twice`)."""

    __slots__ = ()


def sam(tx: GradientTransformation, rho: Scalar = 0.05, *, adaptive: bool = False) -> GradientTransformation:
    """Sharpness-aware minimization: ``tx`` sees the gradient at ``params + rho * g / norm(g)``.

    ``update`` needs one more argument, ``grad_fn(params) -> gradients``, which it calls once; steps of
    `holofunc.train.make_train_step` pass one that evaluates the same batch with the same key. Accumulation goes inside:
    ``sam(multi_steps(tx, n))``.

    Args:
        tx: the optimizer.
        rho: distance of the second look, at least 0.
        adaptive: measure distances in units of ``abs(p)``: ``rho * p**2 * g / norm(abs(p) * g)``.

    Source: Foret et al. (arXiv 2010.01412); adaptive: Kwon et al., ASAM (arXiv 2102.11600).

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> grad_fn = torch.func.grad(lambda params: (params["w"] ** 2).sum())
        >>> tx, params = optim.sam(optim.sgd(0.5), rho=0.5), {"w": torch.ones(1)}
        >>> tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)[0]
        {'w': tensor([-1.5000])}
    """
    check_flags(adaptive=adaptive)
    check_transformation("tx", tx)
    check_inside("sam", tx)
    check_nonnegative(rho=rho)

    def init(params: Params) -> SamState:
        check_params(params, "sam")
        return SamState(init_inside("sam", tx, params))

    def update(
        updates: PyTree,
        state: SamState,
        params: MaybeParams = None,
        *,
        grad_fn: Callable[[Params], PyTree] | None = None,
        flush: bool = False,
        **extra: Any,
    ) -> tuple[PyTree, SamState]:
        need_params(params, "sam")
        if flush:  # closes a window of gradients that were looked at twice already
            updates, inner = tx.update(updates, state.inner, params, flush=True, **extra)
            return updates, SamState(inner)
        if grad_fn is None:
            raise TypeError("sam needs a second gradient: call update(updates, state, params, grad_fn=...)")
        weights = tree.elementwise(lambda p: p.abs() if adaptive else torch.ones_like(p), params)
        norm = tree.global_norm(tree.elementwise(lambda g, w: tree.wide(g) * w, updates, weights))
        factor = tree.hoist(torch.where(norm > 0, rho / torch.where(norm > 0, norm, 1.0), 0.0))
        looked_at = tree.elementwise(
            lambda p, g, w: (tree.wide(p) + factor * w * w * tree.wide(g)).to(p.dtype), params, updates, weights
        )
        grads = grad_fn(looked_at)
        check_updates(grads, params, SECOND)
        updates, inner = tx.update(grads, state.inner, params, **extra)
        return updates, SamState(inner)

    return composed(init, update, tx, adds=(TakesSecondGradient,))


def cautious(tx: GradientTransformation, *, raw: bool | None = None) -> GradientTransformation:
    """Keep of the updates of ``tx`` only the elements that go down the gradient, and scale them up to make up for it.

    Each tensor is divided by the fraction that is kept (at least 1e-3).

    Args:
        tx: an optimizer, or a rule. Around a whole optimizer the mask covers its weight decay too; the paper's AdamW is
            ``named_chain(adam=cautious(scale_by_adam()), weight_decay=..., learning_rate=...)``. Wrappers
            that gather gradients, or keep weights that match the updates, belong around it, and are
            refused inside.
        raw: True says that ``tx`` is a rule before the learning rate, whose output points up the gradient; False, that
            it is an optimizer, whose updates descend. None is an optimizer where ``tx`` holds a learning rate, and
            otherwise a rule; of functions of the user's own it has to be said.

    Raises:
        ValueError: ``raw`` is not said where it has to be; or is True for what holds a learning rate.

    Source: Liang et al., "Cautious optimizers" (arXiv 2411.16085), with the scale of its later code: 1 / mean(mask).

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> params, tx = {"w": torch.zeros(2)}, optim.cautious(optim.sgd(1.0, momentum=0.9))
        >>> _, state = tx.update({"w": torch.tensor([1.0, 1.0])}, tx.init(params), params)
        >>> tx.update({"w": torch.tensor([1.0, -0.1])}, state, params)[0]["w"].abs()
        tensor([3.8000, 0.0000])
    """
    check_transformation("tx", tx)
    check_inside("cautious", tx)
    if raw is not None:
        check_flags(raw=raw)
    descends = Descends in held_by(tx)
    if raw and descends:
        raise ValueError("raw must be False for a tx that holds a learning rate, whose updates descend, got True")
    unknown = raw is None and not descends and UsersOwn in held_by(tx)
    raw = not (descends or unknown) if raw is None else raw
    uphill = 1.0 if raw else -1.0

    def init(params: Params) -> PyTree:
        check_params(params, "cautious")
        state = init_inside("cautious", tx, params)
        if unknown:
            raise ValueError(
                "cautious must know where a tx of your own functions points: write cautious(tx, raw=True) for a rule, "
                "whose output goes up the gradient, and raw=False for an optimizer"
            )
        return state

    def update(updates: PyTree, state: PyTree, params: MaybeParams = None, **extra: Any) -> tuple[PyTree, PyTree]:
        grads = updates
        updates, state = tx.update(grads, state, params, **extra)
        agree = tree.elementwise(lambda u, g: (uphill * u * tree.wide(g) > 0).to(tree.wide(u).dtype), updates, grads)
        gain = tree.elementwise(lambda kept, n: 1 / (kept / n).clamp_min(1e-3), tree.leaf_sum(agree), sizes(updates))
        return tree.elementwise(lambda u, a, s: u * a * s, updates, agree, gain), state

    return composed(init, update, tx)


# --- one vector --------------------------------------------------------------------------------------------------


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
    for element-wise rules. A rule with a number per tensor sees one tensor; what chooses parameters by name (masks,
    labels, `muon`) stands around ``flatten``, and is refused inside.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.flatten(optim.adam(0.1)), {"a": torch.ones(2), "b": torch.ones(1, 2)}
        >>> list(tx.init(params).inner["adam"].mu)
        ['float32']
        >>> tx.update(params, tx.init(params))[0]
        {'a': tensor([-0.1000, -0.1000]), 'b': tensor([[-0.1000, -0.1000]])}
    """
    check_transformation("tx", tx)
    check_inside("flatten", tx)

    def init(params: Params) -> FlattenState:
        check_params(params, "flatten")
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

        def flat_grads(grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return _vectors({path: grads[path].to(p.dtype) for path, p in like.items()})

        if "grad_fn" in extra:
            whole = extra["grad_fn"]

            def grad_fn(vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
                pieces = _cut(vectors, like)
                grads = whole(tree.rebuild(params, [pieces[p] for p in like]))
                check_updates(grads, params, SECOND)
                return flat_grads(dict(tree.leaves_with_path(grads)))

            extra = {**extra, "grad_fn": grad_fn}
        out, inner = tx.update(flat_grads(flat), state.inner, own, **extra)
        done = _cut(out, like)
        updates = tree.rebuild(updates, [done[path] for path in flat])
        return updates, FlattenState(inner, state.names)

    return composed(init, update, tx)


def _groups(flat: Mapping[str, Tensor]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for path in sorted(flat):
        groups.setdefault(dtype_name(flat[path]), []).append(path)
    return groups


def _vectors(flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {kind: torch.cat([flat[path].reshape(-1) for path in paths]) for kind, paths in _groups(flat).items()}


def _cut(vectors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for kind, paths in _groups(like).items():
        pieces = vectors[kind].split([like[path].numel() for path in paths])
        found.update({path: piece.view(like[path].shape) for path, piece in zip(paths, pieces, strict=True)})
    return found


# --- measurements --------------------------------------------------------------------------------------------------


class _Monitor(NamedTuple):
    count: Tensor  # type: ignore[assignment]
    values: dict[str, Tensor]


class MonitorState(_Monitor, KeepsProgress):
    """Updates so far, and the latest measurements, or their moving averages, by name."""

    __slots__ = ()

    @property
    def progress(self) -> tuple[str, ...]:
        return self._fields


def monitor(*, decay: Scalar = 0.0, **measures: Callable[[PyTree, Params | None], Tensor]) -> GradientTransformation:
    """Pass updates through, and keep ``measure(updates, params)`` of each measure in the state, to be read at leisure.

    Args:
        decay: of a moving average of the measurements, in [0, 1); 0 keeps the latest.
        measures: functions that return a 0-d tensor.

    Example:
        >>> import torch
        >>> from holofunc import optim, tree
        >>> tx = optim.named_chain(seen=optim.monitor(grad_norm=lambda u, p: tree.global_norm(u)), sgd=optim.sgd(0.1))
        >>> params = {"w": torch.tensor([3.0, 4.0])}
        >>> tx.update(params, tx.init(params))[1]["seen"].values
        {'grad_norm': tensor(5.)}
    """
    check_decay(decay=decay)

    def init(params: Params) -> MonitorState:
        check_params(params, "monitor")
        count = zero_count(params)
        return MonitorState(count, {n: torch.zeros_like(count, dtype=scalar_dtype(params)) for n in measures})

    def update(
        updates: PyTree, state: MonitorState, params: MaybeParams = None, **extra: Any
    ) -> tuple[PyTree, MonitorState]:
        values = {}
        for name, measure in measures.items():
            now, old = measure(updates, params), state.values[name]
            if isinstance(now, Tensor) and now.ndim:
                raise ValueError(f"{name}: a measure must return a 0-d tensor, got shape {tuple(now.shape)}")
            keep = decay * (state.count > 0).to(old.dtype)
            values[name] = (now + keep * (old - now)).to(old.dtype)
        return updates, MonitorState(state.count + 1, values)

    return GradientTransformation(init, update)
