"""Rules for torch's random functions: each draws from an explicit key."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from holofunc import random
from holofunc.model.drop import WORDS
from holofunc.model.sites import Rule, Site

__all__ = ["DRAWS", "gumbel", "uniform"]


# --- new tensors -------------------------------------------------------------------------------------------------


def uniform(site: Site, shape: Sequence[int], like: Tensor) -> Tensor:
    """Uniform in [0, 1), float32, on the device of ``like``."""
    return random.uniform(site.key(), shape).to(like.device)


def _integers(site: Site, shape: Sequence[int], low: int, high: int) -> Tensor:
    if high - low <= 2**32:
        return random.randint(site.key(), shape, low, high)
    words = random.bits(site.key(), 2 * math.prod(shape)).view(*shape, 2)
    return low + ((words[..., 0] << 31) ^ words[..., 1]) % (high - low)


def _as_asked(x: Tensor, dtype: torch.dtype | None, device: Any, out: Tensor | None, site: Site) -> Tensor:
    x = x.to(torch.empty(0).device if device is None else device, dtype)
    return x if out is None else site.write(out, x)


def _new(draw: Callable[..., Tensor]) -> Rule:
    """The rule of ``torch.rand`` and ``torch.randn``, with ``draw(key, shape, dtype=...)``."""

    def rule(site: Site, *size: Any, dtype: Any = None, device: Any = None, out: Any = None, **options: Any) -> Tensor:
        size = options.get("size", size)
        shape = size[0] if len(size) == 1 and isinstance(size[0], (tuple, list)) else size
        drawn = draw(site.key(), list(shape), dtype=dtype or torch.get_default_dtype())
        return _as_asked(drawn, None, device, out, site)

    return rule


def _alike(draw: Callable[..., Tensor]) -> Rule:
    """The rule of ``torch.rand_like`` and ``torch.randn_like``."""

    def rule(site: Site, input: Tensor, *, dtype: Any = None, device: Any = None, **options: Any) -> Tensor:
        return draw(site.key(), input.shape, dtype=dtype or input.dtype).to(device or input.device)

    return rule


def _randint(
    site: Site, *bounds: Any, size: Any = None, dtype: Any = None, device: Any = None, out: Any = None, **named: Any
) -> Tensor:
    if size is None:
        *bounds, size = bounds  # type: ignore[assignment]
    if tuple(bounds) == WORDS:
        return site.key()
    low, high = (*named.values(),) if len(named.keys() & {"low", "high"}) == 2 else (0, *bounds, *named.values())[-2:]
    return _as_asked(_integers(site, list(size), low, high), dtype, device, out, site)


def _randint_like(
    site: Site, input: Tensor, low: int, high: int | None = None, *, dtype: Any = None, device: Any = None, **_: Any
) -> Tensor:
    bounds = (0, low) if high is None else (low, high)
    return _integers(site, input.shape, *bounds).to(device or input.device, dtype or input.dtype)


def _randperm(site: Site, n: int, *, dtype: Any = torch.int64, device: Any = None, out: Any = None, **_: Any) -> Tensor:
    return _as_asked(random.permutation(site.key(), n), dtype, device, out, site)


def _normal(
    site: Site, mean: Any = 0.0, std: Any = 1.0, size: Any = None, *, out: Any = None, **options: Any
) -> Tensor:
    given = [x for x in (mean, std) if isinstance(x, Tensor)]
    shape = torch.broadcast_shapes(*(x.shape for x in given)) if given else size
    dtype = options.get("dtype") or (given[0].dtype if given else torch.get_default_dtype())
    device = options.get("device") or (given[0].device if given else None)
    unit = _as_asked(random.normal(site.key(), list(shape), dtype=dtype), None, device, None, site)
    return mean + std * unit if out is None else site.write(out, mean + std * unit)


def _kept(site: Site, x: Tensor, p: Any) -> Tensor:
    """True with probability ``p``, where dropout with 1 - p would keep an element."""
    return uniform(site, x.shape, x) >= 1.0 - p


def _bernoulli(site: Site, input: Tensor, p: Any = None, *, out: Any = None, **_: Any) -> Tensor:
    drawn = _kept(site, input, input if p is None else p).to(input.dtype)
    return drawn if out is None else site.write(out, drawn)


def _multinomial(
    site: Site, input: Tensor, num_samples: int, replacement: bool = False, *, out: Any = None, **_: Any
) -> Tensor:
    if replacement:
        levels = input.cumsum(-1)
        places = uniform(site, (*input.shape[:-1], num_samples), input) * levels[..., -1:]
        drawn = torch.searchsorted(levels, places.to(levels.dtype).contiguous(), right=True).clamp_max(
            input.shape[-1] - 1
        )
    else:  # the Gumbel-max trick
        drawn = (input.log() + gumbel(site, input)).topk(num_samples).indices
    return drawn if out is None else site.write(out, drawn)


def _exponential(site: Site, x: Tensor) -> Tensor:
    return -torch.log1p(-random.uniform(site.key(), x.shape, dtype=torch.float64)).to(x.device)


def gumbel(site: Site, x: Tensor) -> Tensor:
    return -_exponential(site, x).clamp_min(torch.finfo(torch.float64).tiny).log().to(x.dtype)


# --- tensors filled in place -------------------------------------------------------------------------------------


def _fill(draw: Callable[..., Tensor]) -> Rule:
    """The rule of a method that fills a tensor with ``draw(site, tensor, *args)``."""

    def rule(site: Site, *args: Any, generator: Any = None, tensor: Any = None, **options: Any) -> Tensor:
        x, *args = args if tensor is None else (tensor, *args)  # type: ignore[assignment]
        named = {NAMES.get(name, name): value for name, value in options.items()}
        return site.write(x, draw(site, x, *args, **named).to(x.dtype))

    return rule


NAMES = {"from": "low", "to": "high", "a": "low", "b": "high", "lambd": "rate"}
"""Torch's names of bounds and rates, and ours."""


