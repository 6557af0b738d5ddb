"""Sinks for TensorBoard, Weights & Biases and MLflow, and a hook for torch's profiler."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from holofunc.train.hooks import Event, Hook
from holofunc.train.sinks import Scalars, Sink

__all__ = ["mlflow", "profile", "tensorboard", "wandb"]


def tensorboard(dir: str | Path) -> Sink:
    """A sink that writes scalars for TensorBoard; needs ``pip install holofunc[tensorboard]``.

    Of a run that is continued, records after the step that it goes on from are void, and all of them are where another
    one begins in the same directory.

    Raises:
        ImportError: the package ``tensorboard`` is not installed.
    """
    from torch.utils.tensorboard import SummaryWriter

    place = str(Path(dir).absolute())  # whatever directory the run goes to
    return _Board(lambda step: SummaryWriter(place, purge_step=step))


class _Board(Sink):
    """A writer for each run: ``begin(step)`` makes one for which older records of this step and later ones are void."""

    def __init__(self, begin: Callable[[int], Any]) -> None:
        self._begin, self._scalars = begin, Sink()

    def follow(self, event: Event) -> None:
        if event.kind == "run_start":
            self._scalars = Scalars(self._begin(event.step + 1))

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._scalars.write(step, metrics)

    def close(self) -> None:
        self._scalars.close()


def wandb(log: Callable[..., Any]) -> Callable[[int, Mapping[str, Any]], None]:
    """A sink that calls ``log(metrics, step=step)``, such as ``wandb.init(...).log``.

    Example:
        >>> from holofunc import train
        >>> train.wandb(lambda metrics, step: print(step, metrics))(3, {"loss": 0.5})
        3 {'loss': 0.5}
    """
    return lambda step, metrics: log(dict(metrics), step=step)


def mlflow(log_metrics: Callable[..., Any]) -> Callable[[int, Mapping[str, Any]], None]:
    """A sink that calls ``log_metrics(numbers, step=step)``, such as ``mlflow.log_metrics``.

    Example:
        >>> from holofunc import train
        >>> train.mlflow(lambda metrics, step: print(step, metrics))(3, {"loss": 0.5, "name": "a"})
        3 {'loss': 0.5}
    """
    return lambda step, metrics: log_metrics(
        {name: value for name, value in metrics.items() if isinstance(value, (int, float))}, step=step
    )


def profile(path: str | Path, *, start: int = 10, steps: int = 5) -> Hook:
    """Write a trace of some steps, for ``chrome://tracing`` or Perfetto.

    Args:
        path: the file, ending in ``.json`` or ``.json.gz``.
        start: the first step that is traced; those that compile come before.
        steps: how many.

    Example:
        >>> from holofunc import train
        >>> hook = train.profile("trace.json", start=10, steps=3)
    """
    if start < 1 or steps < 1:
        raise ValueError(f"start and steps must be at least 1, got {start} and {steps}")
    place = Path(path).absolute()
    place.parent.mkdir(parents=True, exist_ok=True)  # where there is none, torch writes nothing, and raises nothing
    running: list[Any] = []

    def update(state: None, event: Event) -> tuple[None, None]:
        if event.kind == "step" and event.step == event.info.start + start - 1:
            running.append(torch.profiler.profile(acc_events=True))
            running[0].start()
        ends = event.kind in ("run_end", "exception") or event.step >= event.info.start + start + steps - 1
        if running and ends:
            profiler = running.pop()
            profiler.stop()
            profiler.export_chrome_trace(str(place))
        return None, None

    return Hook(lambda: None, update, "observe", "profile")
