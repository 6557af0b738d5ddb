"""Rules for torch's random layers (dropout, attention, pooling): each draws from an explicit key."""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from holofunc.model.draws import gumbel, uniform
from holofunc.model.drop import drop
from holofunc.model.normalization import NORMS
from holofunc.model.recurrent import RECURRENT
from holofunc.model.sites import Rule, Site

__all__ = ["LAYERS"]


# --- dropout -----------------------------------------------------------------------------------------------------


def _dropout(
    shared: int | None, site: Site, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Any:
    if not training or p == 0:
        return NotImplemented
    out = drop(input, p, key=site.key(), shared=shared)
    return site.write(input, out) if inplace else out


def _channels(
    dims: int, site: Site, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Any:
    """Dropout of whole channels with ``dims`` axes; the batch axis may be missing."""
    return _dropout(1 if input.ndim == dims + 1 else 2, site, input, p, training, inplace)


def _alpha(
    shared: int | None, site: Site, input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False
) -> Any:
    """Alpha dropout, which preserves mean and variance: Klambauer et al. (arXiv 1706.02515)."""
    if not training or p == 0:
        return NotImplemented
    floor = -1.7580993408473766  # of the SELU
    a = 0.0 if p == 1 else ((1 - p) * (1 + p * floor**2)) ** -0.5
    shape = [n if shared is None or d < shared else 1 for d, n in enumerate(input.shape)]
    kept = uniform(site, shape, input) >= p
    out = a * torch.where(kept, input, floor) - a * floor * p
    return site.write(input, out) if inplace else out


def _in_place(rule: Rule) -> Rule:
    """The rule of the in-place variant of a function."""
    return lambda site, input, p, train: rule(site, input, p, train, True)


# --- attention ---------------------------------------------------------------------------------------------------


def _attention(
    site: Site, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    if dropout_p == 0:
        return _derivable(
            *(F.scaled_dot_product_attention, query, key, value, attn_mask),
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (x.repeat_interleave(repeats, -3) for x in (key, value))
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, -math.inf)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return drop(scores.softmax(-1), dropout_p, key=site.key()) @ value


def _derivable(attention: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Use the unfused kernel if a forward derivative is needed, because fused ones have none."""
    if torch.compiler.is_compiling():
        return NotImplemented
    try:
        return attention(*args, **kwargs)
    except RuntimeError as error:
        if "forward AD" not in str(error):
            raise
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        return attention(*args, **kwargs)


DEFAULTS = {n: p.default for n, p in inspect.signature(F.multi_head_attention_forward).parameters.items()}
"""The names of the arguments of multi-head attention."""


def _multi_head(site: Site, *args: Any, **kwargs: Any) -> Any:
    """Torch's function computes the weights; dropout and the product with the values are done here."""
    given: dict[str, Any] = {**DEFAULTS, **dict(zip(DEFAULTS, args, strict=False)), **kwargs}
    p, heads = given["dropout_p"], given["num_heads"]
    if p == 0 or not given["training"]:
        return _derivable(F.multi_head_attention_forward, **given)
    wanted, averaged = given["need_weights"], given["average_attn_weights"]
    batched = given["query"].ndim == 3
    given.update(dropout_p=0.0, need_weights=True, average_attn_weights=False)
    weights: Any = F.multi_head_attention_forward(**given)[1]
    weights = drop(weights if batched else weights[None], p, key=site.key())
    values = _values(given, batched, weights.shape[0])
    heads_first = values.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)
    out = (weights @ heads_first).permute(2, 0, 1, 3).flatten(2)
    out = F.linear(out, given["out_proj_weight"], given["out_proj_bias"])
    shown = (weights.mean(1) if averaged else weights) if wanted else None
    return (out, shown) if batched else (out[:, 0], None if shown is None else shown[0])


def _values(given: dict[str, Any], batched: bool, batch: int) -> Tensor:
    """The values of multi-head attention, of shape (S, N, E)."""
    if given["static_v"] is not None:
        values = given["static_v"].unflatten(0, (batch, -1)).permute(2, 0, 1, 3).flatten(2)
    else:
        value, bias = given["value"], given["in_proj_bias"]
        own = given["v_proj_weight"] if given["use_separate_proj_weight"] else given["in_proj_weight"].chunk(3)[2]
        values = F.linear(value if batched else value[:, None], own, None if bias is None else bias.chunk(3)[2])
    if given["bias_v"] is not None:
        values = torch.cat([values, given["bias_v"].expand(1, values.shape[1], -1)])
    return F.pad(values, (0, 0, 0, 0, 0, 1)) if given["add_zero_attn"] else values


# --- activations and pooling --------------------------------------------------------------------------------------


def _gumbel_softmax(
    site: Site, logits: Tensor, tau: float = 1, hard: bool = False, eps: float = 1e-10, dim: int = -1
) -> Tensor:
    soft = ((logits + gumbel(site, logits)) / tau).softmax(dim)
    if not hard:
        return soft
    one_hot = torch.zeros_like(soft).scatter(dim, soft.argmax(dim, keepdim=True), 1.0)
    return one_hot - soft.detach() + soft


def _rrelu(
    site: Site, input: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, inplace: bool = False
) -> Any:
    if not training:
        lower = upper = (lower + upper) / 2
    drawn = uniform(site, input.shape, input).to(input.dtype) if training else 0.0
    slope = lower + (upper - lower) * drawn
    out = torch.where(input >= 0, input, input * slope)
    return site.write(input, out) if inplace else out


def _pool(dims: int, function: Callable[..., Any]) -> Rule:
    """The rule of fractional pooling, which takes its samples as an argument."""

    def rule(site: Site, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("_random_samples") is not None:
            return NotImplemented
        shape = (input.shape[0] if input.ndim == dims + 2 else 1, input.shape[-dims - 1], dims)
        return function(input, *args, **{**kwargs, "_random_samples": uniform(site, shape, input).to(input.dtype)})

    return rule


LAYERS: dict[Any, Rule] = {
    **dict.fromkeys((F.dropout, torch.dropout), partial(_dropout, None)),
    **{f: partial(_channels, dims) for dims, f in enumerate((F.dropout1d, F.dropout2d, F.dropout3d), 1)},
    torch.feature_dropout: partial(_dropout, 2),
    torch.dropout_: _in_place(partial(_dropout, None)),
    torch.feature_dropout_: _in_place(partial(_dropout, 2)),
    **dict.fromkeys((F.alpha_dropout, torch.alpha_dropout), partial(_alpha, None)),
    **dict.fromkeys((F.feature_alpha_dropout, torch.feature_alpha_dropout), partial(_alpha, 2)),
    torch.alpha_dropout_: _in_place(partial(_alpha, None)),
    torch.feature_alpha_dropout_: _in_place(partial(_alpha, 2)),
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _multi_head,
    **RECURRENT,
    **NORMS,
    F.gumbel_softmax: _gumbel_softmax,
    **dict.fromkeys((F.rrelu, torch.rrelu), _rrelu),
    torch.rrelu_: partial(_rrelu, inplace=True),
    **{f: _pool(2, f) for f in (F.fractional_max_pool2d, F.fractional_max_pool2d_with_indices)},
    **{f: _pool(3, f) for f in (F.fractional_max_pool3d, F.fractional_max_pool3d_with_indices)},
}
