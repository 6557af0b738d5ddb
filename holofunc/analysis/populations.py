"""Many trainings in one program: members stacked along a leading axis, stepped by `vmap`."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from holofunc import tree
from holofunc.compile import Checked
from holofunc.metrics import Metric
from holofunc.model import Model
from holofunc.optim import GradientTransformation, set_hyperparams
from holofunc.train import TrainState, create_state
from holofunc.typing import Batch, EvalStep, Key, Metrics, PyTree, Step

__all__ = [
    "Choice",
    "Population",
    "PopulationStep",
    "best_member",
    "create_population",
    "fastest_method",
    "population",
    "population_eval",
]

Method = Literal["auto", "vmap", "loop"]
METHODS = ("auto", "vmap", "loop")
Sharing = Literal["shared", "own"]


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
        keys: of each member, of initial values and all draws; ``holofunc.random.split(key, k)`` makes them. The same
            key for all starts all at one point.
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


class PopulationStep(Checked):
    """The result of `population`.

    Attributes:
        choice: what was measured before the first step, a `Choice`; None if nothing was.
    """

    def __init__(self, step: Step, method: Method, batches: Sharing, chunk_size: int | None) -> None:
        self.step, self.method, self.batches, self.chunk_size = step, method, batches, chunk_size
        self.choice: Choice | None = None

    def __call__(self, states: PyTree, batch: Batch, active: Tensor | None = None) -> tuple[PyTree, Metrics]:
        return super().__call__(states, batch, active)

    def check(self, states: PyTree, batch: Batch, active: Tensor | None = None) -> None:
        members = states.members if isinstance(states, Population) else states
        size = num_members(members)
        if active is not None and (active.shape != (size,) or active.dtype != torch.bool):
            got = f"{active.dtype} of shape {tuple(active.shape)}"
            raise ValueError(f"active must be bool of shape ({size},), one per member, got {got}")
        if self.batches == "own" and any(len(x) != size for x in tree.leaves(batch)):
            found = sorted({len(x) for x in tree.leaves(batch)})
            raise ValueError(
                f"batch must hold a batch for each of the {size} members, along its first axis, got {found}"
            )
        if self.method == "auto" and self.choice is None:
            self.choice = fastest_method(self.step, members, batch, batches=self.batches, repeats=1)

    def run(self, states: PyTree, batch: Batch, active: Tensor | None = None) -> tuple[PyTree, Metrics]:
        if isinstance(states, Population):
            members, metrics = self.run(states.members, batch, active)
            named = {f"{name}/{i}": x for name, xs in metrics.items() for i, x in enumerate(xs.unbind())}
            means = {name: xs.mean() for name, xs in metrics.items() if xs.is_floating_point()}
            return Population(states.step + 1, members), {**means, **named}
        new, metrics = self._stepped(states, batch)
        if active is None:
            return new, metrics
        return tree.map(lambda x, y: torch.where(active.view(-1, *[1] * (x.ndim - 1)), x, y), new, states), metrics

    def _stepped(self, states: PyTree, batch: Batch) -> tuple[PyTree, Metrics]:
        size, own = num_members(states), self.batches == "own"
        if (self.choice.method if self.choice else self.method) == "loop":
            parts = tree.unstack(batch) if own else [batch] * size
            done = [self.step(state, part) for state, part in zip(tree.unstack(states), parts, strict=True)]
            return tree.stack([state for state, _ in done]), tree.stack([metrics for _, metrics in done])
        return torch.vmap(self.step, in_dims=(0, 0 if own else None), chunk_size=self.chunk_size)(states, batch)


def population(
    step: Step, *, method: Method = "auto", batches: Sharing = "shared", chunk_size: int | None = None
) -> PopulationStep:
    """Make a step of many networks at once.

    Args:
        step: of `holofunc.train.make_train_step`, or any pure ``step(state, batch) -> (state, metrics)``.
        method: ``"vmap"`` makes one program of all members: several times faster for small dense networks, and on
            accelerators for most. ``"loop"`` steps one after the other: faster for convolutions on a CPU. ``"auto"``
            measures both, eagerly, before the first step, and says in ``choice`` what it found. They agree to rounding:
            a run that is to be resumed to the last bit, maybe on another machine, names one.
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
        >>> metrics["loss"].shape, sorted(step.choice.seconds)  # seconds of each way
        (torch.Size([4]), ['loop', 'vmap'])
    """
    for name, value, known in (("method", method, METHODS), ("batches", batches, ("shared", "own"))):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
    return PopulationStep(step, method, batches, chunk_size)


class Choice(NamedTuple):
    """The measurements of `fastest_method`: the faster ``method``, and the ``seconds`` of a step with each."""

    method: Method
    seconds: dict[str, float]

    def __str__(self) -> str:
        told = ", ".join(f"by {name} {1e3 * value:.3g} ms" for name, value in self.seconds.items())
        return f"{self.method} (a step {told})"


def fastest_method(
    step: Step,
    states: PyTree,
    batch: Batch,
    *,
    batches: Sharing = "shared",
    repeats: int = 3,
    wrap: Callable[..., Any] = lambda fn: fn,
) -> Choice:
    """Measure which ``method`` of `population` is faster for these states on this machine.

    Args:
        step: of one member.
        states: stacked.
        batch: as for `population`.
        batches: likewise.
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
        run = wrap(population(step, method=method, batches=batches))
        times = []
        for _ in range(repeats + 1):
            began = time.perf_counter()
            tree.map(lambda x: x.cpu(), run(states, batch)[1])  # waits for the device
            times.append(time.perf_counter() - began)
        seconds[method] = min(times[1:])
    return Choice("vmap" if seconds["vmap"] <= seconds["loop"] else "loop", seconds)


