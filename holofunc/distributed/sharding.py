"""Sharding of optimizer states and parameters over ranks."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from holofunc import tree
from holofunc.distributed.averaging import AverageGradientsState, counted, means
from holofunc.distributed.collectives import collective
from holofunc.distributed.ranks import rank, world_size
from holofunc.optim.base import GradientTransformation, MaybeParams, apply_updates, inside
from holofunc.optim.checks import need_params
from holofunc.optim.numerics import scalar_dtype
from holofunc.typing import Params, PyTree, Scalar

__all__ = ["ShardState", "gather", "shard", "share"]

# --- who owns what -----------------------------------------------------------------------------------------------


def owners(shapes: Mapping[str, Any], world: int) -> list[list[str]]:
    """The names of each rank's leaves: whole leaves, the largest first, each to the rank that has the least."""
    if not isinstance(shapes, Mapping) or not all(isinstance(x, Tensor) for x in shapes.values()):
        raise TypeError("params must be a flat dict of tensors, to be cut into the shares of ranks")
    names: list[list[str]] = [[] for _ in range(world)]
    load = [0] * world
    sizes = {name: x.numel() for name, x in shapes.items()}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = load.index(min(load))
        names[least].append(name)
        load[least] += sizes[name]
    return [sorted(each) for each in names]


def share(params: Params, group: Any = None) -> Params:
    """The parameters that this rank owns: replicated in, sharded out. All of them in one process.

    Every parameter belongs to one rank as a whole, so that rules that look at matrices, norms or names find what they
    look at. The shares are as even as whole parameters can be.

    Example:
        >>> import torch
        >>> from holofunc import distributed
        >>> sorted(distributed.share({"w": torch.ones(2, 2), "b": torch.ones(2)}))
        ['b', 'w']
    """
    return {name: params[name] for name in owners(params, world_size(group))[rank(group)]}


