"""The commands. Each checks all that can be checked, and returns what is left to do and gives the exit code."""

import dataclasses
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from holofunc import checkpoint, data, models, optim, plots, random
from holofunc import train as training
from holofunc.cli import job
from holofunc.cli.options import MACHINE, given, version
from holofunc.compile import keep_freed_memory
from holofunc.config import Config, override, read, write
from holofunc.model import Model
from holofunc.train.sinks import Lines
from holofunc.typing import Buffers, Params

__all__ = ["COMMANDS", "evaluate", "export", "find_lr", "list_models", "train"]

CONFIG = "config.toml"


def train(arguments: Namespace) -> Callable[[], int]:
    """``holofunc train``: train a classifier, and leave the run in a folder."""
    config = _settings(arguments)
    folder = Path(config.out or "")
    _check_folder(folder, resume=arguments.resume or arguments.overwrite or arguments.check)
    config, source = job.open_data(config, "train")
    held_out = job.open_data(config, "test")[1]
    if arguments.check:
        return _checked(config, source, held_out)
    fresh = arguments.overwrite or not checkpoint.steps(folder)
    model = job.network(config, job.image_shape(source), fresh=fresh)
    order_key, state_key = random.split(random.key(config.seed))
    batches = job.feed(config, source, key=order_key)
    tx = job.optimizer(config, config.steps or (config.epochs or 0) * len(batches))
    state = job.start(config, model, tx, state_key)
    folder.mkdir(parents=True, exist_ok=True)
    if fresh:
        write(config, folder / CONFIG, comment=f"holofunc {version()}, torch {torch.__version__}")
    else:
        checkpoint.manifest(folder)  # verifies it

    stops = config.early_stopping
    sinks: list[Any] = [folder / "history.csv"]

    def carry_out() -> int:
        final: dict[str, Any] = {}
        measured = job.eval_step(config, model)
        if config.tensorboard:
            sinks.append(training.tensorboard(folder / "tensorboard"))
        progress = "bar" if sys.stderr.isatty() else Lines(sys.stderr)
        sys.stderr.write(f"{model} learns {config.data} on {config.device}{' (compiling)' * config.compile}\n")
        keep_freed_memory()
        result = training.fit(
            job.train_step(config, model, tx),
            state,
            batches,
            epochs=config.epochs,
            steps=config.steps,
            eval=(measured, job.feed(config, held_out)),
            hooks=[
                training.log(progress, *sinks, every=config.log_every),
                training.checkpoint(folder, keep=2, best="val/accuracy", mode="max", overwrite=arguments.overwrite),
                *([] if stops is None else [training.early_stopping("val/loss", stops)]),
                lambda event: final.update(event.metrics) if event.kind == "run_end" else None,
            ],
            log_every=config.log_every,
            resume=None if fresh else folder,
            compile=config.compile,
        )
        if result.history:
            plots.curves(result.history, names=["loss", "accuracy"]).savefig(folder / "curves.png")
        if "val/confusion" not in final and result.reason not in ENDS:
            found = training.evaluate(measured, result.state, job.feed(config, held_out))
            final.update({f"val/{name}": value for name, value in found.items()})
        return _report(config, folder, result, final)

    return carry_out


def _checked(config: Config, *sources: data.Source) -> Callable[[], int]:
    """Read every image once, and train nothing."""

    def carry_out() -> int:
        broken = [problem for source in sources for problem in data.check(source)]
        for problem in broken:
            _say(str(problem))
        _say(f"{config.data}: {sum(len(s.batches(1)) for s in sources):,} images, {len(broken)} cannot be read")
        return 1 if broken else 0

    return carry_out


def find_lr(arguments: Namespace) -> Callable[[], int]:
    """``holofunc find-lr``: try learning rates, and draw the loss."""
    config = _settings(arguments)
    folder = Path(config.out or "")
    _check_writable(folder)
    config, source = job.open_data(config, "train")
    model = job.network(config, job.image_shape(source), fresh=True)
    order_key, state_key = random.split(random.key(config.seed))
    tx = job.optimizer(config, arguments.tries, searched=True)
    state, batches = job.start(config, model, tx, state_key), job.feed(config, source, key=order_key)

    def carry_out() -> int:
        found = training.find_lr(
            job.objective(config, model), tx, state, batches,
            start=arguments.start, end=arguments.end, steps=arguments.tries, compile=config.compile,
        )  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        plots.lr_search(found).savefig(folder / "lr_search.png")
        if found.suggestion is None or found.valley is None:
            _say(f"the loss did not fall between {arguments.start:g} and {arguments.end:g}: see {folder}/lr_search.png")
            return 1
        _say(f"steepest at {found.suggestion:.2e}, valley at {found.valley:.2e}: try --lr {found.valley:.1e}")
        _say(f"{folder}/lr_search.png")
        return 0

    return carry_out


