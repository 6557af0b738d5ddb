"""Sinks of records: a progress bar, lines, CSV and JSONL files, anything with ``write(step, metrics)``."""

import csv
import io
import itertools
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO, runtime_checkable

from tqdm.auto import tqdm

__all__ = ["Bar", "Csv", "Guarded", "Jsonl", "Lines", "Sink", "as_sink"]


class Sink:
    """A place for records; `follow` sees every event, for those who show progress."""

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Take the record of a step."""

    def follow(self, event: Any) -> None:
        """See an event."""

    def close(self) -> None:
        """The run is over."""


def as_sink(sink: Any) -> Sink:
    """The sink of a name, a path, an object with ``write``, or a callable."""
    if isinstance(sink, Sink):
        return sink
    if sink == "bar":
        return Bar()
    if sink == "print":
        return Lines()
    if isinstance(sink, (str, Path)):
        kinds: dict[str, Callable[[Path], Sink]] = {".csv": Csv, ".jsonl": Jsonl}
        if Path(sink).suffix not in kinds:
            raise ValueError(f"sinks must be 'bar', 'print', or end in .csv or .jsonl, got {str(sink)!r}")
        path = Path(sink).absolute()  # whatever directory the run goes to
        path.parent.mkdir(parents=True, exist_ok=True)
        return kinds[path.suffix](path)
    if isinstance(sink, SummaryWriter):
        return Scalars(sink)
    if isinstance(sink, Writes):
        return _Foreign(sink.write, sink.close if isinstance(sink, Closes) else None)
    if callable(sink):
        return _Foreign(sink, None)
    raise TypeError(f"sinks must be names, paths, callables or objects with write(step, metrics), got {sink!r}")


@runtime_checkable
class Writes(Protocol):
    """An object that takes records."""

    def write(self, step: int, metrics: Mapping[str, Any], /) -> Any: ...


@runtime_checkable
class Closes(Protocol):
    """An object that can be told that the run is over."""

    def close(self) -> Any: ...


@runtime_checkable
class SummaryWriter(Protocol):
    """An object like `torch.utils.tensorboard.SummaryWriter`."""

    def add_scalar(self, tag: str, value: float, step: int, /) -> Any: ...
    def close(self) -> Any: ...


class Guarded(Sink):
    """A sink whose failures do not end a run: the first one is a warning, and it is left out from then on."""

    def __init__(self, sink: Sink) -> None:
        self._sink, self._works = sink, True

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._call(self._sink.write, step, metrics)

    def follow(self, event: Any) -> None:
        self._call(self._sink.follow, event)

    def close(self) -> None:
        self._call(self._sink.close)

    def _call(self, method: Callable[..., None], *args: Any) -> None:
        if not self._works:
            return
        try:
            method(*args)
        except Exception as error:
            self._works = False
            warnings.warn(
                f"{type(self._sink).__name__} is left out, it failed: {type(error).__name__}: {error}",
                RuntimeWarning,
                stacklevel=4,
            )


class _Foreign(Sink):
    def __init__(self, write: Callable[[int, Mapping[str, Any]], Any], close: Callable[[], Any] | None) -> None:
        self._write, self._close = write, close

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._write(step, metrics)

    def close(self) -> None:
        if self._close is not None:
            self._close()


class Scalars(Sink):
    """The numbers of each record, to a writer of TensorBoard's kind."""

    def __init__(self, writer: SummaryWriter) -> None:
        self._writer = writer

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        for name, value in metrics.items():
            if _is_number(value):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Pace:
    """How fast a run is: images per second, and the seconds that remain, since the step that compiled."""

    def __init__(self) -> None:
        self._first: tuple[int, int, float] | None = None
        self.rate = self.remaining = 0.0

    def follow(self, event: Any) -> bool:
        """Take note of a step; returns whether it was the first one."""
        if self._first is None:
            self._first = (event.step, event.samples, event.elapsed)
            return True
        steps, samples, seconds = (
            now - then for now, then in zip((event.step, event.samples, event.elapsed), self._first, strict=True)
        )
        self.rate = samples / seconds if seconds > 0 else 0.0
        self.remaining = seconds / steps * ((event.info.total_steps or event.step) - event.step)
        return False


