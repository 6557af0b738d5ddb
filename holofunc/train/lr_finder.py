"""The learning rate search: a sweep over learning rates before training."""

import itertools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from holofunc import tree
from holofunc.compile import jit
from holofunc.ops.checks import check_counts
from holofunc.optim.base import GradientTransformation
from holofunc.optim.capabilities import find
from holofunc.optim.hyperparams import HyperparamsState, get_hyperparams, set_hyperparams
from holofunc.train.state import TrainState
from holofunc.train.step import make_train_step
from holofunc.typing import Batch, Objective

__all__ = ["LRSearch", "check_ascending", "find_lr", "smoothed"]


class LRSearch(NamedTuple):
    """The result of `find_lr`.

    Attributes:
        lrs: the learning rates, ascending.
        losses: the loss at each of them, before the update with it.
        smoothed: the same, as a moving average without the bias of its start.
        suggestion: where the smoothed loss falls steepest per decade: what `plots.lr_search` marks.
        valley: two thirds into the longest stretch on which the smoothed loss falls.
    """

    lrs: list[float]
    losses: list[float]
    smoothed: list[float]
    suggestion: float | None
    valley: float | None


def find_lr(
    objective: Objective,
    tx: GradientTransformation,
    state: TrainState,
    data: Iterable[Batch],
    *,
    start: float = 1e-7,
    end: float = 1.0,
    steps: int = 100,
    beta: float = 0.95,
    diverges: float = 4.0,
    compile: bool = False,
) -> LRSearch:
    """Train for some steps with an increasing learning rate, and record the loss.

    Args:
        objective: as for `make_train_step`.
        tx: with its learning rate injected: ``optim.inject_hyperparams(optim.adamw)(learning_rate=1e-3)``; everything
            else about it is as in training (frozen parts, weight decay, clipping).
        state: of `create_state` with this ``tx``; it is left as it is.
        data: batches; they are begun anew when they end.
        start: the first learning rate.
        end: the last one.
        steps: how many, in equal ratios; at least 3.
        beta: of the moving average.
        diverges: the sweep ends when the smoothed loss is this many times the least one so far, or not finite.
        compile: whether to compile the step, which takes longer than some sweeps.

    Returns:
        The learning rates and losses up to the end, and two suggestions, which are None if nothing fell.

    Raises:
        ValueError: a learning rate that is no injected hyperparameter; the first loss is not finite; ``data`` without a
            batch; options out of range.

    Source: Smith (arXiv 1506.01186). Holocron's draws the same curve; it stops with an error where data end early.

    Example:
        >>> import torch
        >>> from holofunc import lift, losses, optim, random, train
        >>> model, tx = lift(torch.nn.Linear, 3, 2), optim.inject_hyperparams(optim.sgd)(learning_rate=0.1)
        >>> state = train.create_state(model, tx, random.key(0))
        >>> batches = [(torch.ones(4, 3), torch.tensor([0, 1, 0, 1]))]
        >>> found = train.find_lr(train.supervised(model, losses.cross_entropy), tx, state, batches, steps=5)
        >>> [f"{lr:.0e}" for lr in found.lrs]
        ['1e-07', '6e-06', '3e-04', '2e-02', '1e+00']
    """
    check_ascending(start, end)
    check_counts(3, steps=steps)
    if not 0 <= beta < 1 or diverges <= 1:
        raise ValueError(f"beta must be in [0, 1) and diverges more than 1, got {beta} and {diverges}")
    if not find(state.opt_state, HyperparamsState) or "learning_rate" not in get_hyperparams(state.opt_state):
        raise ValueError(
            "tx must have its learning rate injected: optim.inject_hyperparams(optim.adamw)(learning_rate=1e-3)"
        )
    step: Any = make_train_step(objective, tx)
    step = jit(step, donate=True) if compile else step
    now, lrs, seen = tree.clone(state), _geometric(start, end, steps), list[float]()
    for lr, batch in zip(lrs, _endless(data), strict=False):
        now, metrics = step(now._replace(opt_state=set_hyperparams(now.opt_state, learning_rate=lr)), batch)
        seen.append(float(metrics["loss"]))
        if not math.isfinite(seen[0]):
            raise ValueError(f"the first loss must be finite, got {seen[0]} at learning rate {lr}")
        curve = smoothed(seen, beta)
        if not math.isfinite(seen[-1]) or curve[-1] > diverges * min(curve):
            break
    if not seen:
        raise ValueError("data must hold at least one batch, got none")
    finite = [loss for loss in seen if math.isfinite(loss)]
    lrs, curve = lrs[: len(finite)], smoothed(finite, beta)
    return LRSearch(lrs, finite, curve, _steepest(lrs, curve), _valley(lrs, curve))


def check_ascending(start: float, end: float) -> None:
    """Refuse learning rates that do not ascend."""
    if not 0 < start < end < math.inf:
        raise ValueError(f"start and end must be 0 < start < end, got {start} and {end}")


def _geometric(start: float, end: float, steps: int) -> list[float]:
    return [start * (end / start) ** (i / (steps - 1)) for i in range(steps)]


def _endless(data: Iterable[Batch]) -> Iterable[Batch]:
    for _ in itertools.count():
        empty = True
        for batch in data:
            empty = False
            yield batch
        if empty:
            return


def smoothed(values: Iterable[float], beta: float) -> list[float]:
    """The moving average ``m = beta * m + (1 - beta) * value``, divided by ``1 - beta**n``.

    Example:
        >>> from holofunc import train
        >>> train.smoothed([1.0, 2.0], 0.5)
        [1.0, 1.6666666666666667]
    """
    if not 0 <= beta < 1:
        raise ValueError(f"beta must be in [0, 1), got {beta}")
    mean, curve = 0.0, []
    for n, value in enumerate(values, start=1):
        mean = beta * mean + (1 - beta) * value
        curve.append(mean / (1 - beta**n))
    return curve


def _steepest(lrs: list[float], curve: list[float]) -> float | None:
    """Where the loss falls most over a tenth of the rates, before its minimum; single batches vary too much."""
    least, width = min(range(len(curve)), key=curve.__getitem__), max(1, len(curve) // 10)
    falls = {i + width // 2: curve[i] - curve[i + width] for i in range(max(0, least - width + 1))}
    best = max(falls, key=falls.__getitem__, default=None)
    return lrs[best] if best is not None and falls[best] > 0 else None


def _valley(lrs: list[float], curve: list[float]) -> float | None:
    """Two thirds into the longest run of learning rates with falling losses (as fastai's ``valley``)."""
    best, begin = (0, 0), 0
    for i in range(1, len(curve) + 1):
        if i == len(curve) or curve[i] >= curve[i - 1]:
            best, begin = max(best, (i - 1 - begin, begin)), i
    length, begin = best
    return lrs[begin + round(length * 2 / 3)] if length else None
