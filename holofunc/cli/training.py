"""``holofunc train``, ``find-lr`` and ``evaluate``."""

import dataclasses
import functools
import re
import shutil
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from holofunc import checkpoint, distributed, plots, tree
from holofunc import train as training
from holofunc.cli import job, ranks
from holofunc.cli.options import given, version
from holofunc.cli.runs import (
    CONFIG,
    check_folder,
    check_writable,
    outputs_of,
    say,
    settings,
    stored,
    trained,
)
from holofunc.cli.task import Opened
from holofunc.compile import keep_freed_memory
from holofunc.config import Config, override, write
from holofunc.model import Model
from holofunc.ops.checks import check_counts
from holofunc.train.cadences import cadence, seconds
from holofunc.train.lr_finder import check_ascending
from holofunc.train.objective import flat
from holofunc.train.resuming import dependencies, saved_run
from holofunc.train.sinks import Lines

__all__ = ["evaluate", "find_lr", "train"]

ENDS = {"interrupt": 130, "terminated": 143, "hangup": 129}
"""Exit codes of runs that were stopped."""
NEVER = "never"
"""A cadence of evaluations."""
LOWER = re.compile(r"(.*_)?(loss|error|error_rate)|hamming|mae|mse|nonfinite|localization|classification|detection")
"""Metrics that are better when they are lower; the last three are those of `holofunc.metrics.detection_errors`."""


def train(arguments: Namespace) -> Callable[[], int]:
    """``holofunc train``: train a network, and leave the run in a folder."""
    config = settings(arguments, ranks.join(arguments))
    folder = Path(config.out or "")
    check_folder(folder, may_hold_run=arguments.resume or arguments.overwrite or arguments.check)
    if arguments.check and (found := job.broken_files(config)):
        return functools.partial(_listed, found, 1)
    config, source = job.open_data(config, "train", keeps_places=True)
    fresh = arguments.overwrite or not checkpoint.steps(folder)
    if fresh:
        config = job.TASKS[config.task].prepared(config, source)
    held_out = job.open_data(config, "test")[1]
    run = job.assembled(config, source, fresh=fresh)
    measured = job.eval_step(config, run.model)
    world = max(arguments.ranks or 1, distributed.world_size())
    _check(config, measured, world)
    if arguments.check:
        sizes = " and ".join(f"{len(each.batches(1)):,}" for each in (source, held_out))
        return functools.partial(_listed, [f"{config.data}: {sizes} images can be read"], 0)
    _check_folder(run, folder, fresh=fresh)
    if world > distributed.world_size():
        if min(config.batch_size, len(source.batches(1))) < world:
            raise ValueError(f"batch_size must be at least {world}, an image for each rank")
        return ranks.start(arguments)
    evaluation = measured, job.feed(config, held_out)
    return functools.partial(_run, run, evaluation, held_out, fresh=fresh, overwrite=arguments.overwrite)


def _run(
    run: job.Job, evaluation: tuple[training.EvalStep, Any], held_out: Opened, *, fresh: bool, overwrite: bool
) -> int:
    """What is left to do once everything is checked; returns the exit code."""
    config, folder, final = run.config, Path(run.config.out or ""), dict[str, Any]()
    evaluates = config.eval_every != NEVER
    _begin(run, folder, fresh=fresh)
    result = training.fit(
        job.train_step(run),
        run.state,
        run.batches,
        epochs=config.epochs,
        steps=config.steps,
        time=config.time,
        eval=evaluation if evaluates else None,
        eval_every=config.eval_every if evaluates else "1ep",
        hooks=[
            *_hooks(config, folder, overwrite=overwrite),
            lambda event: final.update(event.metrics) if event.kind == "run_end" else None,
        ],
        log_every=config.log_every,
        resume=None if fresh else folder,
        compile=config.compile,
    )
    values = {name.removeprefix("val/"): value for name, value in final.items() if name.startswith("val/")}
    complete = evaluates and result.reason not in ENDS
    found = {name.partition("/")[0] for name in values}
    if complete and not found >= evaluation[0].metrics.keys() - {"nonfinite"}:  # the run had ended before
        values = training.evaluate(evaluation[0], result.state, evaluation[1])
    return _report(run, folder, result, values if complete else {}, held_out)


