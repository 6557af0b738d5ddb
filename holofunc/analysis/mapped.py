"""Objectives of one sample, under `vmap` over the samples of a batch."""

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from holofunc import random, tree
from holofunc.typing import Batch, Buffers, Key, Objective, Params, PyTree

__all__ = [
    "BatchNorm",
    "Replaced",
    "check_real",
    "floats",
    "has_rows",
    "jvp",
    "num_samples",
    "over_samples",
    "plain_batch_norm",
    "unfused",
    "value",
    "with_floats",
]


def num_samples(batch: Batch) -> int:
    """The length that all tensors of a batch share."""
    lengths = {len(x) for x in tree.leaves(batch) if has_rows(x)}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"the tensors of batch must have one length, the number of samples, got {sorted(lengths)}")
    return lengths.pop()


def has_rows(leaf: Any) -> bool:
    """Whether a leaf of a batch holds something for each sample."""
    return isinstance(leaf, Tensor) and leaf.ndim > 0


def over_samples(
    fn: Callable[[Batch, Key | None], Any],
    batch: Batch,
    key: Key | None,
    *,
    chunk_size: int | None = None,
    first_only: bool = False,
) -> Any:
    """``fn(sample, key)`` of each sample, a batch of one, with a key of its own, results stacked.

    ``first_only`` stops after the first sample.
    """
    count = num_samples(batch)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, or None for all samples at once, got {chunk_size}")
    leaves = tree.leaves(batch)
    mapped = [x for x in leaves if has_rows(x)]  # what else there is belongs to every sample
    moved = [*mapped, *([] if key is None else [random.split(key, count)])]
    if first_only:
        moved = [x[:1] for x in moved]

    def one(*moved: Tensor) -> Any:
        rows = iter(moved)
        sample = tree.rebuild(batch, [next(rows)[None] if has_rows(x) else x for x in leaves])
        with Replaced(PLAIN_NORMS):
            return fn(sample, next(rows, None))

    try:
        return torch.vmap(one, chunk_size=chunk_size)(*moved)
    except RuntimeError as error:
        if "there exists a Tensor `other`" in str(error):
            raise ValueError(
                "a layer writes into a tensor that all samples share, as an embedding with max_norm into its weights"
            ) from error
        if "doesn't match the broadcast shape" in str(error):
            raise ValueError(
                "a layer writes what differs between samples into a tensor that all of them share, as torch's cells do "
                "without a first state: give them one of zeros made from the input"
            ) from error
        if "Batching rule not implemented" not in str(error):
            raise
        operation = str(error).split("implemented for ")[-1].split(". ")[0]
        if "nested_tensor" in operation:
            raise ValueError(
                "torch cannot map the nested tensors of nn.TransformerEncoder over samples: build it with "
                "enable_nested_tensor=False"
            ) from error
        raise ValueError(
            f"torch has no rule to map {operation} over samples: build the layer of operations that have one, "
            "such as linear and sigmoid for a recurrent cell"
        ) from error


