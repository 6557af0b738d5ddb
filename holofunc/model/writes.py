"""Rules for the functions of torch that write into their arguments: they announce the write first."""

import inspect
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from holofunc.model.normalization import renewing
from holofunc.model.references import tensors
from holofunc.model.sites import Rule, Site

__all__ = ["WRITES"]


def _writes(position: int, site: Site, *args: Any, **kwargs: Any) -> Any:
    """Writes into the first argument, if the argument ``inplace`` at ``position`` is true, or always if that is 0."""
    if not position or kwargs.get("inplace") or (len(args) > position and args[position] is True):
        site.writes(*tensors(args[0] if args else next(iter(kwargs.values()))))
    return NotImplemented


def _sets_data(site: Site, x: Tensor, value: Tensor) -> Any:
    """``x.data = value`` as a copy, which works under transformations."""
    site.writes(x)
    if x.shape != value.shape or x.dtype != value.dtype:
        return NotImplemented
    with torch.no_grad():
        x.copy_(value)
    return None


def _sets_requires_grad(site: Site, x: Tensor, wanted: bool) -> Any:
    if x.requires_grad != wanted:
        site.writes(x)
    return NotImplemented


def _renorms(site: Site, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Embeddings with ``max_norm`` rescale rows of their weight."""
    if kwargs.get("max_norm", args[1] if len(args) > 1 else None) is not None:
        site.writes(weight)
    return NotImplemented


def _instance_norm(
    site: Site,
    input: Tensor,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Statistics are updated in train mode."""
    if running_mean is None or not use_input_stats:
        return NotImplemented
    site.writes(running_mean, running_var)
    return renewing(F.instance_norm, site, input, running_mean, running_var, weight, bias, True, *args, **kwargs)


def _renews(site: Site, input: Tensor, weight: Any, bias: Any, *args: Any, **kwargs: Any) -> Any:
    """The same for torch's internal functions, where statistics are later arguments."""
    mean, var, training, *_ = (*args, *kwargs.values())
    if mean is not None and training:
        site.writes(mean, var)
    return NotImplemented


def _detached(site: Site, x: Tensor) -> Tensor:
    """A tensor with the same memory, which torch does not regard as a view of ``x``."""
    return site.alias(x.detach(), x)


def _all_that_write() -> dict[Any, Rule]:
    rules: dict[Any, Rule] = {}
    for room in (torch.Tensor, torch, F):
        for name in dir(room):
            own = name in ("__setitem__", "__delitem__") or (name.startswith("__i") and hasattr(room, f"__{name[3:]}"))
            if callable(getattr(room, name)) and (own or (name.endswith("_") and not name.endswith("__"))):
                rules[getattr(room, name)] = partial(_writes, 0)
    for function in vars(F).values():
        parameters = list(inspect.signature(function).parameters) if inspect.isfunction(function) else []
        if "inplace" in parameters:
            rules[function] = partial(_writes, parameters.index("inplace"))
    return rules


WRITES: dict[Any, Rule] = {
    **_all_that_write(),
    **dict.fromkeys((F.embedding, F.embedding_bag), _renorms),
    F.instance_norm: _instance_norm,
    **dict.fromkeys((torch.Tensor.data.__get__, torch.Tensor.detach, torch.detach), _detached),  # type: ignore[attr-defined]
    torch.Tensor.data.__set__: _sets_data,  # type: ignore[attr-defined]
    torch.Tensor.requires_grad.__set__: _sets_requires_grad,  # type: ignore[attr-defined]
    **dict.fromkeys((torch.batch_norm, torch.instance_norm), _renews),
    **dict.fromkeys((torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.__dlpack__), partial(_writes, 0)),
}
