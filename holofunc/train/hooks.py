"""Hooks: what happens beside the steps of a run, as folds over its events.

A hook is a pair ``(init, update)``: ``update(hook_state, event) -> (hook_state, action)``. Hook states are plain JSON
data; `holofunc.train.fit` keeps them and saves them with the run. A plain callable ``event -> action`` is a hook
without a state. Hooks run in the order of their phase, whatever their order in the list: transform, decide, observe,
save; so a checkpoint always holds the decisions of the event it belongs to.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from holofunc.checkpoint import save
from holofunc.train.sinks import as_sink
from holofunc.train.state import TrainState

__all__ = ["Event", "Hook", "Replace", "RunInfo", "Stop", "checkpoint", "early_stopping", "every", "log"]

PHASES = ("transform", "decide", "observe", "save")


class Event(NamedTuple):
    """Something that happened in a run.

    Attributes:
        kind: ``run_start``, ``epoch_start``, ``step``, ``eval``, ``epoch_end``, ``run_end`` or ``exception``.
        step: calls of the step so far.
        epoch: the epoch, 0-based.
        batch_in_epoch: batches of this epoch so far.
        samples: samples seen in this run.
        state: the state; copy what is to outlive the event, because the next step writes into the same memory.
        metrics: means since the last log point, as Python numbers, with the results of an evaluation as ``val/name``.
            Reading them waits for the device.
        elapsed: seconds since the run began, without evaluations.
        info: what is known of the run, a `RunInfo`.
    """

    kind: str
    step: int
    epoch: int
    batch_in_epoch: int
    samples: int
    state: TrainState
    metrics: Mapping[str, Any]
    elapsed: float
    info: "RunInfo"


class RunInfo(NamedTuple):
    """What is known of a run.

    Attributes:
        start: the step at which it began.
        total_steps: the step at which it ends, None if unknown.
        steps_per_epoch: batches in an epoch, None if unknown.
        history: the records so far.
        hooks: the states of all hooks, by name.
        reason: why the run ends, None while it goes on.
    """

    start: int
    total_steps: int | None
    steps_per_epoch: int | None
    history: list[dict[str, Any]]
    hooks: Mapping[str, Any]
    reason: str | None


class Stop(NamedTuple):
    """An action: end the run after this event."""

    reason: str


class Replace(NamedTuple):
    """An action: go on with another state of the same structure."""

    state: TrainState


class Hook(NamedTuple):
    """A fold over events; see the module's description."""

    init: Callable[[], Any]
    update: Callable[[Any, Event], tuple[Any, Stop | Replace | None]]
    phase: str = "observe"
    name: str = "hook"


def as_hook(hook: Any) -> Hook:
    if isinstance(hook, Hook):
        return hook
    if callable(hook):
        return Hook(lambda: None, lambda state, event: (state, hook(event)), name=getattr(hook, "__name__", "hook"))
    raise TypeError(f"hooks must be Hook values or callables event -> action, got {hook!r}")


def every(when: int | str | Iterable[int], fn: Callable[[Event], Any], *, phase: str = "observe") -> Hook:
    """Call ``fn(event)`` at a cadence; what it returns is the hook's action.

    Args:
        when: a number of steps; ``"2ep"`` epochs; ``"10%"`` of the run; ``"30s"`` seconds; or the steps themselves.
        fn: called with the event of a step, or of the end of an epoch.
        phase: one of transform, decide, observe, save.

    Example:
        >>> from holofunc import train
        >>> hook = train.every("1ep", lambda event: train.Stop("one epoch is enough"))
    """
    due = cadence(when)
    if phase not in PHASES:
        raise ValueError(f"phase must be one of {', '.join(PHASES)}, got {phase!r}")

    def update(last: float, event: Event) -> tuple[float, Any]:
        fires, last = due(event, last)
        return last, fn(event) if fires else None

    return Hook(lambda: 0.0, update, phase, f"every {when}")


def cadence(when: int | str | Iterable[int], argument: str = "when") -> Callable[[Event, float], tuple[bool, float]]:
    """``due(event, last) -> (fires, last)`` for a cadence; ``last`` starts at 0 and is plain data."""
    unit, number = _parsed(when, argument)

    def due(event: Event, last: float) -> tuple[bool, float]:
        if unit == "ep":
            return event.kind == "epoch_end" and (event.epoch + 1) % int(number) == 0, last
        if event.kind != "step":
            return False, last
        if unit == "at":
            return event.step in number, last
        if unit == "s":
            fires = event.elapsed - last >= number
            return fires, event.elapsed if fires else last
        if unit == "%":
            total = event.info.total_steps
            if total is None:
                raise ValueError(f"{argument}={when!r} needs data of known length")
            share = (event.step - event.info.start) * 100 / (total - event.info.start) // number
            return share > last, share
        return event.step % number == 0, last

    return due


def _parsed(when: Any, argument: str) -> tuple[str, Any]:
    wanted = f"{argument} must be a positive number of steps, '2ep', '10%', '30s' or a list of steps, got {when!r}"
    if isinstance(when, str):
        for unit in ("ep", "%", "s", ""):
            if when.endswith(unit):
                try:
                    number = float(when.removesuffix(unit)) if unit in ("%", "s") else int(when.removesuffix(unit))
                except ValueError:
                    raise ValueError(wanted) from None
                if number <= 0:
                    raise ValueError(wanted)
                return unit, number
    if isinstance(when, int) and not isinstance(when, bool) and when > 0:
        return "", when
    if isinstance(when, Iterable) and not isinstance(when, str):
        return "at", frozenset(when)
    raise ValueError(wanted)


