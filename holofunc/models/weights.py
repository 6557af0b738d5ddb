"""Published checkpoints: their records, and verified loading from a URL, a file or the Hugging Face Hub.

``weights=`` of a constructor takes a record of `checkpoints`, its name (``"resnet18.imagenette"``, or just
``"IMAGENETTE"`` or ``"DEFAULT"``), a path or a URL. The files are those published by Holocron.
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

__all__ = ["Weights", "checkpoints", "from_folder", "from_hub", "pretrained", "read", "resolve", "to_folder", "to_hub"]

RELEASES = "https://github.com/frgfm/Holocron/releases/download/"
IMAGENETTE = (
    *("tench", "English springer", "cassette player", "chain saw", "church"),
    *("French horn", "garbage truck", "gas pump", "golf ball", "parachute"),
)


@dataclass(frozen=True)
class Weights:
    """The record of a checkpoint.

    Attributes:
        constructor: name of the model.
        member: name of the checkpoint among those of the model.
        url: where it is published, or the path of a file.
        sha256: of the file; only the first 8 digits for early releases, which published no more.
        dataset: of training and evaluation.
        metrics: accuracies in [0, 1], ``top1`` and ``top5``, as published.
        num_classes: of the head; None if unknown.
        num_params: of the model, head included.
        size: of the file in bytes; computed from the tensors for four ImageNet files that Holocron misstates.
        mean, std: per channel, of images in [0, 1].
        input_size, resize_size: side of the square crop, and length of the shorter side before it, in pixels.
        recipe: ``commit``, ``script`` and ``args`` of the training, if published.
        licence: of the file.
        default: whether it is the ``"DEFAULT"`` of its model.
        note: further information.
        class_names: names of the classes, if they are not those of the data set.
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
        """Class names in the order of the outputs; empty if unknown."""
        if self.class_names or self.dataset not in ("imagenette", "imagenet-1k"):
            return self.class_names
        return IMAGENETTE if self.dataset == "imagenette" else _imagenet()

    def path(self) -> Path:
        """The path of the verified file, which is downloaded if it is not in the cache."""
        return download(self.url, self.sha256) if "://" in self.url else verified(Path(self.url), self.sha256)

    def transforms(self) -> Preprocess:
        """The preprocessing with which the accuracy was measured."""
        return Preprocess(self.resize_size, self.input_size, self.mean, self.std, self.interpolation)

    def options(self) -> dict[str, Any]:
        """Arguments for the constructor: these weights, their number of classes and, if it is not 3, of channels."""
        channels = {} if len(self.mean) == 3 else {"in_channels": len(self.mean)}
        return {"weights": self, "num_classes": self.num_classes or len(self.categories), **channels}


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
    from torchvision.models import ResNet18_Weights  # torchvision's list of the 1000 names

    return tuple(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])


