"""The configuration of a run: a frozen record that is validated on creation, and read from and written to TOML.

It is plain data: the command line looks names of models, optimizers and schedules up in dicts. Nothing in a file is
ever executed or imported.
"""

import contextlib
import dataclasses
import difflib
import json
import math
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NamedTuple, get_args, get_origin

__all__ = ["Config", "call", "override", "read", "write"]


class Range(NamedTuple):
    """The allowed values of an option, as words and as a predicate."""

    words: str
    holds: Callable[[Any], bool]


ANY = Range("anything", lambda value: True)
COUNT = Range("at least 1", lambda value: value >= 1)
NATURAL = Range("at least 0", lambda value: value >= 0)
POSITIVE = Range("positive and finite", lambda value: 0 < value < math.inf)
DECAY = Range("at least 0 and finite", lambda value: 0 <= value < math.inf)
SHARE = Range("at least 0 and below 1", lambda value: 0 <= value < 1)
SEED = Range("in [0, 2**63)", lambda value: 0 <= value < 2**63)
CALLS = Range(
    "a name, or one with options as in 'name(option=1)'",
    lambda value: all(_parsed(each) for each in ([value] if isinstance(value, str) else value)),
)


def one_of(*names: str) -> Range:
    return Range(f"one of {', '.join(names)}", lambda value: value in names)


def option(default: Any, group: str, about: str, allowed: Range = ANY) -> Any:
    """A field with its help text and its allowed values."""
    make = {"default_factory": default} if isinstance(default, type) else {"default": default}
    return dataclasses.field(**make, metadata={"group": group, "about": about, "allowed": allowed})


