"""Folders of runs: the configuration of a new one, of one that goes on, of one that is done; what is in them."""

import dataclasses
import os
import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from holofunc import checkpoint, distributed, optim, random, train
from holofunc.cli import job
from holofunc.cli.options import MACHINE, given
from holofunc.config import Config, override, read
from holofunc.model import Model

__all__ = ["CONFIG", "check_folder", "check_writable", "outputs_of", "say", "settings", "stored", "trained"]

CONFIG = "config.toml"
LONG = 10**9
"""Updates of a run that no warm-up is too long for: of an optimizer whose state is read, the length does not matter."""


def settings(arguments: Namespace, device: torch.device | None = None) -> Config:
    """The resolved configuration; what is found in the data is still missing in that of a new run.

    Args:
        arguments: of the command.
        device: that of this rank.
    """
    asked = given(arguments)
    file = read(arguments.config) if arguments.config else Config()
    config = override(file, asked)
    config = job.TASKS[config.task].settled(config)
    folder = Path(config.out or f"runs/{Path(str(config.data).partition(':')[2] or str(config.data)).name or 'run'}")
    if "resume" in arguments and arguments.resume:
        if arguments.overwrite:
            raise ValueError("--resume continues the run that --overwrite removes: only one of them may be given")
        config = _continued(folder, {**_changed(file), **asked})
    elif config.epochs is None and config.steps is None:
        config = dataclasses.replace(config, epochs=5)
    name = job.device(config.device)
    return dataclasses.replace(
        config, out=str(folder), device=str(device) if device and name.startswith("cuda") else name
    )


def _changed(config: Config) -> dict[str, Any]:
    """The values that are not defaults."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {name: value for name, value in values.items() if value != getattr(Config(), name)}


def _continued(folder: Path, asked: Mapping[str, Any]) -> Config:
    """The configuration of a run that goes on: its own, but for the machine, and for images that broke meanwhile."""
    own, free = stored(folder), (*MACHINE, "bad_images")
    for name, value in asked.items():
        if name not in (*free, "out") and value != getattr(own, name):
            raise ValueError(
                f"--resume continues a run as it began: {name} was {getattr(own, name)!r} and cannot become "
                f"{value!r}; begin a new run in another --out"
            )
    return override(own, {name: asked[name] for name in free if name in asked})


def stored(folder: Path) -> Config:
    """The configuration of a run."""
    if not os.path.isfile(folder / CONFIG):
        raise ValueError(f"{str(folder)!r} contains no run: it has no {CONFIG}")
    return read(folder / CONFIG)


def trained(config: Config, folder: Path, step: int | str) -> tuple[Model, train.TrainState, int]:
    """The network of a run with the state that it had after a step, and which step that was."""
    model = job.network(config, fresh=False)
    frozen, starts = job.frozen(config, model), job.starts(config, model)
    tx = job.optimizer(config, LONG, epoch=LONG // 1000, frozen=frozen, starts=starts)
    like = job.start(config, model, tx, random.key(0))
    number = checkpoint.manifest(folder, step=step)["step"]
    return model, checkpoint.restore(folder, {"state": like}, step=number)["state"], number


def outputs_of(config: Config, model: Model, state: train.TrainState, images: torch.Tensor) -> Any:
    """What the network that is evaluated says of some images."""
    network = job.TASKS[config.task].by_image(model)
    with torch.no_grad():
        params = optim.eval_params(state.opt_state, state.params)
        return network.apply(dict(params), dict(state.buffers), images.to(state.step.device))[0]


def check_folder(folder: Path, *, may_hold_run: bool) -> None:
    """Refuse a folder that cannot be written to, or that holds a run."""
    check_writable(folder)
    if not may_hold_run and checkpoint.steps(folder):
        raise ValueError(
            f"{str(folder)!r} already holds a run: continue it with --resume, or choose another --out (--overwrite "
            "removes it)"
        )


def check_writable(folder: Path) -> None:
    """Raise unless the folder, or the nearest one above it that exists, can be written to; leaves nothing behind."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.exists(path))
    if not place.is_dir():
        raise ValueError(f"cannot write to {str(folder)!r}: {str(place)!r} is a file")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"cannot write to {str(folder)!r}: permission denied for {str(place)!r}")


def say(line: str) -> None:
    """A line of the result, once for all ranks."""
    if distributed.is_rank_zero():
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
