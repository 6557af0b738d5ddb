"""`fit`: the training loop."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from holofunc.data.mapping import on_device
from holofunc.train.cadences import cadence, count, seconds
from holofunc.train.evaluation import check_data, plain
from holofunc.train.hooks import PHASES, Hook, as_hook
from holofunc.train.run import Evaluation, FitResult, Run, compiled
from holofunc.train.signals import caught
from holofunc.train.state import TrainState
from holofunc.typing import Batch, Step

__all__ = ["FitResult", "fit"]

Eval = tuple[Any, Iterable[Batch]] | tuple[Any, Iterable[Batch], int | str]


def fit(
    step: Step,
    state: TrainState,
    data: Iterable[Batch],
    *,
    epochs: int | str | None = None,
    steps: int | str | None = None,
    time: float | str | None = None,
    eval: Eval | Mapping[str, Eval] | None = None,
    eval_every: int | str = "1ep",
    eval_batches: int | None = None,
    sanity_batches: int = 0,
    hooks: Sequence[Any] = (),
    log_every: int = 50,
    resume: str | Path | None = None,
    compile: bool = True,
    device: torch.device | str | None = None,
) -> FitResult:
    """Train: run a step over batches.

    Args:
        step: made by `holofunc.train.make_train_step`, or any pure function ``(state, batch) -> (state, metrics)``.
        state: the initial state, which is not changed. Pass the state of a result to continue from there.
        data: batches. `EpochData`, such as `holofunc.data.Batches`, starts at the position given by ``state.step``; any
            other iterable is iterated again in each epoch.
        epochs: number of further epochs; give at most one of ``epochs`` and ``steps``.
        steps: number of further calls of ``step``.
        time: limit of the training time, without evaluations: seconds, or ``"90m"``, ``"2h"``.
        eval: ``(eval_step, batches)``, reported as ``val/name``, or a dict of such pairs by prefix. An optional third
            member is the cadence of this evaluation.
        eval_every: steps, or ``"1ep"``, ``"10%"`` or ``"30m"``; there is always an evaluation at the end of the run.
        eval_batches: the largest number of batches per evaluation; None is all.
        sanity_batches: evaluate this many batches before the first step, to find errors early; results are discarded.
        hooks: hooks of `holofunc.train`, or callables ``event -> action``.
        log_every: steps between records of the history. These are also the points at which the host waits for the
            device, and at which a run ends whose latest updates were all skipped (`holofunc.optim.gave_up`).
            Evaluations and ends of epochs are recorded too.
        resume: a directory written by the `checkpoint` hook: continue that run to its end.
        compile: compile ``step`` and the evaluation with `holofunc.jit`.
        device: move batches there, ahead of the step (`holofunc.data.on_device`).

    Returns:
        ``FitResult(state, history, reason)``; the reason is ``"finished"``, that of a `Stop`, ``"interrupt"`` (Ctrl-C),
        ``"terminated"`` (SIGTERM) or ``"hangup"`` (SIGHUP); the current step is always completed. It starts with
        ``"gave up"`` if `holofunc.optim.apply_if_finite` skipped ``max_consecutive`` updates in a row; parameters,
        buffers and moments are those of the last applied update. Only a finished run applies an incomplete accumulation
        of gradients and is evaluated at its end; a run that is stopped earlier is left ready to be resumed.

    Raises:
        ValueError: the length is missing or given twice; a number is below 1; an epoch has no batch; the resumed run
            had other data. TypeError: ``state`` has no ``step``.

    Example:
        >>> import torch
        >>> from holofunc import lift, losses, optim, random, train
        >>> model, tx = lift(torch.nn.Linear, 3, 2), optim.sgd(0.1)
        >>> step = train.make_train_step(train.supervised(model, losses.cross_entropy), tx)
        >>> state = train.create_state(model, tx, random.key(0))
        >>> batches = [(torch.ones(4, 3), torch.tensor([0, 1, 0, 1]))]
        >>> result = train.fit(step, state, batches, epochs=3, compile=False)
        >>> result.state.step, result.reason
        (tensor(3), 'finished')
    """
    if not isinstance(state, HasStep) or not isinstance(state.step, Tensor):
        raise TypeError(f"state must be a TrainState, or have a tensor step, got {type(state).__name__}")
    if (epochs is not None and steps is not None) or (epochs is None and steps is None and time is None):
        raise ValueError(
            f"exactly one of epochs and steps must be given, got epochs={epochs}, steps={steps} (time alone will do)"
        )
    check_data(data)
    if isinstance(hooks, Hook) or not isinstance(hooks, Iterable):
        raise TypeError(f"hooks must be a list of hooks, got {type(hooks).__name__}: write hooks=[...]")
    run = Run(
        step,
        state,
        data if device is None else on_device(data, device),
        epochs=None if epochs is None else count("epochs", epochs, "ep"),
        steps=None if steps is None else count("steps", steps, "steps"),
        time=None if time is None else seconds("time", time),
        evals=_evaluations(eval, eval_every, compile),
        eval_batches=None if eval_batches is None else count("eval_batches", eval_batches, ""),
        hooks=sorted(map(as_hook, hooks), key=lambda hook: PHASES.index(hook.phase)),
        log_every=count("log_every", log_every, ""),
        compile=compile,
        resume=resume,
    )
    if sanity_batches:
        run.rehearse(count("sanity_batches", sanity_batches, ""))
    with caught(run.end):
        return run.complete()


@runtime_checkable
class HasStep(Protocol):
    """A state that counts the calls of its step."""

    @property
    def step(self) -> Tensor:
        """0-d, or (n,) for n stacked states."""


def _evaluations(given: Any, every: int | str, compile: bool) -> dict[str, Evaluation]:
    found, usual = {}, cadence(every, "eval_every")
    if not isinstance(given, (tuple, Mapping, NoneType)):
        raise TypeError(f"eval must be a pair (eval_step, batches), or a dict of pairs, got {type(given).__name__}")
    for name, entry in ({"val": given} if isinstance(given, tuple) else dict(given or {})).items():
        if not isinstance(entry, tuple) or len(entry) not in (2, 3):
            raise TypeError(f"eval must hold (eval_step, batches) or (eval_step, batches, every), got {entry!r}")
        eval_step, data, *own = entry
        source = plain(eval_step)
        check_data(data, f"eval[{name!r}]'s second")
        due = cadence(own[0], f"eval[{name!r}]") if own else usual
        found[name] = Evaluation(compiled(eval_step, compile), data, due, source.metrics)
    return found
