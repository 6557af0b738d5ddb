"""Parameter initialization: functions of the structure of a module and a key."""

import math
import zlib

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from holofunc import random
from holofunc.typing import Key, Params

__all__ = ["kaiming"]


def kaiming(skeleton: nn.Module, key: Key, *, nonlinearity: str = "relu", slope: float | None = None) -> Params:
    """Kaiming initialization of convolutions, and torch's defaults for linear and normalization layers.

    Convolutions: normal with standard deviation ``gain / sqrt(fan_out)``, biases zero. Linear layers: uniform in
    ``+-1 / sqrt(fan_in)``. Normalizations: weights one, biases zero. The key of each tensor is ``key`` folded with a
    hash of its name, so adding or removing a layer does not change the others.

    Args:
        skeleton: a module on any device; only its structure is used.
        key: of `holofunc.random`.
        nonlinearity: determines the gain, as in `torch.nn.init.calculate_gain`.
        slope: negative slope of ``"leaky_relu"``; None is 0.01.

    Returns:
        The parameters of these layers by name, float32, on the device of ``key``.

    Source: He et al., "Delving deep into rectifiers" (arXiv 1502.01852), fan-out mode.

    Example:
        >>> import torch
        >>> from holofunc import nn, random
        >>> values = nn.init.kaiming(torch.nn.Conv2d(3, 64, 3), random.key(0))
        >>> values["weight"].shape, float(values["bias"].abs().max())
        (torch.Size([64, 3, 3, 3]), 0.0)
    """
    values: Params = {}
    gain = nn.init.calculate_gain(nonlinearity, slope)  # type: ignore[arg-type]
    for path, module in skeleton.named_modules():
        own = {name: p.shape for name, p in module.named_parameters(recurse=False)}
        prefix = path + "." if path else ""
        for name, shape in own.items():
            value = _initial(module, name, shape, random.fold_in(key, zlib.crc32((prefix + name).encode())), gain)
            if value is not None:
                values[prefix + name] = value
    return values


def _initial(module: nn.Module, name: str, shape: torch.Size, key: Key, gain: float) -> Tensor | None:
    if isinstance(module, _ConvNd):
        fan_out = shape[0] * math.prod(shape[2:])
        std = gain / math.sqrt(fan_out) if name == "weight" else 0.0
        return random.normal(key, shape, std=std)
    if isinstance(module, nn.Linear):
        bound = 1.0 / math.sqrt(module.in_features)
        return random.uniform(key, shape, low=-bound, high=bound)
    if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)):
        return torch.full(shape, 1.0 if name == "weight" else 0.0, device=key.device)
    return None
