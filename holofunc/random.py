"""Explicit random keys, and random numbers as pure functions of a key.

A key is an int64 tensor of shape (2,): (seed, offset) of the counter-based generator Philox 4x32-10. The same key gives
the same bits in eager and compiled code, under `vmap`, on every device and with every supported torch. Keys are
derived, never advanced: the key of a step is ``fold_in(state.key, state.step)``.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Keys and integers equal those of
``torch.func._random`` in the releases of torch that have it. Normal numbers are computed in double precision and
rounded, so that eager and compiled code agree; torch's, in single precision, are within 2e-6 of them.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from holofunc.typing import Key, Scalar

__all__ = [
    "bernoulli",
    "beta",
    "bits",
    "fold_in",
    "fold_in_each",
    "key",
    "normal",
    "permutation",
    "randint",
    "split",
    "uniform",
]

MASK = 0xFFFFFFFF


def key(seed: int, *, device: torch.device | str | None = None) -> Key:
    """The root key of ``seed``.

    Args:
        seed: any integer in [0, 2**64).
        device: of the key; random numbers are computed on the device of their key.

    Raises:
        TypeError: ``seed`` is not an int. ValueError: it is out of range.

    Example:
        >>> from holofunc import random
        >>> random.key(42)
        tensor([42,  0])
    """
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed must be an int, got {seed!r}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in [0, 2**64), got {seed}")
    return torch.tensor([seed - 2**64 if seed >= 2**63 else seed, 0], dtype=torch.int64, device=device)


def split(key: Key, num: int = 2) -> Key:
    """``num`` independent keys, int64 of shape (num, 2).

    Example:
        >>> from holofunc import random
        >>> first, second = random.split(random.key(0))
    """
    if isinstance(num, bool) or not isinstance(num, int):
        raise TypeError(f"num must be an int, got {num!r}")
    if num < 1:
        raise ValueError(f"num must be at least 1, got {num}")
    return _as_keys(_blocks(check_key(key), num))


def fold_in(key: Key, data: int | Tensor) -> Key:
    """Derive a key from ``key`` and a number: ``split(key, data + 1)[data]``, at constant cost.

    Args:
        data: a non-negative int or 0-d integer tensor. Pass a number that changes between calls (a step) as a tensor.

    Example:
        >>> import torch
        >>> from holofunc import random
        >>> bool((random.fold_in(random.key(0), 3) == random.split(random.key(0), 4)[3]).all())
        True
    """
    key = check_key(key)
    if isinstance(data, Tensor):
        if data.ndim or data.is_floating_point() or data.is_complex():
            raise TypeError(
                f"data must be an int or a 0-d integer tensor, got {data.dtype} of shape {tuple(data.shape)}"
            )
        data = data.to(device=key.device, dtype=torch.int64)
    elif isinstance(data, bool) or not isinstance(data, int):
        raise TypeError(f"data must be an int or a 0-d integer tensor, got {data!r}")
    elif data < 0:
        raise ValueError(f"data must not be negative, got {data}")
    elif data >= 2**63:
        raise ValueError(f"data must be below 2**63, got {data}")
    return _as_keys(_philox(key, (key[1] + data).unsqueeze(0)))[0]


def fold_in_each(key: Key, items: Sequence[int]) -> Key:
    """`fold_in` for every item at once: keys, int64 of shape (len(items), 2).

    Example:
        >>> import torch
        >>> from holofunc import random
        >>> keys = random.fold_in_each(random.key(0), [5, 2])
        >>> torch.equal(keys[0], random.fold_in(random.key(0), 5))
        True
    """
    key = check_key(key)
    if any(isinstance(item, bool) or not isinstance(item, int) or item < 0 for item in items):
        raise ValueError(f"items must be non-negative ints, got {list(items)}")
    return _as_keys(_philox(key, key[1] + torch.tensor(list(items), dtype=torch.int64).to(key.device)))


def bits(key: Key, num: int) -> Tensor:
    """``num`` random 32-bit words, int64 in [0, 2**32).

    Example:
        >>> from holofunc import random
        >>> random.bits(random.key(42), 2)
        tensor([2632642643, 2012563771])
    """
    key = check_key(key)
    return _blocks(key, -(-num // 4)).reshape(-1)[:num]


def uniform(
    key: Key, shape: Sequence[int] = (), *, low: float = 0.0, high: float = 1.0, dtype: torch.dtype | None = None
) -> Tensor:
    """Uniform random numbers in [low, high); rounding may give ``high`` unless the bounds are 0 and 1.

    Args:
        dtype: any floating-point dtype; None is float32. Numbers have all bits of its precision: 24 for float32.

    Example:
        >>> from holofunc import random
        >>> random.uniform(random.key(42), (2,))
        tensor([0.9177, 0.9581])
    """
    dtype, shape = _floating(dtype), _sizes(shape)
    _check_finite(low=low, high=high)
    if isinstance(low, (int, float)) and isinstance(high, (int, float)) and low > high:
        raise ValueError(f"low must not be greater than high, got low={low}, high={high}")
    num = math.prod(shape)
    digits = 1 + round(-math.log2(torch.finfo(dtype).eps))
    if digits <= 32:
        draw = bits(key, num) & ((1 << digits) - 1)
    else:
        pairs = bits(key, 2 * num).view(num, 2)
        draw = ((pairs[:, 0] << 32) | pairs[:, 1]) & ((1 << digits) - 1)
    unit = (draw.to(torch.float64 if digits > 24 else torch.float32) * 2.0**-digits).to(dtype).view(shape)
    return unit if (type(low), low, type(high), high) == (float, 0.0, float, 1.0) else low + (high - low) * unit


def normal(
    key: Key, shape: Sequence[int] = (), *, mean: float = 0.0, std: float = 1.0, dtype: torch.dtype | None = None
) -> Tensor:
    """Normal random numbers (Box-Muller).

    Example:
        >>> from holofunc import random
        >>> random.normal(random.key(42), (2,))
        tensor([-0.9702,  0.1940])
    """
    dtype, shape = _floating(dtype), _sizes(shape)
    _check_finite(mean=mean, std=std)
    if isinstance(std, (int, float)) and std < 0:
        raise ValueError(f"std must not be negative, got {std}")
    num = math.prod(shape)
    words = bits(key, num + num % 2).view(-1, 2).double()
    radius = torch.sqrt(-2.0 * torch.log((words[:, 0] + 0.5) * 2.0**-32))
    angle = (2.0 * math.pi * 2.0**-32) * (words[:, 1] + 0.5)
    pairs = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], 1)
    return (mean + std * pairs.view(-1)[:num]).to(dtype).view(shape)


def bernoulli(key: Key, shape: Sequence[int], p: Scalar) -> Tensor:
    """A bool tensor of ``shape``, True with probability ``p``.

    Raises:
        ValueError: ``p`` is a number outside [0, 1].

    Example:
        >>> from holofunc import random
        >>> random.bernoulli(random.key(42), (6,), 0.5)
        tensor([False, False, False,  True, False, False])
    """
    if isinstance(p, (int, float)) and not 0 <= p <= 1:
        raise ValueError(f"p must be in [0, 1], got {p}")
    return uniform(key, shape) < p


def randint(key: Key, shape: Sequence[int], low: int, high: int) -> Tensor:
    """Random integers in [low, high), int64; ``high - low`` is at most 2**32.

    Example:
        >>> from holofunc import random
        >>> random.randint(random.key(42), (4,), 0, 10)
        tensor([3, 1, 7, 7])
    """
    for name, value in (("low", low), ("high", high)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {value!r}")
    if not 0 < high - low <= 2**32:
        raise ValueError(f"high - low must be in [1, 2**32], got low={low}, high={high}")
    shape = _sizes(shape)
    return low + (bits(key, math.prod(shape)) % (high - low)).view(shape)


def permutation(key: Key, n: int) -> Tensor:
    """A random permutation of ``range(n)``, int64 of shape (n,).

    Example:
        >>> from holofunc import random
        >>> sorted(random.permutation(random.key(0), 5).tolist())
        [0, 1, 2, 3, 4]
    """
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(f"n must be an int, got {n!r}")
    if n < 0:
        raise ValueError(f"n must not be negative, got {n}")
    pairs = bits(key, 2 * n).view(n, 2)
    return torch.argsort((pairs[:, 0] << 31) ^ pairs[:, 1], stable=True)


def beta(key: Key, shape: Sequence[int], a: Scalar, b: Scalar) -> Tensor:
    """Beta(a, b) random numbers in [0, 1], float32, for a, b > 0, computed from two gamma variables.

    Source: Marsaglia and Tsang, "A simple method for generating gamma variables" (2000), with 16 candidates at
    once instead of a loop. With probability below 1e-20 none is accepted, and the mode is returned.

    Example:
        >>> from holofunc import random
        >>> random.beta(random.key(42), (3,), 0.4, 0.4)
        tensor([0.6546, 0.2218, 0.7893])
    """
    for name, value in (("a", a), ("b", b)):
        if isinstance(value, (int, float)) and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    shape = _sizes(shape)
    first, second = split(key)
    return torch.sigmoid(_log_gamma_draw(first, shape, a) - _log_gamma_draw(second, shape, b)).float()


def _log_gamma_draw(key: Key, shape: Sequence[int], a: Scalar) -> Tensor:
    candidates = 16
    keys = split(key, 3)
    d = a + 2.0 / 3.0  # of Gamma(a + 1); a power of a uniform number turns it into Gamma(a)
    x = normal(keys[0], (candidates, *shape), dtype=torch.float64)
    v = (1.0 + x / (9.0 * d) ** 0.5) ** 3
    log_v = torch.log(torch.where(v > 0, v, 1.0))
    log_u = torch.log1p(-uniform(keys[1], (candidates, *shape), dtype=torch.float64))
    accepted = (v > 0) & (log_u < 0.5 * x * x + d - d * v + d * log_v)
    first = accepted & (accepted.cumsum(0) == 1)
    log_gamma = torch.where(first, log_v, 0.0).sum(0) + _log(d)
    return log_gamma + torch.log1p(-uniform(keys[2], shape, dtype=torch.float64)) / a


def _log(x: Scalar) -> Any:
    return torch.log(x) if isinstance(x, Tensor) else math.log(x)


# --- the generator -----------------------------------------------------------------------------------------------


def _blocks(key: Key, num: int) -> Tensor:
    """Blocks 0 to ``num - 1`` of a key's stream: int64 words in [0, 2**32) of shape (num, 4)."""
    return _philox(key, key[1] + torch.arange(num, device=key.device))


