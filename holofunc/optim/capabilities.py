"""Capabilities of states, said by classes: weights for evaluation, skipped updates, accumulation, second gradients.

A state that derives from one of these classes is found by `isinstance`, however deep it lies in the states of chains,
wrappers and partitions; nothing is read from the names of fields, which a state may choose as it likes. The classes
have no fields of their own. A NamedTuple takes one on in two steps:

    >>> from typing import NamedTuple
    >>> import torch
    >>> from holofunc import optim
    >>> class _Gate(NamedTuple):
    ...     skipped: torch.Tensor
    >>> class GateState(_Gate, optim.CanSkip):
    ...     '''Whether the last update was skipped.'''
    ...     __slots__ = ()
    >>> optim.skipped((GateState(torch.tensor(True)), ()))
    tensor(True)

"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from holofunc import tree
from holofunc.typing import Buffers, Params, PyTree

__all__ = [
    "Accumulates", "CanSkip", "ChoosesByName", "KeepsBuffers", "KeepsCopies", "KeepsProgress", "KeepsWeights",
    "ReportsHyperparams", "ScalesLoss", "TakesHessianProduct", "TakesSecondGradient", "TiesWeights", "accumulates",
    "check_nesting", "eval_buffers", "eval_params", "find", "gave_up", "looks_twice", "loss_scale", "skipped",
]  # fmt: skip


# --- the classes -------------------------------------------------------------------------------------------------


class KeepsWeights:
    """A state with other weights for evaluation: `eval_params` finds it."""

    __slots__ = ()

    @abstractmethod
    def averaged(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights to evaluate with, by path, of those ``params`` that the state was made for."""


