"""Batch normalization of single images under vmap, whose gradients torch has wrong.

The backward pass of ``torch.nn.functional.batch_norm`` under `torch.vmap` reads a gradient that is transposed (of the
tokens of a map, say) in the wrong order if the batch is one image: torch 2.14 on the CPU, silently, in either mode.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from holofunc.model.sites import Rule, Site

__all__ = ["NORMS"]


def _batch_norm(
    site: Site, input: Tensor, running_mean: Any = None, running_var: Any = None, weight: Any = None, bias: Any = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Any:  # fmt: skip
    """By the formula, where torch's own is not to be trusted."""
    renews = training and running_mean is not None
    if renews:
        site.writes(running_mean, running_var)
    many = input.shape[0] != 1 or (training and input.numel() == input.shape[1])  # or a mean of one number: an error
    if many or not _mapped(input, weight, bias) or (renews and not _mapped(running_mean)):
        return NotImplemented
    if not training:
        return _normalized(input, running_mean, running_var, weight, bias, eps)
    dims = [d for d in range(input.ndim) if d != 1]
    mean, var = input.mean(dims), input.var(dims, unbiased=False)
    if renews:
        count = input.numel() // input.shape[1]
        for running, new in ((running_mean, mean), (running_var, var * count / (count - 1))):
            running.lerp_(new.detach().to(running.dtype), momentum)
    return _normalized(input, mean, var, weight, bias, eps)


def _normalized(x: Tensor, mean: Tensor, var: Tensor, weight: Any, bias: Any, eps: float) -> Tensor:
    scale = (var + eps).rsqrt() if weight is None else (var + eps).rsqrt() * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    shape = [-1 if d == 1 else 1 for d in range(x.ndim)]
    return x * scale.to(x.dtype).view(shape) + shift.to(x.dtype).view(shape)


def _mapped(*tensors: Any) -> bool:
    """Whether one of them is one of many under vmap; of what is compiled that is not known."""
    return torch.compiler.is_compiling() or any(_is_mapped(x) for x in tensors if x is not None)


def _is_mapped(x: Tensor) -> bool:
    while (inner := torch.func.debug_unwrap(x, recurse=False)) is not x:
        if inner.ndim != x.ndim:
            return True
        x = inner
    return False


NORMS: dict[Any, Rule] = {F.batch_norm: _batch_norm}
