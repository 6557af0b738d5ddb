"""The arguments of the commands, made from the fields of `Config`; torch is not needed for them."""

import argparse
import contextlib
import dataclasses
import functools
import tomllib
from collections.abc import Callable, Collection, Sequence
from importlib import metadata
from types import NoneType, UnionType
from typing import Any, NoReturn, get_args, get_origin

from holofunc.config import Config

__all__ = ["MACHINE", "given", "parse", "version"]

MACHINE = ("root", "download", "workers", "device", "compile")
"""What may differ when a run is continued: it changes where and how fast, not what."""

EVALUATION = ("data", "root", "download", "image_size", "batch_size", "workers", "bad_images", "device")

RANK_TIMEOUT = "that a rank waits for the others, compiling included (default: 600)"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The parsed arguments: ``command``, its own arguments, and those fields of `Config` that were given.

    Raises:
        ValueError: an argument is unknown or has no such value.
        SystemExit: ``--help`` or ``--version`` was all.
    """
    parser = _Parser(prog="holofunc", description="Computer vision as pure functions, from the command line.")
    parser.add_argument("--version", action="version", version=f"holofunc {version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (_train, _find_lr, _evaluate, _explain, _export, _predict, _models):
        command(functools.partial(commands.add_parser, allow_abbrev=False))
    arguments = parser.parse_args(argv)
    if "place" in arguments:
        arguments.run = arguments.run or arguments.place
        if arguments.run is None:
            raise ValueError("the following arguments are required: RUN")
    return arguments


def version() -> str:
    """The installed version."""
    try:
        return metadata.version("holofunc")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of `Config` that were given."""
    names = {field.name for field in dataclasses.fields(Config)}
    values = {name: value for name, value in vars(arguments).items() if name in names}
    tables = {field.name for field in dataclasses.fields(Config) if get_origin(field.type) is dict}
    return {name: dict(value) if name in tables else value for name, value in values.items()}


# --- a command each ----------------------------------------------------------------------------------------------

AddParser = Callable[..., argparse.ArgumentParser]


def _train(add_parser: AddParser) -> None:
    about = "train a network: checkpoints, history.csv, config.toml and pictures in a folder"
    train = add_parser("train", help=about, description=about)
    train.add_argument("--config", metavar="FILE", help="read options from a TOML file; those given here win")
    train.add_argument("--resume", action="store_true", help="continue the run in --out to the end that it had")
    train.add_argument("--overwrite", action="store_true", help="remove the run that is in --out")
    train.add_argument("--check", action="store_true", help="try everything, read every image, and train nothing")
    train.add_argument("--ranks", type=int, metavar="N", help="processes on this machine that train together")
    train.add_argument("--rank-timeout", type=float, default=600.0, metavar="SECONDS", help=RANK_TIMEOUT)
    _add(train, [field.name for field in dataclasses.fields(Config) if field.metadata["group"] != "found"])


def _find_lr(add_parser: AddParser) -> None:
    about = "try learning rates from small to large for some steps, and draw the loss: lr_search.png in a folder"
    search = add_parser("find-lr", help=about, description=about)
    search.add_argument("--config", metavar="FILE", help="read options from a TOML file; those given here win")
    search.add_argument("--start", type=float, default=1e-6, metavar="X", help="the first rate (default: 1e-6)")
    search.add_argument("--end", type=float, default=1.0, metavar="X", help="the last rate (default: 1)")
    search.add_argument("--tries", type=int, default=100, metavar="N", help="how many (default: 100)")
    groups = ("data", "model", "training", "machine")
    left_out = ("lr", "epochs", "steps", "time", "schedule", "warmup")
    names = [f.name for f in dataclasses.fields(Config) if f.metadata["group"] in groups and f.name not in left_out]
    _add(search, [*names, "out"])


def _evaluate(add_parser: AddParser) -> None:
    about = "measure a trained network on held-out data, and draw what it says of them"
    evaluate = add_parser("evaluate", help=about, description=about)
    _add_run(evaluate)
    _add(evaluate, [*EVALUATION, "metrics"], "(default: that of the run)")


