"""A configuration put together: data, network, optimizer. Names are looked up here, in dicts of functions."""

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from holofunc import data, losses, metrics, models, optim, random, train
from holofunc.config import Config
from holofunc.model import Model
from holofunc.optim import GradientTransformation, schedules
from holofunc.typing import Key

__all__ = [
    "device",
    "eval_step",
    "feed",
    "image_shape",
    "network",
    "objective",
    "open_data",
    "optimizer",
    "optimizers",
    "start",
    "train_step",
]

SCHEDULES: Mapping[str, Callable[[float, int, Callable[[float], float]], Any]] = {
    "constant": lambda lr, steps, warmup: lr,
    "cosine": lambda lr, steps, warmup: schedules.cosine(lr, steps),
    "one_cycle": lambda lr, steps, warmup: schedules.one_cycle(lr, steps, warmup_fraction=warmup(0.3)),
    "warmup_cosine": lambda lr, steps, warmup: schedules.warmup_cosine(lr, steps, int(warmup(0.1) * steps)),
}


# --- data --------------------------------------------------------------------------------------------------------


def open_data(config: Config, split: str) -> tuple[Config, data.Source]:
    """The data of a split, and the configuration with what was found in them.

    Classes, mean and std that the configuration has already are those of the network: data of other classes are
    refused, and images are normalized as it is used to.
    """
    source = data.open_dataset(
        config.data,
        config.root,
        split=split,
        image_size=config.image_size,
        download=config.download,
        bad_images=config.bad_images,
    )
    if config.classes and config.classes != source.classes:
        raise ValueError(
            f"{config.data} has {_enumerated(source.classes)}, but the network was made for "
            f"{_enumerated(config.classes)}"
        )
    source = source._replace(mean=config.mean or source.mean, std=config.std or source.std)
    channels = image_shape(source)[0]
    for name in ("mean", "std"):
        if len(getattr(source, name)) != channels:
            raise ValueError(f"{name} must hold a number for each of {channels} channels, got {getattr(source, name)}")
    return replace(config, classes=source.classes, mean=source.mean, std=source.std), source


def _enumerated(names: tuple[str, ...]) -> str:
    return f"{len(names)} classes ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"


def image_shape(source: data.Source) -> tuple[int, ...]:
    """Channels, height and width, as the first image has them."""
    images, _ = next(iter(source.batches(1)))
    return tuple(images.shape[1:])


def feed(config: Config, source: data.Source, *, key: Key | None = None) -> Any:
    """Batches on the device. With a key they are shuffled and all of one size, which is one graph."""
    wanted = config.batch_size if key is not None else config.eval_batch_size or config.batch_size
    size = min(wanted, len(source.batches(1)))
    batches: Any = source.batches(size, key=key, drop_last=key is not None, num_workers=config.workers)
    if config.device != "cpu":
        batches = data.on_device(batches, config.device)
    if not config.channels_last:
        return batches
    return data.map(lambda batch: (batch[0].to(memory_format=_memory_format(config)), batch[1]), batches)


def _memory_format(config: Config) -> torch.memory_format:
    return torch.channels_last if config.channels_last else torch.contiguous_format


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


# --- network -----------------------------------------------------------------------------------------------------


def network(config: Config, shape: tuple[int, ...], *, fresh: bool) -> Model:
    """The network, tried on images of this shape without computing anything.

    Args:
        config: with the classes and the mean that were found in the data.
        shape: channels, height and width of the images.
        fresh: whether the network begins; otherwise its weights will be restored, and published ones are not needed.

    Raises:
        ValueError: there is no such network, it does not classify, or not such images.
        TypeError: it has no such option.
    """
    given = {"num_classes": len(config.classes), "in_channels": len(config.mean)}
    if decided := given.keys() & config.model_options.keys():
        raise ValueError(f"model_options must not hold {', '.join(sorted(decided))}: the data decide")
    options = {n: v for n, v in config.model_options.items() if fresh or n not in ("weights", "new_head")}
    model = models.create(config.model, **given, **options)
    size = "x".join(map(str, shape))
    try:
        found = model.output_shape(torch.empty(1, *shape, device="meta"))
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{config.model} does not take images of {size}: {str(error).splitlines()[0]}") from error
    if found != (1, len(config.classes)):
        raise ValueError(f"{config.model} is no classifier: from an image of {size} it makes {found}")
    return model


# --- optimizer ---------------------------------------------------------------------------------------------------


