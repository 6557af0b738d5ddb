"""Optimizers and schedules by name, and the wrappers around them."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from holofunc import distributed, optim, random, train
from holofunc.cli.task import arguments, built, known, parameters
from holofunc.config import Config, call
from holofunc.optim import GradientTransformation, schedules
from holofunc.typing import Schedule

__all__ = ["SCHEDULES", "learning_rate", "optimizer", "optimizers"]


@functools.cache
def optimizers() -> Mapping[str, Callable[..., GradientTransformation]]:
    """By name: the functions of `holofunc.optim` that take a learning rate first, pieces of chains aside."""
    named = {name: vars(optim)[name] for name in optim.__all__ if not name.startswith("scale_by_")}
    return {name: f for name, f in named.items() if inspect.isfunction(f) and parameters(f)[:1] == ["learning_rate"]}


def optimizer(
    config: Config,
    steps: int,
    *,
    epoch: int | None = None,
    frozen: Mapping[str, bool] | None = None,
    starts: Mapping[str, Any] | None = None,
    searched: bool = False,
) -> GradientTransformation:
    """The optimizer with its schedule, averages over ranks and clipping before it, an average of the weights after it.

    Args:
        config: names it.
        steps: of the whole run; the schedule counts updates, of which each takes ``accumulate`` steps.
        epoch: batches in an epoch, in which durations may be given; by default there is one epoch.
        frozen: which parameters stay as they are.
        starts: when parameters begin to learn: updates, ``"1ep"`` or ``"10%"``.
        searched: whether its learning rate will be set from outside, by `holofunc.train.find_lr`.

    Raises:
        ValueError: there is no such optimizer or schedule, or it has no such option.
    """
    stands = searched or (config.schedule == "constant" and config.warmup is None)  # some rules take a number only
    tx = _rule(config, config.lr if stands else learning_rate(config, steps, epoch or steps), searched)
    name, options = call(config.schedule)
    if distributed.world_size() > 1 and (name == PLATEAU or _sees_one_rank(tx)):
        raise ValueError(
            f"optimizer {config.optimizer} with the schedule {name} goes by the loss, or by second gradients, which "
            "are those of one rank: train in one process"
        )
    plateau = {"plateau": built("schedule", optim.reduce_on_plateau, options)} if name == PLATEAU else {}
    clip = {"clip": optim.clip_by_global_norm(config.clip)} if config.clip is not None else {}
    later = {} if starts is None else {"unfreeze": _from_update(starts, Span.of(config, steps, epoch or steps))}
    tx = optim.named_chain(average=distributed.average_gradients(), **clip, optimizer=tx, **plateau, **later)
    if frozen is not None:
        tx = optim.freeze(frozen, tx)
    if config.precision == "fp16":
        tx = optim.dynamic_loss_scale(tx)
    if config.ema is not None:
        tx = optim.ema_params(tx, config.ema, warmup=True)
    return tx if config.accumulate == 1 else optim.multi_steps(tx, config.accumulate)


def _rule(config: Config, rate: Any, searched: bool) -> GradientTransformation:
    build = known("optimizer", config.optimizer, optimizers())
    accepted = parameters(build)
    own = random.split(random.key(config.seed), 3)[2]  # two are the run's
    defaults = {"mask": optim.no_decay_mask, "key": own}
    options: dict[str, Any] = {name: value for name, value in defaults.items() if name in accepted}
    if config.weight_decay is not None:
        options["weight_decay"] = config.weight_decay
    options = arguments(f"optimizer {config.optimizer}", build, options | config.optimizer_options, first=1)
    try:
        tx = (optim.inject_hyperparams(build) if searched else build)(learning_rate=rate, **options)
        probe = {"weight": torch.ones(2, 2)}
        tx.update(probe, tx.init(probe), probe, loss=torch.ones(()), grad_fn=lambda params: params)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"optimizer {config.optimizer} refuses its options or the schedule {config.schedule}: {error}"
        ) from error
    return tx


def _from_update(starts: Mapping[str, Any], span: "Span") -> GradientTransformation:
    numbers = {name: span.in_updates("unfreeze", length) for name, length in starts.items()}
    return optim.unfreeze(lambda params: {name: numbers[name] for name in params})


def _sees_one_rank(tx: GradientTransformation) -> bool:
    """Whether updates depend on more than gradients, which alone are averaged over ranks."""
    probe = {"weight": torch.ones(2, 2)}
    state = tx.init(probe)
    try:
        tx.update(probe, state, probe)
    except (TypeError, ValueError):  # it asks for the loss
        return True
    return optim.looks_twice(state)


# --- schedules ---------------------------------------------------------------------------------------------------

PLATEAU = "reduce_on_plateau"
SCHEDULES: Mapping[str, Callable[..., Any]] = {
    **{name: vars(schedules)[name] for name in schedules.__all__ if name != "half_life"},  # that one is for averages
    PLATEAU: optim.reduce_on_plateau,
}
USUAL = {"warmup_cosine": "10%", "wsd": "10%"}
"""The warm-up where none is asked for."""
DURATIONS = ("steps", "warmup_steps", "decay_steps", "cooldown_steps", "every", "period", "begin")
"""Options that count updates."""


class Span(NamedTuple):
    """A part of a run: how many updates it has, and an epoch; and how many steps an update takes."""

    updates: int
    epoch: int
    accumulate: int

    @classmethod
    def of(cls, config: Config, steps: int, epoch: int) -> "Span":
        """Of a run of so many steps, in epochs of so many, whose ends close an open window."""
        whole, rest = divmod(steps, epoch)
        per_epoch = -(-epoch // config.accumulate)
        return cls(whole * per_epoch - (-rest // config.accumulate), epoch, config.accumulate)

    def in_updates(self, name: str, length: Any) -> int:
        """A duration in updates: a share below 1, a number, ``"1ep"`` or ``"10%"``."""
        if isinstance(length, (int, float)) and 0 < length < 1:
            return int(length * self.updates)
        try:
            if isinstance(length, str) and length.endswith("%"):
                return int(float(length[:-1]) / 100 * self.updates)
            whole = isinstance(length, float) and length.is_integer()
            return train.updates(int(length) if whole else length, self.epoch, accumulate=self.accumulate)
        except ValueError:
            raise ValueError(f"{name} must be a number of updates, '1ep' or '10%', got {length!r}") from None


def learning_rate(config: Config, steps: int, epoch: int) -> Schedule:
    """The schedule over so many steps, of epochs of so many. Schedules that do not warm up themselves follow a rise.

    Raises:
        ValueError: there is no such schedule, or it has no such option.
    """
    span = Span.of(config, steps, epoch)
    name, _ = call(config.schedule)
    own = {"warmup_steps", "warmup_fraction"} & set(parameters(known("schedule", name, SCHEDULES)))
    warmup = span.in_updates("warmup", USUAL.get(name, 0) if config.warmup is None else config.warmup)
    if own or not warmup:
        return _made(config, config.schedule, span, warmup)
    if warmup >= span.updates:
        raise ValueError(f"warmup must be shorter than the run of {span.updates} updates, got {config.warmup!r}")
    rise, rest_of_it = schedules.linear(0.0, config.lr, warmup), span._replace(updates=span.updates - warmup)
    return schedules.join([rise, _made(config, config.schedule, rest_of_it, 0)], [warmup])


def _made(config: Config, text: str, span: Span, warmup: int = 0) -> Schedule:
    """The schedule of a text; what it needs and the text does not say is the run's."""
    name, options = call(text)
    fn, what = known("schedule", name, SCHEDULES), f"schedule {name}"
    options = arguments(what, fn, options)
    if name == PLATEAU:
        return schedules.constant(config.lr)
    options |= {n: span.in_updates(f"{what}: {n}", v) for n, v in options.items() if n in DURATIONS}
    if name == "noisy":
        options |= {"base": _made(config, str(options.get("base", "constant")), span), "key": random.key(config.seed)}
    if name == "join":
        options = _joined(config, options, span)
    if "factors" in options:  # the keys of a table are texts
        options["factors"] = {
            span.in_updates(what, int(k) if k.isdecimal() else k): v for k, v in options["factors"].items()
        }
    peaks = [each for each in ("value", "peak_value", "init_value") if each in parameters(fn)][:1]
    usual = {"steps": span.updates, "warmup_steps": warmup, "decay_steps": span.updates // 5, "end_value": 0.0}
    usual |= dict.fromkeys(peaks, config.lr)
    needed = {n for n, p in inspect.signature(fn).parameters.items() if p.default is inspect.Parameter.empty}
    usual = {n: value for n, value in usual.items() if n in needed}
    if "warmup_fraction" in parameters(fn) and config.warmup is not None:
        usual["warmup_fraction"] = warmup / span.updates
    return built(what, fn, {**usual, **options})


def _joined(config: Config, options: Mapping[str, Any], span: Span) -> dict[str, Any]:
    """Each part is made for the updates that it has."""
    ends = [span.in_updates("schedule join: boundaries", end) for end in options.get("boundaries", ())]
    lengths = [max(1, b - a) for a, b in zip([0, *ends], [*ends, span.updates], strict=True)]
    parts = zip(options.get("parts", ()), lengths, strict=False)
    return {"boundaries": ends, "parts": [_made(config, part, span._replace(updates=n)) for part, n in parts]}
