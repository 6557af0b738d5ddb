"""`fit`: the loop around a step. It owns the clock, and calls; all else is a function it was given."""

import contextlib
import itertools
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from holofunc import checkpoint, tree
from holofunc.compile import Compiled, jit
from holofunc.data.mapping import on_device
from holofunc.optim.capabilities import accumulates, gave_up
from holofunc.train.cadences import cadence, count, seconds
from holofunc.train.evaluation import evaluate
from holofunc.train.hooks import PHASES, Event, Hook, Replace, Report, RunInfo, Save, Stop, as_hook
from holofunc.train.records import LazyMetrics, Means, hyperparameters
from holofunc.train.resuming import check_dependencies, dependencies
from holofunc.train.state import TrainState
from holofunc.train.step import TrainStep, num_samples
from holofunc.typing import Batch, EpochData, Step

__all__ = ["FitResult", "fit"]

GAVE_UP = "gave up: max_consecutive updates in a row were refused"

Eval = tuple[Any, Iterable[Batch]] | tuple[Any, Iterable[Batch], int | str]


class FitResult(NamedTuple):
    """What a run leaves: the last ``state``, the ``history`` (a dict per record), and why it ended (``reason``)."""

    state: TrainState
    history: list[dict[str, Any]]
    reason: str


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
    """Run a step over batches.

    Args:
        step: of `holofunc.train.make_train_step`, or any pure ``(state, batch) -> (state, metrics)``.
        state: where to begin; left as it is. Calling `fit` again with the state of its result goes on from there.
        data: batches. `EpochData`, such as `holofunc.data.Batches`, is entered at the position that ``state.step``
            says, in the order of its epoch; any other iterable is iterated anew each epoch.
        epochs: how many more, or
        steps: how many more calls of ``step``; at most one of the two.
        time: the run ends after this time at the latest, without evaluations: seconds, or ``"90m"``, ``"2h"``.
        eval: ``(eval_step, batches)``, reported as ``val/name``, or a dict of such pairs by prefix. A third member is a
            cadence of its own.
        eval_every: steps, epochs as ``"1ep"``, ``"10%"`` or ``"30m"``; the end of the run is always evaluated.
        eval_batches: of an evaluation, at most; None is all.
        sanity_batches: evaluate so many batches before the first step, to find out early what fails; nothing of it is
            kept.
        hooks: of `holofunc.train.hooks`, or callables ``event -> action``.
        log_every: steps between records of the history, which are also the points at which the device is waited for,
            and at which a run ends whose latest updates were all refused (`holofunc.optim.gave_up`). Evaluations and
            ends of epochs are recorded too.
        resume: a directory written by the `checkpoint` hook: continue that run, to the end that it had.
        compile: compile ``step`` and the evaluation with `holofunc.jit`.
        device: move batches there, ahead of the step (`holofunc.data.on_device`).

    Returns:
        ``FitResult(state, history, reason)``; the reason is ``"finished"``, what a `Stop` said, ``"interrupt"``
        (Ctrl-C) or ``"terminated"`` (SIGTERM): the step under way is completed first. It begins with ``"gave up"``
        where `holofunc.optim.apply_if_finite` refused ``max_consecutive`` updates in a row; parameters, buffers and
        moments are those after the last update that was applied. A run that is stopped in the middle of an epoch is
        left as it is, to be resumed: only a finished one closes an open window of gradients and is evaluated once more.

    Raises:
        ValueError: no length, or ``epochs`` and ``steps``; a number below 1; no batch in an epoch; ``resume`` with
            other data than the run had. TypeError: ``state`` has no ``step``.

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
    run = _Run(
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
    with _signals(run):
        return run.complete()


@runtime_checkable
class HasStep(Protocol):
    """A state that counts the calls of its step."""

    @property
    def step(self) -> Tensor:
        """0-d, or (n,) of n states that are stacked."""


class Evaluation(NamedTuple):
    """A part of `fit`'s ``eval``."""

    step: Any
    data: Iterable[Batch]
    due: Callable[[Event, float], tuple[bool, float]]