def log(*sinks: Any, every: int = 50) -> Hook:
    """Write metrics while training.

    Args:
        sinks: ``"bar"`` (a progress bar with loss, images/s and the time that remains), ``"print"``, a path ending in
            ``.csv`` or ``.jsonl``, or anything with ``write(step, metrics)`` and, perhaps, ``close()``; a plain
            callable ``(step, metrics)`` will do.
        every: steps between records; the end of an epoch is always one.

    Example:
        >>> from holofunc import train
        >>> seen = []
        >>> hook = train.log(lambda step, metrics: seen.append(step), every=10)
    """
    if not isinstance(every, int) or every < 1:
        raise ValueError(f"every must be a positive number of steps, got {every!r}")
    opened = [as_sink(sink) for sink in sinks]

    def update(state: None, event: Event) -> tuple[None, None]:
        ends_epoch = event.batch_in_epoch == event.info.steps_per_epoch  # then there is more to say in a moment
        due = event.kind == "epoch_end" or (event.kind == "step" and event.step % every == 0 and not ends_epoch)
        for sink in opened:
            sink.follow(event)
            if due:
                sink.write(event.step, {"epoch": event.epoch, **event.metrics})
            if event.kind in ("run_end", "exception"):
                sink.close()
        return None, None

    return Hook(lambda: None, update, "observe", "log")


def checkpoint(
    dir: str | Path,
    *,
    every: int | str | Iterable[int] = "1ep",
    keep: int | None = 3,
    best: str | None = None,
    mode: str = "min",
) -> Hook:
    """Save the run: its state, the states of the hooks, the history. ``fit(resume=dir)`` continues it.

    Args:
        dir: the checkpoint directory of `holofunc.checkpoint`.
        every: cadence, as in `every`; the end of the run is always saved.
        keep: how many of the newest steps to keep (None: all); the best one is kept beside them.
        best: the metric, e.g. ``"val/accuracy"``, that marks a step as the best so far.
        mode: whether ``"min"`` or ``"max"`` of it is best.

    Example:
        >>> from holofunc import train
        >>> hook = train.checkpoint("runs/digits", best="val/accuracy", mode="max")
    """
    due = cadence(every, "every")
    better = _comparison(mode)

    def update(state: dict[str, Any], event: Event) -> tuple[dict[str, Any], None]:
        fires, last = due(event, state["last"])
        fires = fires or (event.kind == "run_end" and state["saved"] != event.step)
        state = {**state, "last": last}
        if not fires:
            return state, None
        value = event.metrics.get(best) if best is not None else None
        improved = (
            value is not None and not math.isnan(value) and (state["best"] is None or better(value, state["best"]))
        )
        state = {"last": last, "saved": event.step, "best": value if improved else state["best"]}
        save(
            dir,
            {"state": event.state},
            event.step,
            metadata=record(event, {"checkpoint": state}),
            keep=keep,
            best=improved,
        )
        return state, None

    return Hook(lambda: {"last": 0.0, "saved": None, "best": None}, update, "save", "checkpoint")


def record(event: Event, newest: Mapping[str, Any]) -> dict[str, Any]:
    """What must be known beside the state to continue a run."""
    info = event.info
    return {
        "start": info.start,
        "samples": event.samples,
        "elapsed": event.elapsed,
        "history": list(info.history),
        "hooks": {**info.hooks, **newest},
    }


def early_stopping(
    monitor: str, patience: int, *, mode: str = "min", min_delta: float = 0.0, target: float | None = None
) -> Hook:
    """End the run when a metric has not improved for ``patience`` of its evaluations.

    Args:
        monitor: the metric, e.g. ``"val/loss"``.
        patience: evaluations without improvement that are too many, at least 1.
        mode: whether ``"min"`` or ``"max"`` is better.
        min_delta: what counts as an improvement must exceed this.
        target: end as soon as the metric is this good.

    A metric that is not finite is no improvement.

    Example:
        >>> from holofunc import train
        >>> hook = train.early_stopping("val/loss", patience=3)
    """
    if patience < 1:
        raise ValueError(f"patience must be at least 1, got {patience}")
    better = _comparison(mode)

    def update(state: dict[str, Any], event: Event) -> tuple[dict[str, Any], Stop | None]:
        if event.kind != "eval" or monitor not in event.metrics:
            if event.kind == "eval" and monitor.split("/")[0] in {name.split("/")[0] for name in event.metrics}:
                raise ValueError(f"monitor must be one of {sorted(event.metrics)}, got {monitor!r}")
            return state, None
        value, best = event.metrics[monitor], state["best"]
        step = min_delta if mode == "min" else -min_delta
        if math.isfinite(value) and (best is None or better(value + step, best)):
            state = {"best": value, "waited": 0}
        else:
            state = {"best": best, "waited": state["waited"] + 1}
        if target is not None and (better(value, target) or value == target):
            return state, Stop(f"{monitor} reached {value:.4g}")
        if state["waited"] >= patience:
            return state, Stop(f"{monitor} did not improve for {patience} evaluations")
        return state, None

    return Hook(lambda: {"best": None, "waited": 0}, update, "decide", "early_stopping")


def _comparison(mode: str) -> Callable[[float, float], bool]:
    if mode not in ("min", "max"):
        raise ValueError(f"mode must be 'min' or 'max', got {mode!r}")
    return (lambda a, b: a < b) if mode == "min" else (lambda a, b: a > b)
