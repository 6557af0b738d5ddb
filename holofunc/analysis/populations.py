"""Many trainings in one program: members stacked along a leading axis, stepped by `vmap`."""

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from holofunc import tree
from holofunc.model import Model
from holofunc.optim import GradientTransformation, set_hyperparams
from holofunc.train import TrainState, create_state
from holofunc.typing import Batch, Buffers, Key, Metrics, Params, PyTree, Step

__all__ = [
    "Choice",
    "Ensemble",
    "Population",
    "create_population",
    "ensemble",
    "fastest_method",
    "population",
    "resample",
    "soup",
]

Method = Literal["vmap", "loop"]


class Population(NamedTuple):
    """A population as `holofunc.train.fit` runs it: ``step`` counts the calls, ``members`` are stacked states."""

    step: Tensor
    members: PyTree

    @staticmethod
    def of(members: PyTree) -> "Population":
        """The population of stacked states, before its first step.

        Example:
            >>> import torch
            >>> from holofunc import analysis
            >>> analysis.Population.of({"w": torch.zeros(3)}).step
            tensor(0)
        """
        return Population(torch.zeros((), dtype=torch.int64, device=tree.leaves(members)[0].device), members)


def create_population(
    model: Model, tx: GradientTransformation, keys: Key | Sequence[Key], **hyperparams: Tensor | Sequence[float]
) -> TrainState:
    """Stacked initial states, one per key.

    Args:
        model: of all members.
        tx: of all members; built by `holofunc.optim.inject_hyperparams` where members are to differ in it.
        keys: of each member, of initial values and all draws; `holofunc.random.split(key, k)` makes them. The same key
            for all starts all at one point.
        hyperparams: a value per member, by the names of `holofunc.optim.get_hyperparams`.

    Raises:
        ValueError: no keys; not one value per member; a hyperparameter that is not in the state.

    Example:
        >>> import torch
        >>> from holofunc import analysis, lift, optim, random
        >>> tx = optim.inject_hyperparams(optim.sgd)(learning_rate=0.1)
        >>> keys = random.split(random.key(0), 3)
        >>> states = analysis.create_population(lift(torch.nn.Linear, 3, 2), tx, keys, learning_rate=[0.1, 0.2, 0.3])
        >>> states.params["weight"].shape
        torch.Size([3, 2, 3])
    """
    members = list(keys)
    if not members:
        raise ValueError("keys must hold a key per member, at least one, got none")
    states = tree.stack([create_state(model, tx, key) for key in members])
    values = {name: torch.as_tensor(value) for name, value in hyperparams.items()}
    for name, value in values.items():
        if value.shape != (len(members),):
            raise ValueError(f"{name} must hold {len(members)} values, one per member, got shape {tuple(value.shape)}")
    return states._replace(opt_state=set_hyperparams(states.opt_state, **values)) if values else states


