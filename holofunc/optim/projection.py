"""AdamP: Adam without the part of an update that only makes weights longer."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from holofunc import tree
from holofunc.arena.layouts import WIDTHS, Slot
from holofunc.compile import alone
from holofunc.optim.adaptive import AdamState, adam_state, gains, root, squares_average
from holofunc.optim.base import GradientTransformation, MaybeParams, need_params
from holofunc.optim.labels import Mask, check_labels, mask_flags
from holofunc.optim.scalars import (
    ABSENT,
    check_count,
    check_decay,
    check_flags,
    check_nonnegative,
    scalar_dtype,
    value_at,
)
from holofunc.optim.transforms import moving_average
from holofunc.typing import Params, PyTree, Scalar, Schedule

__all__ = ["scale_by_adamp"]


def scale_by_adamp(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    *,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
    delta: Scalar = 0.1,
    wd_ratio: Scalar = 0.1,
    nesterov: bool = False,
    amsgrad: bool = False,
    views: tuple[str, ...] = ("channel", "layer"),
    absolute: bool = True,
    min_ndim: int = 2,
) -> GradientTransformation:
    """Adam's ``u``, projected where weights look scale-invariant, plus ``weight_decay * p``:

        cos = |<g, p>| / ((norm(g) + eps) * (norm(p) + eps))       # for each row of the view
        if max(cos) < delta / sqrt(length of a row):               # the first view for which this holds
            u = u - <u, p> * p / (norm(p) + eps)**2
            weight_decay = weight_decay * wd_ratio

    Args:
        b1, b2: in [0, 1).
        eps: added outside of the root, and to norms.
        weight_decay: decoupled; it belongs here because it depends on the projection.
        mask: True where weights decay; None is everywhere.
        delta: threshold of the cosine.
        wd_ratio: factor of the decay where the update was projected.
        nesterov: ``b1 * mu + (1 - b1) * g`` in place of ``mu``.
        amsgrad: divide by the root of the largest ``nu`` so far, debiased afterwards.
        views: what a row is: ``"channel"`` an index of the first axis, ``"layer"`` the whole tensor.
        absolute: False compares the cosine with its sign, as Holocron 0.3.0 does.
        min_ndim: tensors of fewer axes are left to Adam.

    Source: Heo et al., "AdamP" (arXiv 2006.08217), the authors' rule.
    """
    check_flags(nesterov=nesterov, amsgrad=amsgrad, absolute=absolute)
    check_decay(b1=b1, b2=b2)
    check_nonnegative(True, weight_decay=weight_decay)
    check_nonnegative(eps=eps, delta=delta, wd_ratio=wd_ratio)
    check_count(0, min_ndim=min_ndim)
    if not views or any(view not in ("channel", "layer") for view in views):
        raise ValueError(f"views must be some of 'channel' and 'layer', got {views!r}")

    def init(params: Params) -> AdamState:
        if mask is not None:
            check_labels("mask", mask, params, bool)
        return adam_state(params, "scale_by_adamp", amsgrad)

    factors = functools.partial(_factors, views=views, absolute=absolute)

    def project(u: Tensor, g: Tensor, p: Tensor, decay: Scalar, *numbers: Scalar) -> Tensor:
        u, g, p = tree.wide(u), tree.wide(g), tree.wide(p)
        if p.ndim < min_ndim or p.numel() == 0:
            return u + decay * p
        us, gs, ps = (x.flatten(1) if x.ndim > 1 else x.reshape(1, -1) for x in (u, g, p))
        squares = [torch.linalg.vector_norm(x, dim=1).square() for x in (gs, ps)]  # without those of all elements
        sums = [(us * ps).sum(1), (gs * ps).sum(1), *squares]
        factor = factors(sums, [len(ps)], [p.numel()], [True], decay * us.new_ones(1), *numbers)
        return torch.addcmul(us, ps, factor[:, None]).view(u.shape)

    def project_rows(
        u: tree.Arena, g: tree.Arena, p: tree.Arena, decays: Mapping[str, bool], decay: Tensor, *numbers: Scalar
    ) -> tree.Arena:
        """`project` for leaves whose channels are whole rows: from sums of these, in passes over all leaves."""
        u, g, p = (tree.elementwise(tree.wide, x) for x in (u, g, p))
        pairs = [tree.elementwise(torch.mul, x, y).vectors for x, y in ((u, p), (g, p), (g, g), (p, p))]
        layout, out = p.layout, []
        for group, slots in enumerate(layout.groups):

            def column(
                decay: Tensor, numbers: Sequence[Scalar], *by_row: Tensor, group: int = group, slots: Any = slots
            ) -> Tensor:
                counts, numels = [_channels(s, min_ndim) for s in slots], [s.numel for s in slots]
                sums = [layout.unit_sums(group, x, counts) for x in by_row]
                used = decay * sums[0].new_tensor([float(decays[s.name]) for s in slots])
                projected = [_is_projected(s, min_ndim) for s in slots]
                return layout.unit_column(group, factors(sums, counts, numels, projected, used, *numbers), counts)

            found = alone(column, decay, numbers, *(vectors[group].sum(1) for vectors in pairs))
            out.append(u.vectors[group] + p.vectors[group] * found)
        return tree.Arena(out, u.layout)

    def update(updates: PyTree, state: AdamState, params: MaybeParams = None, **extra: Any) -> tuple[PyTree, AdamState]:
        need_params(params, "scale_by_adamp")
        slots = updates.layout.slots if isinstance(updates, tree.Arena) else ()
        regular = {s.name: _channels(s, min_ndim) for s in slots if not _is_projected(s, min_ndim) or _fills_rows(s)}
        others = [s.name for s in slots if s.name not in regular]
        if regular:
            updates.need_whole_units(regular)
        count = state.count + 1
        mu, nu = moving_average(updates, state.mu, b1), squares_average(updates, state.nu, b2)
        nu_max = tree.elementwise(torch.maximum, state.nu_max, nu) if amsgrad else ABSENT
        c1, c2 = gains(b1, b2, count, scalar_dtype(updates))
        first = moving_average(updates, mu, b1) if nesterov else mu
        u = tree.elementwise(lambda m, v: m * c1 / (root(v, c2) + eps), first, nu_max if amsgrad else nu)
        decay = value_at("weight_decay", weight_decay, state.count, updates)
        decays = mask_flags(mask, params)

        def project_leaves(u: PyTree, g: PyTree, p: PyTree, decays: PyTree, decay: Tensor, *numbers: Scalar) -> PyTree:
            return tree.map(lambda u, g, p, used: project(u, g, p, decay * used, *numbers), u, g, p, decays)

        of_leaves = functools.partial(alone, project_leaves, by_leaf=True)
        numbers = decay, eps, delta, wd_ratio
        if not regular:
            out = of_leaves(u, updates, params, decays, *numbers)
            return out, AdamState(count, mu, nu, nu_max)
        by_rows, by_leaf = zip(
            *(tree.parted(x, [list(regular), others]) for x in (u, updates, params, decays)), strict=True
        )
        done = [project_rows(*by_rows, *numbers), *([of_leaves(*by_leaf, *numbers)] if others else [])]
        return tree.together(done, u), AdamState(count, mu, nu, nu_max)

    return GradientTransformation(init, update)


def _factors(
    sums: Sequence[Tensor],
    counts: Sequence[int],
    numels: Sequence[int],
    projected: Sequence[bool],
    decays: Tensor,
    eps: Scalar,
    delta: Scalar,
    wd_ratio: Scalar,
    *,
    views: Sequence[str],
    absolute: bool,
) -> Tensor:
    """What of ``p`` is added to ``u``: a number for each channel of some leaves, which have ``counts`` of them.

    ``sums`` are those of ``u * p``, ``g * p``, ``g * g`` and ``p * p`` over each channel.
    """
    like = sums[0]
    leaves = torch.arange(len(counts), device=like.device)
    owner = leaves.repeat_interleave(torch.tensor(counts, device=like.device), output_size=sum(counts))

    def total(x: Tensor) -> Tensor:
        return x.new_zeros(len(counts)).index_add(0, owner, x)

    def most(x: Tensor) -> Tensor:
        return x.new_zeros(len(counts)).scatter_reduce(0, owner, x, "amax", include_self=False)

    along, kept = torch.zeros_like(like), torch.ones_like(decays)
    for view in reversed(views):
        channels = view == "channel"
        up, gp, gg, pp = sums if channels else [total(x) for x in sums]
        length = tree.safe_sqrt(pp) + eps
        cosine = (gp / ((tree.safe_sqrt(gg) + eps) * length)).detach()  # which only decides
        cosine = cosine.abs() if absolute else cosine
        cosine = most(cosine) if channels else cosine
        sizes = [n / count if channels else n for n, count in zip(numels, counts, strict=True)]
        invariant = (cosine < delta / like.new_tensor(sizes).sqrt()) & torch.tensor(projected, device=like.device)
        part = up / length.square()
        along = torch.where(invariant[owner], part if channels else part[owner], along)
        kept = torch.where(invariant, wd_ratio, kept)
    return (decays * kept)[owner] - along


def _is_projected(slot: Slot, min_ndim: int) -> bool:
    return len(slot.shape) >= min_ndim and slot.numel > 0


def _channels(slot: Slot, min_ndim: int) -> int:
    """How many there are for the rule in a leaf."""
    return slot.shape[0] if len(slot.shape) > 1 and _is_projected(slot, min_ndim) else 1


def _fills_rows(slot: Slot) -> bool:
    """Whether each index of a leaf's first axis can be whole rows of an arena, narrow ones if need be."""
    channels = slot.shape[0] if len(slot.shape) > 1 else 1
    return slot.order[:1] in ((), (0,)) and slot.numel // channels % WIDTHS[-1] == 0
