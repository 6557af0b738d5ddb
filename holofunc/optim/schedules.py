"""Schedules: pure functions ``schedule(step) -> value``, for learning rates and for any other hyperparameter.

``step`` is 0-based. A tensor gives a 0-d float64 tensor (its arithmetic never leaves the device, and compiled code sees
one graph for all steps); a Python number gives a Python number, for plotting. Values before step 0 and after the last
one are those of the ends. All arguments but counts of steps may be 0-d tensors too.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from holofunc import random
from holofunc.optim.numerics import (
    check_count,
    check_decay,
    check_finite,
    check_flags,
    check_fraction,
    check_nonnegative,
    check_positive,
)
from holofunc.typing import Key, Scalar, Schedule

__all__ = [
    "constant",
    "cosine",
    "cosine_restarts",
    "exponential",
    "half_life",
    "join",
    "linear",
    "noisy",
    "one_cycle",
    "piecewise",
    "polynomial",
    "step",
    "tanh",
    "warmup_cosine",
    "wsd",
]


def _schedule(fn: Callable[[Tensor], Any]) -> Schedule:
    """``fn`` of a float64 tensor, as a function of a number or a tensor of any dtype."""

    def schedule(step: Any) -> Any:
        if isinstance(step, Tensor):
            return fn(step.to(torch.float64))
        return fn(torch.tensor(step, dtype=torch.float64)).item()

    return schedule


def _like(t: Tensor, value: Scalar) -> Tensor:
    return value.to(t) if isinstance(value, Tensor) else torch.full_like(t, value)


def constant(value: Scalar) -> Schedule:
    """``value`` at every step.

    Example:
        >>> from holofunc.optim import schedules
        >>> schedules.constant(0.1)(1000)
        0.1
    """
    check_finite(value=value)
    return _schedule(lambda t: _like(t, value))


def polynomial(init_value: Scalar, end_value: Scalar, steps: int, *, power: Scalar = 1.0, begin: int = 0) -> Schedule:
    """``(init_value - end_value) * (1 - progress)**power + end_value``, where progress grows from 0 to 1.

    Args:
        init_value: value until step ``begin``.
        end_value: value from step ``begin + steps`` on.
        steps: length of the transition, at least 1.
        power: exponent.
        begin: first step of the transition.

    Example:
        >>> from holofunc.optim import schedules
        >>> rate = schedules.polynomial(1.0, 0.0, 10, power=2)
        >>> rate(0), rate(5), rate(20)
        (1.0, 0.25, 0.0)
    """
    check_count(steps=steps)
    check_finite(init_value=init_value, end_value=end_value, begin=begin)
    check_nonnegative(power=power)
    return _schedule(lambda t: (init_value - end_value) * (1 - _progress(t - begin, steps)) ** power + end_value)


def _progress(t: Tensor, steps: float) -> Tensor:
    return (t / steps).clamp(0, 1)


def linear(init_value: Scalar, end_value: Scalar, steps: int, *, begin: int = 0) -> Schedule:
    """A straight line from ``init_value`` to ``end_value`` over ``steps`` steps.

    Example:
        >>> from holofunc.optim import schedules
        >>> schedules.linear(0.0, 1.0, 4)(1)
        0.25
    """
    return polynomial(init_value, end_value, steps, begin=begin)


def exponential(
    init_value: Scalar,
    rate: Scalar,
    *,
    every: int = 1,
    staircase: bool = False,
    begin: int = 0,
    end_value: Scalar | None = None,
) -> Schedule:
    """``init_value * rate**(step / every)``.

    Args:
        init_value: value at the beginning.
        rate: factor per ``every`` steps.
        every: steps per factor.
        staircase: in whole factors only.
        begin: step at which the decay begins.
        end_value: bound that the value does not pass.

    Example:
        >>> from holofunc.optim import schedules
        >>> schedules.exponential(1.0, 0.5, every=10, staircase=True)(25)
        0.25
    """
    check_flags(staircase=staircase)
    check_count(every=every)
    check_finite(init_value=init_value, begin=begin)
    check_nonnegative(rate=rate)
    if end_value is not None:
        check_finite(end_value=end_value)

    def fn(t: Tensor) -> Tensor:
        exponent = (t - begin).clamp_min(0) / every
        value = init_value * _like(t, rate) ** (exponent.floor() if staircase else exponent)
        if end_value is None:
            return value
        bound = _like(t, end_value)
        return torch.where(_like(t, rate) < 1, value.maximum(bound), value.minimum(bound))

    return _schedule(fn)


def cosine(init_value: Scalar, steps: int, *, end_value: Scalar = 0.0, k: Scalar = 1.0) -> Schedule:
    """Half a cosine from ``init_value`` to ``end_value`` over ``steps`` steps.

    Equal to ``torch.optim.lr_scheduler.CosineAnnealingLR(T_max=steps, eta_min=end_value)`` within its period.

    Args:
        init_value: value at step 0.
        steps: length.
        end_value: value from step ``steps`` on.
        k: of k-decay, the power of the progress: above 1 the value stays high for longer.

    Source: k-decay: Zhang and Li (arXiv 2004.05909).

    Example:
        >>> from holofunc.optim import schedules
        >>> round(schedules.cosine(1.0, 100)(50), 6)
        0.5
    """
    check_count(steps=steps)
    check_finite(init_value=init_value, end_value=end_value)
    check_positive(k=k)
    return _schedule(lambda t: _half_cosine(init_value, end_value, _progress(t, steps) ** k))


def _half_cosine(start: Scalar, end: Scalar, progress: Tensor) -> Tensor:
    return end + (start - end) * 0.5 * (1 + torch.cos(math.pi * progress))


def tanh(
    init_value: Scalar, steps: int, *, end_value: Scalar = 0.0, low: Scalar = -7.0, high: Scalar = 3.0
) -> Schedule:
    """``end_value + (init_value - end_value) * (1 - tanh(x)) / 2``, where x goes from ``low`` to ``high``.

    Args:
        init_value: value that step 0 nearly has.
        steps: length.
        end_value: value that the end nearly has.
        low: below ``high``; the farther from 0, the longer the value stays near ``init_value``.
        high: likewise for the end.

    Source: Hsueh et al., "Stochastic gradient descent with hyperbolic-tangent decay" (arXiv 1806.01593); as timm's.

    Example:
        >>> from holofunc.optim import schedules
        >>> rate = schedules.tanh(1.0, 100)
        >>> round(rate(0), 4), round(rate(70), 4), round(rate(100), 4)
        (1.0, 0.5, 0.0025)
    """
    check_count(steps=steps)
    check_finite(init_value=init_value, end_value=end_value, low=low, high=high)

    def fn(t: Tensor) -> Tensor:
        progress = _progress(t, steps)
        return end_value + (init_value - end_value) * 0.5 * (1 - torch.tanh(low * (1 - progress) + high * progress))

    return _schedule(fn)


def noisy(base: Schedule, key: Key, scale: Scalar) -> Schedule:
    """``base`` times a factor that is drawn for each step, from 1 - scale to 1 + scale.

    Args:
        base: any schedule.
        key: a step has the same factor in every run with it.
        scale: in [0, 1].

    Example:
        >>> from holofunc import random
        >>> from holofunc.optim import schedules
        >>> rate = schedules.noisy(schedules.constant(1.0), random.key(0), 0.1)
        >>> 0.9 <= rate(3) <= 1.1, rate(3) == rate(3), rate(3) == rate(4)
        (True, True, False)
    """
    if not callable(base):
        raise TypeError(f"base must be a schedule, base(step), got {base!r}")
    check_fraction(scale=scale)

    def fn(t: Tensor) -> Tensor:
        draw = random.uniform(random.fold_in(key.to(t.device), t.long().clamp_min(0)), low=-1.0, high=1.0)
        return base(t) * (1 + scale * draw.to(torch.float64))

    return _schedule(fn)


def warmup_cosine(
    peak_value: Scalar,
    steps: int,
    warmup_steps: int,
    *,
    init_value: Scalar = 0.0,
    end_value: Scalar = 0.0,
    cooldown_steps: int = 0,
) -> Schedule:
    """A line from ``init_value`` to ``peak_value``, then half a cosine to ``end_value``.

    Args:
        peak_value: value at step ``warmup_steps``.
        steps: length of the whole, warm-up included.
        warmup_steps: less than ``steps``.
        init_value: value at step 0.
        end_value: value from step ``steps`` on.
        cooldown_steps: so many of the steps, the last ones, have ``end_value`` already.

    Raises:
        ValueError: ``warmup_steps`` and ``cooldown_steps`` that leave nothing of ``steps``.

    Example:
        >>> from holofunc.optim import schedules
        >>> rate = schedules.warmup_cosine(1.0, 100, 10)
        >>> rate(5), rate(10), rate(100)
        (0.5, 1.0, 0.0)
    """
    check_count(steps=steps)
    check_count(0, warmup_steps=warmup_steps, cooldown_steps=cooldown_steps)
    check_finite(peak_value=peak_value, init_value=init_value, end_value=end_value)
    if warmup_steps >= steps:
        raise ValueError(f"warmup_steps must be in [0, steps), got {warmup_steps} of {steps}")
    if warmup_steps + cooldown_steps >= steps:
        raise ValueError(f"cooldown_steps must leave steps for the cosine, got {cooldown_steps} of {steps}")
    down = cosine(peak_value, steps - warmup_steps - cooldown_steps, end_value=end_value)
    return join([linear(init_value, peak_value, warmup_steps), down], [warmup_steps]) if warmup_steps else down


def one_cycle(
    peak_value: Scalar,
    steps: int,
    *,
    warmup_fraction: float = 0.3,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    anneal: str = "cosine",
    three_phase: bool = False,
) -> Schedule:
    """Up to ``peak_value`` and down to almost nothing.

    Equal to ``torch.optim.lr_scheduler.OneCycleLR(max_lr=peak_value, total_steps=steps, pct_start=warmup_fraction)``.

    Args:
        peak_value: the highest value.
        steps: length of the cycle; the last value is that of step ``steps - 1``.
        warmup_fraction: part of the cycle that goes up, in [0, 1].
        div_factor: the first value is ``peak_value / div_factor``.
        final_div_factor: the last value is the first one divided by it.
        anneal: ``"cosine"`` or ``"linear"``.
        three_phase: down to the first value as fast as up, then to the last one.

    Source: Smith and Topin, "Super-convergence" (arXiv 1708.07120).

    Example:
        >>> from holofunc.optim import schedules
        >>> rate = schedules.one_cycle(1.0, 101)
        >>> round(rate(0), 4), round(rate(29.3), 4), round(rate(100) * 250_000, 4)
        (0.04, 1.0, 1.0)
    """
    check_flags(three_phase=three_phase)
    check_count(steps=steps)
    check_finite(peak_value=peak_value, warmup_fraction=warmup_fraction)
    check_positive(div_factor=div_factor, final_div_factor=final_div_factor)
    if not 0 <= warmup_fraction <= 1:
        raise ValueError(f"warmup_fraction must be in [0, 1], got {warmup_fraction}")
    if anneal not in ("cosine", "linear"):
        raise ValueError(f"anneal must be 'cosine' or 'linear', got {anneal!r}")
    first = peak_value / div_factor
    top, last = warmup_fraction * steps - 1, steps - 1
    points = [(0.0, first), (top, peak_value), (last, first / final_div_factor)]
    if three_phase:
        points.insert(2, (2 * top, first))

    def fn(t: Tensor) -> Tensor:
        value = _like(t, points[-1][1])
        for (begin, a), (end, b) in reversed(list(itertools.pairwise(points))):
            progress = _progress(t - begin, end - begin) if end > begin else torch.ones_like(t)
            now = _half_cosine(a, b, progress) if anneal == "cosine" else a + (b - a) * progress
            value = torch.where(t <= end, now, value)
        return value

    return _schedule(fn)


def piecewise(init_value: Scalar, factors: Mapping[int, Scalar]) -> Schedule:
    """``init_value``, multiplied by ``factors[s]`` from step ``s`` on.

    Equal to ``torch.optim.lr_scheduler.MultiStepLR`` if all factors are one number.

    Example:
        >>> from holofunc.optim import schedules
        >>> rate = schedules.piecewise(1.0, {10: 0.5, 20: 0.5})
        >>> rate(9), rate(10), rate(20)
        (1.0, 0.5, 0.25)
    """
    if not isinstance(factors, Mapping):
        raise TypeError(f"piecewise needs factors by step, such as {{10: 0.1}}, got {factors!r}")
    check_finite(init_value=init_value, **{f"factors[{s}]": f for s, f in factors.items()})
    check_nonnegative(**{f"factors' key {s!r}": s for s in factors})

    def fn(t: Tensor) -> Tensor:
        value = _like(t, init_value)
        for begin, factor in factors.items():
            value = value * torch.where(t >= begin, _like(t, factor), 1.0)  # two Python numbers would give fp32
        return value

    return _schedule(fn)


def step(init_value: Scalar, every: int, *, factor: Scalar = 0.1) -> Schedule:
    """``init_value``, multiplied by ``factor`` every ``every`` steps: ``torch.optim.lr_scheduler.StepLR``.

    Example:
        >>> from holofunc.optim import schedules
        >>> schedules.step(1.0, 30, factor=0.5)(60)
        0.25
    """
    check_nonnegative(factor=factor)
    return exponential(init_value, factor, every=every, staircase=True)


def cosine_restarts(
    init_value: Scalar,
    period: int,
    *,
    growth: int = 1,
    decay: Scalar = 1.0,
    end_value: Scalar = 0.0,
    limit: int | None = None,
) -> Schedule:
    """Half cosines, one after the other.

    Equal to ``torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(T_0=period, T_mult=growth, eta_min=end_value)``.

    Args:
        init_value: value at the beginning of the first period.
        period: steps of the first period.
        growth: each period is this many times as long as the one before, at least 1.
        decay: each period begins at this fraction of where the one before began.
        end_value: value that each period approaches.
        limit: of periods; after them the value is ``end_value``. None is no limit.

    Source: Loshchilov and Hutter, "SGDR" (arXiv 1608.03983).

    Example:
        >>> from holofunc.optim import schedules
        >>> rate = schedules.cosine_restarts(1.0, 10, growth=2)
        >>> rate(0), round(rate(5), 6), rate(10), round(rate(20), 6)
        (1.0, 0.5, 1.0, 0.5)
    """
    check_count(period=period, growth=growth, **({} if limit is None else {"limit": limit}))
    check_finite(init_value=init_value, end_value=end_value)
    check_nonnegative(decay=decay)

    def fn(t: Tensor) -> Tensor:
        t = t.clamp_min(0)
        if growth == 1:
            cycle, length = (t / period).floor(), _like(t, period)
            begin = cycle * period
        else:  # cycle n begins at period * (growth**n - 1) / (growth - 1)
            cycle = torch.floor(torch.log(t / period * (growth - 1) + 1) / math.log(growth) + 1e-9)
            length = period * _like(t, growth) ** cycle
            begin = (length - period) / (growth - 1)
        peak = init_value * _like(t, decay) ** cycle
        value = _half_cosine(peak, end_value, (t - begin) / length)
        return value if limit is None else torch.where(cycle < limit, value, end_value)

    return _schedule(fn)


def half_life(init_value: Scalar, end_value: Scalar, steps: int) -> Schedule:
    """From one decay rate of a moving average to another, so that its half-life grows in a straight line.

    Source: the warm-up of beta3 in Pagliardini et al., "The AdEMAMix optimizer" (arXiv 2409.03137), whose steps count
    from 1.

    Example:
        >>> from holofunc.optim import schedules
        >>> rate = schedules.half_life(0.9, 0.9999, 100)
        >>> round(rate(0), 4), round(rate(50), 4), round(rate(100), 4)
        (0.9, 0.9998, 0.9999)
    """
    check_count(steps=steps)
    check_decay(init_value=init_value, end_value=end_value)

    def fn(t: Tensor) -> Tensor:
        begin, end = (math.log(0.5) / torch.log(_like(t, value) + 1e-8) - 1 for value in (init_value, end_value))
        progress = _progress(t, steps)
        rate = 0.5 ** (1 / ((1 - progress) * begin + progress * end + 1))
        return torch.where(t >= steps, _like(t, end_value), rate)

    return _schedule(fn)


def wsd(
    peak_value: Scalar,
    steps: int,
    warmup_steps: int,
    decay_steps: int,
    *,
    init_value: Scalar = 0.0,
    end_value: Scalar = 0.0,
    shape: str = "linear",
) -> Schedule:
    """Warm up, stay, decay.

    Args:
        peak_value: value of the plateau.
        steps: length of the whole.
        warmup_steps: from ``init_value`` up, in a line; may be 0.
        decay_steps: at the end, down to ``end_value``; may be 0.
        init_value: value at step 0.
        end_value: value from step ``steps`` on.
        shape: of the decay: ``"linear"``, ``"cosine"`` or ``"sqrt"`` (``1 - sqrt(progress)``).

    Source: Hu et al., "MiniCPM" (arXiv 2404.06395); the square root: Haegele et al. (arXiv 2405.18392).

    Example:
        >>> from holofunc.optim import schedules
        >>> rate = schedules.wsd(1.0, 100, 10, 20)
        >>> rate(5), rate(50), rate(90)
        (0.5, 1.0, 0.5)
    """
    check_count(steps=steps)
    check_finite(peak_value=peak_value, init_value=init_value, end_value=end_value)
    check_count(0, warmup_steps=warmup_steps, decay_steps=decay_steps)
    if warmup_steps + decay_steps > steps:
        raise ValueError(
            f"warmup_steps and decay_steps must fit into steps, got {warmup_steps} and {decay_steps} of {steps}"
        )
    falls = {
        "linear": lambda p: 1 - p,
        "cosine": lambda p: 0.5 * (1 + torch.cos(math.pi * p)),
        "sqrt": lambda p: 1 - torch.sqrt(p),
    }
    if shape not in falls:
        raise ValueError(f"shape must be one of {sorted(falls)}, got {shape!r}")

    def fn(t: Tensor) -> Tensor:
        up = init_value + (peak_value - init_value) * _progress(t, max(warmup_steps, 1))
        down = falls[shape](_progress(t - (steps - decay_steps), max(decay_steps, 1)))
        up = torch.where(t < warmup_steps, up, peak_value)
        return torch.where(t < steps - decay_steps, up, end_value + (peak_value - end_value) * down)

    return _schedule(fn)


def join(parts: Sequence[Schedule], boundaries: Sequence[int]) -> Schedule:
    """Schedules one after the other: ``parts[i]``, from step 0 of its own, from step ``boundaries[i - 1]`` on.

    Raises:
        ValueError: boundaries that are not increasing, or not one fewer than the parts.

    Example:
        >>> from holofunc.optim import schedules
        >>> rate = schedules.join([schedules.linear(0.0, 1.0, 10), schedules.constant(1.0)], [10])
        >>> rate(5), rate(15)
        (0.5, 1.0)
    """
    for i, part in enumerate(parts):
        if not callable(part):
            raise TypeError(f"parts[{i}] must be a schedule, got {part!r}")
    boundaries = list(boundaries)
    if not parts or len(boundaries) != len(parts) - 1:
        raise ValueError(f"boundaries must be one fewer than parts, got {len(boundaries)} for {len(parts)} parts")
    if any(b <= a for a, b in zip([0, *boundaries], boundaries, strict=False)):
        raise ValueError(f"boundaries must be increasing and positive, got {boundaries}")

    def fn(t: Tensor) -> Tensor:
        value = _like(t, parts[0](t))
        for begin, part in zip(boundaries, parts[1:], strict=True):
            value = torch.where(t >= begin, part((t - begin).clamp_min(0)), value)
        return value

    return _schedule(fn)
