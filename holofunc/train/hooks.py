"""Hooks: functions of the events of a run, optionally with state.

A hook is a pair ``(init, update)`` with ``update(hook_state, event) -> (hook_state, action)``. Hook states are plain
JSON data, which `holofunc.train.fit` saves with the run. A plain callable ``event -> action`` is a hook without state.
Hooks run in the order of their phases, whatever their order in the list: transform, decide, observe, save. So a
checkpoint always contains the decisions made at its step.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from holofunc.checkpoint import Writer, steps
from holofunc.ops.checks import check_counts
from holofunc.train.cadences import cadence
from holofunc.train.sinks import Guarded, as_sink
from holofunc.train.state import TrainState
from holofunc.typing import Batch, PyTree

__all__ = [
    "Event",
    "Hook",
    "Replace",
    "Report",
    "RunInfo",
    "Save",
    "Stop",
    "checkpoint",
    "comparison",
    "every",
    "log",
    "watched",
]

PHASES = ("transform", "decide", "observe", "save")


class RunInfo(NamedTuple):
    """Information about a run.

    Attributes:
        start: the step at which the run started.
        total_steps: the step at which it ends; None if unknown.
        steps_per_epoch: batches per epoch; None if unknown.
        history: the records so far.
        hooks: the states of all hooks, by name.
        reason: why the run ends; None while it continues.
        resumed_from: the directory of a resumed run.
        num_params: the number of parameters.
        device: the device of the state.
        accumulates: whether gradients are accumulated over several calls (`holofunc.optim.multi_steps`).
        settings: the settings of the step: its ``precision``, and those passed to `make_train_step`.
        world_size: the number of processes.
        batch_size: samples per batch, over all processes; None if the data do not say (`Fingerprinted`).
        evaluated: the metrics of evaluations, as ``val/name``; a metric that computes a dict has several.
    """

    start: int
    total_steps: int | None
    steps_per_epoch: int | None
    history: list[dict[str, Any]]
    hooks: Mapping[str, Any]
    reason: str | None
    resumed_from: str | None
    num_params: int
    device: torch.device
    accumulates: bool
    settings: Mapping[str, Any]
    world_size: int = 1
    batch_size: int | None = None
    evaluated: tuple[str, ...] = ()

    @property
    def batch_size_per_device(self) -> int | None:
        """The largest number of samples of a batch on one process."""
        return None if self.batch_size is None else -(-self.batch_size // self.world_size)


class Event(NamedTuple):
    """An event of a run.

    Attributes:
        kind: ``run_start``, ``epoch_start``, ``step``, ``eval_start``, ``eval`` (after it), ``epoch_end``, ``run_end``
            or ``exception``.
        step: calls of the step so far.
        epoch: the epoch, 0-based.
        batch_in_epoch: batches of this epoch so far.
        samples: samples seen in this run.
        state: the state; clone what you want to keep, because the next step writes into the same memory.
        metrics: means since the last log point, as Python numbers, with the results of an evaluation as ``val/name``.
            Reading them waits for the device.
        elapsed: seconds since the start of the run, without evaluations.
        info: a `RunInfo`.
        batch: the batch of a step or of the progress of an evaluation, otherwise None.
        outputs: the outputs of the objective, for a step made with ``make_train_step(..., outputs=True)``.
        evaluated: whether there was an evaluation at this step; its results are among the metrics.
        evaluating: for `Hook.follow`: the name of the data set, the batches done, and the total.
    """

    kind: str
    step: int
    epoch: int
    batch_in_epoch: int
    samples: int
    state: TrainState
    metrics: Mapping[str, Any]
    elapsed: float
    info: RunInfo
    batch: Batch = None
    outputs: PyTree = None
    evaluated: bool = False
    evaluating: tuple[str, int, int | None] | None = None


class Stop(NamedTuple):
    """An action: end the run after this event."""

    reason: str


class Replace(NamedTuple):
    """An action: continue with another state of the same structure."""

    state: TrainState


class Report(NamedTuple):
    """An action: add numbers to the next record; from ``transform`` and ``decide`` that is the record of the step."""

    metrics: Mapping[str, float]


class Save(NamedTuple):
    """An action: call ``write(tree, step, metadata)`` with everything that `fit` needs to resume here."""

    write: Callable[[PyTree, int, dict[str, Any]], Any]


class Hook(NamedTuple):
    """A function of the events of a run, with state; see the description of the module.

    ``follow(event)`` gets the progress of evaluations: an event ``evaluating`` after each of their batches.
    """

    init: Callable[[], Any]
    update: Callable[[Any, Event], tuple[Any, Stop | Replace | Report | Save | None]]
    phase: str = "observe"
    name: str = "hook"
    follow: Callable[[Event], None] | None = None


def as_hook(hook: Any) -> Hook:
    if isinstance(hook, Hook):
        return hook
    if callable(hook):
        return Hook(lambda: None, lambda state, event: (state, hook(event)), name=getattr(hook, "__name__", "hook"))
    raise TypeError(f"hooks must be Hook values or callables event -> action, got {hook!r}")


def every(when: int | str | Iterable[int], fn: Callable[[Event], Any], *, phase: str = "observe") -> Hook:
    """Call ``fn(event)`` at a cadence; its result is the action of the hook.

    Args:
        when: a number of steps, ``"2ep"`` (epochs), ``"10%"`` of the run, ``"30s"`` (seconds), or a list of steps.
        fn: called with the event of a step, or of the end of an epoch.
        phase: one of transform, decide, observe, save.

    Example:
        >>> from holofunc import train
        >>> hook = train.every("1ep", lambda event: train.Stop("one epoch is enough"))
    """
    due = cadence(when)
    if not callable(fn):
        raise TypeError(f"fn must be callable, fn(event), got {fn!r}")
    if phase not in PHASES:
        raise ValueError(f"phase must be one of {', '.join(PHASES)}, got {phase!r}")

    def update(last: float, event: Event) -> tuple[float, Any]:
        fires, last = due(event, last)
        return last, fn(event) if fires else None

    return Hook(lambda: 0.0, update, phase, f"every {when}")


def log(*sinks: Any, every: int = 50) -> Hook:
    """Write metrics while training.

    Args:
        sinks: ``"bar"`` (a progress bar with loss, images/s and remaining time), ``"print"``, a path ending in ``.csv``
            or ``.jsonl``, an object with ``write(step, metrics)`` and optionally ``close()``, or a callable
            ``(step, metrics)``.
        every: steps between records; the end of an epoch is always recorded.

    Example:
        >>> from holofunc import train
        >>> seen = []
        >>> hook = train.log(lambda step, metrics: seen.append(step), every=10)
    """
    check_counts(every=every)
    opened = [Guarded(as_sink(sink)) for sink in sinks]

    def update(state: None, event: Event) -> tuple[None, None]:
        ends_epoch = event.batch_in_epoch == event.info.steps_per_epoch  # then the event epoch_end follows
        stops = event.kind == "step" and (event.step % every == 0 or event.evaluated) and not ends_epoch
        for sink in opened:
            sink.follow(event)
            if stops or event.kind == "epoch_end":
                sink.write(event.step, {"epoch": event.epoch, **event.metrics})
            if event.kind in ("run_end", "exception"):
                sink.close()
        return None, None

    def follow(event: Event) -> None:
        for sink in opened:
            sink.follow(event)

    return Hook(lambda: None, update, "observe", "log", follow)


def checkpoint(
    dir: str | Path,
    *,
    every: int | str | Iterable[int] = "1ep",
    keep: int | None = 3,
    best: str | None = None,
    mode: str = "min",
    overwrite: bool = False,
    wait: bool = True,
) -> Hook:
    """Save the run: its state, the states of the hooks, the history. ``fit(resume=dir)`` continues it.

    The directory is locked by the run; a second run in it is an error.

    Args:
        dir: the checkpoint directory of `holofunc.checkpoint`.
        every: cadence, as in the hook ``every``; the end of the run is always saved.
        keep: how many of the newest steps to keep (None: all), in addition to the best one.
        best: the metric, e.g. ``"val/accuracy"``, that determines the best step, of those that are saved.
        mode: whether ``"min"`` or ``"max"`` of it is best.
        overwrite: whether a new run removes later steps of another run from the directory; otherwise they are an error,
            because they would remain the latest ones.
        wait: whether training waits until a step is on disk. Otherwise a copy of the state is written in the
            background, and errors in writing are raised at the next save or at the end.

    Example:
        >>> from holofunc import train
        >>> hook = train.checkpoint("runs/digits", best="val/accuracy", mode="max")
    """
    due, better, place = cadence(every, "every"), comparison(mode), Path(dir).absolute()
    check_counts(keep=1 if keep is None else keep)
    opened: list[Writer] = []

    def update(state: dict[str, Any], event: Event) -> tuple[dict[str, Any], Save | None]:
        if event.kind == "run_start":
            if best is not None:
                watched("best", best, event)
            before = {str(Path(dir).resolve()) for dir in (event.info.resumed_from, state.get("dir")) if dir}
            opened.append(_open(place, event, overwrite, goes_on=str(place.resolve()) in before))
            state = {**state, "dir": str(place)}
        if event.kind == "exception" and opened:
            opened.pop().close()
        fires, last = due(event, state["last"])
        state, mark = {**state, "last": last}, [event.step, len(event.info.history), event.evaluated]
        if not fires and not (event.kind == "run_end" and state["saved"] != mark):
            if event.kind == "run_end":
                opened.pop().close()
            return state, None
        value = watched("best", best, event) if best is not None else None
        improved = (
            value is not None and not math.isnan(value) and (state["best"] is None or better(value, state["best"]))
        )

        def write(tree: PyTree, step: int, metadata: dict[str, Any]) -> None:
            options: dict[str, Any] = {
                "metadata": metadata,
                "keep": keep,
                "best": improved or state["best_step"] == step,
            }
            if wait:
                opened[0].save(tree, step, **options)
            else:
                opened[0].save_async(tree, step, copy=True, **options)
            if event.kind == "run_end":
                opened.pop().close()

        if improved:
            state |= {"best": value, "best_step": event.step}
        return {**state, "saved": mark}, Save(write)

    return Hook(lambda: {"last": 0.0, "saved": None, "best": None, "best_step": None}, update, "save", "checkpoint")


def _open(dir: Path, event: Event, overwrite: bool, *, goes_on: bool) -> Writer:
    """A writer for a run that starts here, or is resumed (``goes_on``), possibly before later steps of its own."""
    later = [step for step in steps(dir) if step > event.step]
    if later and not (overwrite or goes_on):
        raise ValueError(
            f"dir must not hold later steps of another run, which would stay the latest ones: {str(dir)!r} holds step "
            f"{later[-1]}, and this run starts at {event.step}. Continue that run (resume=dir), choose another "
            "directory, or let checkpoint(..., overwrite=True) remove them"
        )
    writer = Writer(dir)
    if later:
        writer.discard(after=event.step)
    return writer


def watched(argument: str, name: str, event: Event) -> float | None:
    """A metric of an event; None if it has not been measured yet or is not measured at this step.

    Raises:
        ValueError: there is no such metric, or it is not a number.
    """
    metrics, known = event.metrics, event.info.evaluated
    value = metrics.get(name)
    if isinstance(value, (int, float)):
        return float(value)
    whole = next((each for each in known if f"{name}/".startswith(f"{each}/")), None)
    of_a_set = name.partition("/")[0] in {each.partition("/")[0] for each in known}
    here = whole is not None and any(f"{each}/".startswith(f"{whole}/") for each in metrics)
    if value is not None or here or (whole is None and (of_a_set or metrics)):
        there = sorted({*known, *(n for n, x in metrics.items() if isinstance(x, (int, float)))})
        raise ValueError(f"{argument} must be one of {there} or a number among their parts, got {name!r}")
    return None


def comparison(mode: str) -> Callable[[float, float], bool]:
    """``better(a, b)`` of ``"min"`` or ``"max"``."""
    if mode not in ("min", "max"):
        raise ValueError(f"mode must be 'min' or 'max', got {mode!r}")
    return (lambda a, b: a < b) if mode == "min" else (lambda a, b: a > b)