def _random(site: Site, x: Tensor, low: int | None = None, high: int | None = None) -> Tensor:
    if high is None and low is not None:
        low, high = 0, low
    if high is None:
        floating = x.dtype.is_floating_point
        high = round(2 / torch.finfo(x.dtype).eps) + 1 if floating else min(torch.iinfo(x.dtype).max, WORDS[1] - 1) + 1
    return _integers(site, x.shape, low or 0, high).to(x.device)


def _uniform_fill(site: Site, x: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    return random.uniform(site.key(), x.shape, low=low, high=high, dtype=x.dtype).to(x.device)


def _normal_fill(site: Site, x: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    return random.normal(site.key(), x.shape, mean=mean, std=std, dtype=x.dtype).to(x.device)


def _cauchy(site: Site, x: Tensor, median: float = 0.0, sigma: float = 1.0) -> Tensor:
    return median + sigma * torch.tan(math.pi * (uniform(site, x.shape, x) - 0.5))


FILLS: dict[str, Callable[..., Tensor]] = {
    "bernoulli_": lambda site, x, p=0.5: _kept(site, x, p),
    "uniform_": _uniform_fill,
    "normal_": _normal_fill,
    "random_": _random,
    "exponential_": lambda site, x, rate=1.0: _exponential(site, x) / rate,
    "cauchy_": _cauchy,
    "log_normal_": lambda site, x, mean=1.0, std=2.0: _normal_fill(site, x, mean, std).exp(),
    "geometric_": lambda site, x, p: (_exponential(site, x) / -math.log1p(-p)).ceil(),
}  # fmt: skip


def _refused(name: str) -> Rule:
    def rule(site: Site, *_: Any, **__: Any) -> Any:
        return site.refuse(f"calls torch.{name}, for which there is no draw by a key", WAY_OUT)

    return rule


def _keyed(rule: Rule) -> Rule:
    """``rule``, or an error if a generator is passed."""

    def checked(site: Site, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("generator") is not None:
            return site.refuse("draws from a generator of its own, whose state no caller sees", WAY_OUT)
        return rule(site, *args, **kwargs)

    return checked


WAY_OUT = "leave generator= out, or draw with holofunc.random by a holofunc.model.site_key()"

RULES: dict[Any, Rule] = {
    torch.rand: _new(random.uniform),
    torch.randn: _new(random.normal),
    torch.rand_like: _alike(random.uniform),
    torch.randn_like: _alike(random.normal),
    torch.randint: _randint,
    torch.randint_like: _randint_like,
    torch.randperm: _randperm,
    torch.normal: _normal,
    torch.bernoulli: _bernoulli,
    torch.Tensor.bernoulli: _bernoulli,
    torch.multinomial: _multinomial,
    torch.Tensor.multinomial: _multinomial,
    **{getattr(torch.Tensor, name): _fill(draw) for name, draw in FILLS.items()},
    torch.nn.init.uniform_: torch.no_grad()(_fill(_uniform_fill)),
    torch.nn.init.normal_: torch.no_grad()(_fill(_normal_fill)),
    **{getattr(torch, n): _refused(n) for n in ("poisson", "binomial", "pca_lowrank", "svd_lowrank")},
}

DRAWS = {function: _keyed(rule) for function, rule in RULES.items()}