def _check_folder(run: job.Job, folder: Path, *, fresh: bool) -> None:
    """Refuse a folder that another process writes to, and a run that cannot go on from what is in it."""
    if folder.is_dir() and distributed.is_rank_zero():
        checkpoint.Writer(folder).close()
    if not fresh:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come when the run goes on
            saved_run(folder, run.state, dependencies(run.batches, len(run.batches)))


def _check(config: Config, measured: training.EvalStep, world: int) -> None:
    """Refuse what the loop would refuse, a monitor that is not measured, and what ranks could not agree on."""
    for name, length in (("time", config.time), ("eval_every", config.eval_every)):
        if world > 1 and str(length)[-1] in "smhd":
            raise ValueError(f"{name} must not be {length!r} on {world} ranks, whose clocks differ")
    if config.eval_every != NEVER:
        cadence(config.eval_every, "eval_every")
    elif config.early_stopping is not None:
        raise ValueError("early_stopping needs evaluations: eval_every must not be never")
    cadence(config.save_every, "save_every")
    if config.time is not None:
        seconds("time", config.time)
    if config.tensorboard and find_spec("tensorboard") is None:
        raise ImportError("tensorboard is not installed: pip install 'holofunc[tensorboard]'")
    values = flat({name: metric.compute(metric.init()) for name, metric in measured.metrics.items()})
    names, monitor = [f"val/{name}" for name, value in values.items() if value.ndim == 0], _monitor(config)[0]
    if monitor not in names:
        raise ValueError(f"monitor must be one of {', '.join(names)}, got {monitor!r}")


def _monitor(config: Config) -> tuple[str, str]:
    """The evaluation that says what is best, and whether it is at its minimum or its maximum."""
    monitor = config.monitor or job.TASKS[config.task].monitor
    name = monitor.rpartition("/")[2].partition("(")[0]
    return monitor, config.mode or ("min" if LOWER.fullmatch(name) else "max")


def _hooks(config: Config, folder: Path, *, overwrite: bool) -> list[Any]:
    """What happens beside the steps; on all ranks but the first one only what ranks do together."""
    monitor, mode = _monitor(config)
    together = [ranks.end_together(config.log_every)] if distributed.world_size() > 1 else []
    if (patience := config.early_stopping) is not None:
        together.append(training.early_stopping(monitor, patience, mode=mode, min_delta=config.min_delta))
    if not distributed.is_rank_zero():
        return together
    sinks: list[Any] = ["bar" if sys.stderr.isatty() else Lines(sys.stderr), folder / "history.csv"]
    if config.tensorboard:
        sinks.append(training.tensorboard(folder / "tensorboard"))
    every, keep, best = config.save_every, config.keep, monitor if config.eval_every != NEVER else None
    saved = training.checkpoint(folder, every=every, keep=keep, best=best, mode=mode, overwrite=overwrite)
    return [*together, training.log(*sinks, every=config.log_every), saved]


def _begin(run: job.Job, folder: Path, *, fresh: bool) -> None:
    config, world = run.config, distributed.world_size()
    distributed.fingerprint({"state": run.state, "config": str(dataclasses.replace(config, device="cpu"))})
    keep_freed_memory()
    if not distributed.is_rank_zero():
        return
    folder.mkdir(parents=True, exist_ok=True)
    known = config if fresh else dataclasses.replace(stored(folder), bad_images=config.bad_images)
    if fresh:
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)  # of the run that is overwritten
    if fresh or known != stored(folder):
        write(known, folder / CONFIG, comment=f"holofunc {version()}, torch {torch.__version__}")
    shares = f", {world} ranks with {config.batch_size / world:g} of {config.batch_size} images" if world > 1 else ""
    fixed = job.frozen(config, run.model)
    parts = f", {sum(fixed.values())} of {len(fixed)} parameters frozen" if fixed else ""
    sys.stderr.write(
        f"{run.model} learns {config.data} on {config.device}{shares}{parts}{' (compiling)' * config.compile}\n"
    )


def _listed(lines: Sequence[str], code: int) -> int:
    """Say what was found in all images; nothing is trained."""
    for line in lines:
        say(line)
    return code