def population(
    step: Step, *, method: Method = "vmap", batches: Literal["shared", "own"] = "shared", chunk_size: int | None = None
) -> Callable[..., Any]:
    """A step of all members at once.

    Args:
        step: of `holofunc.train.make_train_step`, or any pure ``step(state, batch) -> (state, metrics)``.
        method: ``"vmap"`` makes one program of all members: several times faster for small dense networks, and on
            accelerators for most. ``"loop"`` steps one after the other: faster for convolutions on a CPU.
            `fastest_method` measures.
        batches: ``"shared"``: every member sees the same batch; ``"own"``: its tensors have a leading axis of members.
        chunk_size: members at a time under ``"vmap"``; None is all.

    Returns:
        ``step(states, batch, active=None) -> (states, metrics)``: states and metrics stacked. Members where the bool
        tensor ``active`` (K,) is False stay as they are. Given a `Population` it returns one, and metrics of the single
        members by name, ``loss/0``, ``loss/1``, ..., beside their mean ``loss``: so `holofunc.train.fit` runs it.

    Raises:
        ValueError: an unknown method; states without members, or of different numbers of them.

    Example:
        >>> import torch
        >>> from holofunc import analysis, lift, losses, optim, random, train
        >>> model, tx = lift(torch.nn.Linear, 3, 2), optim.sgd(0.1)
        >>> step = analysis.population(train.make_train_step(train.supervised(model, losses.cross_entropy), tx))
        >>> states = analysis.create_population(model, tx, random.split(random.key(0), 4))
        >>> states, metrics = step(states, (torch.ones(5, 3), torch.tensor([0, 1, 0, 1, 1])))
        >>> metrics["loss"].shape
        torch.Size([4])
    """
    for name, value, known in (("method", method, ("vmap", "loop")), ("batches", batches, ("shared", "own"))):
        if value not in known:
            raise ValueError(f"{name} must be {known[0]!r} or {known[1]!r}, got {value!r}")

    def many(states: PyTree, batch: Batch) -> tuple[PyTree, Metrics]:
        size = _num_members(states)
        if method == "loop":
            own = tree.unstack(batch) if batches == "own" else [batch] * size
            done = [step(state, part) for state, part in zip(tree.unstack(states), own, strict=True)]
            return tree.stack([state for state, _ in done]), tree.stack([metrics for _, metrics in done])
        dims = (0, None if batches == "shared" else 0)
        return torch.vmap(step, in_dims=dims, chunk_size=chunk_size)(states, batch)

    def run(states: PyTree, batch: Batch, active: Tensor | None = None) -> tuple[PyTree, Metrics]:
        if isinstance(states, Population):
            members, metrics = run(states.members, batch, active)
            named = {f"{name}/{i}": x for name, xs in metrics.items() for i, x in enumerate(xs.unbind())}
            means = {name: xs.mean() for name, xs in metrics.items() if xs.is_floating_point()}
            return Population(states.step + 1, members), {**means, **named}
        new, metrics = many(states, batch)
        if active is None:
            return new, metrics
        return tree.map(lambda x, y: torch.where(active.view(-1, *[1] * (x.ndim - 1)), x, y), new, states), metrics

    return run


class Choice(NamedTuple):
    """What `fastest_method` measured: the faster ``method``, and the ``seconds`` of each."""

    method: Method
    seconds: dict[str, float]


