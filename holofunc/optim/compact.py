"""Compact states: moments in 16 or 8 bits, rounded at random; Kahan sums for bfloat16 parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from holofunc import random, tree
from holofunc.compile import opaque
from holofunc.optim.base import GradientTransformation, MaybeParams, as_transformation, composed, held_by
from holofunc.optim.capabilities import Accumulates, KeepsProgress, KeepsStart, KeepsWeights, TiesWeights
from holofunc.optim.checks import check_state, need_params
from holofunc.optim.ranges import check_count
from holofunc.optim.scalars import zero_count
from holofunc.typing import Key, Params, PyTree

__all__ = ["BlockInt8", "CompactState", "KahanState", "Rounded16", "compact_state", "kahan_sum"]


BLOCK = 256
"""Elements that share a scale."""

OVERFLOWED = -128


class Rounded16(NamedTuple):
    """A tensor in bfloat16, in place of one in fp32."""

    values: Tensor


class BlockInt8(NamedTuple):
    """A tensor as ``scale * sign(code) * (abs(code) / 127)**4``, with one scale for each 256 elements in a row.

    The code -128 is an infinity, as squares are that overflow; the size of the largest element shows it to guards.
    """

    codes: Tensor
    scales: Tensor
    largest: Tensor


class _Compact(NamedTuple):
    step: Tensor
    key: Key
    inner: PyTree


class CompactState(_Compact, KeepsProgress):
    """Updates so far, the key of all rounding, the inner state with small leaves in place of those of parameters."""

    __slots__ = ()


def compact_state(
    tx: GradientTransformation, kind: str = "int8", *, key: Key | None = None, min_size: int = 4096
) -> GradientTransformation:
    """Keep the moments of ``tx`` in 16 or 8 bits between updates; each update computes in fp32 as before.

    Compacted are the parts of the state that have the structure of the parameters: averages of gradients and of
    their squares. With fp32 parameters AdamW then costs 4 + 2.03 bytes each for ``"int8"``, instead of 12; what
    factors or bases cost stays. Rounding is random and right in the mean, as the small steps of a slow average would
    be lost otherwise. One huge gradient silences its block of 256: clip, or guard.

    Args:
        tx: an optimizer. What keeps copies of parameters is an error.
        kind: ``"bf16"``, relative steps of 2**-8; ``"int8"``, blocks of 256 with steps of about 3 %, finer at the top,
            and down to 4e-9 of the largest element.
        key: of the rounding; None is a constant one.
        min_size: smaller tensors stay as they are.

    Raises:
        ValueError: a ``tx`` that holds weights (lookahead, averages, initial parameters) or sums of gradients.

    Source: Dettmers et al., "8-bit optimizers via block-wise quantization" (arXiv 2110.02861), with a power in place of
    their table; random rounding: Zamirai et al., "Revisiting bfloat16 training" (arXiv 2010.06192).

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.compact_state(optim.adamw(1e-3), "int8"), {"w": torch.ones(64, 64)}
        >>> mu = tx.init(params).inner["adam"].mu["w"]
        >>> mu.codes.dtype, mu.scales.shape
        (torch.int8, torch.Size([16]))
    """
    tx = as_transformation("tx", tx)
    if kind not in ("bf16", "int8"):
        raise ValueError(f"kind must be 'bf16' or 'int8', got {kind!r}")
    check_count(0, min_size=min_size)
    for kind_of_state, reason in FORBIDDEN.items():
        if any(issubclass(held, kind_of_state) for held in held_by(tx)):
            raise ValueError(f"compact_state cannot wrap {reason}")
    own_key = random.key(0) if key is None else key
    random.check_key(own_key)
    pack = _to_bf16 if kind == "bf16" else _to_int8

    def compacted(state: PyTree, params: Params, draw: Callable[[Tensor], Tensor]) -> PyTree:
        def leaf(x: Tensor, p: Tensor) -> PyTree:
            large = x.is_floating_point() and x.ndim > 0 and x.numel() >= max(min_size, 1)
            return pack(x, draw(x)) if large else x

        return tree.map_params(leaf, state, params)

    def init(params: Params) -> CompactState:
        state = tx.init(params)
        check_state("compact_state", state)
        state = tree.map(lambda x: tree.upcast(x) if x.is_floating_point() else x, state)
        step = zero_count(params)
        return CompactState(step, own_key.to(step.device, copy=True), compacted(state, params, torch.ones_like))

    def update(
        updates: PyTree, state: CompactState, params: MaybeParams = None, **extra: Any
    ) -> tuple[PyTree, CompactState]:
        need_params(params, "compact_state")
        inner = opaque(_expanded, state.inner)
        updates, inner = tx.update(updates, inner, params, **extra)
        noise = random.fold_in(state.key, state.step)
        drawn = iter(range(1_000_000))

        def rounded(inner: PyTree, params: Params, noise: Key) -> PyTree:
            return compacted(
                inner,
                params,
                lambda x: random.uniform(random.fold_in(noise, next(drawn)), x.shape, dtype=torch.float32),
            )

        return updates, CompactState(state.step + 1, state.key, opaque(rounded, inner, params, noise))

    return composed(init, update, tx)


FORBIDDEN: dict[type, str] = {
    TiesWeights: "schedule_free or primal_averaging, whose iterates would be rounded: put compact_state(tx) inside",
    KeepsWeights: "what keeps weights, whose rounding would move parameters: write lookahead(compact_state(tx)), say",
    KeepsStart: "a rule that remembers the initial parameters, such as prodigy, madgrad and distance over gradients",
    Accumulates: "multi_steps, whose sums would be rounded each time: write multi_steps(compact_state(tx), every)",
}


def _expanded(node: PyTree) -> PyTree:
    if isinstance(node, Rounded16):
        return node.values.float()
    if isinstance(node, BlockInt8):
        share = (node.codes.float() / 127).square().square() * node.codes.sign()
        scales = node.scales.repeat_interleave(BLOCK)[: node.codes.numel()]
        return torch.where(node.codes == OVERFLOWED, torch.inf, share * scales.view(node.codes.shape))
    if node is None or not tree.is_node(node):
        return node
    return tree.with_children(node, [_expanded(x) for x in tree.children(node).values()])


def _to_bf16(x: Tensor, noise: Tensor) -> Rounded16:
    """Towards zero, or from it with the probability of what would be cut off; an infinity and a NaN as they are."""
    bits = x.float().view(torch.int32) + (noise * 65536).to(torch.int32).clamp(0, 65535) * (noise < 1)
    near = (bits & -65536).view(torch.float32)
    return Rounded16(torch.where(x.isfinite(), near, x.float()).to(torch.bfloat16))


def _to_int8(x: Tensor, noise: Tensor) -> BlockInt8:
    """What is not zero stays so, as a second moment of zero beside a first one would make a step of any length."""
    flat = x.float().reshape(-1)
    infinite = flat.isinf()
    sizes = torch.where(infinite, 0.0, flat.abs())
    scales = torch.nn.functional.pad(sizes, (0, -len(flat) % BLOCK)).view(-1, BLOCK).amax(1)
    share = sizes / torch.where(scales > 0, scales, 1.0).repeat_interleave(BLOCK)[: len(flat)]
    low = (share.sqrt().sqrt() * 127).floor().clamp(0, 126)
    ends = [((low + i) / 127).square().square() for i in (0, 1)]
    up = noise.reshape(-1) < (share - ends[0]) / (ends[1] - ends[0])
    code = torch.where(sizes > 0, (low + up).clamp_min(1.0), 0.0) * flat.sign()
    codes = torch.where(infinite, OVERFLOWED, code).to(torch.int8).view(x.shape)
    return BlockInt8(codes, scales, flat.abs().amax())


class KahanState(NamedTuple):
    """What the latest roundings of the parameters have lost, in the dtypes of these, and the inner state."""

    lost: PyTree
    inner: PyTree


def kahan_sum(tx: GradientTransformation) -> GradientTransformation:
    """Parameters of half precision that do not lose small updates: what rounding cuts off is added to the next update.

    Two bytes more for each parameter of bfloat16 in place of a copy in fp32; parameters in fp32 gain a little, too.

    Args:
        tx: the whole optimizer: this wraps it.

    Source: Kahan (1965); for training: Zamirai et al., "Revisiting bfloat16 training" (arXiv 2010.06192).

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> def moved(tx, params={"w": torch.ones(1, dtype=torch.bfloat16)}):
        ...     state = tx.init(params)
        ...     for _ in range(100):
        ...         updates, state = tx.update({"w": torch.ones(1, dtype=torch.bfloat16)}, state, params)
        ...         params = optim.apply_updates(params, updates)
        ...     return params["w"].item()
        >>> moved(optim.sgd(1e-3)), moved(optim.kahan_sum(optim.sgd(1e-3)))
        (1.0, 0.8984375)
    """
    tx = as_transformation("tx", tx)

    def update(
        updates: PyTree, state: KahanState, params: MaybeParams = None, **extra: Any
    ) -> tuple[PyTree, KahanState]:
        need_params(params, "kahan_sum")
        updates, inner = tx.update(updates, state.inner, params, **extra)
        wanted = tree.elementwise(lambda u, c: tree.upcast(u) + tree.upcast(c), updates, state.lost)
        moved = tree.elementwise(
            lambda p, u: tree.upcast((tree.upcast(p) + u).to(p.dtype)) - tree.upcast(p), params, wanted
        )
        lost = tree.elementwise(lambda u, m, c: (u - m).to(c.dtype), wanted, moved, state.lost)
        return moved, KahanState(lost, inner)

    return composed(lambda params: KahanState(tree.zeros_like(params), tx.init(params)), update, tx)
