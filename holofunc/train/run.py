"""The implementation of `fit`: events, records, and the saved position of a run."""

import itertools
import json
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from holofunc import distributed, tree
from holofunc.compile import Compiled, jit
from holofunc.data.mapping import length
from holofunc.optim.capabilities import accumulates, gave_up
from holofunc.train.evaluation import evaluate
from holofunc.train.hooks import PHASES, Event, Hook, Replace, Report, RunInfo, Save, Stop
from holofunc.train.records import LazyMetrics, Means, hyperparameters, read
from holofunc.train.resuming import dependencies, saved_run
from holofunc.train.state import TrainState
from holofunc.train.step import TrainStep, num_samples
from holofunc.typing import Batch, EpochData, Step

__all__ = ["Evaluation", "FitResult", "Run", "compiled"]

KEPT = ("start", "first_epoch", "samples", "evaluated")
"""What is saved of a run, and restored, as it is."""
GAVE_UP = "gave up: max_consecutive updates in a row were refused"


class FitResult(NamedTuple):
    """The result of `fit`: the final ``state``, the ``history`` (a dict per record), and the ``reason`` for the end."""

    state: TrainState
    history: list[dict[str, Any]]
    reason: str

    def __repr__(self) -> str:
        return f"FitResult(reason={self.reason!r}, step={self.state.step.tolist()}, records={len(self.history)})"


class Evaluation(NamedTuple):
    """A part of `fit`'s ``eval``."""

    step: Any
    data: Iterable[Batch]
    due: Callable[[Event, float], tuple[bool, float]]
    metrics: Mapping[str, Any]


def compiled(fn: Any, compile: bool, *, donate: bool = False) -> Any:
    return jit(fn, donate=donate) if compile and not isinstance(fn, Compiled) else fn