# --- evaluation --------------------------------------------------------------------------------------------------


class _PopulationEval(EvalStep):
    def __init__(self, eval_step: EvalStep, members: int, method: Method) -> None:
        self.eval_step, self.members, self.method = eval_step, members, method
        self.metrics = {name: _of_members(metric, members) for name, metric in eval_step.metrics.items()}

    def __call__(self, state: Population, batch: Batch, weights: Tensor | None = None) -> dict[str, PyTree]:
        if (count := num_members(state.members)) != self.members:
            raise ValueError(f"members must be those of the population, {count}, got {self.members}")

        def one(member: PyTree) -> dict[str, PyTree]:
            return self.eval_step(member, batch, weights)

        if self.method == "loop":
            return tree.stack([one(member) for member in tree.unstack(state.members)])
        return torch.vmap(one)(state.members)

    def check(self, batch: Batch) -> None:
        self.eval_step.check(batch)


def _of_members(metric: Metric, members: int) -> Metric:
    def merge(a: PyTree, b: PyTree) -> PyTree:
        pairs = zip(tree.unstack(a), tree.unstack(b), strict=True)
        return tree.stack([metric.merge(*pair) for pair in pairs])

    def compute(states: PyTree) -> dict[str, PyTree]:
        found = [metric.compute(state) for state in tree.unstack(states)]
        return {
            "mean": tree.map(lambda *xs: torch.stack(xs).mean(0), *found),
            **{str(i): x for i, x in enumerate(found)},
        }

    return metric._replace(
        init=lambda **options: tree.stack([metric.init(**options) for _ in range(members)]),
        merge=merge,
        compute=compute,
    )


def population_eval(eval_step: EvalStep, members: int, *, method: Literal["vmap", "loop"] = "vmap") -> EvalStep:
    """An evaluation of a `Population`: each metric per member, as ``accuracy/0``, and its mean, as ``accuracy/mean``.

    Args:
        eval_step: of one member, such as `holofunc.train.make_eval_step` makes.
        members: how many there are, at least 1.
        method: as for `population`.

    Example:
        >>> import torch
        >>> from holofunc import analysis, lift, metrics, optim, random, train
        >>> model = lift(torch.nn.Linear, 3, 2)
        >>> states = analysis.create_population(model, optim.sgd(0.1), random.split(random.key(0), 2))
        >>> step = analysis.population_eval(train.make_eval_step(model, {"accuracy": metrics.accuracy()}), 2)
        >>> data = [(torch.ones(4, 3), torch.zeros(4, dtype=torch.int64))]
        >>> sorted(train.evaluate(step, analysis.Population.of(states), data))
        ['accuracy/0', 'accuracy/1', 'accuracy/mean']
    """
    if members < 1:
        raise ValueError(f"members must be at least 1, got {members}")
    if method not in METHODS[1:]:
        raise ValueError(f"method must be 'vmap' or 'loop', got {method!r}")
    return _PopulationEval(eval_step, members, method)


def best_member(record: Mapping[str, Any], metric: str = "loss", *, mode: Literal["min", "max"] = "min") -> int:
    """The index of the member with the best value of a metric in a record of `holofunc.train.fit`.

    ``tree.unstack(result.state.members)[best]`` is its state; one checkpoint holds all of them.

    Args:
        record: of ``result.history``, usually the last.
        metric: ``record[f"{metric}/0"]`` and so on are the members' values. Those that are NaN are not the best.
        mode: whether low or high values are good.

    Raises:
        ValueError: the record has no such metric of members, or it is NaN for all of them.

    Example:
        >>> from holofunc import analysis
        >>> analysis.best_member({"loss": 0.2, "loss/0": 0.3, "loss/1": 0.1})
        1
    """
    if mode not in ("min", "max"):
        raise ValueError(f"mode must be 'min' or 'max', got {mode!r}")
    values = {i: record[f"{metric}/{i}"] for i in range(len(record)) if f"{metric}/{i}" in record}
    values = {i: value for i, value in values.items() if value == value}
    if not values:
        raise ValueError(f"record must hold {metric}/0, {metric}/1, ..., got {', '.join(sorted(record))}")
    return (min if mode == "min" else max)(values, key=values.__getitem__)


def num_members(states: PyTree) -> int:
    """The length of the leading axis that all leaves share."""
    counts = {len(x) if x.ndim else -1 for x in tree.leaves(states)}
    if len(counts) != 1 or min(counts) < 1:
        raise ValueError(
            "states must be stacked along one leading axis of members, at least one (analysis.stack makes such), got "
            f"leading axes {sorted(counts)}"
        )
    return counts.pop()