def resolve(weights: Any, constructor: str) -> Weights:
    """The record for an argument ``weights=`` of a constructor.

    Raises:
        ValueError: there is no such checkpoint or file, or it is of another constructor. TypeError: another type.
    """
    members = checkpoints(constructor)
    known = ", ".join(repr(w.member) for w in members) or "none"
    if isinstance(weights, Weights):
        if weights.constructor != constructor:
            raise ValueError(f"{weights.name} are weights of {weights.constructor}, not of {constructor}")
        return weights
    if not isinstance(weights, (str, Path)):
        raise TypeError(
            f"weights must be one of models.weights.checkpoints({constructor!r}), its name, a path or a URL, "
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
    """Read a state dict from a safetensors or torch file, on the CPU and without executing code.

    In the file of a training run, it is the entry ``model`` or ``state_dict``.

    Raises:
        ValueError: the file is not a state dict, or not only one. OSError: there is no such file.
        ImportError: safetensors is not installed.
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
        raise ValueError(f"{path} cannot be read safely as weights: {reason}") from error
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
    """The model whose `Model.init` returns these weights. They are downloaded and checked at once.

    Raises:
        ValueError: they do not fit the model, for instance because of another number of classes.
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
    """The weights of a repository of the Hugging Face Hub in Holocron's layout, as `to_folder` writes it.

    Args:
        repo_id: e.g. ``"frgfm/repvgg_a0"``.
        revision: the full hash of a commit, so that the same call always gives the same weights.
        endpoint: URL of the hub; None is the default.

    Returns:
        A record for ``models.create(weights.constructor, **weights.options())``.

    Raises:
        ValueError: the revision is not a commit hash, the configuration lacks an entry, or there are no weights.
        ImportError: `huggingface_hub` is not installed.
    """
    if len(revision) != 40 or set(revision) - set("0123456789abcdef"):
        raise ValueError(f"revision must be the 40 digits of a commit hash, got {revision!r}")
    hub = _hub("from_hub")

    def fetch(name: str) -> Path | None:
        try:
            return Path(hub.hf_hub_download(repo_id, name, revision=revision, endpoint=endpoint))
        except hub.errors.EntryNotFoundError:
            return None

    return _laid_out(fetch, f"{repo_id}@{revision[:8]}", repo_id)


def from_folder(path: str | Path) -> Weights:
    """The weights in a folder in the layout of `to_folder`, such as a cloned repository.

    Raises:
        ValueError: there is no configuration, it lacks an entry, or there are no weights.
    """
    folder = Path(path)
    return _laid_out(lambda name: file if (file := folder / name).is_file() else None, folder.name, str(path))


def to_folder(path: str | Path, weights: Weights, params: Params, buffers: Buffers, *, card: str = "") -> Path:
    """Write a folder to publish: ``config.json``, ``pytorch_model.bin`` and a model card, ``README.md``.

    It can be read by `from_folder`, `from_hub` and Holocron's ``model_from_hf_hub``.

    Args:
        path: of the folder, which is created if necessary; existing files of these names are overwritten.
        weights: constructor, classes, preprocessing, metrics and licence; its ``url`` is not used.
        params: of the model.
        buffers: of the model.
        card: further text for the model card.

    Raises:
        ValueError: ``weights`` has no class names.

    Example:
        >>> import tempfile
        >>> from holofunc import models, random
        >>> about = models.weights.Weights("smallnet", "mine", "", class_names=("cat", "dog"), metrics={"top1": 0.9})
        >>> params, buffers = models.smallnet(num_classes=2).init(random.key(0))
        >>> folder = models.weights.to_folder(tempfile.mkdtemp(), about, params, buffers)
        >>> found = models.weights.from_folder(folder)
        >>> found.constructor, found.categories
        ('smallnet', ('cat', 'dog'))
    """
    if not weights.categories:
        raise ValueError(f"weights must have class_names, got none for {weights.name}")
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    size, classes = weights.input_size, list(weights.categories)
    config = {
        "task": "classification",
        "arch": weights.constructor,
        "classes": classes,
        "num_classes": len(classes),
        "input_shape": [len(weights.mean), size, size],
        "mean": list(weights.mean),
        "std": list(weights.std),
        "interpolation": weights.interpolation,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    torch.save({n: x.detach().cpu().contiguous() for n, x in {**params, **buffers}.items()}, folder / FILES[1])
    (folder / "README.md").write_text(_card(weights, card))
    return folder


def to_hub(
    folder: str | Path, repo_id: str, *, private: bool = False, endpoint: str | None = None, token: str | None = None
) -> str:
    """Publish a folder of `to_folder` as a repository of the Hugging Face Hub, which is created if necessary.

    Args:
        folder: made by `to_folder`.
        repo_id: e.g. ``"frgfm/repvgg_a0"``.
        private: whether a new repository is private.
        endpoint: URL of the hub; None is the default.
        token: None is that of ``hf auth login``.

    Returns:
        The hash of the commit, for ``from_hub(repo_id, revision=...)``.

    Raises:
        ValueError: the folder is incomplete. ImportError: `huggingface_hub` is not installed.
    """
    from_folder(folder)
    api = _hub("to_hub").HfApi(endpoint=endpoint, token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    return str(api.upload_folder(repo_id=repo_id, folder_path=str(folder)).oid)


FILES = ("model.safetensors", "pytorch_model.bin")


def _hub(what: str) -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(f"{what} needs huggingface_hub: pip install 'holofunc[hub]'") from error
    return huggingface_hub


def _laid_out(fetch: Callable[[str], Path | None], member: str, place: str) -> Weights:
    """The record of files in Holocron's layout: ``config.json`` and one of `FILES`."""
    about = fetch("config.json")
    if about is None:
        raise ValueError(f"{place} has no config.json")
    config = json.loads(about.read_text())
    if absent := [name for name in ("arch", "classes", "input_shape", "mean", "std") if name not in config]:
        raise ValueError(f"config.json of {place} has no {', '.join(absent)}")
    file = fetch(FILES[0]) or fetch(FILES[1])
    if file is None:
        raise ValueError(f"{place} has neither {' nor '.join(FILES)}")
    size = config["input_shape"][-1]
    return Weights(
        constructor=config["arch"],
        member=member,
        url=str(file),
        class_names=tuple(config["classes"]),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        input_size=size,
        resize_size=size,
        interpolation=config.get("interpolation", "bilinear"),
    )


def _card(weights: Weights, text: str) -> str:
    """A model card: metadata for the hub, a description, and how to load the model."""
    licence = [f"license: {weights.licence.lower()}"] if weights.licence else []
    head = ["---", *licence, "library_name: holofunc", "tags:", "- image-classification", "- pytorch", "---"]
    measured = [f"| {name} | {value:.2%} |" for name, value in weights.metrics.items()]
    body = [
        f"# {weights.constructor}",
        f"{len(weights.categories)} classes{f' of {weights.dataset}' if weights.dataset else ''}, images of "
        f"{weights.input_size} x {weights.input_size} pixels.",
        *([text] if text else []),
        *(["\n".join([f"| {weights.dataset or 'measured'} | |", "| --- | --- |", *measured])] if measured else []),
        "```python\nfrom holofunc import models\n\n"
        'record = models.weights.from_hub("<this repository>", revision="<the hash of a commit>")\n'
        "model = models.create(record.constructor, **record.options())\n```",
    ]
    return "\n".join(head) + "\n\n" + "\n\n".join(body) + "\n"