class Run:
    """A run of `fit`, from its first step to its last."""

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
        self.step, self.source = compiled(step, compile, donate=True), source
        self.state = tree.clone(state)
        self.steps_per_epoch = length(data)
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
        known = self.state if isinstance(self.state, TrainState) else None
        self.num_params = 0 if known is None else sum(p.numel() for p in known.params.values())
        self.accumulates = known is not None and accumulates(known.opt_state)
        self.end_epoch = None if epochs is None else self.first_epoch + epochs
        self.total_steps = None if steps is None else self.start + steps
        if epochs is not None and self.steps_per_epoch:
            self.total_steps = self.start + epochs * self.steps_per_epoch
        self.reason: str | None = None
        self.batch: Batch = None
        self.outputs: Any = None
        self.over = False  # the length that was asked for is reached
        self.ended = False  # the epoch that is counted still

    # --- from the first step to the last -------------------------------------------------------------------------

    def end(self, reason: str) -> None:
        """Go no further than the step under way."""
        self.reason = self.reason or reason

    def rehearse(self, batches: int) -> None:
        """Evaluate some batches, and forget the results."""
        for each in self.evals.values():
            evaluate(each.step, self.state, each.data, max_batches=batches)

    def complete(self) -> FitResult:
        self.clock = time.perf_counter() - self.elapsed
        self.over = self._is_over()
        try:
            self._emit("run_start")
            while self.reason is None and not self.over:
                self._run_epoch()
            self.reason = self.reason or "finished"
            self._emit("run_end")
        except BaseException as error:
            self._emit_exception(error)
            raise
        return FitResult(self.state, self.history, self.reason)

    def _run_epoch(self) -> None:
        self._emit("epoch_start")
        for batch in self._batches():
            self._check_length(self.position + 1, at_end=False)
            self._take(batch)
            if (self.reason is not None or self.over) and self.position != self.steps_per_epoch:
                return  # in the middle of the epoch
        self._check_length(self.position, at_end=True)
        self.batch = self.outputs = None
        if self.steps_per_epoch is None:  # otherwise its last step has closed the window
            self._flush()
        self.ended = True
        self.over = self._is_over()
        self._run_phases("epoch_end")
        self.epoch, self.position, self.ended = self.epoch + 1, 0, False

    def _check_length(self, batches: int, *, at_end: bool) -> None:
        """Refuse data without a batch, and data that are longer or shorter than they say."""
        if not batches:
            used_up = ": an iterator is used up by one epoch" if isinstance(self.data, Iterator) else ""
            raise ValueError(f"data must hold at least one batch, got none in epoch {self.epoch}{used_up}")
        said = self.steps_per_epoch
        if said is not None and (batches != said if at_end else batches > said):
            raise ValueError(
                f"data must hold as many batches as len(data), {said}, got {batches}{'' if at_end else ' or more'} in "
                f"epoch {self.epoch}; where their number is not known, leave len out"
            )

    def _take(self, batch: Batch) -> None:
        result = self.step(self.state, batch)
        if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[1], Mapping):
            raise TypeError(
                f"step must return (state, metrics), metrics in a dict by name, got {type(result).__name__}"
            )
        self.state, metrics = result
        self.batch, self.outputs = batch, metrics.get("outputs")
        number, device = num_samples(batch), self.state.step.device
        metrics = {n: torch.tensor(x, device=device) if isinstance(x, (int, float)) else x for n, x in metrics.items()}
        self.means.add(_per_member(metrics) if self.state.step.ndim else metrics, number)
        self.done, self.position, self.samples = self.done + 1, self.position + 1, self.samples + number
        self.over = self._is_over()
        if self.position == self.steps_per_epoch or self.over:
            self._flush()
        self._run_phases("step")

    def _run_phases(self, kind: str) -> None:
        """What follows a step or the end of an epoch: transform, evaluate, decide, observe, save."""
        self._emit(kind, ("transform",))
        due = []
        for name, each in self.evals.items():
            fires, self.eval_last[name] = each.due(self._event(kind), self.eval_last[name])
            due += [name] * (fires or (self.over and self.reason is None and not self._is_evaluated(name)))
        if due:
            self._evaluate(due)
        self._emit(kind, ("decide",))
        if kind == "epoch_end" or self.done % self.log_every == 0 or self.evaluated == self.done or self.over:
            self._record()
        self._emit(kind, ("observe", "save"))

    def _is_evaluated(self, name: str) -> bool:
        return self.evaluated == self.done and any(result.startswith(f"{name}/") for result in self.results)

    def _is_over(self) -> bool:
        """Whether it has the length that it was given; where an epoch is complete, that is said at its end."""
        if self.position == self.steps_per_epoch and not self.ended:
            return False
        if self.time is not None and self.done > self.start and time.perf_counter() - self.clock >= self.time:
            return True
        if self.total_steps is not None:
            return self.done >= self.total_steps
        return self.end_epoch is not None and self.epoch + self.ended >= self.end_epoch

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
        self._emit("eval_start")
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

    def _progress(self, prefix: str) -> Callable[[int, int | None, Batch], None]:
        def progress(done: int, total: int | None, batch: Batch) -> None:
            event = self._event("evaluating")._replace(evaluating=(prefix, done, total), batch=batch, outputs=None)
            for hook in self.hooks.values():
                if hook.follow is not None:
                    hook.follow(event)

        return progress

    def _record(self) -> None:
        """The means since the last record, hyperparameters, and the results of an evaluation at this very step."""
        rates = hyperparameters(self._opt_state())
        means = self.means.take(rates)
        if not means:
            again = self.history and self.history[-1]["step"] == self.done
            means = {n: v for n, v in self.history.pop().items() if n not in ("step", "epoch")} if again else {}
            means |= read(rates)
        numbers = {n: v for n, v in {**self.extra, **self._results_here()}.items() if isinstance(v, (int, float))}
        self.means.last, self.extra = {**means, **numbers}, {}
        self.history.append({"step": self.done, "epoch": self.epoch, **self.means.last})
        refused = gave_up(self._opt_state())
        if refused is not None and refused.any():
            self.reason = self.reason or GAVE_UP

    def _results_here(self) -> dict[str, Any]:
        """Those of an evaluation at this very step."""
        return self.results if self.evaluated == self.done else {}

    def _opt_state(self) -> Any:
        return self.state.opt_state if isinstance(self.state, TrainState) else None

    # --- events --------------------------------------------------------------------------------------------------

    def _emit(self, kind: str, phases: tuple[str, ...] = PHASES) -> None:
        hooks = {name: hook for name, hook in self.hooks.items() if hook.phase in phases}
        if not hooks:
            return
        event = self._event(kind)
        for name, hook in hooks.items():
            if self._call_hook(name, hook, event):
                event = self._event(kind)

    def _call_hook(self, name: str, hook: Hook, event: Event) -> bool:
        """Call a hook with an event and apply its action; returns whether the state was replaced."""
        self.hook_states[name], action = hook.update(self.hook_states[name], event)
        if isinstance(action, Stop):
            self.reason = self.reason or action.reason
        elif isinstance(action, Replace):
            self.state = tree.clone(action.state)
        elif isinstance(action, Report):
            self.extra |= {n: float(value) for n, value in action.metrics.items()}
        elif isinstance(action, Save):
            action.write({"state": self.state}, self.done, self._snapshot())
        elif action is not None:
            raise TypeError(f"a hook must return Stop, Replace, Report, Save or None, {name} returned {action!r}")
        return isinstance(action, Replace)

    def _emit_exception(self, error: BaseException) -> None:
        """Tell every hook that the run ends with an error, even if some of them fail."""
        event = self._event("exception")
        for name, hook in self.hooks.items():
            try:
                self._call_hook(name, hook, event)
            except Exception as another:
                error.add_note(f"the hook {name} failed at this, too: {another!r}")

    def _event(self, kind: str) -> Event:
        return Event(
            kind,
            self.done,
            self.epoch,
            self.position,
            self.samples,
            self.state,
            LazyMetrics(self.means, self._opt_state(), {**self.extra, **self._results_here()}),
            time.perf_counter() - self.clock,
            self._info(),
            self.batch,
            self.outputs,
            self.evaluated == self.done,
        )

    def _info(self) -> RunInfo:
        return RunInfo(
            self.start,
            self.total_steps,
            self.steps_per_epoch,
            self.history,
            self.hook_states,
            self.reason,
            None if self.resumed_from is None else str(self.resumed_from),
            self.num_params,
            self.state.step.device,
            self.accumulates,
            self.source.settings if isinstance(self.source, TrainStep) else {},
            distributed.world_size(),
            self.depends.get("data: batch_size"),
            tuple(f"{name}/{metric}" for name, each in self.evals.items() for metric in each.metrics),
        )

    # --- what is saved, and read again ---------------------------------------------------------------------------

    def _snapshot(self) -> dict[str, Any]:
        """All that must be known beside the state to continue the run, as JSON has it."""
        for name, state in self.hook_states.items():
            try:
                json.dumps(state)
            except (TypeError, ValueError) as error:
                wanted = (
                    f"the state of a hook must be plain data, as JSON has it, to be saved: that of {name} is {state!r}"
                )
                raise TypeError(wanted) from error
        return {
            **{name: getattr(self, name) for name in KEPT},
            "epoch": self.epoch + self.ended,
            "position": 0 if self.ended else self.position,
            "elapsed": time.perf_counter() - self.clock,
            "history": list(self.history),
            "means": self.means.saved(),
            "extra": dict(self.extra),
            "results": {n: v for n, v in self.results.items() if isinstance(v, (int, float))},
            "eval_last": self.eval_last,
            "hooks": self.hook_states,
            "depends": self.depends,
        }

    def _resume(self, directory: str | Path) -> None:
        self.state, saved = saved_run(directory, self.state, self.depends)
        self.done = self._clock()
        for name in (*KEPT, "epoch", "position", "elapsed", "results", "extra"):
            setattr(self, name, saved[name])
        self.history = list(saved["history"])
        self.means = Means.restored(saved["means"], self.state.step.device)
        self.eval_last |= {n: last for n, last in saved["eval_last"].items() if n in self.evals}
        self.hook_states.update({n: s for n, s in saved["hooks"].items() if n in self.hook_states})
        if self.position and not isinstance(self.data, (EpochData, Sequence)):
            warnings.warn(
                f"data is not an EpochData, so the first {self.position} batches of epoch {self.epoch} are drawn again "
                "and skipped: the run resumes exactly only if they come in the same order as before",
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
