"""Batch normalization, also where torch raises or is wrong.

Under vmap over batches (tasks, members of a population) torch refuses to renew statistics that all batches have in
common; here each renews its own.

On the CPU (torch 2.14, 2.15) the backward pass of ``torch.nn.functional.batch_norm``, in either mode, reads a gradient
that is transposed in the wrong order if the batch is one image: ``norm(x).flatten(2).transpose(1, 2)``, the tokens of a
map, has gradients that are silently wrong. Two images are right.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from holofunc import tree
from holofunc.model.sites import Rule, Site

__all__ = ["NORMS", "normalized", "renewing"]


def _batch_norm(
    site: Site, input: Tensor, running_mean: Any = None, running_var: Any = None, weight: Any = None, bias: Any = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Any:  # fmt: skip
    """Compute the formula where torch's gradient would be wrong."""
    renews = training and running_mean is not None
    if renews:
        site.writes(running_mean, running_var)
        if input.shape[0] > 1:
            rest = weight, bias, training, momentum, eps
            return renewing(F.batch_norm, site, input, running_mean, running_var, *rest)
    count = input.numel() // input.shape[1]
    if input.shape[0] != 1 or count == 1 or not _is_doubtful(input, weight, bias):
        return NotImplemented
    if renews and _is_mapped(input) and not _is_mapped(running_mean):
        return NotImplemented  # torch raises
    if not training:
        return normalized(input, running_mean, running_var, weight, bias, eps)
    dims = [d for d in range(input.ndim) if d != 1]
    mean, var = input.mean(dims), input.var(dims, unbiased=False)
    if renews:
        for running, new in ((running_mean, mean), (running_var, var * count / (count - 1))):
            running.mul_(1 - momentum).add_(momentum * new.detach().to(running.dtype))
    return normalized(input, mean, var, weight, bias, eps)


def renewing(
    function: Any, site: Site, input: Tensor, running_mean: Tensor, running_var: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """A norm in train mode; under vmap, with statistics for each member."""
    try:
        return function(input, running_mean, running_var, *args, **kwargs)
    except RuntimeError as error:
        if "got a batched tensor" not in str(error):
            raise
    mean, var = (input.new_empty(x.shape, dtype=x.dtype).copy_(x) for x in (running_mean, running_var))
    out = function(input, mean, var, *args, **kwargs)
    site.write(running_mean, mean)
    site.write(running_var, var)
    return out


def _is_doubtful(*tensors: Any) -> bool:
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or tensors[0].device.type != "cpu":
        return False
    return any(x.requires_grad for x in tensors if x is not None)


def normalized(x: Tensor, mean: Tensor, var: Tensor, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` by channel, as a product and a sum, in float32 at least.

    Args:
        x: (N, C, ...).
        mean: (C,), like all that follow.
        var: variance.
        weight: None for 1.
        bias: None for 0.
        eps: added to the variance.

    Returns:
        Of the shape and dtype of ``x``.

    Example:
        >>> import torch
        >>> from holofunc.model.normalization import normalized
        >>> normalized(torch.tensor([[3.0]]), torch.tensor([1.0]), torch.tensor([4.0]), eps=0.0)
        tensor([[1.]])
    """
    scale = (tree.upcast(var) + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    shape = [-1 if d == 1 else 1 for d in range(x.ndim)]
    return (x * scale.view(shape) + shift.view(shape)).to(x.dtype)


def _is_mapped(x: Tensor) -> bool:
    """Whether a tensor is batched by vmap."""
    while (inner := torch.func.debug_unwrap(x, recurse=False)) is not x:
        if inner.ndim != x.ndim:
            return True
        x = inner
    return False


NORMS: dict[Any, Rule] = {F.batch_norm: _batch_norm}