def _explain(add_parser: AddParser) -> None:
    about = "show the images that a trained network finds hard: explain.html and explain.csv in the folder of the run"
    explain = add_parser("explain", help=about, description=about)
    _add_run(explain)
    explain.add_argument("--part", choices=("held-out", "training"), default="held-out", help="(default: held-out)")
    explain.add_argument("--count", type=int, default=24, metavar="N", help="images for each score (default: 24)")
    explain.add_argument("--grad-norms", action=argparse.BooleanOptionalAction, help="gradients too: of each image")
    _add(explain, EVALUATION, "(default: that of the run)")


def _export(add_parser: AddParser) -> None:
    about = "write a trained network as a program that needs no holofunc, and prove it by running the file"
    export = add_parser("export", help=about, description=about)
    source = export.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", metavar="DIR", help="folder of a run")
    source.add_argument("--model", metavar="NAME", help="or a name of 'holofunc models', with --weights")
    export.add_argument("--step", default="best", type=_step, help="of the run: best (default), latest or a number")
    export.add_argument("--weights", metavar="NAME", help="a published name (DEFAULT), a path or a URL")
    export.add_argument("--model-options", **_kind(dict[str, Any]), default=[], help="for the model's constructor")
    export.add_argument("--out", metavar="FILE", help="(default: model.pt2 in the run's folder, NAME.pt2 here)")
    export.add_argument("--format", choices=("pt2", "onnx"), help="(default: what --out ends with, or pt2)")
    export.add_argument("--reparametrize", action="store_true", help="merge branches and normalizations first")
    export.add_argument("--size", type=int, metavar="N", help="pixels of the images (default: what it learned on)")


def _predict(add_parser: AddParser) -> None:
    about = "say what an exported network sees in images, a line each"
    predict = add_parser("predict", help=about, description=about)
    predict.add_argument("program", metavar="FILE", help="a .pt2 or .onnx of 'holofunc export'")
    predict.add_argument("images", metavar="IMAGE", nargs="+", help="files, or folders of them")
    predict.add_argument("--batch-size", type=int, default=32, metavar="N", help="images at once (default: 32)")


def _models(add_parser: AddParser) -> None:
    about = "list the networks"
    models = add_parser("models", help=about, description=about)
    models.add_argument("pattern", nargs="?", default="*", help="as in a shell, e.g. 'resnet*'")


# --- what they share ---------------------------------------------------------------------------------------------


def _add_run(parser: argparse.ArgumentParser) -> None:
    """A run, by its place or as an option, and one of its steps."""
    parser.add_argument("place", metavar="RUN", nargs="?", help="folder of a run")
    parser.add_argument("--run", metavar="DIR", help="the same")
    parser.add_argument("--step", default="best", type=_step, help="best (default), latest or a number")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _add(parser: argparse.ArgumentParser, names: Collection[str], default: str | None = None) -> None:
    """An argument for each field of these names; what is not given is left out of the namespace."""
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(Config):
        if field.name not in names:
            continue
        about = field.metadata["about"]
        if default is None and type(field.default) in (int, float, str) and "default:" not in about:
            about += f" (default: {field.default})"
        group = field.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group, default)
        settings = {"help": about.replace("%", "%%"), "default": argparse.SUPPRESS, **_kind(field.type)}
        groups[group].add_argument(f"--{field.name.replace('_', '-')}", **settings)


def _kind(kind: Any) -> dict[str, Any]:
    """How a field of this type is read."""
    if get_origin(kind) is UnionType:
        kinds = [each for each in get_args(kind) if each is not NoneType]
        return _kind(kinds[0]) if len(kinds) == 1 else {"type": functools.partial(_either, kinds), "metavar": "LENGTH"}
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(kind) is dict:
        return {"action": "append", "type": _pair, "metavar": "NAME=VALUE"}
    if get_origin(kind) is tuple:
        return {"action": "append", "metavar": "TEXT"}
    return {"type": kind, "metavar": {int: "N", float: "X", str: "TEXT"}[kind]}


def _either(kinds: Sequence[Callable[[str], Any]], text: str) -> Any:
    """A number if it is one, or else the text."""
    for kind in kinds:
        with contextlib.suppress(ValueError):
            return kind(text)
    raise ValueError


def _pair(text: str) -> tuple[str, Any]:
    """``b2=0.99``: a name, and a TOML value or else text."""
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    try:
        return name, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name, value


def _step(text: str) -> int | str:
    if text in ("best", "latest"):
        return text
    if text.isdecimal():
        return int(text)
    raise argparse.ArgumentTypeError(f"must be best, latest or a number, got {text!r}")
