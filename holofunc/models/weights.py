"""Published checkpoints: what they are, and loading them, verified, from the net, a file or a hub.

``weights=`` of a constructor takes a `Weights` of `checkpoints`, its name (``"resnet18.imagenette"``, or within its
constructor ``"IMAGENETTE"`` or ``"DEFAULT"``), a path or a URL. Files are Holocron's, as published.
"""

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from holofunc import random
from holofunc.model import Model
from holofunc.models import surgery
from holofunc.models.derived import Derived
from holofunc.models.download import download, verified
from holofunc.models.preprocess import Preprocess
from holofunc.typing import Buffers, Params

__all__ = ["Weights", "checkpoints", "from_hub", "pretrained", "read", "resolve"]

RELEASES = "https://github.com/frgfm/Holocron/releases/download/"
IMAGENETTE = (
    *("tench", "English springer", "cassette player", "chain saw", "church"),
    *("French horn", "garbage truck", "gas pump", "golf ball", "parachute"),
)


@dataclass(frozen=True)
class Weights:
    """One checkpoint.

    Attributes:
        constructor: the name of the model it is of.
        member: its name among that model's.
        url: where it is published, or the path of a file.
        sha256: of the whole file; its first 8 digits where no more were published (the early releases).
        dataset: what it was trained and measured on.
        metrics: accuracies in [0, 1], ``top1`` and ``top5``, as published.
        num_classes: of the head; None if only the file says.
        num_params: of the model, head included.
        size: of the file in bytes; for the four of ImageNet that Holocron misstates, computed from the tensors.
        mean, std: per channel, of images in [0, 1].
        input_size, resize_size: pixels of the square that is cut out, and of the shorter side before.
        recipe: ``commit``, ``script`` and ``args`` of the training, if published.
        licence: of the file.
        default: whether it is its model's ``"DEFAULT"``.
        note: what else is to be known.
        class_names: of classes that are not the data set's own.
    """

    constructor: str
    member: str
    url: str
    sha256: str | None = None
    dataset: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    num_classes: int | None = None
    num_params: int | None = None
    size: int | None = None
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    input_size: int = 224
    resize_size: int = 256
    interpolation: str = "bilinear"
    recipe: Mapping[str, str] | None = None
    licence: str | None = None
    default: bool = False
    note: str = ""
    class_names: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.constructor}.{self.member.lower()}"

    @property
    def categories(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the outputs; empty if unknown."""
        if self.class_names or self.dataset not in ("imagenette", "imagenet-1k"):
            return self.class_names
        return IMAGENETTE if self.dataset == "imagenette" else _imagenet()

    def path(self) -> Path:
        """The file, verified, and downloaded if it is not in the cache."""
        return download(self.url, self.sha256) if "://" in self.url else verified(Path(self.url), self.sha256)

    def transforms(self) -> Preprocess:
        """From images as files hold them to what the model was measured on."""
        return Preprocess(self.resize_size, self.input_size, self.mean, self.std, self.interpolation)

    def options(self) -> dict[str, Any]:
        """Arguments for the constructor: these weights, and as many classes as they have."""
        return {"weights": self, "num_classes": self.num_classes or len(self.categories)}


@functools.cache
def checkpoints(constructor: str | None = None) -> tuple[Weights, ...]:
    """All published checkpoints, or those of one constructor.

    Example:
        >>> from holofunc import models
        >>> [w.name for w in models.weights.checkpoints("rexnet1_0x")]
        ['rexnet1_0x.imagenet1k', 'rexnet1_0x.imagenette']
        >>> models.weights.checkpoints("resnet18")[0].metrics
        {'top1': 0.9361, 'top5': 0.9946}
    """
    if constructor is not None:
        return tuple(w for w in checkpoints() if w.constructor == constructor)
    entries = json.loads(Path(__file__).with_name("published.json").read_text())
    return tuple(_published(**entry) for entry in entries)


def _published(
    *, file: str, top1: float | None = None, top5: float | None = None, args: str = "", commit: str = "", **known: Any
) -> Weights:
    return Weights(
        **known,
        url=RELEASES + file,
        metrics={"top1": top1, "top5": top5} if top1 is not None and top5 is not None else {},
        num_classes=1000 if known["dataset"] == "imagenet-1k" else 10,
        resize_size=232 if args else 256,
        recipe={"commit": commit, "script": "references/classification/train.py", "args": args} if args else None,
        licence="Apache-2.0",
    )


@functools.cache
def _imagenet() -> tuple[str, ...]:
    from torchvision.models import ResNet18_Weights  # its public list of the 1000 names

    return tuple(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])


def resolve(weights: Any, constructor: str) -> Weights:
    """What ``weights=`` of a constructor stands for.

    Raises:
        ValueError: no such checkpoint or file, or one of another constructor. TypeError: none of these.
    """
    members = checkpoints(constructor)
    known = ", ".join(repr(w.member) for w in members) or "none"
    if isinstance(weights, Weights):
        if weights.constructor != constructor:
            raise ValueError(f"{weights.name} are weights of {weights.constructor}, not of {constructor}")
        return weights
    if not isinstance(weights, (str, Path)):
        raise TypeError(
            f"weights must be a member of models.weights.checkpoints({constructor!r}), its name, a path or a URL, "
            f"got {weights!r}"
        )
    text = str(weights)
    for w in members:
        if text in (w.member, w.name) or (text == "DEFAULT" and w.default):
            return w
    if text.startswith(("http://", "https://")) or Path(text).is_file():
        return Weights(constructor, Path(text).name, text)
    raise ValueError(f"weights {text!r}: {constructor} has no such checkpoint ({known}), and there is no such file")


def read(path: str | Path) -> dict[str, Tensor]:
    """A state dict from a file, on the CPU: safetensors, or torch's formats with nothing but tensors in them.

    A training run's file is recognized by its entry ``model`` or ``state_dict``.

    Raises:
        ValueError: the file holds no state dict, or more than that. OSError: there is no such file.
        ImportError: it is of safetensors, which is not installed.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return dict(_safetensors(path)(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (ImportError, OSError):
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path} holds no weights that can be read safely: {reason}") from error
    for entry in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(entry), Mapping):
            content = content[entry]
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()) or not content:
        raise ValueError(f"{path} must hold a state dict, tensors by name, got {type(content).__name__}")
    return dict(content)