class _Cut(NamedTuple):
    """Flat dicts of the names and shapes of ``like`` in shares: vectors of one length, one per rank."""

    names: list[list[str]]
    like: Mapping[str, Tensor]
    length: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, like: Mapping[str, Tensor], own: Mapping[str, Tensor], group: Any) -> "_Cut":
        names = owners(like, world_size(group))
        length = max(sum(like[n].numel() for n in each) for each in names)
        devices = (x.device for x in (*own.values(), *like.values()) if not x.is_meta)
        return cls(names, like, length, scalar_dtype(like), next(devices, torch.device("cpu")))

    def vector(self, leaves: Mapping[str, Tensor], owner: int) -> Tensor:
        """What a rank owns of ``leaves``, one after the other, filled up with zeros."""
        parts = [leaves[name].flatten().to(self.dtype) for name in self.names[owner]]
        return torch.cat([*parts, self.zeros((self.length - sum(part.numel() for part in parts),))])

    def zeros(self, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def leaves(self, vector: Tensor, owner: int) -> dict[str, Tensor]:
        """The inverse of ``vector``."""
        sizes = [self.like[name].numel() for name in self.names[owner]]
        cut = zip(self.names[owner], vector[: sum(sizes)].split(sizes), strict=True)
        return {name: x.view(self.like[name].shape) for name, x in cut}

    def joined(
        self, own: Mapping[str, Tensor], group: Any, beside: Tensor, due: Tensor | None = None, divisor: float = 1.0
    ) -> tuple[Params, Tensor]:
        """All leaves, of those that each rank owns, and what is 0-d beside them: sharded in, replicated out."""
        vector = torch.cat([self.vector(own, rank(group)), beside[None]])
        parts = collective("gather", vector, group, due=due, divisor=divisor).split(self.length + 1)
        whole = {n: x for owner, part in enumerate(parts) for n, x in self.leaves(part, owner).items()}
        return {name: whole[name] for name in self.like}, torch.stack([part[-1] for part in parts])


# --- the state of an optimizer -----------------------------------------------------------------------------------


class ShardState(NamedTuple):
    """The state of ``tx`` for the parameters that this rank owns, and what `average_gradients` keeps."""

    average: AverageGradientsState
    inner: PyTree


def shard(tx: GradientTransformation, group: Any = None, *, averaged: bool = False) -> GradientTransformation:
    """Let every rank update the parameters that it owns (`share`), and keep the state of ``tx`` only for these.

    Gradients are averaged over the samples of all ranks as by `average_gradients`, by a reduce-scatter, and the updates
    gathered: two collectives, which together move what one all-reduce does, and 1 / W of the optimizer's memory on W
    ranks (ZeRO 1 and 2). Parameters, and wrappers around it, stay whole: ``lookahead(shard(tx))``,
    ``apply_if_finite(shard(tx))``, ``multi_steps(shard(tx), 4)``.

    In its state, ``inner`` has the names and paths of the state of ``tx``, whoever owns them: so what some ranks have
    saved (`save_sharded`), others can read.

    Args:
        tx: of flat dicts of parameters. It must treat every parameter on its own: what looks at all of them
            (`clip_by_global_norm`, `prodigy`) is refused. Masks and labels are functions of the parameters, as a rank
            asks for those of its share; what draws for all of them (`add_noise`) stands before, as below.
        group: as for `average_gradients`.
        averaged: gradients come in replicated already: ``chain(average_gradients(), clip_by_global_norm(1.0),
            shard(adam(1e-3), averaged=True))`` (ZeRO 1).

    Raises:
        ValueError: if ``tx`` keeps weights, refuses updates or looks twice: such wrappers stand outside; from ``init``,
            if it looks across parameters. TypeError: from ``init``, for parameters that are no flat dict.

    Source: Rajbhandari et al., "ZeRO" (arXiv 1910.02054), with whole parameters in place of equal slices.

    Example:
        >>> import torch
        >>> from holofunc import distributed, optim
        >>> tx, params = distributed.shard(optim.adam(0.1)), {"w": torch.zeros(2)}
        >>> tx.update({"w": torch.ones(2)}, tx.init(params), params)[0]
        {'w': tensor([-0.1000, -0.1000])}
    """
    tx = inside("shard", tx)

    def init(params: Params) -> ShardState:
        state = tx.init(share(params, group))
        _check_separable(tx, params)
        return ShardState(AverageGradientsState.start(params), state)

    def update(
        updates: PyTree,
        state: ShardState,
        params: MaybeParams = None,
        *,
        weight: Scalar = 1.0,
        loss: Any = None,
        due: Tensor | None = None,
        buffers: PyTree = None,
        **extra: Any,
    ) -> tuple[PyTree, ShardState]:
        need_params(params, "shard")
        loss = state.average.latest(loss)
        if world_size(group) == 1 or not tree.leaves(updates):
            average = AverageGradientsState(loss, tree.global_norm(updates))
            updates, inner = tx.update(updates, state.inner, params, weight=weight, loss=loss, **extra)
            return updates, ShardState(average, inner)
        grads, whole, me = dict(updates), dict(params), rank(group)  # type: ignore[arg-type]
        cut = _Cut.of(whole, whole, group)
        mine = cut.vector(grads, me)
        if not averaged:
            parts = [cut.vector(grads, r) for r in range(world_size(group))]
            *parts, facts = counted(parts, weight, loss, buffers, grads)
            vector = torch.cat([x for part in parts for x in (part, facts)])
            mine, loss = means(collective("scatter", vector, group, due=due))
        own = {name: whole[name] for name in cut.names[me]}
        new, inner = tx.update(cut.leaves(mine, me), state.inner, own, weight=weight, loss=loss, **extra)
        fine = tree.all_finite(inner)  # or all ranks are to learn of it
        new = tree.elementwise(lambda u: torch.where(fine, u, torch.nan), new)
        updates, squares = cut.joined(dict(new), group, mine.square().sum(), due)
        return updates, ShardState(AverageGradientsState(loss, squares.sum().sqrt()), inner)

    return GradientTransformation(init, update)


def _check_separable(tx: GradientTransformation, params: Params) -> None:
    """Refuse what would not do to a share of the parameters what it does to all of them."""
    names = sorted(params, key=lambda name: (params[name].numel(), name))[:2]
    if len(names) < 2 or not all(tree.is_known(params[name]) for name in names):
        return
    alone, beside = (_first_after(tx, params, names[:n]) for n in (1, 2))
    if not torch.allclose(alone, beside, rtol=1e-3, atol=0, equal_nan=True):
        raise ValueError(
            "shard cannot wrap what looks at all parameters, as clip_by_global_norm does: write "
            "chain(average_gradients(), clip_by_global_norm(...), shard(tx, averaged=True))"
        )


def _first_after(tx: GradientTransformation, params: Params, names: Sequence[str]) -> Tensor:
    """The fourth update of the first of ``names``, the gradients of the others being large."""
    values = {name: params[name] for name in names}
    state = tx.init(values)
    for step in range(4):  # an estimate over all parameters may take some to show
        grads = {
            name: torch.full_like(p, 1.0 if name == names[0] else 1e3 * (-1) ** step) for name, p in values.items()
        }
        updates, state = tx.update(grads, state, values, loss=params[names[0]].new_ones(()))
        values = apply_updates(values, updates)
    return updates[names[0]]


# --- parameters --------------------------------------------------------------------------------------------------


def gather(params: Params, like: Params, group: Any = None) -> Params:
    """All parameters, from the shares that the ranks own (`share`): sharded in, replicated out (ZeRO 3).

    Its derivative is the *mean* over the ranks, of one's own share: a reduce-scatter. In front of an objective it
    leaves a step that knows only shares, and needs no `average_gradients`::

        step = make_train_step(lambda params, *rest: objective(distributed.gather(params, like), *rest), tx)

    The ranks' parts of a batch must be of one size (``drop_last=True``), and ``tx`` treat every parameter on its own.

    Args:
        params: the share of this rank.
        like: names, shapes and dtypes of all parameters, which may be on the device ``meta``.
        group: as for `psum`.

    Example:
        >>> import torch
        >>> from holofunc import distributed
        >>> params = {"w": torch.ones(2)}
        >>> distributed.gather(distributed.share(params), params)
        {'w': tensor([1., 1.])}
    """
    if world_size(group) == 1:
        return params
    cut = _Cut.of(like, params, group)
    whole, _ = cut.joined(params, group, cut.zeros(()), divisor=world_size(group))
    return {name: x.to(like[name].dtype) for name, x in whole.items()}