def _philox(key: Key, counter: Tensor) -> Tensor:
    """The blocks of a key at ``counter``, int64 of shape (num,): words in [0, 2**32) of shape (num, 4).

    A single operation of a graph, because the formula would be hundreds of them.
    """
    return torch.ops.holofunc.philox(key, counter)


torch.library.define("holofunc::philox", "(Tensor key, Tensor counter) -> Tensor")

CHUNK = 2**12
"""Blocks computed at a time, few enough to stay in the CPU cache."""


@torch.library.impl("holofunc::philox", "CompositeExplicitAutograd")
def _blocks_at(key: Key, counter: Tensor) -> Tensor:
    if counter.device.type != "cpu":
        return torch.stack(philox(key[0], counter), -1)
    if 0 < counter.numel() <= 4 and key.ndim == counter.ndim == 1:  # derived keys: cheaper in plain Python
        return torch.tensor([philox(key[0].item(), c) for c in counter.tolist()], dtype=torch.int64)
    counters, keys = counter.numpy().view(np.uint64), key[0].numpy().view(np.uint64)
    out = np.empty((*counters.shape, 4), np.uint64)
    rows = max(1, CHUNK // max(1, counter[:1].numel()))
    for i in range(0, len(counter), rows):
        for word, values in enumerate(philox(keys, counters[i : i + rows])):
            out[i : i + rows, ..., word] = values
    return torch.from_numpy(out.view(np.int64))


@torch.library.register_fake("holofunc::philox")
def _shape(key: Key, counter: Tensor) -> Tensor:
    return counter.new_empty(*counter.shape, 4)


@torch.library.register_vmap("holofunc::philox")
def _batched(info: Any, in_dims: tuple[int | None, int | None], key: Key, counter: Tensor) -> tuple[Tensor, int]:
    """One operation for all keys of the batch: blocks of shape (num, members)."""
    keys = key if in_dims[0] is None else key.movedim(in_dims[0], -1)  # (2, members)
    if in_dims[1] is None:
        counter = counter[..., None].expand(*counter.shape, info.batch_size)
    else:
        counter = counter.movedim(in_dims[1], -1)
    return torch.ops.holofunc.philox(keys, counter), counter.ndim - 1


def philox(key: Any, counter: Any) -> tuple[Any, Any, Any, Any]:
    """Philox 4x32-10, for Python ints, uint64 arrays or int64 tensors.

    The product of two 32-bit words may overflow int64; its bits are still right.
    """
    c0, c1, c2, c3 = counter & MASK, counter >> 32, 0 * counter, 0 * counter
    k0, k1 = key & MASK, (key >> 32) & MASK
    for _ in range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((product1 >> 32) ^ c1 ^ k0) & MASK, product1
        c2, c3 = ((product0 >> 32) ^ c3 ^ k1) & MASK, product0
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1 & MASK, c2, c3 & MASK


def _as_keys(blocks: Tensor) -> Key:
    return torch.stack([blocks[..., 0] | (blocks[..., 1] << 32), blocks[..., 2] | (blocks[..., 3] << 32)], -1)


def check_key(key: Key) -> Key:
    """Return ``key``, or raise TypeError if it is not a key."""
    if not isinstance(key, Tensor) or key.dtype != torch.int64 or key.shape != (2,):
        got = f"{key.dtype} of shape {tuple(key.shape)}" if isinstance(key, Tensor) else repr(key)
        raise TypeError(f"key must be an int64 tensor of shape (2,) made by random.key, split or fold_in, got {got}")
    return key


def _floating(dtype: torch.dtype | None) -> torch.dtype:
    if dtype is None:
        return torch.float32
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating dtype, got {dtype}")
    return dtype


def _sizes(shape: Sequence[int]) -> tuple[int, ...]:
    sizes = tuple(shape) if isinstance(shape, Sequence) else (shape,)
    whole = all(isinstance(n, (int, torch.SymInt)) and not isinstance(n, bool) for n in sizes)
    if not isinstance(shape, Sequence) or not whole:
        raise TypeError(f"shape must be a sequence of ints, got {shape!r}")
    if any(n < 0 for n in sizes):
        raise ValueError(f"shape must not have negative sizes, got {sizes}")
    return sizes


def _check_finite(**values: Any) -> None:
    for name, value in values.items():
        if isinstance(value, Tensor):
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {value!r}")
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