def _report(run: job.Job, folder: Path, result: training.FitResult, values: Mapping[str, Any], held_out: Opened) -> int:
    """Draw the run and its last evaluation, say how it ended; returns the exit code."""
    if distributed.is_rank_zero():
        if result.history:
            plots.curves(result.history, names=_panels(result.history)).savefig(folder / "curves.png")
        pictures = _draw(run.config, folder, run.model, result.state, values, held_out) if values else []
        if values:
            summary = job.TASKS[run.config.task].summary(values)
            count, step = len(held_out.batches(1)), int(result.state.step)
            say(f"{summary} on {count:,} held-out images after {step:,} steps")
        say(f"{folder}: {', '.join(['checkpoints', CONFIG, 'history.csv', 'curves.png', *pictures])}")
        if result.reason in ENDS:
            sys.stderr.write(f"holofunc: {result.reason}; continue with: holofunc train --resume --out {folder}\n")
        elif result.reason != "finished":
            sys.stderr.write(f"holofunc: {result.reason}\n")
    return ENDS.get(result.reason, 0)


def _panels(history: list[dict[str, Any]]) -> list[str]:
    """Of the curves: the loss, and what is measured on held-out data, beside the same of the batches where there is."""
    names = {name for record in history for name in record}
    held_out = dict.fromkeys(name for record in history for name in record if name.startswith("val/"))
    twins = {name: name.removeprefix("val/") for name in held_out}
    return [*dict.fromkeys(["loss", *(twin if twin in names else name for name, twin in twins.items())])]


def _draw(
    config: Config,
    folder: Path,
    model: Model,
    state: training.TrainState,
    values: Mapping[str, Any],
    held_out: Opened,
) -> list[str]:
    """Pictures of an evaluation; returns their names."""
    images, targets = next(iter(held_out.batches(min(16, len(held_out.batches(1))))))
    outputs = tree.map(torch.Tensor.cpu, outputs_of(config, model, state, images))
    job.TASKS[config.task].draw(config, model, images, outputs, targets).savefig(folder / "predictions.png")
    if "confusion" not in values:
        return ["predictions.png"]
    plots.confusion(values["confusion"], config.classes).savefig(folder / "confusion.png")
    return ["confusion.png", "predictions.png"]


def find_lr(arguments: Namespace) -> Callable[[], int]:
    """``holofunc find-lr``: try learning rates, and draw the loss."""
    check_ascending(arguments.start, arguments.end)
    check_counts(3, tries=arguments.tries)
    config = settings(arguments)
    folder = Path(config.out or "")
    check_writable(folder)
    config, source = job.open_data(config, "train", keeps_places=True)
    config = job.TASKS[config.task].prepared(config, source)
    run = job.assembled(config, source, fresh=True, steps=arguments.tries)

    def carry_out() -> int:
        found = training.find_lr(
            job.objective(config, run.model), run.tx, run.state, run.batches,
            start=arguments.start, end=arguments.end, steps=arguments.tries, compile=config.compile,
        )  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        plots.lr_search(found).savefig(folder / "lr_search.png")
        if found.suggestion is None or found.valley is None:
            say(f"the loss did not fall between {arguments.start:g} and {arguments.end:g}: see {folder}/lr_search.png")
            return 1
        say(f"steepest at {found.suggestion:.2e}, valley at {found.valley:.2e}: try --lr {found.valley:.1e}")
        say(f"{folder}/lr_search.png")
        return 0

    return carry_out


def evaluate(arguments: Namespace) -> Callable[[], int]:
    """``holofunc evaluate``: measure the network of a run on held-out data."""
    folder = Path(arguments.run)
    config = override(stored(folder), given(arguments))
    config, source = job.open_data(dataclasses.replace(config, device=job.device(config.device)), "test")
    model, state, step = trained(config, folder, arguments.step)
    batches = job.feed(config, source)
    measured = job.eval_step(config, model)
    check_writable(folder)

    def carry_out() -> int:
        values = training.evaluate(measured, state, batches)
        pictures = _draw(config, folder, model, state, values, source)
        say(f"{len(source.batches(1)):,} held-out images of {config.data}, step {step} of {folder}")
        width = max(map(len, values)) + 2
        for name, value in values.items():
            if isinstance(value, (int, float)):
                say(f"{name:{width}}{value:.4f}")
        say(f"{folder}: {', '.join(pictures)}")
        return 0

    return carry_out
