"""``holofunc export`` and ``models``."""

import dataclasses
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from holofunc import models, optim, random
from holofunc.cli import job
from holofunc.cli.runs import check_writable, say, stored, trained
from holofunc.model import Model
from holofunc.typing import Buffers, Params

__all__ = ["export", "list_models"]


def list_models(arguments: Namespace) -> Callable[[], int]:
    """``holofunc models``: a table of the networks."""
    names = models.list_models(arguments.pattern)
    if not names:
        raise ValueError(f"no model is named like {arguments.pattern!r}; 'holofunc models' lists them all")

    def carry_out() -> int:
        width = max(map(len, names))
        say(f"{'name':{width}}  parameters   GMACs  size  {'task':14}  {'top-1':18}  weights")
        for name in names:  # one by one: counting takes a while
            (row,) = models.table(name)
            numbers = f"{row.params:>10,}  {row.macs / 1e9:>6.2f}  {row.input_size:>4}"
            top1 = "" if row.top1 is None else f"{row.top1:.2%} {row.dataset}"
            say(f"{name:{width}}  {numbers}  {row.task:14}  {top1:18}  {', '.join(row.weights)}".rstrip())
        return 0

    return carry_out


def export(arguments: Namespace) -> Callable[[], int]:
    """``holofunc export``: write a trained network as a program, and prove it."""
    folder = Path(arguments.run or "")
    if arguments.run:
        stored(folder)  # where there is none, nothing else matters
    path = models.exporting.check_path(_out(arguments, folder))
    check_writable(path.parent)
    model, params, buffers, about = _of_run(folder, arguments) if arguments.run else _published(arguments)
    shape = about["shape"] if arguments.size is None else _sized(model, about, arguments.size)
    example, about["shape"] = random.normal(random.key(0), (3, *shape)), list(shape)
    if arguments.reparametrize:
        model, params, buffers = models.reparametrize(model, params, buffers)

    def carry_out() -> int:
        difference = models.export(model, params, buffers, path, example=example, metadata=about)
        megabytes = path.stat().st_size / 1e6
        say(f"{path}: {model}, {megabytes:.1f} MB, outputs within {difference:.0e} of the network's")
        return 0

    return carry_out


def _sized(model: Model, about: Mapping[str, Any], size: int) -> tuple[int, ...]:
    """The shape of images of another size, which the model takes; lines of text keep their height."""
    if about["task"] == "recognition":
        return (*about["shape"][:2], size)
    models.exporting.example_images(model, size)  # raises if it does not
    return (about["shape"][0], size, size)


Trained = tuple[Model, Params, Buffers, dict[str, Any]]
"""A network, and what its program has to say of itself."""


def _of_run(folder: Path, arguments: Namespace) -> Trained:
    """What ``evaluate`` measures."""
    if arguments.weights or arguments.model_options:
        raise ValueError("--weights and --model-options go with --model: a run has its own")
    config = dataclasses.replace(stored(folder), device="cpu", channels_last=False)
    model, state, step = trained(config, folder, arguments.step)
    names = ("task", "data", "shape", "classes", "mean", "std")
    about = {"model": config.model, "step": step, **{name: getattr(config, name) for name in names}}
    about["axes"] = job.TASKS[config.task].axes
    return model, dict(optim.eval_params(state.opt_state, state.params)), dict(state.buffers), about


def _published(arguments: Namespace) -> Trained:
    """A network with weights of a file."""
    if arguments.weights is None:
        raise ValueError("--model needs --weights: DEFAULT, another published name, a path or a URL")
    if arguments.model not in models.list_models():
        models.create(arguments.model)  # says which names are spelled alike
    record = models.weights.resolve(arguments.weights, arguments.model)
    classes = {} if record.num_classes is None else {"num_classes": record.num_classes}
    model = models.create(arguments.model, **classes | dict(arguments.model_options) | {"weights": record})
    channels = models.base.image_channels(model.skeleton)
    (row,) = models.table(arguments.model)
    about = {
        "model": arguments.model,
        "task": row.task,
        "shape": (channels, record.input_size, record.input_size),
        "classes": record.categories,
        "mean": record.mean,
        "std": record.std,
        "axes": job.TASKS[row.task].axes,
    }
    return model, *model.init(random.key(0)), about


def _out(arguments: Namespace, folder: Path) -> Path:
    """Where the program goes, with the suffix of its format."""
    if arguments.out is None:
        return folder / f"{arguments.model or 'model'}.{arguments.format or 'pt2'}"
    out = Path(arguments.out)
    if arguments.format and out.suffix != f".{arguments.format}":
        raise ValueError(f"--out must end with .{arguments.format} for --format {arguments.format}, got {str(out)!r}")
    return out