def _safetensors(path: Path) -> Callable[[Path], dict[str, Tensor]]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f"reading {path} needs safetensors: pip install 'holofunc[hub]'") from error
    return load_file


def pretrained(model: Model, weights: Weights, *, new_head: bool) -> Model:
    """The model whose `Model.init` returns these weights. They are fetched, verified and compared with it at once.

    Raises:
        ValueError: they do not fit, for instance because of another number of classes.
    """
    path, head = weights.path(), surgery.head_names(model)
    classes = dict(model.skeleton.named_parameters())[head[0]].shape[0]

    def loaded(params: Params, buffers: Buffers) -> tuple[Params, Buffers]:
        values = read(path)
        if new_head:
            values = {**surgery.drop(values, *head), **{n: params[n] for n in head}}
        elif head[0] in values and len(values[head[0]]) != classes:
            there = len(values[head[0]])
            if getattr(model.skeleton, "heads", ()):
                raise ValueError(
                    f"{weights.name} has {there} outputs, {model.name} was asked for {classes}: pass its num_classes "
                    "and anchors, or new_head=True to load everything else and draw the head from the key"
                )
            raise ValueError(
                f"{weights.name} has {there} classes, {model.name} was asked for {classes}: pass num_classes={there}, "
                "or new_head=True to load everything else and draw the head from the key"
            )
        new_params, new_buffers = surgery.load(model, values)
        return _like(new_params, params), _like(new_buffers, buffers)

    loaded(*model.init(random.key(0), device="meta"))
    return Derived(model, convert=loaded)


def _like(values: dict[str, Tensor], start: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: v.to(start[n].device, start[n].dtype) for n, v in values.items()}


def from_hub(repo_id: str, *, revision: str, endpoint: str | None = None) -> Weights:
    """The weights of a repository of the Hugging Face Hub in Holocron's layout.

    ``config.json`` names the architecture, the classes and the preprocessing; the weights are ``model.safetensors``
    or, where there is none, ``pytorch_model.bin``.

    Args:
        repo_id: e.g. ``"frgfm/repvgg_a0"``.
        revision: the full hash of a commit, so that the same call always gives the same weights.
        endpoint: the hub's address, if not the usual one.

    Returns:
        Weights for ``models.create(weights.constructor, **weights.options())``.

    Raises:
        ValueError: the revision is no commit's hash, the configuration lacks an entry, or there are no weights.
        ImportError: `huggingface_hub` is not installed.
    """
    if len(revision) != 40 or set(revision) - set("0123456789abcdef"):
        raise ValueError(f"revision must be the 40 digits of a commit's hash, got {revision!r}")
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise ImportError("from_hub needs huggingface_hub: pip install 'holofunc[hub]'") from error
    fetch = functools.partial(hub.hf_hub_download, repo_id, revision=revision, endpoint=endpoint)
    config = json.loads(Path(fetch("config.json")).read_text())
    if absent := [name for name in ("arch", "classes", "input_shape", "mean", "std") if name not in config]:
        raise ValueError(f"config.json of {repo_id} has no {', '.join(absent)}")
    for name in ("model.safetensors", "pytorch_model.bin"):
        try:
            file = fetch(name)
            break
        except hub.errors.EntryNotFoundError:
            continue
    else:
        raise ValueError(f"{repo_id} has neither model.safetensors nor pytorch_model.bin at {revision}")
    size = config["input_shape"][-1]
    return Weights(
        constructor=config["arch"],
        member=f"{repo_id}@{revision[:8]}",
        url=str(file),
        class_names=tuple(config["classes"]),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        input_size=size,
        resize_size=size,
        interpolation=config.get("interpolation", "bilinear"),
    )
