"""Schedules: pure functions ``schedule(step) -> value``, for learning rates and for any other hyperparameter.

``step`` is 0-based. A tensor gives a 0-d float64 tensor (its arithmetic never leaves the device, and compiled code sees
one graph for all steps); a Python number gives a Python number, for plotting. Values before step 0 and after the last
one are those of the ends. All arguments but counts of steps may be 0-d tensors too.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from holofunc import random
from holofunc.optim.annealing import (
    cosine,
    cosine_restarts,
    like_step,
    one_cycle,
    progress_of,
    schedule_of_tensor,
    tanh,
    wsd,
)
from holofunc.optim.checks import check_function
from holofunc.optim.ranges import check_count, check_decay, check_finite, check_flags, check_fraction, check_nonnegative
from holofunc.typing import Key, Scalar, Schedule

__all__ = [
    "constant", "cosine", "cosine_restarts", "exponential", "half_life", "join", "linear", "linear_to_zero", "noisy",
    "one_cycle", "piecewise", "polynomial", "power_cool", "step", "tanh", "warmup_cosine", "wsd",
]  # fmt: skip


def constant(value: Scalar) -> Schedule:
    """``value`` at every step.

    Example:
        >>> from holofunc.optim import schedules
        >>> schedules.constant(0.1)(1000)
        0.1
    """
    check_finite(value=value)
    return schedule_of_tensor(lambda t: like_step(t, value))


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
    return schedule_of_tensor(
        lambda t: (init_value - end_value) * (1 - progress_of(t - begin, steps)) ** power + end_value
    )


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
        value = init_value * like_step(t, rate) ** (exponent.floor() if staircase else exponent)
        if end_value is None:
            return value
        bound = like_step(t, end_value)
        return torch.where(like_step(t, rate) < 1, value.maximum(bound), value.minimum(bound))

    return schedule_of_tensor(fn)


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
        value = like_step(t, init_value)
        for begin, factor in factors.items():
            value = value * torch.where(t >= begin, like_step(t, factor), 1.0)  # two Python numbers would give fp32
        return value

    return schedule_of_tensor(fn)


def step(init_value: Scalar, every: int, *, factor: Scalar = 0.1) -> Schedule:
    """``init_value``, multiplied by ``factor`` every ``every`` steps: ``torch.optim.lr_scheduler.StepLR``.

    Example:
        >>> from holofunc.optim import schedules
        >>> schedules.step(1.0, 30, factor=0.5)(60)
        0.25
    """
    check_nonnegative(factor=factor)
    return exponential(init_value, factor, every=every, staircase=True)


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
        begin, end = (math.log(0.5) / torch.log(like_step(t, value) + 1e-8) - 1 for value in (init_value, end_value))
        progress = progress_of(t, steps)
        rate = 0.5 ** (1 / ((1 - progress) * begin + progress * end + 1))
        return torch.where(t >= steps, like_step(t, end_value), rate)

    return schedule_of_tensor(fn)


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
    check_function(base=base)
    check_fraction(scale=scale)

    def fn(t: Tensor) -> Tensor:
        draw = random.uniform(random.fold_in(key.to(t.device), t.long()), low=-1.0, high=1.0)
        return base(t) * (1 + scale * draw.to(torch.float64))

    return schedule_of_tensor(fn)


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


def power_cool(
    peak_value: Scalar,
    steps: int,
    warmup_steps: int = 0,
    *,
    power: Scalar = 1.2,
    cooldown_steps: int | None = None,
    init_value: Scalar = 0.0,
    end_value: Scalar = 0.0,
) -> Schedule:
    """Warm up, stay, and cool down by a power: ``(1 - progress)**power``.

    Args:
        peak_value: value from step ``warmup_steps`` on.
        steps: length of the whole.
        warmup_steps: from ``init_value`` up, in a line; may be 0.
        power: of the cooldown: 1 is a line, above 1 it falls faster at first.
        cooldown_steps: at the end, down to ``end_value``; None is all after the warm-up.
        init_value: value at step 0.
        end_value: value from step ``steps`` on.

    Source: PowerCool, of the step-count records of modded-nanogpt (spring 2026).

    Example:
        >>> from holofunc.optim import schedules
        >>> rate = schedules.power_cool(1.0, 100, 20, power=2.0)
        >>> rate(10), rate(20), rate(60), rate(100)
        (0.5, 1.0, 0.25, 0.0)
    """
    check_count(steps=steps)
    check_count(0, warmup_steps=warmup_steps)
    check_finite(peak_value=peak_value, init_value=init_value, end_value=end_value)
    if warmup_steps >= steps:
        raise ValueError(f"warmup_steps must be in [0, steps), got {warmup_steps} of {steps}")
    most = steps - warmup_steps
    cooldown_steps = most if cooldown_steps is None else cooldown_steps
    check_count(cooldown_steps=cooldown_steps)
    if cooldown_steps > most:
        raise ValueError(
            f"warmup_steps and cooldown_steps must fit into steps, got {warmup_steps} and {cooldown_steps} of {steps}"
        )
    down = polynomial(peak_value, end_value, cooldown_steps, power=power, begin=most - cooldown_steps)
    up = linear(init_value, peak_value, max(warmup_steps, 1))
    return join([up, down], [warmup_steps]) if warmup_steps else down


def linear_to_zero(peak_value: Scalar, steps: int, warmup_steps: int = 0) -> Schedule:
    """A line up to ``peak_value`` over ``warmup_steps``, and a line to 0 at step ``steps``: `power_cool` of power 1.

    Source: Bergsma et al., "Straight to zero: why linearly decaying the learning rate to zero works best for LLMs"
    (arXiv 2502.15938).

    Example:
        >>> from holofunc.optim import schedules
        >>> rate = schedules.linear_to_zero(1.0, 100, 20)
        >>> rate(10), rate(60), rate(100)
        (0.5, 0.5, 0.0)
    """
    return power_cool(peak_value, steps, warmup_steps, power=1.0)


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
        value = like_step(t, parts[0](t))
        for begin, part in zip(boundaries, parts[1:], strict=True):
            value = torch.where(t >= begin, part((t - begin).clamp_min(0)), value)
        return value

    return schedule_of_tensor(fn)