def _evaluations(given: Any, every: int | str, compile: bool) -> dict[str, Evaluation]:
    found, usual = {}, cadence(every, "eval_every")
    for name, entry in ({"val": given} if isinstance(given, tuple) else dict(given or {})).items():
        if not isinstance(entry, tuple) or len(entry) not in (2, 3):
            raise TypeError(f"eval must hold (eval_step, batches) or (eval_step, batches, every), got {entry!r}")
        eval_step, data, *own = entry
        due = cadence(own[0], f"eval[{name!r}]") if own else usual
        found[name] = Evaluation(_compiled(eval_step, compile), data, due)
    return found


def _compiled(fn: Any, compile: bool, *, donate: bool = False) -> Any:
    return jit(fn, donate=donate) if compile and not isinstance(fn, Compiled) else fn


class _Run:
    def __init__(
        self,
        step: Step,
        state: TrainState,
        data: Iterable[Batch],
        *,
        epochs: int | None,
        steps: int | None,
        time: float | None,
        evals: dict[str, Evaluation],
        eval_batches: int | None,
        hooks: list[Hook],
        log_every: int,
        compile: bool,
        resume: str | Path | None,
    ) -> None:
        self.data, self.evals, self.eval_batches, self.log_every = data, evals, eval_batches, log_every
        self.time, self.resumed_from = time, resume
        self.hooks = dict(_named(hooks))
        self.hook_states = {name: hook.init() for name, hook in self.hooks.items()}
        source = step.fn if isinstance(step, Compiled) else step
        self.step, self.source = _compiled(step, compile, donate=True), source
        self.state = tree.clone(state)
        self.steps_per_epoch = len(data) if isinstance(data, Sized) else None
        self.start = self.done = self._clock()
        self.epoch, self.position = divmod(self.done, self.steps_per_epoch) if self.steps_per_epoch else (0, 0)
        self.first_epoch, self.samples, self.elapsed = self.epoch, 0, 0.0
        self.history: list[dict[str, Any]] = []
        self.means, self.extra = Means(), dict[str, Any]()
        self.results: dict[str, Any] = {}
        self.evaluated, self.eval_last = -1, dict.fromkeys(evals, 0.0)
        self.depends = dependencies(data, self.steps_per_epoch)
        if resume is not None:
            self._resume(resume)
        self.end_epoch = None if epochs is None else self.first_epoch + epochs
        self.total_steps = None if steps is None else self.start + steps
        if epochs is not None and self.steps_per_epoch:
            self.total_steps = self.start + epochs * self.steps_per_epoch
        self.reason: str | None = None
        self.batch: Batch = None
        self.outputs: Any = None
        self.ended = False  # the epoch that is counted still

    # --- from the first step to the last -------------------------------------------------------------------------

    def rehearse(self, batches: int) -> None:
        """Evaluate some batches, and forget the results."""
        for each in self.evals.values():
            evaluate(each.step, self.state, each.data, max_batches=batches)

    def complete(self) -> FitResult:
        self.clock = time.perf_counter() - self.elapsed
        try:
            self._emit("run_start")
            while self.reason is None and not self._is_over():
                self._run_epoch()
            if self.reason is None:
                self._finish()
        except BaseException:
            self._emit("exception")
            raise
        self.reason = self.reason or "finished"
        self._emit("run_end")
        return FitResult(self.state, self.history, self.reason)

    def _run_epoch(self) -> None:
        self._emit("epoch_start")
        for batch in self._batches():
            self._take(batch)
            if (self.reason is not None or self._is_over()) and self.position != self.steps_per_epoch:
                return  # in the middle of the epoch
        if not self.position:
            raise ValueError(f"data must hold at least one batch, got none in epoch {self.epoch}")
        self.batch = self.outputs = None
        if self.steps_per_epoch is None:  # otherwise its last step has closed the window
            self._flush()
        self.ended = True
        self._happen("epoch_end")
        self.epoch, self.position, self.ended = self.epoch + 1, 0, False

    def _take(self, batch: Batch) -> None:
        self.state, metrics = self.step(self.state, batch)
        self.batch, self.outputs = batch, metrics.get("outputs")
        number = num_samples(batch)
        self.means.add(_per_member(metrics) if self.state.step.ndim else metrics, number)
        self.done, self.position, self.samples = self.done + 1, self.position + 1, self.samples + number
        if self.position == self.steps_per_epoch or self.done == self.total_steps:
            self._flush()
        self._happen("step")

    def _happen(self, kind: str) -> None:
        """A step, or the end of an epoch: transform, evaluate, decide, observe, save."""
        self._emit(kind, ("transform",))
        due = []
        for name, each in self.evals.items():
            fires, self.eval_last[name] = each.due(self._event(kind), self.eval_last[name])
            due += [name] * fires
        if due:
            self._evaluate(due)
        self._emit(kind, ("decide",))
        if kind == "epoch_end" or self.done % self.log_every == 0 or self.evaluated == self.done:
            self._record()
        self._emit(kind, ("observe", "save"))

    def _finish(self) -> None:
        if self.position:  # a run may end in the middle of an epoch
            self._flush()
        if self.evals and self.evaluated != self.done:
            self._evaluate(list(self.evals))
        if self.means.count or self.evaluated == self.done:
            self._record()

    def _is_over(self) -> bool:
        if self.position == self.steps_per_epoch:  # its end is still to come
            return False
        if self.time is not None and self.done > self.start and time.perf_counter() - self.clock >= self.time:
            return True
        if self.total_steps is not None:
            return self.done >= self.total_steps
        return self.end_epoch is not None and self.epoch >= self.end_epoch

    def _batches(self) -> Iterator[Batch]:
        if isinstance(self.data, EpochData):
            return self.data.epoch(self.epoch, self.position)
        return itertools.islice(iter(self.data), self.position, None)

    def _clock(self) -> int:
        return int(self.state.step.flatten()[0])  # states that are stacked go in step

    def _flush(self) -> None:
        if isinstance(self.source, TrainStep):
            self.state = self.source.finish(self.state)

    # --- what is measured ----------------------------------------------------------------------------------------

    def _evaluate(self, names: Sequence[str]) -> None:
        began = time.perf_counter()
        if self.evaluated != self.done:
            self.results = {}
        for prefix in names:
            each = self.evals[prefix]
            found = evaluate(
                each.step, self.state, each.data, max_batches=self.eval_batches, progress=self._progress(prefix)
            )
            self.results |= {f"{prefix}/{name}": value for name, value in found.items()}
        self.clock += time.perf_counter() - began
        self.evaluated = self.done
        self._emit("eval")

    def _progress(self, prefix: str) -> Callable[[int, int | None], None]:
        def progress(batch: int, total: int | None) -> None:
            event = self._event("evaluating")._replace(evaluating=(prefix, batch, total))
            for hook in self.hooks.values():
                if hook.follow is not None:
                    hook.follow(event)

        return progress

    def _record(self) -> None:
        """The means since the last record, hyperparameters, and the results of an evaluation at this very step."""
        means = self.means.take()
        if not means and self.history and self.history[-1]["step"] == self.done:
            means = {n: v for n, v in self.history.pop().items() if n not in ("step", "epoch")}
        opt_state = self.state.opt_state if isinstance(self.state, TrainState) else None
        results = self.results if self.evaluated == self.done else {}
        numbers = {n: v for n, v in {**self.extra, **results}.items() if isinstance(v, (int, float))}
        self.means.last, self.extra = {**means, **hyperparameters(opt_state), **numbers}, {}
        self.history.append({"step": self.done, "epoch": self.epoch, **self.means.last})
        refused = gave_up(opt_state)
        if refused is not None and refused.any():
            self.reason = self.reason or GAVE_UP

    # --- events --------------------------------------------------------------------------------------------------

    def _emit(self, kind: str, phases: tuple[str, ...] = PHASES) -> None:
        event = self._event(kind)
        for name, hook in self.hooks.items():
            if hook.phase not in phases:
                continue
            self.hook_states[name], action = hook.update(self.hook_states[name], event)
            if isinstance(action, Stop):
                self.reason = self.reason or action.reason
            elif isinstance(action, Replace):
                self.state = tree.clone(action.state)
                event = self._event(kind)
            elif isinstance(action, Report):
                self.extra |= action.metrics
            elif isinstance(action, Save):
                action.write({"state": self.state}, self.done, self._snapshot())
            elif action is not None:
                raise TypeError(f"a hook must return Stop, Replace, Report, Save or None, {name} returned {action!r}")

    def _event(self, kind: str) -> Event:
        results = self.results if self.evaluated == self.done else {}
        return Event(
            kind,
            self.done,
            self.epoch,
            self.position,
            self.samples,
            self.state,
            LazyMetrics(self.means, {**self.extra, **results}),
            time.perf_counter() - self.clock,
            self._info(),
            self.batch,
            self.outputs,
            self.evaluated == self.done,
        )

    def _info(self) -> RunInfo:
        params = self.state.params if isinstance(self.state, TrainState) else {}
        return RunInfo(
            self.start,
            self.total_steps,
            self.steps_per_epoch,
            self.history,
            self.hook_states,
            self.reason,
            None if self.resumed_from is None else str(self.resumed_from),
            sum(p.numel() for p in params.values()),
            self.state.step.device,
            isinstance(self.state, TrainState) and accumulates(self.state.opt_state),
            self.source.settings if isinstance(self.source, TrainStep) else {},
        )

    # --- what is saved, and read again ---------------------------------------------------------------------------

    def _snapshot(self) -> dict[str, Any]:
        """All that must be known beside the state to continue the run, as JSON has it."""
        return {
            "start": self.start,
            "first_epoch": self.first_epoch,
            "epoch": self.epoch + self.ended,
            "position": 0 if self.ended else self.position,
            "samples": self.samples,
            "elapsed": time.perf_counter() - self.clock,
            "history": list(self.history),
            "means": self.means.saved(),
            "extra": dict(self.extra),
            "evaluated": self.evaluated,
            "results": {n: v for n, v in self.results.items() if isinstance(v, (int, float))},
            "eval_last": self.eval_last,
            "hooks": self.hook_states,
            "depends": self.depends,
        }

    def _resume(self, directory: str | Path) -> None:
        about = checkpoint.manifest(directory)
        saved = about["metadata"]
        check_dependencies(saved["depends"], self.depends)
        self.state = checkpoint.restore(directory, {"state": self.state}, step=about["step"])["state"]
        self.done = self._clock()
        for name in (
            "start",
            "first_epoch",
            "epoch",
            "position",
            "samples",
            "elapsed",
            "evaluated",
            "results",
            "extra",
        ):
            setattr(self, name, saved[name])
        self.history = list(saved["history"])
        self.means = Means.restored(saved["means"], self.state.step.device)
        self.eval_last |= {n: last for n, last in saved["eval_last"].items() if n in self.evals}
        self.hook_states.update({n: s for n, s in saved["hooks"].items() if n in self.hook_states})
        if self.position and not isinstance(self.data, (EpochData, Sequence)):
            warnings.warn(
                f"data is no EpochData, so the first {self.position} batches of epoch {self.epoch} are drawn again and "
                "left out: the run goes on exactly only if they come in the same order as before",
                stacklevel=4,
            )


def _named(hooks: Sequence[Hook]) -> Iterator[tuple[str, Hook]]:
    for i, hook in enumerate(hooks):
        twins = sum(other.name == hook.name for other in hooks[:i])
        yield (f"{hook.name} {twins + 1}" if twins else hook.name), hook


def _per_member(metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Metrics of states that are stacked: their mean, and each by its number."""
    found: dict[str, Tensor] = {}
    for name, values in metrics.items():
        if isinstance(values, Tensor) and values.ndim == 1:
            found |= {name: values.mean(), **{f"{name}/{i}": value for i, value in enumerate(values)}}
    return found


@contextlib.contextmanager
def _signals(run: _Run) -> Iterator[None]:
    """Let the first Ctrl-C or SIGTERM end the run after its step; the second acts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[Any, Any] = {}

    def handler(reason: str) -> Callable[[int, Any], None]:
        def note(number: int, frame: Any) -> None:
            signal.signal(number, before[number])
            run.reason = run.reason or reason

        return note

    for number, reason in ((signal.SIGINT, "interrupt"), (signal.SIGTERM, "terminated")):
        before[number] = signal.signal(number, handler(reason))
    try:
        yield
    finally:
        for caught, old in before.items():
            signal.signal(caught, old)