def evaluate(arguments: Namespace) -> Callable[[], int]:
    """``holofunc evaluate``: measure the network of a run on held-out data."""
    folder = Path(arguments.run)
    config = override(_stored(folder), given(arguments))
    config, source = job.open_data(dataclasses.replace(config, device=job.device(config.device)), "test")
    model, state, step = _trained(config, folder, arguments.step, job.image_shape(source))
    batches = job.feed(config, source)
    _check_writable(folder)

    def carry_out() -> int:
        values = training.evaluate(job.eval_step(config, model), state, batches)
        matrix = values.pop("confusion")
        _draw_confusion(matrix, config, folder)
        _say(f"{int(matrix.sum()):,} held-out images of {config.data}, step {step} of {folder}")
        for name, value in values.items():
            _say(f"{name:10}{value:.4f}")
        return 0

    return carry_out


def list_models(arguments: Namespace) -> Callable[[], int]:
    """``holofunc models``: a table of the networks."""
    names = models.list_models(arguments.pattern)
    if not names:
        raise ValueError(f"no model is named like {arguments.pattern!r}; 'holofunc models' lists them all")

    def carry_out() -> int:
        width = max(map(len, names))
        _say(f"{'name':{width}}  parameters   GMACs  size  {'task':14}  {'top-1':18}  weights")
        for name in names:  # one by one: counting takes a while
            (row,) = models.table(name)
            numbers = f"{row.params:>10,}  {row.macs / 1e9:>6.2f}  {row.input_size:>4}"
            top1 = "" if row.top1 is None else f"{row.top1:.2%} {row.dataset}"
            _say(f"{name:{width}}  {numbers}  {row.task:14}  {top1:18}  {', '.join(row.weights)}".rstrip())
        return 0

    return carry_out


def export(arguments: Namespace) -> Callable[[], int]:
    """``holofunc export``: write a trained network as a program, and prove it."""
    folder = Path(arguments.run or "")
    config = _stored(folder) if arguments.run else None
    path = models.exporting.check_path(_out(arguments, folder))
    _check_writable(path.parent)
    model, params, buffers, usual = _published(arguments) if config is None else _of_run(config, folder, arguments)
    size = usual if arguments.size is None else arguments.size
    models.exporting.example_images(model, size)
    if arguments.reparametrize:
        model, params, buffers = models.reparametrize(model, params, buffers)

    def carry_out() -> int:
        difference = models.export(model, params, buffers, path, size=size)
        megabytes = path.stat().st_size / 1e6
        _say(f"{path}: {model}, {megabytes:.1f} MB, outputs within {difference:.0e} of the network's")
        return 0

    return carry_out


NATIVE = {"digits": 8, "cifar10": 32}
"""Pixels of the images of data that have a size of their own."""


def _of_run(config: Config, folder: Path, arguments: Namespace) -> tuple[Model, Params, Buffers, int]:
    """What ``evaluate`` measures, and the size of the images."""
    if arguments.weights or arguments.model_options:
        raise ValueError("--weights and --model-options go with --model: a run has its own")
    config = dataclasses.replace(config, device="cpu", channels_last=False)
    size = config.image_size or NATIVE.get(config.data, 224)
    model, state, _ = _trained(config, folder, arguments.step, (len(config.mean), size, size))
    return model, optim.eval_params(state.opt_state, state.params), state.buffers, size


def _published(arguments: Namespace) -> tuple[Model, Params, Buffers, int]:
    """A network with weights of a file, and the size of their images."""
    if arguments.weights is None:
        raise ValueError("--model needs --weights: DEFAULT, another published name, a path or a URL")
    if arguments.model not in models.list_models():
        models.create(arguments.model)  # says which names are spelled alike
    record = models.weights.resolve(arguments.weights, arguments.model)
    classes = {} if record.num_classes is None else {"num_classes": record.num_classes}
    model = models.create(arguments.model, **classes | dict(arguments.model_options) | {"weights": record})
    return model, *model.init(random.key(0)), record.input_size


