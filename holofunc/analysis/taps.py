"""Exact per-sample gradient norms without per-sample gradients.

The gradient of a convolution's or linear layer's weights is a product of what goes into the layer and the gradient of
what comes out. Zeros added to the output, a *tap*, have that gradient; the norm of the product follows from its
factors, whose size is that of the activations. Everything runs inside `vmap`, which knows where the samples are
however a model folds its axes; calls that involve weights are recognized by a `TorchFunctionMode`, whoever makes them.

A weight has a tap if it goes into one call that has a rule here and into nothing else. All other parameters, such as
biases, affine parameters of norms and layer scales, are differentiated per sample: their gradients are small. So is
a weight that is shared, reshaped or used in another way: exact, at the price of memory for its gradients.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from holofunc.analysis.mapped import BatchNorm
from holofunc.model.normalization import normalized

__all__ = ["Call", "Tapping", "tapped"]

CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


class Call(NamedTuple):
    """A call of a function with a rule: what went in, what came out, and the rule."""

    x: Tensor
    out: Tensor
    squared_norm: Callable[[Tensor, Tensor], Tensor]
    """Of the gradient of the weights, given what went in and the gradient of what came out."""


class Tapping(TorchFunctionMode):
    """Records the calls that involve ``weights``, and adds to their results the ``taps`` of the same names.

    Attributes:
        calls: by the name of the weight.
        others: names of the weights that were used in another way, or twice.
    """

    def __init__(self, weights: dict[str, Tensor], taps: dict[str, Tensor] | None = None) -> None:
        super().__init__()
        self.weights, self.taps = weights, taps or {}
        self.calls: dict[str, Call] = {}
        self.others: set[str] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return _batch_norm(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            out = _self_attention(lambda *x: self.__torch_function__(F.linear, (), x), *args, **kwargs)
            if out is not None:
                return out, None
        out = func(*args, **kwargs)
        weight: Tensor | None = None
        call: Call | None = None
        if func is F.linear:
            weight, call = _linear(out, *args, **kwargs)
        elif func in CONVOLUTIONS:
            weight, call = _conv(out, *args, **kwargs)
        elif func in TRANSPOSED:
            weight, call = _conv_transpose(out, *args, **kwargs)
        elif func is F.embedding:
            weight, call = _embedding(out, *args, **kwargs)
        for name in self._names((args, tuple(kwargs.values())), out):
            if call is None or weight is not self.weights[name] or name in self.calls:
                self.others.add(name)
                continue
            self.calls[name] = call
            if name in self.taps:
                out = out + self.taps[name]
        return out

    def _names(self, arguments: Any, out: Any) -> list[str]:
        """The weights among the arguments of a call that makes tensors (asking for a shape, say, does not count)."""
        if not any(isinstance(x, Tensor) for x in _flat(out)):
            return []
        found = [x for x in _flat(arguments) if isinstance(x, Tensor)]
        return [name for name, weight in self.weights.items() if any(x is weight for x in found)]


def _flat(node: Any) -> list[Any]:
    if isinstance(node, (tuple, list)):
        return [x for child in node for x in _flat(child)]
    return [node]


def tapped(run: Callable[[dict[str, Tensor]], Any], weights: dict[str, Tensor]) -> dict[str, Call]:
    """The calls that can be tapped when ``run(weights)`` is called: those of weights that are used once."""
    mode = Tapping(weights)
    with mode:
        run(weights)
    return {name: call for name, call in mode.calls.items() if name not in mode.others and _outlives(call)}


def _outlives(call: Call) -> bool:
    """Whether what went in can be used after the call: not if it was made under a transformation within the model."""
    try:
        torch.zeros_like(call.x).add(call.x)
    except RuntimeError:
        return False
    return True


# --- rules ---------------------------------------------------------------------------------------------------------


def _linear(out: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Call]:
    def squared_norm(x: Tensor, g: Tensor) -> Tensor:
        return _product_norm(x.reshape(1, -1, x.shape[-1]).mT, g.reshape(1, -1, g.shape[-1]).mT)

    return weight, Call(input, out, squared_norm)


def _conv(
    out: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    transposed: bool = False,
) -> tuple[Tensor, Call]:
    size = tuple(weight.shape[2:])

    def squared_norm(x: Tensor, g: Tensor) -> Tensor:
        x, g = (g, x) if transposed else (x, g)  # a convolution backwards: its input is our output
        if x.ndim == len(size) + 1:  # no axis of samples
            x, g = x[None], g[None]
        seen = _Seen.of(x, size, stride, padding, dilation, tuple(g.shape[2:]))
        rows, columns, places = weight[0].numel(), weight.shape[0] // groups, len(x) * math.prod(g.shape[2:])
        if seen.dense and min(weight.shape[1], columns) >= 16 and not _by_gram(rows, columns, places):
            return _shifted_norm(seen, g, groups)
        return _product_norm(_columns(seen.patches(), groups), _columns(g, groups))

    return weight, Call(input, out, squared_norm)


def _conv_transpose(
    out: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> tuple[Tensor, Call]:
    return _conv(out, input, weight, bias, stride, padding, dilation, groups, transposed=True)


def _embedding(
    out: Tensor,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> tuple[Tensor, Call | None]:
    if max_norm is not None or scale_grad_by_freq:
        return weight, None
    rows, padding = len(weight), padding_idx

    def squared_norm(x: Tensor, g: Tensor) -> Tensor:
        x, g = x.reshape(-1), g.reshape(-1, g.shape[-1])
        same = x.unsqueeze(0) == x.unsqueeze(1)
        if padding is not None:
            same = same & (x != padding % rows)
        return torch.where(same, g @ g.mT, 0.0).sum()

    return weight, Call(input, out, squared_norm)


def _batch_norm(*args: Any, **kwargs: Any) -> Tensor:
    """`F.batch_norm`; in eval mode as a product and a sum, which `vmap` differentiates much faster."""
    call = BatchNorm(*args, **kwargs)
    if call.training or call.running_mean is None or call.running_var is None:
        return F.batch_norm(*call)
    return normalized(call.input, call.running_mean, call.running_var, call.weight, call.bias, call.eps)


def _self_attention(
    linear: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    heads: int,
    in_weight: Tensor | None,
    in_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_weight: Tensor,
    out_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    **others: Any,
) -> Tensor | None:
    """`F.multi_head_attention_forward` of a sequence (T, N, E) with itself, its two projections by ``linear``.

    None in the cases that this does not cover.
    """
    plain = query is key and key is value and in_weight is not None and query.ndim == 3 and not need_weights
    extras = [bias_k, bias_v, key_padding_mask, others.get("static_k"), others.get("static_v")]
    draws, refused = training and dropout_p > 0, others.get("is_causal", False) and attn_mask is None
    if not plain or add_zero_attn or draws or refused or any(x is not None for x in extras):
        return None
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(attn_mask, -torch.inf)
    length, count, _ = query.shape
    if attn_mask is not None and attn_mask.ndim == 3:
        attn_mask = attn_mask.reshape(count, heads, length, length)
    projected = linear(query, in_weight, in_bias).view(length, count, 3, heads, -1)
    q, k, v = projected.permute(2, 1, 3, 0, 4).unbind()
    out = F.scaled_dot_product_attention(q, k, v, attn_mask)
    return linear(out.permute(2, 0, 1, 3).reshape(length, count, -1), out_weight, out_bias)


# --- factors of gradients ------------------------------------------------------------------------------------------


def _product_norm(a: Tensor, b: Tensor) -> Tensor:
    """``||a @ b.mT||**2``, summed over groups, for a (groups, I, T) and b (groups, O, T), the cheaper way."""
    if _by_gram(a.shape[1], b.shape[1], a.shape[2]):
        return ((a.mT @ a) * (b.mT @ b)).sum()
    return (a @ b.mT).square().sum()


def _by_gram(rows: int, columns: int, places: int) -> bool:
    """Whether two products over the rows and columns are cheaper than one over the places."""
    return places * (rows + columns) < rows * columns


def _columns(x: Tensor, groups: int) -> Tensor:
    """(N, C, ...) as (groups, C / groups, places)."""
    x = x.flatten(2) if x.ndim > 2 else x
    return x.transpose(0, 1).reshape(groups, x.shape[1] // groups, -1)


class _Seen(NamedTuple):
    """What the places of a convolution's output see of its input.

    Attributes:
        x: the input, with margins: no more than is seen.
        size: of the kernel.
        stride: per dimension.
        dilation: per dimension.
    """

    x: Tensor
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]

    @staticmethod
    def of(
        x: Tensor, size: tuple[int, ...], stride: Any, padding: Any, dilation: Any, places: tuple[int, ...]
    ) -> "_Seen":
        rank = len(size)
        stride, dilation = _each(stride, rank), _each(dilation, rank)
        spans = [d * (k - 1) for d, k in zip(dilation, size, strict=True)]
        before = [span // 2 if padding == "same" else 0 for span in spans]
        before = before if isinstance(padding, str) else list(_each(padding, rank))
        ends = [(n - 1) * s + span + 1 for n, s, span in zip(places, stride, spans, strict=True)]
        after = [end - have - margin for end, have, margin in zip(ends, x.shape[2:], before, strict=True)]
        if any(before + after):  # less than nothing after it is what no place sees
            x = F.pad(x, [margin for pair in zip(before[::-1], after[::-1], strict=True) for margin in pair])
        return _Seen(x, size, stride, dilation)

    @property
    def dense(self) -> bool:
        """Whether what a place sees is what its neighbour sees, shifted by one."""
        return set(self.stride) == {1}

    def patches(self) -> Tensor:
        """(N, C * kernel, places), by views and a copy: `torch.nn.functional.unfold` is six times slower on a CPU."""
        x, rank = self.x, len(self.size)
        for dim, (size, step, gap) in enumerate(zip(self.size, self.stride, self.dilation, strict=True), 2):
            x = x.unfold(dim, gap * (size - 1) + 1, step)[..., ::gap]
        places = x.shape[2 : 2 + rank]
        x = x.movedim(list(range(2, 2 + rank)), list(range(-rank, 0)))
        return x.reshape(len(x), -1, *places).flatten(2)


def _shifted_norm(seen: _Seen, g: Tensor, groups: int) -> Tensor:
    """The norm without patches: for each place of the kernel a product of ``g`` and ``x``, which lie in memory in the
    same order when ``g`` has the margins too, one shifted against the other.
    """
    x = seen.x
    g = F.pad(g, [margin for n, have in zip(x.shape[:1:-1], g.shape[:1:-1], strict=True) for margin in (0, n - have)])
    apart = [math.prod(x.shape[dim + 1 :]) for dim in range(2, x.ndim)]  # of neighbours in a dimension, in memory
    x, g = _columns(x, groups), _columns(g, groups)
    steps = [[gap * i * far for i in range(k)] for k, gap, far in zip(seen.size, seen.dilation, apart, strict=True)]
    shifts = [sum(shift) for shift in itertools.product(*steps)]
    length = x.shape[-1] - max(shifts)  # where g is not a margin
    g = g[..., :length].mT
    return torch.stack([(x[..., shift : shift + length] @ g).square().sum() for shift in shifts]).sum()


def _each(value: Any, count: int) -> tuple[int, ...]:
    """One number per dimension."""
    if isinstance(value, int):
        return (value,) * count
    return tuple(value) * count if len(value) == 1 and count > 1 else tuple(value)
