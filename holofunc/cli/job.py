"""A configuration put together: data, network, optimizer, steps. Names are looked up in dicts of functions."""

import inspect
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from holofunc import data, distributed, models, optim, random, train, transforms
from holofunc.cli.classification import Classification
from holofunc.cli.detection import Detection
from holofunc.cli.optimizers import optimizer
from holofunc.cli.recognition import Recognition
from holofunc.cli.segmentation import Segmentation
from holofunc.cli.task import Opened, Task, built, extra_metrics, known, parameters
from holofunc.config import Config, call
from holofunc.data.inspecting import problems
from holofunc.model import Model
from holofunc.optim import GradientTransformation
from holofunc.typing import Key, Params

__all__ = [
    "TASKS",
    "Job",
    "assembled",
    "augmentation",
    "broken",
    "broken_files",
    "device",
    "eval_step",
    "feed",
    "frozen",
    "image_shape",
    "network",
    "objective",
    "open_data",
    "rehearse",
    "start",
    "starts",
]

TASKS: Mapping[str, Task] = {
    "classification": Classification(),
    "detection": Detection(),
    "segmentation": Segmentation(),
    "recognition": Recognition(),
}


# --- data --------------------------------------------------------------------------------------------------------


def open_data(config: Config, split: str, *, keeps_places: bool = False) -> tuple[Config, Opened]:
    """The data of a split, and the configuration with what was found in them.

    Classes, mean and std that the configuration has already are those of the network: data of other classes are
    refused, and images are normalized as it is used to. Images that cannot be read are left out, if the configuration
    says so; with ``keeps_places`` others take their places, so that a run in which one broke can go on: all the rest
    stays where it was.
    """
    source = TASKS[config.task].open(config, split)
    if config.classes and config.classes != source.classes:
        raise ValueError(
            f"{config.data} has {_enumerated(source.classes)}, but the network was made for "
            f"{_enumerated(config.classes)}"
        )
    source = source._replace(mean=config.mean or source.mean, std=config.std or source.std)
    if config.bad_images == "skip":
        source = _without_broken(source, keeps_places=keeps_places)
    shape = image_shape(source)
    for name in ("mean", "std"):
        if len(getattr(source, name)) != shape[0]:
            raise ValueError(f"{name} must hold a number for each of {shape[0]} channels, got {getattr(source, name)}")
    return replace(config, classes=source.classes, shape=shape, mean=source.mean, std=source.std), source


def _enumerated(names: tuple[str, ...]) -> str:
    return f"{len(names)} classes ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"


def broken(source: Opened) -> dict[int, str]:
    """The samples that cannot be read, and why, by their numbers."""
    if isinstance(source.data, tuple):  # tensors
        return {}
    return problems(source.data.__getitem__, range(len(source.data)))


def broken_files(config: Config) -> list[str]:
    """What is wrong with the images of both splits, a line each, and how many they are; nothing, if nothing is."""
    found = [why for split in ("train", "test") for why in broken(TASKS[config.task].open(config, split)).values()]
    return [*found, f"{config.data}: {len(found)} images cannot be read"] if found else []


