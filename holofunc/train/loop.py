"""`fit`: the loop around a step. It owns the clock, and calls; all else is a function it was given."""

import contextlib
import itertools
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from holofunc import checkpoint, tree
from holofunc.compile import Compiled, jit
from holofunc.optim.capabilities import gave_up
from holofunc.train.evaluation import evaluate, read
from holofunc.train.hooks import PHASES, Event, Hook, Replace, RunInfo, Stop, as_hook, cadence
from holofunc.train.state import TrainState
from holofunc.train.step import TrainStep, num_samples
from holofunc.typing import Batch, EpochData, Step

__all__ = ["FitResult", "fit"]

GAVE_UP = "gave up: max_consecutive updates in a row were refused"


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
    epochs: int | None = None,
    steps: int | None = None,
    eval: tuple[Any, Iterable[Batch]] | Mapping[str, tuple[Any, Iterable[Batch]]] | None = None,
    eval_every: int | str = "1ep",
    hooks: Sequence[Any] = (),
    log_every: int = 50,
    resume: str | Path | None = None,
    compile: bool = True,
) -> FitResult:
    """Run a step over batches.

    Args:
        step: of `holofunc.train.make_train_step`, or any pure ``(state, batch) -> (state, metrics)``.
        state: where to begin; left as it is. Calling `fit` again with the state of its result goes on from there.
        data: batches. `holofunc.data.Batches` is entered at the position that ``state.step`` says, in the order of its
            epoch; any other iterable is iterated anew each epoch.
        epochs: how many more, or
        steps: how many more calls of ``step``; exactly one of the two.
        eval: ``(eval_step, batches)``, reported as ``val/name``, or a dict of such pairs by prefix.
        eval_every: steps, or epochs as ``"1ep"``; the end of the run is always evaluated.
        hooks: of `holofunc.train.hooks`, or callables ``event -> action``.
        log_every: steps between records of the history, which are also the points at which the device is waited for,
            and at which a run ends whose latest updates were all refused (`holofunc.optim.gave_up`).
        resume: a directory written by the `checkpoint` hook: continue that run, to the end that it had.
        compile: compile ``step`` and the evaluation with `holofunc.jit`.

    Returns:
        ``FitResult(state, history, reason)``; the reason is ``"finished"``, what a `Stop` said, ``"interrupt"``
        (Ctrl-C) or ``"terminated"`` (SIGTERM): the step under way is completed first. It begins with ``"gave up"``
        where `holofunc.optim.apply_if_finite` refused ``max_consecutive`` updates in a row; parameters, buffers and
        moments are those after the last update that was applied.

    Raises:
        ValueError: not exactly one of ``epochs`` and ``steps``; a number below 1; no batch in an epoch.

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
    for name, value in (("epochs", epochs), ("steps", steps), ("log_every", log_every)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    if (epochs is None) == (steps is None):
        raise ValueError(f"exactly one of epochs and steps must be given, got epochs={epochs}, steps={steps}")
    run = _Run(step, state, data, epochs, steps, eval, eval_every, hooks, log_every, resume, compile)
    with _signals(run):
        return run.complete()


class _Run:
    def __init__(
        self,
        step: Step,
        state: TrainState,
        data: Iterable[Batch],
        epochs: int | None,
        steps: int | None,
        eval: Any,
        eval_every: int | str,
        hooks: Sequence[Any],
        log_every: int,
        resume: str | Path | None,
        compile: bool,
    ) -> None:
        self.data, self.log_every, self.hooks = data, log_every, [as_hook(h) for h in hooks]
        self.hooks.sort(key=lambda hook: PHASES.index(hook.phase))
        self.hook_states = {name: hook.init() for name, hook in self._named_hooks()}
        pairs = {"val": eval} if isinstance(eval, tuple) else dict(eval or {})

        def wrap(fn: Any, **options: Any) -> Any:
            return jit(fn, **options) if compile and not isinstance(fn, Compiled) else fn

        source = step.fn if isinstance(step, Compiled) else step
        self.step, self.finish = wrap(step, donate=True), source.finish if isinstance(source, TrainStep) else None
        self.evals = {name: (wrap(eval_step), batches) for name, (eval_step, batches) in pairs.items()}
        self.eval_due = cadence(eval_every, "eval_every")
        self.state = tree.map(torch.clone, state)
        self.history: list[dict[str, Any]] = []
        self.steps_per_epoch = len(data) if isinstance(data, Sized) else None
        self.start, self.samples, self.elapsed = int(state.step), 0, 0.0
        if resume is not None:
            self._resume(resume)
        self.end_epoch = None if epochs is None else self._epoch_at(self.start)[0] + epochs
        self.total_steps = None if steps is None else self.start + steps
        if epochs is not None and self.steps_per_epoch:
            self.total_steps = self.start + epochs * self.steps_per_epoch
        self.done = int(self.state.step)
        self.epoch, self.position = self._epoch_at(self.done)
        self.means = _Means()
        self.results: dict[str, Any] = {}
        self.reason: str | None = None

    def complete(self) -> FitResult:
        self.clock = time.perf_counter() - self.elapsed
        self._emit("run_start")
        try:
            while self.reason is None and not self._is_over():
                self._run_epoch()
        except BaseException:
            self._emit("exception")
            raise
        if self.position and self.finish is not None:
            self.state = self.finish(self.state)
        if self.evals and self.evaluated != self.done:
            self._evaluate()
        if self.means.count or (self.results and self.position):
            self._log()
        self.reason = self.reason or "finished"
        self._emit("run_end")
        return FitResult(self.state, self.history, self.reason)

    evaluated = -1

    def _run_epoch(self) -> None:
        self._emit("epoch_start")
        before = self.done
        for batch in self._batches():
            self.state, metrics = self.step(self.state, batch)
            count = num_samples(batch)
            self.means.add(metrics, count)
            self.done, self.position, self.samples = self.done + 1, self.position + 1, self.samples + count
            if self.done % self.log_every == 0:
                self._log()
            self._emit("step")
            if self.eval_due(self._event("step"), 0.0)[0]:
                self._evaluate()
            if (self.reason is not None or self.done == self.total_steps) and self.position != self.steps_per_epoch:
                return  # in the middle of the epoch
        if self.done == before:
            raise ValueError(f"data must hold at least one batch, got none in epoch {self.epoch}")
        if self.finish is not None:
            self.state = self.finish(self.state)
        if self.eval_due(self._event("epoch_end"), 0.0)[0]:
            self._evaluate()
        self._log()
        self._emit("epoch_end")
        self.epoch, self.position = self.epoch + 1, 0

    def _is_over(self) -> bool:
        if self.total_steps is not None:
            return self.done >= self.total_steps
        return self.end_epoch is not None and self.epoch >= self.end_epoch

    def _batches(self) -> Iterator[Batch]:
        if isinstance(self.data, EpochData):
            return self.data.epoch(self.epoch, self.position)
        return itertools.islice(iter(self.data), self.position, None)

    def _epoch_at(self, step: int) -> tuple[int, int]:
        size = self.steps_per_epoch
        return divmod(step, size) if size else (0, 0)

    def _evaluate(self) -> None:
        began = time.perf_counter()
        self.results = {
            f"{prefix}/{name}": value
            for prefix, (eval_step, batches) in self.evals.items()
            for name, value in evaluate(eval_step, self.state, batches).items()
        }
        self.clock += time.perf_counter() - began
        self.evaluated = self.done
        if self.evals:
            self._emit("eval")

    def _log(self) -> None:
        """A record: the means since the last one, and the results of an evaluation at this very step."""
        means = self.means.read()
        if not means and self.history and self.history[-1]["step"] == self.done:
            means = {n: v for n, v in self.history.pop().items() if n not in ("step", "epoch")}
        numbers = {n: v for n, v in self.results.items() if isinstance(v, float)} if self.evaluated == self.done else {}
        self.history.append({"step": self.done, "epoch": self.epoch, **means, **numbers})
        self.means.last = {**means, **numbers}
        refused = gave_up(self.state.opt_state) if isinstance(self.state, TrainState) else None
        if refused is not None and refused:
            self.reason = self.reason or GAVE_UP

    def _emit(self, kind: str) -> None:
        event = self._event(kind)
        for name, hook in self._named_hooks():
            self.hook_states[name], action = hook.update(self.hook_states[name], event)
            if isinstance(action, Stop):
                self.reason = self.reason or action.reason
            elif isinstance(action, Replace):
                self.state = tree.map(torch.clone, action.state)
                event = self._event(kind)
            elif action is not None:
                raise TypeError(f"a hook must return Stop, Replace or None, {hook.name} returned {action!r}")

    def _event(self, kind: str) -> Event:
        info = RunInfo(self.start, self.total_steps, self.steps_per_epoch, self.history, self.hook_states, self.reason)
        metrics = _Lazy(self.means, self.results if self.evaluated == self.done else {})
        elapsed = time.perf_counter() - self.clock
        return Event(kind, self.done, self.epoch, self.position, self.samples, self.state, metrics, elapsed, info)

    def _named_hooks(self) -> Iterator[tuple[str, Hook]]:
        for i, hook in enumerate(self.hooks):
            twins = sum(other.name == hook.name for other in self.hooks[:i])
            yield (f"{hook.name} {twins + 1}" if twins else hook.name), hook

    def _resume(self, directory: str | Path) -> None:
        about = checkpoint.manifest(directory)
        saved = about["metadata"]
        self.state = checkpoint.restore(directory, {"state": self.state}, step=about["step"])["state"]
        self.start, self.samples, self.elapsed = saved["start"], saved["samples"], saved["elapsed"]
        self.history = list(saved["history"])
        self.hook_states.update({n: s for n, s in saved["hooks"].items() if n in self.hook_states})


class _Means:
    """Sample-weighted means of metrics, summed on the device; reading them is the only wait for it."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0
        self.last: dict[str, float] = {}

    def add(self, metrics: Mapping[str, Tensor], count: int) -> None:
        for name, value in metrics.items():
            if value.ndim == 0:
                weighted = value.detach() * count
                self.sums[name] = weighted if name not in self.sums else self.sums[name] + weighted
        self.count += count

    def now(self) -> dict[str, float]:
        return read({name: total / self.count for name, total in self.sums.items()}) if self.count else self.last

    def read(self) -> dict[str, float]:
        means, self.sums, self.count = (self.now() if self.count else {}), {}, 0
        return means


class _Lazy(Mapping[str, Any]):
    """The metrics of an event, transferred from the device when somebody looks."""

    def __init__(self, means: _Means, results: Mapping[str, Any]) -> None:
        self._means, self._results = means, results
        self._found: dict[str, Any] | None = None

    def _values(self) -> dict[str, Any]:
        if self._found is None:
            self._found = {**self._means.now(), **self._results}
        return self._found

    def __getitem__(self, name: str) -> Any:
        return self._values()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values())

    def __len__(self) -> int:
        return len(self._values())


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