TASKS = ("classification", "detection", "segmentation", "recognition")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that a run of ``holofunc train`` depends on.

    Raises:
        TypeError: a value is of the wrong type.
        ValueError: a value is out of its range, or both ``epochs`` and ``steps`` are given.

    Example:
        >>> from holofunc import config
        >>> config.Config(data="digits", lr=1e-2).batch_size
        64
        >>> config.Config(epochs=0)
        Traceback (most recent call last):
        ValueError: epochs must be at least 1, got 0
    """

    task: str = option("classification", "data", f"one of {', '.join(TASKS)}", one_of(*TASKS))
    data: str | None = option(
        None,
        "data",
        "classification: digits, cifar10, imagenette, folder:PATH; detection: canvases, shapes, coco:PATH, voc:PATH; "
        "segmentation: shapes, masks:PATH, coco:PATH, voc:PATH; recognition: lines, text:PATH (default: the first)",
    )
    root: str = option("data", "data", "folder of cifar10 and imagenette")
    download: bool = option(False, "data", "download them if they are missing")
    image_size: int | None = option(None, "data", "side of the images in pixels; for lines of text, their width", COUNT)
    images: int | None = option(None, "data", "number of synthetic canvases, shapes or lines (default: 1000)", COUNT)
    batch_size: int = option(64, "data", "images per step, over all ranks", COUNT)
    eval_batch_size: int | None = option(None, "data", "images per evaluation step (default: batch_size)", COUNT)
    drop_last: bool = option(True, "data", "drop the incomplete last batch of an epoch: one graph")
    workers: int = option(0, "data", "processes that load images", NATURAL)
    augment: tuple[str, ...] = option(
        (), "data", "a function of holofunc.transforms, e.g. random_flip or 'random_crop(padding=2)'", CALLS
    )
    bad_images: str = option("stop", "data", "images that cannot be read: stop or skip", one_of("stop", "skip"))

    model: str | None = option(
        None, "model", "a name of 'holofunc models' (default: smallnet, yolov2, unet or ctc_recognizer)"
    )
    model_options: dict[str, Any] = option(dict, "model", "arguments of the model, e.g. weights=DEFAULT")  # noqa: RUF009
    ema: float | None = option(None, "model", "evaluate a moving average of the weights with this decay", SHARE)
    freeze: tuple[str, ...] = option((), "model", "freeze parts, e.g. backbone or '*.bias'")
    freeze_until: str | None = option(None, "model", "freeze layers up to this one, e.g. layer2")
    unfreeze: dict[str, Any] = option(dict, "model", "unfreeze parts at a time, e.g. layer3=1ep")  # noqa: RUF009
    freeze_norms: bool = option(False, "model", "freeze BatchNorms and their statistics")

    epochs: int | None = option(None, "training", "passes over the data (default: 5)", COUNT)
    steps: int | None = option(None, "training", "number of steps, instead of epochs", COUNT)
    time: str | None = option(None, "training", "time limit, e.g. 90m")
    loss: tuple[str, ...] = option(
        (), "training", "a function of holofunc.losses, e.g. 'focal(gamma=2)'; several are summed", CALLS
    )
    label_smoothing: float = option(0.0, "training", "fraction of each label spread over all classes", SHARE)
    optimizer: str = option("adamw", "training", "sgd, adamw, lion, ... (a function of holofunc.optim)")
    optimizer_options: dict[str, Any] = option(dict, "training", "arguments of the optimizer, e.g. b2=0.99")  # noqa: RUF009
    lr: float = option(3e-3, "training", "peak learning rate", POSITIVE)
    weight_decay: float | None = option(
        None, "training", "except for biases and norms (default: the optimizer's)", DECAY
    )
    schedule: str = option(
        "warmup_cosine", "training", "a function of holofunc.optim.schedules, e.g. cosine or 'step(every=30)'", CALLS
    )
    warmup: float | str | None = option(
        None, "training", "fraction of the run, or updates, 1ep, 10% (default: warmup_cosine 0.1, one_cycle 0.3)"
    )
    accumulate: int = option(1, "training", "steps per update (gradient accumulation)", COUNT)
    clip: float | None = option(None, "training", "clip gradients to this global norm", POSITIVE)
    seed: int = option(0, "training", "random seed of weights, data order and augmentation", SEED)

    metrics: tuple[str, ...] = option(
        (), "evaluation", "further metrics of holofunc.metrics, e.g. kappa or 'accuracy(topk=5)'", CALLS
    )
    eval_every: int | str = option("1ep", "evaluation", "steps, epochs as 2ep, 10%, 30s, or never")
    monitor: str | None = option(
        None, "evaluation", "metric of the best step (default: val/accuracy, val/coco/ap, ...)"
    )
    mode: str | None = option(
        None, "evaluation", "min or max of it is best (default: min for losses and errors)", one_of("min", "max")
    )
    early_stopping: int | None = option(
        None, "evaluation", "end after this many evaluations without improvement", COUNT
    )
    min_delta: float = option(0.0, "evaluation", "smallest improvement that counts", DECAY)

    precision: str = option("fp32", "machine", "fp32, bf16 or fp16", one_of("fp32", "bf16", "fp16"))
    device: str = option("auto", "machine", "cpu, cuda, cuda:1, mps or auto")
    compile: bool = option(True, "machine", "compile the step: slower to start, faster to run")
    channels_last: bool = option(False, "machine", "memory layout, faster for convolutions on GPUs")

    log_every: int = option(10, "output", "steps between records", COUNT)
    save_every: int | str = option("1ep", "output", "steps, epochs as 2ep, 10% or 30s between checkpoints")
    keep: int = option(2, "output", "number of newest checkpoints to keep, in addition to the best", COUNT)
    tensorboard: bool = option(False, "output", "also write records for TensorBoard")
    out: str | None = option(None, "output", "folder of the run (default: runs/NAME_OF_THE_DATA)")

    classes: tuple[str, ...] = option((), "found", "names of the classes, or characters")
    shape: tuple[int, ...] = option((), "found", "channels, height and width of the images")
    mean: tuple[float, ...] = option((), "found", "mean of each channel, subtracted from the images")
    std: tuple[float, ...] = option((), "found", "standard deviation of each channel")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            given = getattr(self, field.name)
            value, allowed = _of_type(field.name, given, field.type), field.metadata["allowed"]
            if value == "":  # of a variable of the shell, say, that is not set
                raise ValueError(f"{field.name} must not be empty")
            if value is not None and not allowed.holds(value):
                raise ValueError(f"{field.name} must be {allowed.words}, got {given!r}")
            object.__setattr__(self, field.name, value)
        if self.epochs is not None and self.steps is not None:
            raise ValueError(f"only one of epochs and steps may be given, got {self.epochs} and {self.steps}")


def override(config: Config, values: Mapping[str, Any]) -> Config:
    """``config`` with other values; ``steps`` replaces ``epochs``, and vice versa.

    Example:
        >>> from holofunc import config
        >>> changed = config.override(config.Config(epochs=5), {"steps": 100})
        >>> changed.epochs, changed.steps
        (None, 100)
    """
    lengths = {"epochs", "steps"}
    dropped = lengths - set(values) if lengths & set(values) else set()
    changes: dict[str, Any] = {**dict.fromkeys(dropped), **values}
    return dataclasses.replace(config, **changes)


# --- names with options ------------------------------------------------------------------------------------------


def call(text: str) -> tuple[str, dict[str, Any]]:
    """Parse a name with options in TOML syntax.

    Raises:
        ValueError: the text is not a name with optional options.

    Example:
        >>> from holofunc import config
        >>> config.call("random_crop(padding=2, fill=0.5)")
        ('random_crop', {'padding': 2, 'fill': 0.5})
    """
    parsed = _parsed(text)
    if parsed is None:
        raise ValueError(f"must be {CALLS.words}, got {text!r}")
    return parsed


def _parsed(text: str) -> tuple[str, dict[str, Any]] | None:
    found = re.fullmatch(r"\s*([A-Za-z]\w*)\s*(?:\((.*)\))?\s*", text, re.DOTALL)
    try:
        return found and (found[1], tomllib.loads(f"options = {{{found[2] or ''}}}")["options"])
    except tomllib.TOMLDecodeError:
        return None


# --- TOML --------------------------------------------------------------------------------------------------------


def read(path: str | Path) -> Config:
    """Read the configuration from a TOML file; missing keys have their defaults.

    Raises:
        ValueError: the file is not TOML, or has an unknown key or a value out of range.
        TypeError: a value is of the wrong type.
        OSError: the file cannot be read.
    """
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
        known = [field.name for field in dataclasses.fields(Config)]
        for name in values:
            if name not in known:
                alike = difflib.get_close_matches(name, known, n=1)
                raise ValueError(f"unknown key {name!r}" + (f", did you mean {alike[0]!r}?" if alike else ""))
        return Config(**values)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{path}: {error}") from error


def write(config: Config, path: str | Path, *, comment: str = "") -> None:
    """Write a configuration to a TOML file, atomically.

    Example:
        >>> import pathlib, tempfile
        >>> from holofunc import config
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "run.toml")
        ...     config.write(config.Config(lr=0.1), path)
        ...     config.read(path) == config.Config(lr=0.1)
        True
    """
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    values = {name: value for name, value in values.items() if value not in (None, (), {})}
    tables = {name: value for name, value in values.items() if isinstance(value, dict)}
    lines = [f"# {line}" for line in comment.splitlines()]
    lines += [f"{name} = {_toml(value)}" for name, value in values.items() if name not in tables]
    for name, table in tables.items():
        lines += ["", f"[{name}]", *(f"{_toml(key)} = {_toml(value)}" for key, value in table.items())]
    unfinished = Path(f"{path}.tmp")
    unfinished.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def _toml(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):  # JSON strings are TOML strings, except for one character
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
    return str(value).lower() if isinstance(value, bool) else repr(value)


# --- types -------------------------------------------------------------------------------------------------------

WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "text", tuple: "a list", dict: "a table"}


def _of_type(name: str, value: Any, kind: Any) -> Any:
    """Convert ``value`` to a ``kind``: an integer to a float, a list to a tuple."""
    if get_origin(kind) is UnionType:
        if value is None and NoneType in get_args(kind):
            return None
        kinds = [each for each in get_args(kind) if each is not NoneType]
        for each in kinds:
            with contextlib.suppress(TypeError):
                return _of_type(name, value, each)
        raise TypeError(f"{name} must be {' or '.join(WORDS[each] for each in kinds)}, got {value!r}")
    if kind is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    plain = get_origin(kind) or kind
    if plain is tuple and isinstance(value, (list, tuple)):
        return tuple(_of_type(f"{name}[{i}]", each, get_args(kind)[0]) for i, each in enumerate(value))
    if type(value) is not plain:
        raise TypeError(f"{name} must be {WORDS[plain]}, got {value!r}")
    if plain is dict:
        for key, each in value.items():
            if not _is_plain(each):
                raise TypeError(f"{name}.{key} must be a number, text, true, false or a list of these, got {each!r}")
    return value


def _is_plain(value: Any) -> bool:
    return all(map(_is_plain, value)) if isinstance(value, list) else isinstance(value, (bool, int, float, str))