class Bar(Sink):
    """A progress bar: steps done, the newest loss and accuracy, images per second, the time that remains."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._pace = Pace()
        self._shown: dict[str, str] = {}

    def follow(self, event: Any) -> None:
        if event.kind == "run_start":
            form = "{desc}|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
            total = event.info.total_steps
            self._bar = tqdm(total=total, initial=event.step, bar_format=form, file=sys.stderr, dynamic_ncols=True)
        elif event.kind == "step" and self._bar is not None:
            if self._pace.follow(event):
                self._bar.unpause()
            self._bar.update(event.step - self._bar.n)
            self._bar.set_description(f"epoch {event.epoch + 1}", refresh=False)
        elif event.kind == "evaluating" and self._bar is not None:
            name, done, total = event.evaluating
            self._bar.set_description(f"{name} {done}/{total or '?'}")

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        if self._bar is not None:
            self._shown |= {n: f"{v:.3g}" for n, v in metrics.items() if _is_shown(n, v)}
            self._shown |= {"images/s": f"{self._pace.rate:.0f}"}  # behind the first record, before evaluations
            self._bar.set_postfix(self._shown)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _is_shown(name: str, value: Any) -> bool:
    return isinstance(value, float) and name.split("/")[-1] in ("loss", "accuracy")


class Lines(Sink):
    """A line per record, on standard output or another stream."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._pace = Pace()

    def follow(self, event: Any) -> None:
        if event.kind == "step":
            self._pace.follow(event)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        numbers = "  ".join(f"{n} {v:.4g}" for n, v in metrics.items() if isinstance(v, (int, float)))
        pace = f"  images/s {self._pace.rate:.0f}  left {self._pace.remaining:.0f} s" if self._pace.rate else ""
        stream = self._stream or sys.stdout
        stream.write(f"step {step}  {numbers}{pace}\n")
        stream.flush()


class Jsonl(Sink):
    """A JSON object per line, from a run's beginning as in `Csv`; numbers that are not finite become null."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: list[tuple[int, int]] = []  # steps, and where their lines begin

    def follow(self, event: Any) -> None:
        if event.kind == "run_start" and self._path.exists():
            self._lines = []
            if event.info.resumed_from is not None or event.step:
                self._keep_until(event.step)
            else:
                _replace(self._path, "")

    def _keep_until(self, step: int) -> None:
        """Leave out what a run that is continued wrote after the step that it goes on from."""
        kept = []
        for line in _whole_lines(self._path):
            if json.loads(line)["step"] > step:
                break
            kept.append(line)
        _replace(self._path, "".join(kept))
        starts = itertools.accumulate((len(line.encode()) for line in kept), initial=0)
        self._lines = [(json.loads(line)["step"], start) for line, start in zip(kept, starts, strict=False)]

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        line = {"step": step, **{n: v if math.isfinite(v) else None for n, v in metrics.items() if _is_number(v)}}
        with self._path.open("r+" if self._path.exists() else "w", encoding="utf-8", newline="") as file:
            start = file.seek(0, 2)
            if self._lines and self._lines[-1][0] == step:  # there is more to say of the same step
                start = file.seek(self._lines.pop()[1])
                file.truncate()
            file.write(json.dumps(line) + "\n")
        self._lines.append((step, start))


class Csv(Sink):
    """One row per record. A run that is continued goes on after the last step that precedes its own."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: list[dict[str, Any]] = []

    def follow(self, event: Any) -> None:
        if event.kind == "run_start":
            self._rows = []
            if (event.info.resumed_from is not None or event.step) and self._path.exists():
                rows = csv.DictReader(_whole_lines(self._path))
                self._rows = [row for row in rows if int(row["step"]) <= event.step]
            self._save()

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        row = {"step": step, **{n: v for n, v in metrics.items() if _is_number(v) and n != "step"}}
        same_step = bool(self._rows) and int(self._rows[-1]["step"]) == step
        columns = set(self._columns())
        if same_step:
            self._rows[-1] = {**self._rows[-1], **row}
        else:
            self._rows.append(row)
        if same_step or not columns >= set(row):
            self._save()
        else:
            with self._path.open("a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, self._columns()).writerow(row)

    def _columns(self) -> list[str]:
        return list(dict.fromkeys(name for row in self._rows for name in row))

    def _save(self) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns())
        if self._rows:
            writer.writeheader()
        writer.writerows(self._rows)
        _replace(self._path, text.getvalue())


def _whole_lines(path: Path) -> list[str]:
    """The lines of a file, but for a last one that a kill has cut off."""
    with path.open(encoding="utf-8", newline="") as file:
        return [line for line in file if line.endswith("\n")]


def _replace(path: Path, text: str) -> None:
    """Write a file anew; a kill leaves the old one or the new one."""
    unfinished = path.with_name(f".{path.name}.tmp")
    with unfinished.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
    os.replace(unfinished, path)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