@functools.cache
def optimizers() -> Mapping[str, Callable[..., GradientTransformation]]:
    """By name: the functions of `holofunc.optim` that take a learning rate first, pieces of chains aside."""
    named = {name: vars(optim)[name] for name in optim.__all__ if not name.startswith("scale_by_")}
    return {name: f for name, f in named.items() if inspect.isfunction(f) and _parameters(f)[:1] == ["learning_rate"]}


def _parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def optimizer(config: Config, steps: int, *, searched: bool = False) -> GradientTransformation:
    """The optimizer with its schedule over so many steps, clipping before it and an average of the weights after it.

    Args:
        config: names it.
        steps: of the whole run; the schedule counts updates, of which each takes ``accumulate`` steps.
        searched: whether its learning rate will be set from outside, by `holofunc.train.find_lr`.

    Raises:
        ValueError: there is no such optimizer or schedule, or it has no such option.
    """
    build = _named("optimizer", config.optimizer, optimizers())
    schedule = config.lr if searched else _schedule(config, -(-steps // config.accumulate))
    accepted = _parameters(build)
    own = random.split(random.key(config.seed), 3)[2]  # two are the run's
    defaults = {"mask": optim.no_decay_mask, "key": own}
    options: dict[str, Any] = {name: value for name, value in defaults.items() if name in accepted}
    if config.weight_decay is not None:
        options["weight_decay"] = config.weight_decay
    options |= config.optimizer_options
    if unknown := options.keys() - set(accepted):
        raise ValueError(
            f"optimizer {config.optimizer} has no option {', '.join(sorted(unknown))}; it has {', '.join(accepted[1:])}"
        )
    try:
        tx = (optim.inject_hyperparams(build) if searched else build)(learning_rate=schedule, **options)
        probe = {"weight": torch.ones(2, 2)}
        tx.update(probe, tx.init(probe), probe, loss=torch.ones(()), grad_fn=lambda params: params)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"optimizer {config.optimizer} refuses its options or the schedule {config.schedule}: {error}"
        ) from error
    if config.clip is not None:
        tx = optim.named_chain(clip=optim.clip_by_global_norm(config.clip), optimizer=tx)
    if config.freeze_until is not None:
        tx = optim.freeze(functools.partial(optim.up_to, last=config.freeze_until), tx)
    if config.precision == "fp16":
        tx = optim.dynamic_loss_scale(tx)
    if config.ema is not None:
        tx = optim.ema_params(tx, config.ema, warmup=True)
    return tx if config.accumulate == 1 else optim.multi_steps(tx, config.accumulate)


def _schedule(config: Config, steps: int) -> Any:
    asked: list[float] = []

    def warmup(default: float) -> float:
        asked.append(default)
        return default if config.warmup is None else config.warmup

    schedule = _named("schedule", config.schedule, SCHEDULES)(config.lr, steps, warmup)
    if config.warmup is not None and not asked:
        raise ValueError(f"warmup is for warmup_cosine and one_cycle, not for {config.schedule}")
    return schedule


def _named(what: str, name: str, known: Mapping[str, Any]) -> Any:
    if name not in known:
        raise ValueError(f"{what} must be one of {', '.join(sorted(known))}, got {name!r}")
    return known[name]


# --- steps -------------------------------------------------------------------------------------------------------


def start(config: Config, model: Model, tx: GradientTransformation, key: Key) -> train.TrainState:
    """The state in which the run begins."""
    memory_format = torch.channels_last if config.channels_last else None
    return train.create_state(model, tx, key, device=config.device, memory_format=memory_format)


def train_step(config: Config, model: Model, tx: GradientTransformation) -> Any:
    return train.make_train_step(objective(config, model), tx)


def objective(config: Config, model: Model) -> train.Supervised:
    loss = functools.partial(losses.cross_entropy, label_smoothing=config.label_smoothing)
    frozen = None
    if config.freeze_until is not None:
        frozen = optim.up_to(model.init(random.key(0), device="meta")[0], last=config.freeze_until)
    measured = {"accuracy": metrics.accuracy()}
    return train.supervised(model, loss, metrics=measured, precision=config.precision, frozen=frozen)


def eval_step(config: Config, model: Model) -> train.EvalStep:
    measured = {"accuracy": metrics.accuracy(), "confusion": metrics.confusion(len(config.classes))}
    return train.make_eval_step(model, measured, loss=losses.cross_entropy, precision=config.precision)