class Replaced(TorchFunctionMode):
    """Functions of torch, and what is called in their place."""

    def __init__(self, functions: Mapping[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self.functions = functions

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.functions.get(func, func)(*args, **(kwargs or {}))


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    return _normalized(input, list(range(-len(normalized_shape), 0)), eps, weight, bias)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if running_mean is not None:
        return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    return _normalized(input, list(range(2, input.ndim)), eps, *_of_channels(input, weight, bias))


class BatchNorm(NamedTuple):
    """The arguments of `torch.nn.functional.batch_norm`."""

    input: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5


def _batch_norm(*args: Any, **kwargs: Any) -> Tensor:
    """Without statistics of its own, as sums and products."""
    call = BatchNorm(*args, **kwargs)
    return (plain_batch_norm if call.running_mean is None else F.batch_norm)(*call)


def plain_batch_norm(*args: Any, **kwargs: Any) -> Tensor:
    """As sums and products: torch's own has no derivatives by its running statistics, which states hold."""
    input, running_mean, running_var, weight, bias, training, momentum, eps = BatchNorm(*args, **kwargs)
    x, dims, channels = tree.upcast(input), [0, *range(2, input.ndim)], (-1, *[1] * (input.ndim - 2))
    mean, variance = running_mean, running_var
    if training or mean is None or variance is None:
        mean, variance = x.mean(dims), x.var(dims, correction=0)
        if running_mean is not None and running_var is not None:
            count = x.numel() / x.shape[1]
            running_mean.copy_(running_mean + momentum * (mean - running_mean))
            running_var.copy_(running_var + momentum * (variance * count / (count - 1) - running_var))
    out = (x - mean.view(channels)) * (variance + eps).rsqrt().view(channels)
    out = out if weight is None else out * weight.view(channels)
    return (out if bias is None else out + bias.view(channels)).to(input.dtype)


def _forward_batch_norm(*args: Any, **kwargs: Any) -> Tensor:
    """Under autocast as sums and products: there the forward derivative of torch's own has another dtype than it."""
    call = BatchNorm(*args, **kwargs)
    mixed = call.weight is not None and call.weight.dtype != call.input.dtype
    return (plain_batch_norm if mixed else F.batch_norm)(*call)


def _of_channels(x: Tensor, *values: Tensor | None) -> Iterator[Tensor | None]:
    """One value per channel, as they broadcast with (N, C, ...)."""
    return (value if value is None else value.reshape(-1, *[1] * (x.ndim - 2)) for value in values)


def _normalized(x: Tensor, dims: list[int], eps: float, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    wide = tree.upcast(x)
    centred = wide - wide.mean(dims, keepdim=True)
    out = centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
    out = out if weight is None else out * weight
    return (out if bias is None else out + bias).to(x.dtype)


PLAIN_NORMS: dict[Any, Callable[..., Tensor]] = {
    F.layer_norm: _layer_norm,
    F.instance_norm: _instance_norm,
    F.batch_norm: _batch_norm,
}
"""Normalizations as sums and products: torch's own, mapped over samples, have wrong second derivatives."""


def unfused() -> Any:
    """Where attention is computed step by step: its fused kernels know neither `vmap` nor `jvp`."""
    return sdpa_kernel(SDPBackend.MATH)


def jvp(fn: Callable[[Any], Any], x: Any, v: Any) -> Any:
    """``fn(x)`` and its derivative along ``v``."""
    if not torch.compiler.is_compiling():
        _load_forward_derivatives()
    with Replaced({F.batch_norm: _forward_batch_norm}):
        return torch.func.jvp(fn, (x,), (v,))


@functools.cache
def _load_forward_derivatives() -> None:
    """On their first use torch scripts formulas, and warns that scripting is deprecated: nothing a user can mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.func.jvp(torch.sin, (torch.zeros(()),), (torch.zeros(()),))


def value(objective: Objective, params: Params, buffers: Buffers, batch: Batch, key: Key | None) -> Tensor:
    """The loss alone."""
    with unfused():
        return objective(params, buffers, batch, key)[0]  # type: ignore[arg-type]


# --- leaves --------------------------------------------------------------------------------------------------------


def floats(node: PyTree) -> list[Tensor]:
    """The leaves that have derivatives."""
    return [x for x in tree.leaves(node) if x.is_floating_point()]


def with_floats(node: PyTree, floats: Sequence[Tensor]) -> PyTree:
    """``node`` with other floating leaves."""
    rest = iter(floats)
    return tree.rebuild(node, [next(rest) if x.is_floating_point() else x for x in tree.leaves(node)])


def check_real(params: Params) -> None:
    """Refuse parameters that are integers or complex."""
    for name, p in params.items():
        if not p.is_floating_point():
            raise TypeError(f"params must hold real floating tensors, got {p.dtype} at {name!r}")
