"""Annealing: schedules that fall along a curve, with or without a warm-up, once or again and again."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from holofunc.optim.ranges import check_count, check_finite, check_flags, check_nonnegative, check_positive
from holofunc.typing import Scalar, Schedule

__all__ = ["cosine", "cosine_restarts", "one_cycle", "tanh", "wsd"]


def schedule_of_tensor(fn: Callable[[Tensor], Any]) -> Schedule:
    """``fn`` of a float64 tensor of at least 0, as a function of a number or a tensor of any dtype."""

    def schedule(step: Any) -> Any:
        if isinstance(step, Tensor):
            return fn(step.to(torch.float64).clamp_min(0))
        return fn(torch.tensor(max(step, 0), dtype=torch.float64)).item()

    return schedule


def like_step(t: Tensor, value: Scalar) -> Tensor:
    return value.to(t) if isinstance(value, Tensor) else torch.full_like(t, value)


def progress_of(t: Tensor, steps: float) -> Tensor:
    return (t / steps).clamp(0, 1)


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
    return schedule_of_tensor(lambda t: half_cosine(init_value, end_value, progress_of(t, steps) ** k))


def half_cosine(start: Scalar, end: Scalar, progress: Tensor) -> Tensor:
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
        progress = progress_of(t, steps)
        return end_value + (init_value - end_value) * 0.5 * (1 - torch.tanh(low * (1 - progress) + high * progress))

    return schedule_of_tensor(fn)


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
        value = like_step(t, points[-1][1])
        for (begin, a), (end, b) in reversed(list(itertools.pairwise(points))):
            progress = progress_of(t - begin, end - begin) if end > begin else torch.ones_like(t)
            now = half_cosine(a, b, progress) if anneal == "cosine" else a + (b - a) * progress
            value = torch.where(t <= end, now, value)
        return value

    return schedule_of_tensor(fn)


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
        if growth == 1:
            cycle, length = (t / period).floor(), like_step(t, period)
            begin = cycle * period
        else:  # cycle n begins at period * (growth**n - 1) / (growth - 1)
            cycle = torch.floor(torch.log(t / period * (growth - 1) + 1) / math.log(growth) + 1e-9)
            length = period * like_step(t, growth) ** cycle
            begin = (length - period) / (growth - 1)
        peak = init_value * like_step(t, decay) ** cycle
        value = half_cosine(peak, end_value, (t - begin) / length)
        return value if limit is None else torch.where(cycle < limit, value, end_value)

    return schedule_of_tensor(fn)


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
        up = init_value + (peak_value - init_value) * progress_of(t, max(warmup_steps, 1))
        down = falls[shape](progress_of(t - (steps - decay_steps), max(decay_steps, 1)))
        up = torch.where(t < warmup_steps, up, peak_value)
        return torch.where(t < steps - decay_steps, up, end_value + (peak_value - end_value) * down)

    return schedule_of_tensor(fn)
