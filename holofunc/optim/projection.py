"""AdamP: Adam without the part of an update that only makes weights longer."""

from typing import Any

import torch
from torch import Tensor

from holofunc import tree
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

    def project(u: Tensor, g: Tensor, p: Tensor, decay: Scalar, eps: Scalar, delta: Scalar, wd_ratio: Scalar) -> Tensor:
        u, g, p = tree.wide(u), tree.wide(g), tree.wide(p)
        if p.ndim < min_ndim or p.numel() == 0:
            return u + decay * p
        rows = [x.flatten(1) if x.ndim > 1 else x.reshape(1, -1) for x in (u, g, p)]
        us, gs, ps = rows
        products = [(x * ps).sum(1) for x in (us, gs)]
        norms = [torch.linalg.vector_norm(x, dim=1) for x in (gs, ps)]  # without squares in memory
        along, kept = torch.zeros_like(products[0]), torch.ones((), dtype=u.dtype, device=u.device)
        for view in reversed(views):
            size = ps.shape[1] if view == "channel" else ps.numel()
            up, gp = products if view == "channel" else [x.sum(0, keepdim=True) for x in products]
            g_norm, p_norm = (
                norms if view == "channel" else [torch.linalg.vector_norm(x, dim=0, keepdim=True) for x in norms]
            )
            length = p_norm + eps
            cosine = gp / ((g_norm + eps) * length)
            invariant = (cosine.abs() if absolute else cosine).amax() < delta / size**0.5
            along = torch.where(invariant, up / length.square(), along)
            kept = torch.where(invariant, wd_ratio, kept)
        return torch.addcmul(us, ps, (decay * kept - along)[:, None]).view(u.shape)

    def update(updates: PyTree, state: AdamState, params: MaybeParams = None, **extra: Any) -> tuple[PyTree, AdamState]:
        need_params(params, "scale_by_adamp")
        count = state.count + 1
        mu, nu = moving_average(updates, state.mu, b1), squares_average(updates, state.nu, b2)
        nu_max = tree.elementwise(torch.maximum, state.nu_max, nu) if amsgrad else ABSENT
        c1, c2 = gains(b1, b2, count, scalar_dtype(updates))
        first = moving_average(updates, mu, b1) if nesterov else mu
        u = tree.elementwise(lambda m, v: m * c1 / (root(v, c2) + eps), first, nu_max if amsgrad else nu)
        decay = value_at("weight_decay", weight_decay, state.count, updates)
        decays = mask_flags(mask, params)

        def projected(u: PyTree, g: PyTree, p: PyTree, decays: PyTree, decay: Tensor, *numbers: Scalar) -> PyTree:
            return tree.map(lambda u, g, p, used: project(u, g, p, decay * used, *numbers), u, g, p, decays)

        out = alone(projected, u, updates, params, decays, decay, eps, delta, wd_ratio, by_leaf=True)
        return out, AdamState(count, mu, nu, nu_max)

    return GradientTransformation(init, update)