def _without_broken(source: Opened, *, keeps_places: bool) -> Opened:
    found = broken(source)
    if not found:
        return source
    whole = [i for i in range(len(source.data)) if i not in found]
    if not whole:
        raise ValueError(f"none of the {len(found)} images can be read: {next(iter(found.values()))}")
    what = "others take the places of" if keeps_places else "left out"
    warnings.warn(f"{what} {len(found)} images that cannot be read: {'; '.join([*found.values()][:5])}", stacklevel=3)
    if not keeps_places:
        return source.at(whole)
    others = {each: whole[number * len(whole) // len(found)] for number, each in enumerate(found)}  # from all over
    return source.at([others.get(i, i) for i in range(len(source.data))])


def image_shape(source: Opened) -> tuple[int, ...]:
    """Channels, height and width, as the first image has them."""
    images, _ = next(iter(source.batches(1)))
    return tuple(images.shape[1:])


def feed(config: Config, source: Opened, *, key: Key | None = None) -> Any:
    """Batches on the device, this rank's part of each. With a key they are shuffled and usually all of one size."""
    wanted = config.batch_size if key is not None else config.eval_batch_size or config.batch_size
    size = min(wanted, len(source.batches(1)))
    trains, world = key is not None, distributed.world_size()
    batches: Any = source.batches(size, key=key, drop_last=trains and config.drop_last, num_workers=config.workers)
    if world > 1:
        batches = batches.shard(distributed.rank(), world, uneven=not trains)
    if config.device != "cpu":
        batches = data.on_device(batches, config.device)
    if not config.channels_last:
        return batches
    return data.map(lambda batch: (batch[0].to(memory_format=torch.channels_last), batch[1]), batches)


def device(name: str) -> str:
    """The name of a device that is there.

    Raises:
        ValueError: there is no such device.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise ValueError(f"device must be cpu, cuda, cuda:1, mps or auto, got {name!r}")
    try:
        torch.empty(0, device=name)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"device {name} is not there: {str(error).splitlines()[0]}") from error
    return name


AUGMENTS: Mapping[str, Callable[..., transforms.Augment]] = {
    fn.__name__: fn
    for fn in (
        *(transforms.color_jitter, transforms.cutmix, transforms.large_scale_jitter, transforms.mixup),
        *(transforms.mosaic, transforms.rand_augment, transforms.random_crop, transforms.random_erasing),
        *(transforms.random_flip, transforms.random_resized_crop, transforms.zoom_out),
    )
}
PIXELS = ("color_jitter", "rand_augment")
"""Those for images in [0, 1]."""


def augmentation(config: Config) -> transforms.Augment | None:
    """What becomes of a batch inside the step, one after the other."""
    steps = []
    for text in config.augment:
        name, options = call(text)
        make = known("augment", name, AUGMENTS)
        if "num_classes" in parameters(make):
            options = {"num_classes": len(config.classes), **options}
        augment = built(f"augment {name}", make, options)
        steps.append(transforms.denormalized(augment, config.mean, config.std) if name in PIXELS else augment)
    return transforms.compose(*steps) if steps else None


# --- network -----------------------------------------------------------------------------------------------------

LAYERS = {name: each for name, each in vars(nn).items() if inspect.isclass(each) and issubclass(each, nn.Module)}
"""What options like ``norm_layer`` may name."""


def network(config: Config, *, fresh: bool) -> Model:
    """The network, tried on images like those of the data without computing anything.

    Args:
        config: with what was found in the data.
        fresh: whether the network begins; otherwise its weights will be restored, and published ones are not needed.

    Raises:
        ValueError: there is no such network, it is for another task, or not for such images.
        TypeError: it has no such option.
    """
    task, shape = TASKS[config.task], config.shape
    given = task.decided(config)
    if decided := given.keys() & config.model_options.keys():
        raise ValueError(f"model_options must not hold {', '.join(sorted(decided))}: the data decide")
    options = {n: v for n, v in config.model_options.items() if fresh or n not in STARTS}
    options = {n: known(n, v, LAYERS) if n.endswith("_layer") and isinstance(v, str) else v for n, v in options.items()}
    model = models.create(str(config.model), **given, **options)
    size = "x".join(map(str, shape))
    try:
        found = model.output_shape(torch.empty(1, *shape, device="meta"))
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"model {config.model} does not take images of {size}: {str(error).splitlines()[0]}"
        ) from error
    task.check_model(config, model, found, shape)
    return model


STARTS = ("weights", "new_head", "body_weights")
"""Options that say where a new network starts."""


def frozen(config: Config, model: Model) -> dict[str, bool] | None:
    """Which parameters stay as they are; None if all of them learn."""
    params: Params = dict(model.skeleton.named_parameters())
    masks = []
    if config.freeze_until is not None:
        masks.append(_mask("freeze_until", lambda last: optim.up_to(params, last), config.freeze_until))
    for pattern in config.freeze:
        masks.append(_mask("freeze", lambda p: optim.label_by_path(params, [(p, True)], default=False), pattern))
    if config.freeze_norms:
        norms = [n for n, m in model.skeleton.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        masks.append({name: name.rpartition(".")[0] in norms for name in params})
    if not masks:
        return None
    mask = {name: any(each[name] for each in masks) for name in params}
    if all(mask.values()):
        raise ValueError(f"freeze must leave something to learn, got all of {', '.join(optim.layers(params))}")
    return mask


def starts(config: Config, model: Model) -> dict[str, Any] | None:
    """When each parameter begins to learn; None if all of them do at once."""
    if not config.unfreeze:
        return None
    params: Params = dict(model.skeleton.named_parameters())
    return _mask("unfreeze", lambda rules: optim.label_by_path(params, rules, default=0), config.unfreeze)


def _mask(name: str, make: Callable[[Any], Any], value: Any) -> dict[str, Any]:
    try:
        return dict(make(value))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


# --- steps -------------------------------------------------------------------------------------------------------


class Job(NamedTuple):
    """All that a run begins with."""

    config: Config
    model: Model
    tx: GradientTransformation
    state: train.TrainState
    batches: Any


def assembled(config: Config, source: Opened, *, fresh: bool, steps: int | None = None) -> Job:
    """A run on these data, tried on its first images; with ``steps``, a search for its learning rate."""
    model = network(config, fresh=fresh)
    rehearse(config, model, source)
    order_key, state_key = random.split(random.key(config.seed))
    batches = feed(config, source, key=order_key)
    total = steps or config.steps or (config.epochs or 1) * len(batches)
    searched, parts = steps is not None, (frozen(config, model), starts(config, model))
    tx = optimizer(config, total, epoch=len(batches), frozen=parts[0], starts=parts[1], searched=searched)
    return Job(config, model, tx, start(config, model, tx, state_key), batches)


def start(config: Config, model: Model, tx: GradientTransformation, key: Key) -> train.TrainState:
    """The state in which the run begins."""
    memory_format = torch.channels_last if config.channels_last else None
    return train.create_state(model, tx, key, device=config.device, memory_format=memory_format)


def objective(config: Config, model: Model) -> train.Supervised:
    """What is minimized. On several ranks, normalizations and dropout are those of one process."""
    task = TASKS[config.task]
    network = task.by_image(model)
    if distributed.world_size() > 1:
        network = distributed.sync_dropout(distributed.sync_batch_norm(network))
    return train.supervised(
        network,
        task.objective_loss(config, model, smooth=True),
        metrics=task.measured(config, model, held_out=False),
        precision=config.precision,
        frozen=frozen(config, model),
    )


def eval_step(config: Config, model: Model) -> train.EvalStep:
    """What is measured on held-out data."""
    task = TASKS[config.task]
    measured = {**task.measured(config, model, held_out=True), **extra_metrics(task, config, model)}
    loss = task.objective_loss(config, model, smooth=False)
    return train.make_eval_step(task.by_image(model), measured, loss=loss, precision=config.precision)


def rehearse(config: Config, model: Model, source: Opened) -> None:
    """Try augmentation, loss and metrics on two images and outputs of zeros, so that what does not fit is said now.

    Raises:
        ValueError: naming what does not.
    """
    task = TASKS[config.task]
    images, targets = batch = next(iter(source.batches(min(2, len(source.batches(1))))))
    augment, measured = augmentation(config), extra_metrics(task, config, model)
    loss = task.objective_loss(config, model, smooth=True)
    if augment is not None:
        images, _ = batch = _tried("augment", lambda: augment(batch, random.key(0)))
    shape = _tried("augment", lambda: task.by_image(model).output_shape(images))
    if shape is None:  # several maps, of detectors
        return
    outputs = torch.zeros(shape)
    _tried("loss", lambda: loss(outputs, batch[1]))
    for name, metric in measured.items():
        _tried(f"metrics {name}", lambda m=metric: m.update(m.init(), outputs, targets))  # type: ignore[misc]


def _tried(what: str, fn: Callable[[], Any]) -> Any:
    try:
        return fn()
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{what} does not fit these data: {str(error).splitlines()[0]}") from error


def train_step(job: Job) -> train.TrainStep:
    """The step of training."""
    return train.make_train_step(objective(job.config, job.model), job.tx, augment=augmentation(job.config))