def fastest_method(
    step: Step, states: PyTree, batch: Batch, *, repeats: int = 3, wrap: Callable[..., Any] = lambda fn: fn
) -> Choice:
    """Which ``method`` of `population` steps these states faster on this machine: the best of some steps of each.

    Args:
        step: of one member.
        states: stacked.
        batch: shared by the members.
        repeats: steps to measure of each, after one that is not measured.
        wrap: applied to both, for instance `holofunc.jit`.

    Example:
        >>> import torch
        >>> from holofunc import analysis, lift, losses, optim, random, train
        >>> model, tx = lift(torch.nn.Linear, 3, 2), optim.sgd(0.1)
        >>> step = train.make_train_step(train.supervised(model, losses.cross_entropy), tx)
        >>> states = analysis.create_population(model, tx, random.split(random.key(0), 32))
        >>> analysis.fastest_method(step, states, (torch.ones(5, 3), torch.tensor([0, 1, 0, 1, 1]))).method
        'vmap'
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    seconds: dict[str, float] = {}
    methods: tuple[Method, ...] = ("vmap", "loop")
    for method in methods:
        run = wrap(population(step, method=method))
        times = []
        for _ in range(repeats + 1):
            began = time.perf_counter()
            tree.map(lambda x: x.cpu(), run(states, batch)[1])  # waits for the device
            times.append(time.perf_counter() - began)
        seconds[method] = min(times[1:])
    return Choice("vmap" if seconds["vmap"] <= seconds["loop"] else "loop", seconds)


def resample(states: PyTree, members: Tensor) -> PyTree:
    """The population in which member i is a copy of the former member ``members[i]``: its size may change.

    Example:
        >>> import torch
        >>> from holofunc import analysis
        >>> analysis.resample({"w": torch.tensor([1.0, 2.0, 3.0])}, torch.tensor([2, 2, 0]))
        {'w': tensor([3., 3., 1.])}
    """
    count = _num_members(states)
    if members.ndim != 1 or members.is_floating_point() or len(members) == 0:
        raise ValueError(f"members must be integers (K,), at least one, got {members.dtype} of {tuple(members.shape)}")
    if members.device.type == "cpu" and not bool(((members >= 0) & (members < count)).all()):
        raise ValueError(f"members must be in [0, {count}), got {members.tolist()}")
    return tree.map(lambda x: x[members], states)


def soup(states: PyTree, weights: Tensor | None = None) -> PyTree:
    """The mean of the members' floating leaves, weighted; of the others, the first member's.

    Members average well if they started from one point. BatchNorm statistics of the mean are not the mean of the
    statistics: `calibrate` them.

    Source: Wortsman et al., "Model soups" (ICML 2022).

    Example:
        >>> import torch
        >>> from holofunc import analysis
        >>> analysis.soup({"w": torch.tensor([1.0, 3.0])})
        {'w': tensor(2.)}
    """
    count = _num_members(states)
    if weights is not None and weights.shape != (count,):
        raise ValueError(f"weights must have shape ({count},), one per member, got {tuple(weights.shape)}")

    def mean(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x[0]
        return x.mean(0) if weights is None else torch.tensordot(weights.to(x) / weights.sum().to(x), x, 1)

    return tree.map(mean, states)


class Ensemble(NamedTuple):
    """What `ensemble` returns.

    Attributes:
        outputs: of each member, (K, N, classes).
        probabilities: their mean, (N, classes).
        prediction: (N,).
        disagreement: share of members that predict another class, (N,).
        entropy: of the mean probabilities, in nats, (N,): all uncertainty.
        mutual_information: what of it comes from members contradicting each other, (N,).
    """

    outputs: Tensor
    probabilities: Tensor
    prediction: Tensor
    disagreement: Tensor
    entropy: Tensor
    mutual_information: Tensor


def ensemble(model: Model, params: Params, buffers: Buffers, images: Tensor, *, method: Method = "vmap") -> Ensemble:
    """The joint prediction of stacked members in eval mode, and how far they disagree.

    Args:
        model: a classifier.
        params: stacked.
        buffers: stacked.
        images: (N, C, H, W).
        method: as for `population`.

    Source: Lakshminarayanan et al., "Simple and scalable predictive uncertainty estimation using deep ensembles"
        (NeurIPS 2017).

    Example:
        >>> import torch
        >>> from holofunc import analysis, lift, optim, random
        >>> model = lift(torch.nn.Linear, 3, 2)
        >>> states = analysis.create_population(model, optim.sgd(0.1), random.split(random.key(0), 4))
        >>> analysis.ensemble(model, states.params, states.buffers, torch.ones(5, 3)).probabilities.shape
        torch.Size([5, 2])
    """

    def one(params: Params, buffers: Buffers) -> Tensor:
        return model.apply(params, buffers, images)[0]

    if method == "loop":
        pairs = zip(
            tree.unstack(params), tree.unstack(buffers) if buffers else [{}] * _num_members(params), strict=True
        )
        outputs = torch.stack([one(*pair) for pair in pairs])
    else:
        outputs = torch.vmap(one)(params, buffers)
    log_p = torch.log_softmax(outputs, -1)
    p = log_p.exp().mean(0)
    prediction = p.argmax(-1)
    entropy = -torch.special.xlogy(p, p).sum(-1)
    inner = -(log_p.exp() * log_p).sum(-1).mean(0)
    apart = (outputs.argmax(-1) != prediction).to(p.dtype).mean(0)
    return Ensemble(outputs, p, prediction, apart, entropy, (entropy - inner).clamp_min(0))


def _num_members(states: PyTree) -> int:
    counts = {len(x) if x.ndim else -1 for x in tree.leaves(states)}
    if len(counts) != 1 or min(counts) < 1:
        raise ValueError(
            "states must be stacked along one leading axis of members, at least one (analysis.stack makes such), got "
            f"leading axes {sorted(counts)}"
        )
    return counts.pop()