def _out(arguments: Namespace, folder: Path) -> Path:
    """Where the program goes, with the suffix of its format."""
    if arguments.out is None:
        return folder / f"{arguments.model or 'model'}.{arguments.format or 'pt2'}"
    out = Path(arguments.out)
    if arguments.format and out.suffix != f".{arguments.format}":
        raise ValueError(f"--out must end with .{arguments.format} for --format {arguments.format}, got {str(out)!r}")
    return out


COMMANDS: Mapping[str, Callable[[Namespace], Callable[[], int]]] = {
    "train": train,
    "find-lr": find_lr,
    "evaluate": evaluate,
    "models": list_models,
    "export": export,
}


# --- configuration and folder ------------------------------------------------------------------------------------


def _settings(arguments: Namespace) -> Config:
    """The resolved configuration; what is found in the data is still missing in that of a new run."""
    asked = given(arguments)
    file = read(arguments.config) if arguments.config else Config()
    config = override(file, asked)
    folder = Path(config.out or f"runs/{Path(config.data.removeprefix('folder:')).name or 'run'}")
    if "resume" in arguments and arguments.resume:
        if arguments.overwrite:
            raise ValueError("--resume continues the run that --overwrite removes: only one of them may be given")
        config = _continued(folder, {**_changed(file), **asked})
    elif config.epochs is None and config.steps is None:
        config = dataclasses.replace(config, epochs=5)
    return dataclasses.replace(config, out=str(folder), device=job.device(config.device))


def _changed(config: Config) -> dict[str, Any]:
    """The values that are not defaults."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {name: value for name, value in values.items() if value != getattr(Config(), name)}


def _continued(folder: Path, asked: Mapping[str, Any]) -> Config:
    """The configuration of a run that goes on: its own, but for the machine that it runs on."""
    stored = _stored(folder)
    for name, value in asked.items():
        if name not in (*MACHINE, "out") and value != getattr(stored, name):
            raise ValueError(
                f"--resume continues a run as it began: {name} was {getattr(stored, name)!r} and cannot become "
                f"{value!r}; begin a new run in another --out"
            )
    return override(stored, {name: asked[name] for name in MACHINE if name in asked})


def _stored(folder: Path) -> Config:
    if not os.path.isfile(folder / CONFIG):
        raise ValueError(f"{str(folder)!r} holds no run: there is no {CONFIG} in it")
    return read(folder / CONFIG)


def _trained(
    config: Config, folder: Path, step: int | str, shape: tuple[int, ...]
) -> tuple[Model, training.TrainState, int]:
    """The network of a run with the state that it had after a step, and which step that was."""
    model = job.network(config, shape, fresh=False)
    like = job.start(config, model, job.optimizer(config, 1), random.key(0))
    number = checkpoint.manifest(folder, step=step)["step"]
    return model, checkpoint.restore(folder, {"state": like}, step=number)["state"], number


def _check_folder(folder: Path, *, resume: bool) -> None:
    _check_writable(folder)
    if not resume and checkpoint.steps(folder):
        raise ValueError(
            f"{str(folder)!r} already holds a run: continue it with --resume, or choose another --out (--overwrite "
            "removes it)"
        )


def _check_writable(folder: Path) -> None:
    """Raise unless the folder, or the nearest one above it that exists, can be written to; leaves nothing behind."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.exists(path))
    if not place.is_dir():
        raise ValueError(f"cannot write to {str(folder)!r}: {str(place)!r} is a file")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"cannot write to {str(folder)!r}: permission denied for {str(place)!r}")


# --- results -----------------------------------------------------------------------------------------------------


def _report(config: Config, folder: Path, result: training.FitResult, final: Mapping[str, Any]) -> int:
    """Draw the last evaluation, say how the run ended; returns the exit code."""
    step = int(result.state.step)
    if (matrix := final.get("val/confusion")) is not None:  # a run that was interrupted has not been evaluated
        _draw_confusion(matrix, config, folder)
        _say(f"accuracy {final['val/accuracy']:.2%} on {int(matrix.sum()):,} held-out images after {step:,} steps")
    _say(f"{folder}: checkpoints, {CONFIG}, history.csv, curves.png, confusion.png")
    if result.reason in ENDS:
        sys.stderr.write(f"holofunc: {result.reason}; continue with: holofunc train --resume --out {folder}\n")
    return ENDS.get(result.reason, 0)


ENDS = {"interrupt": 130, "terminated": 143}


def _draw_confusion(matrix: Tensor, config: Config, folder: Path) -> None:
    plots.confusion(matrix, config.classes).savefig(folder / "confusion.png")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
