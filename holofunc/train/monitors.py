"""Hooks that monitor a metric: early stopping, and learning rate reduction on a plateau."""

import math
from collections.abc import Callable
from typing import Any

from holofunc.ops.checks import check_counts
from holofunc.optim.hyperparams import get_hyperparams, set_hyperparams
from holofunc.train.hooks import Event, Hook, Replace, Stop, comparison, watched

__all__ = ["early_stopping", "plateau"]


def early_stopping(
    monitor: str,
    patience: int,
    *,
    mode: str = "min",
    min_delta: float = 0.0,
    target: float | None = None,
    baseline: float | None = None,
    start: int | str = 0,
    finite: bool = True,
) -> Hook:
    """End the run when a metric has not improved for ``patience`` of its evaluations.

    Args:
        monitor: the metric, e.g. ``"val/loss"``.
        patience: number of evaluations without improvement after which the run ends, at least 1.
        mode: whether ``"min"`` or ``"max"`` is better.
        min_delta: an improvement must be larger than this.
        target: end as soon as the metric reaches this value.
        baseline: the value that the first improvement has to exceed.
        start: ignore evaluations before this step, or epoch (``"5ep"``).
        finite: whether a NaN or infinite metric ends the run at once; otherwise it is not an improvement.

    Example:
        >>> from holofunc import train
        >>> hook = train.early_stopping("val/loss", patience=3)
    """
    check_counts(1, patience=patience)
    check_deltas(min_delta=min_delta)
    for name, value in (("target", target), ("baseline", baseline)):
        if value is not None and math.isnan(value):
            raise ValueError(f"{name} must be a number or None, got {value}")
    better, first = comparison(mode), _start(start)
    needed = min_delta if mode == "min" else -min_delta

    def reached(value: float | None) -> bool:
        return target is not None and value is not None and (better(value, target) or value == target)

    def verdict(value: float | None, waited: int) -> Stop | None:
        if reached(value):
            return Stop(f"{monitor} reached {value:.4g}")
        return Stop(f"{monitor} did not improve for {patience} evaluations") if waited >= patience else None

    def update(state: dict[str, Any], event: Event) -> tuple[dict[str, Any], Stop | None]:
        value, best, waited = _watched(monitor, event), state["best"], state["waited"]
        if event.kind == "run_start" and event.info.resumed_from is not None:
            return state, verdict(best, waited)  # a resumed run stays ended
        if value is None:
            return state, None
        if finite and not math.isfinite(value):
            return state, Stop(f"{monitor} is not finite: {value}")
        if reached(value) or (math.isfinite(value) and (best is None or better(value + needed, best))):
            best, waited = value, 0
        elif first(event):
            waited += 1
        return {"best": best, "waited": waited}, verdict(value, waited)

    return Hook(lambda: {"best": baseline, "waited": 0}, update, "decide", "early_stopping")


def _start(start: int | str) -> Callable[[Event], bool]:
    """Whether an event is at or after the start."""
    if isinstance(start, str) and start.endswith("ep") and start[:-2].isdecimal():
        epochs = int(start[:-2])
        return lambda event: event.epoch >= epochs
    if isinstance(start, bool) or not isinstance(start, int) or start < 0:
        raise ValueError(f"start must be a number of steps or epochs as '5ep', got {start!r}")
    return lambda event: event.step >= start


def plateau(
    monitor: str,
    patience: int = 10,
    *,
    factor: float = 0.1,
    mode: str = "min",
    min_delta: float = 0.0,
    cooldown: int = 0,
    min_value: float = 0.0,
    name: str = "learning_rate",
) -> Hook:
    """Multiply the learning rate by ``factor`` when a metric has not improved for more than ``patience`` evaluations.

    Args:
        monitor: the metric, e.g. ``"val/loss"``; a non-finite value is not an improvement.
        patience: number of evaluations without improvement to tolerate, at least 0.
        factor: in (0, 1).
        mode: whether ``"min"`` or ``"max"`` is better.
        min_delta: an improvement must be larger than this.
        cooldown: number of evaluations after a reduction that are ignored.
        min_value: lower bound of the hyperparameter.
        name: of the hyperparameter, which must be injected (`holofunc.optim.inject_hyperparams`); in a `partition`,
            ``"head/learning_rate"``.

    Raises:
        ValueError: an option is out of range; during the run, there is no such hyperparameter or metric.

    Source: `torch.optim.lr_scheduler.ReduceLROnPlateau` with ``threshold_mode="abs"`` and without
        ``eps``; the count starts with the first evaluation, and is saved with the run.

    Example:
        >>> from holofunc import optim, train
        >>> tx = optim.inject_hyperparams(optim.adamw)(learning_rate=1e-3)
        >>> hook = train.plateau("val/loss", patience=3, factor=0.5)
    """
    check_counts(0, patience=patience, cooldown=cooldown)
    check_deltas(min_delta=min_delta, min_value=min_value)
    if not 0 < factor < 1:
        raise ValueError(f"factor must be in (0, 1), got {factor}")
    better = comparison(mode)
    needed = min_delta if mode == "min" else -min_delta

    def update(state: dict[str, Any], event: Event) -> tuple[dict[str, Any], Replace | None]:
        value = _watched(monitor, event)
        if value is None:
            return state, None
        best, waited, rests = state["best"], state["waited"] + 1, state["rests"]
        if math.isfinite(value) and (best is None or better(value + needed, best)):
            best, waited = value, 0
        if rests:
            rests, waited = rests - 1, 0
        if waited <= patience:
            return {"best": best, "waited": waited, "rests": rests}, None
        opt_state = event.state.opt_state
        known = get_hyperparams(opt_state)
        if name not in known:
            raise ValueError(f"name must be an injected hyperparameter, one of {sorted(known)}, got {name!r}")
        lower = max(float(known[name]) * factor, min_value)
        changed = event.state._replace(opt_state=set_hyperparams(opt_state, **{name: lower}))
        return {"best": best, "waited": 0, "rests": cooldown}, Replace(changed)

    return Hook(lambda: {"best": None, "waited": 0, "rests": 0}, update, "decide", "plateau")


def check_deltas(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and at least 0, got {value}")


def _watched(monitor: str, event: Event) -> float | None:
    """The metric, if it was evaluated at this event."""
    if event.kind == "run_start":
        if not event.info.evaluated:
            raise ValueError(f"monitor={monitor!r} is looked at after evaluations, and there are none: fit(eval=...)")
        watched("monitor", monitor, event)
    return watched("monitor", monitor, event) if event.kind == "eval" else None