class KeepsBuffers:
    """A state with other buffers for evaluation: `eval_buffers` finds it."""

    __slots__ = ()

    @abstractmethod
    def averaged_buffers(self, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The buffers to evaluate with, by path."""


class TiesWeights(KeepsWeights):
    """One whose average and parameters belong together: the parameters have to move by its updates alone."""

    __slots__ = ()


class CanSkip:
    """A state of a transformation that skips updates: see `skipped` and `gave_up`.

    `holofunc.train.make_train_step` keeps the old buffers where an update was skipped.
    """

    __slots__ = ()

    @property
    @abstractmethod
    def skipped(self) -> Tensor:
        """Whether the last update was skipped, a 0-d bool."""

    @property
    def exhausted(self) -> Tensor | None:
        """Whether more updates in a row were skipped than are tolerated, 0-d bool; None where any number is."""
        return None


class Accumulates:
    """A state that accumulates the gradients of micro-batches.

    The transformation's ``update`` takes ``flush=True``, which updates with what is there: see
    `holofunc.optim.flush`.
    """

    __slots__ = ()

    @property
    @abstractmethod
    def is_open(self) -> Tensor:
        """Whether micro-batches wait for their update, a 0-d bool."""


class TakesSecondGradient:
    """The ``update`` needs ``grad_fn(params) -> gradients``: of the same batch, at other parameters, as `sam` does."""

    __slots__ = ()


class TakesHessianProduct(TakesSecondGradient):
    """It takes the derivative of ``grad_fn`` too."""

    __slots__ = ()


class KeepsCopies:
    """A state that holds, beside a state, what that one was before."""

    __slots__ = ()

    @property
    @abstractmethod
    def copies(self) -> tuple[str, ...]:
        """The names of the fields with these copies, which `find` passes over."""


class KeepsProgress:
    """A state with fields that say how far training has come: they stay where `lookahead` sets back its optimizer."""

    __slots__ = ()

    @property
    def progress(self) -> tuple[str, ...]:
        """The names of these fields."""
        return ("step",)


class ReportsHyperparams:
    """A state that knows the hyperparameters of the latest update; `holofunc.train.fit` records them."""

    __slots__ = ()

    @property
    @abstractmethod
    def hyperparameters(self) -> dict[str, Tensor]:
        """By name, 0-d."""


class ScalesLoss:
    """A state with a factor for the loss before it is differentiated; gradients arrive divided by it."""

    __slots__ = ()

    @property
    @abstractmethod
    def loss_scale(self) -> Tensor:
        """The factor, 0-d."""


class JoinsRanks:
    """A state of a transformation whose updates are those of all ranks, and not of the gradient that it is given."""

    __slots__ = ()


class ChoosesByName:
    """Of transformations, not of states: it treats parameters by their names, and cannot stand inside `flatten`."""

    __slots__ = ()


# --- what is said of a transformation by `composed`, and not of its state ----------------------------------------


class Descends:
    """Its updates point down the gradient, as they hold a learning rate."""


class KeepsStart:
    """It remembers the initial parameters."""


class PointsAnywhere:
    """Nobody knows whether it turns updates around: it is made of a user's functions, or of a factor of any sign."""


# --- what is asked of a state, however deep the answer lies in it ------------------------------------------------


def find(state: PyTree, kind: type) -> list[Any]:
    """The states of class ``kind`` inside ``state``, outer ones first.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx = optim.chain(optim.clip_by_global_norm(1.0), optim.multi_steps(optim.sgd(0.1), every=2))
        >>> [type(s).__name__ for s in optim.find(tx.init({"w": torch.ones(1)}), optim.Accumulates)]
        ['MultiStepsState']
    """
    return list(_walk(state, kind))


def _walk(state: PyTree, kind: type) -> Iterator[Any]:
    if isinstance(state, kind):
        yield state
    for child in parts(state):
        yield from _walk(child, kind)


def parts(state: PyTree) -> list[PyTree]:
    """Child states, without cached copies (the fields that `KeepsCopies` lists)."""
    if state is None or not tree.is_node(state):
        return []
    copies = state.copies if isinstance(state, KeepsCopies) else ()
    return [child for name, child in tree.children(state).items() if name not in copies]


def eval_params(state: PyTree, params: Params) -> Params:
    """The parameters to evaluate with: slow weights, average or averaged iterate, if ``state`` holds one.

    A state says so as a `KeepsWeights`; it is found through any nesting. Of several, one inside the other, the
    outermost counts. Parameters that no state speaks for are returned as they are.

    Raises:
        ValueError: ``params`` without some of those that ``state`` was made for.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> params = {"w": torch.ones(1)}
        >>> tx = optim.chain(optim.clip_by_global_norm(1.0), optim.ema_params(optim.sgd(1.0), decay=0.5))
        >>> updates, state = tx.update({"w": torch.ones(1)}, tx.init(params), params)
        >>> optim.eval_params(state, optim.apply_updates(params, updates))
        {'w': tensor([0.5000])}
    """
    flat = dict(tree.leaves_with_path(params))
    try:
        found = averaged(state, flat)
        missing = sorted(found.keys() - flat.keys())
    except KeyError as error:
        missing = [error.args[0]]
    if missing:
        raise ValueError(f"params must hold all parameters that state was made for: missing {missing}")
    return tree.rebuild(params, [found[path].to(p.dtype) if path in found else p for path, p in flat.items()])


def eval_buffers(state: PyTree, buffers: Buffers) -> Buffers:
    """The buffers to evaluate with: averages, if a part of ``state`` keeps some, otherwise ``buffers``.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> params, buffers = {"w": torch.ones(1)}, {"norm.mean": torch.zeros(1)}
        >>> tx = optim.ema_params(optim.sgd(1.0), decay=0.75, buffers=buffers)
        >>> latest = {"norm.mean": torch.ones(1)}
        >>> _, state = tx.update(params, tx.init(params), params, buffers=latest)
        >>> optim.eval_buffers(state, latest)
        {'norm.mean': tensor([0.2500])}
    """
    found = {
        path: x for held in reversed(find(state, KeepsBuffers)) for path, x in held.averaged_buffers(buffers).items()
    }
    return {path: found[path].to(x.dtype) if path in found else x for path, x in buffers.items()}


def averaged(state: PyTree, flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the states inside ``state`` offer for evaluation in place of the parameters ``flat``, both by path."""
    if isinstance(state, KeepsWeights):
        return state.averaged(flat)
    return {path: x for child in parts(state) for path, x in averaged(child, flat).items()}


def skipped(state: PyTree) -> Tensor | None:
    """Whether the last update was skipped: a 0-d bool tensor, or None if no part of ``state`` can skip one.

    Asks those that are `CanSkip`. Between the updates of `multi_steps` nothing is skipped.
    """
    own = [state.skipped] if isinstance(state, CanSkip) else []
    found = _any([*own, *map(skipped, parts(state))])
    if found is None or not isinstance(state, Accumulates):
        return found
    return found & ~state.is_open


def gave_up(state: PyTree) -> Tensor | None:
    """Whether as many updates in a row were skipped as `apply_if_finite` tolerates; 0-d bool, or None as `skipped`."""
    return _any([found.exhausted for found in find(state, CanSkip)])


def _any(answers: list[Tensor | None]) -> Tensor | None:
    """Whether one of the 0-d ``answers`` is true; None if nobody answered."""
    given = [answer for answer in answers if answer is not None]
    return torch.stack(given).any() if given else None


def looks_twice(state: PyTree) -> bool:
    """Whether updates need the extra argument ``grad_fn``, the gradient at other parameters, as those of `sam` do."""
    return len(find(state, TakesSecondGradient)) > 0


def loss_scale(state: PyTree) -> Tensor | None:
    """The factor for the loss that `dynamic_loss_scale` keeps, a 0-d tensor; None if there is none."""
    found = find(state, ScalesLoss)
    return found[0].loss_scale if found else None


def accumulates(state: PyTree) -> bool:
    """Whether updates are gathered from several micro-batches, as by `multi_steps`."""
    return bool(find(state, Accumulates))


# --- which wrappers cannot wrap which, and why ---------------------------------------------------------------------

_WEIGHTS = "lookahead, scout, ema_params or schedule_free"
_TIED = "schedule_free, whose average would no longer match the parameters that {} moves: choose one of the two"

REASONS: dict[tuple[str, type], str] = {
    ("cautious", KeepsWeights): (
        f"{_WEIGHTS}, whose weights would no longer match the updates: write lookahead(cautious(tx)), and so on"
    ),
    ("cautious", Accumulates): (
        "multi_steps, as it would compare with the last micro-batch only: write multi_steps(cautious(tx), every)"
    ),
    ("cautious", JoinsRanks): (
        "average_gradients or shard, as it would compare with the gradient of one rank: write "
        "chain(average_gradients(), cautious(tx)) or shard(cautious(tx))"
    ),
    ("schedule_free", KeepsWeights): (
        f"{_WEIGHTS}: they would take the points where gradients are taken for the iterates of tx"
    ),
    ("schedule_free", Accumulates): (
        "multi_steps, as it would average between updates: write multi_steps(schedule_free(tx, learning_rate), every)"
    ),
    ("primal_averaging", KeepsWeights): (
        f"{_WEIGHTS}: they would take the points where gradients are taken for the iterates of tx"
    ),
    ("primal_averaging", Accumulates): (
        "multi_steps, as it would average between updates: write multi_steps(primal_averaging(tx), every)"
    ),
    ("nesterov_updates", KeepsWeights): (
        f"{_WEIGHTS}, whose weights would no longer match the updates: write lookahead(nesterov_updates(tx)), and so on"
    ),
    ("nesterov_updates", Accumulates): (
        "multi_steps, as momentum would fade between updates: write multi_steps(nesterov_updates(tx), every)"
    ),
    ("mechanic", KeepsWeights): (
        f"{_WEIGHTS}, whose weights would be those of the updates before their scale: write lookahead(mechanic(tx)), "
        "and so on"
    ),
    ("mechanic", Accumulates): (
        "multi_steps, as it would learn from each micro-batch: write multi_steps(mechanic(tx), every)"
    ),
    ("mechanic", CanSkip): (
        "apply_if_finite or another that skips updates, as its scale would learn from what is skipped: write "
        "apply_if_finite(mechanic(tx))"
    ),
    ("in_eigenbasis", KeepsWeights): (
        f"{_WEIGHTS}, whose weights would be moved by rotated updates: write lookahead(chain(in_eigenbasis(rule), ...))"
    ),
    ("in_eigenbasis", Accumulates): (
        "multi_steps, whose sum would mix gradients of several bases: put it around the whole chain"
    ),
    ("lookahead", TiesWeights): _TIED.format("lookahead"),
    ("scout", TiesWeights): _TIED.format("scout"),
    ("multi_steps", TakesHessianProduct): (
        "sophia or hutchinson_estimator, which would see the last micro-batch only: accumulate inside of the objective"
    ),
    ("multi_steps", TakesSecondGradient): (
        "sam, or a line search, which would look at the last micro-batch only: write sam(multi_steps(tx, every))"
    ),
    ("multi_steps", Accumulates): "multi_steps: write one, with the product of both numbers",
    ("sam", TakesHessianProduct): "sophia or hutchinson_estimator: there is one second gradient per update",
    ("sam", TakesSecondGradient): "sam, or a line search: there is one second gradient per update",
    ("shard", CanSkip): "apply_if_finite, as ranks would refuse alone: write apply_if_finite(shard(tx))",
    ("shard", KeepsWeights): "lookahead, ema_params and the like, whose weights are whole: write them around",
    ("shard", TakesSecondGradient): "sam, which looks at whole gradients: write sam(shard(tx))",
    ("flatten", ChoosesByName): (
        "partition, masked or freeze, which choose among named parameters: put it inside, as in "
        "masked(flatten(tx), mask)"
    ),
}


def check_nesting(outer: str, has: Callable[[type], bool]) -> None:
    """Raise a ValueError if a transformation that ``has`` some capabilities cannot be wrapped in ``outer``."""
    for (name, kind), reason in REASONS.items():
        if name == outer and has(kind):
            raise ValueError(f"{outer} cannot wrap {reason}")
