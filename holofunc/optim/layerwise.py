"""Rules with one number per tensor: trust ratios, LARS, TAdam, NovoGrad, clipping by layer."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from holofunc import tree
from holofunc.optim.adam import adam_state, gains, root, squares_average
from holofunc.optim.base import GradientTransformation, MaybeParams, check_params, need_params, stateless
from holofunc.optim.capabilities import KeepsProgress
from holofunc.optim.labels import Mask, check_labels, mask_values
from holofunc.optim.numerics import (
    ABSENT,
    bounded,
    check_bound,
    check_decay,
    check_flags,
    check_nonnegative,
    is_zero,
    known,
    scalar_dtype,
    value_at,
    zero_count,
    zeros,
)
from holofunc.typing import Params, PyTree, Scalar, Schedule

__all__ = [
    "LarsState",
    "NovogradState",
    "TadamState",
    "clip_by_block_rms",
    "normalize_by_update_norm",
    "scale_by_lars",
    "scale_by_novograd",
    "scale_by_param_block_norm",
    "scale_by_param_block_rms",
    "scale_by_tadam",
    "scale_by_trust_ratio",
]


def sizes(like: PyTree) -> PyTree:
    """The number of elements of each leaf, at least 1, as `tree.elementwise` takes it."""
    return tree.leaf_values(tree.map_shapes(lambda shape: float(max(shape.numel(), 1)), like), like)


def block_rms(values: PyTree) -> PyTree:
    """The root of the mean square of each leaf."""
    squares = tree.leaf_sum(tree.elementwise(lambda x: tree.wide(x).square(), values))
    return tree.elementwise(lambda s, n: tree.safe_sqrt(s / n), squares, sizes(values))


def ratio_or_one(above: Tensor, below: Tensor, valid: Tensor) -> Tensor:
    """``above / below`` where ``valid``, otherwise 1; the gradient too is that of 1 there."""
    return torch.where(valid, above / torch.where(valid, below, 1.0), 1.0)


# --- trust ratios --------------------------------------------------------------------------------------------------


def scale_by_trust_ratio(
    *, clip: tuple[float, float] | None = None, trust_coefficient: Scalar = 1.0, eps: Scalar = 0.0
) -> GradientTransformation:
    """``u * trust_coefficient * norm(p) / (norm(u) + eps)`` for each tensor; ``u`` where a norm is zero.

    Args:
        clip: ``(low, high)`` to which ``norm(p)`` is clamped first.
        trust_coefficient: at least 0.
        eps: at least 0.

    Source: You et al., LAMB (arXiv 1904.00962).

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> params = {"w": torch.tensor([3.0, 4.0]), "zero": torch.zeros(2)}
        >>> optim.scale_by_trust_ratio().update({"w": torch.tensor([0.0, 2.0]), "zero": torch.ones(2)}, (), params)[0]
        {'w': tensor([0., 5.]), 'zero': tensor([1., 1.])}
    """
    check_nonnegative(trust_coefficient=trust_coefficient, eps=eps)
    if clip is not None and not (isinstance(clip, (tuple, list)) and len(clip) == 2 and 0 <= clip[0] <= clip[1]):
        raise ValueError(f"clip must be (low, high) with 0 <= low <= high, got {clip}")

    def ratio(p: Tensor, u: Tensor) -> Tensor:
        if clip is not None:
            p = p.clamp(*clip)
        return ratio_or_one(trust_coefficient * p, u + eps, (p > 0) & (u > 0))

    def fn(updates: PyTree, params: MaybeParams) -> PyTree:
        need_params(params, "scale_by_trust_ratio")
        ratios = tree.elementwise(ratio, tree.leaf_norm(params), tree.leaf_norm(updates))
        return tree.elementwise(lambda u, r: tree.wide(u) * r, updates, ratios)

    return stateless(fn, "scale_by_trust_ratio")


class _Lars(NamedTuple):
    count: Tensor  # type: ignore[assignment]
    trace: PyTree


class LarsState(_Lars, KeepsProgress):
    """Updates so far, and the momentum buffer (absent without momentum)."""

    __slots__ = ()

    @property
    def progress(self) -> tuple[str, ...]:
        return ("count",)


def scale_by_lars(
    learning_rate: Scalar | Schedule,
    *,
    momentum: Scalar = 0.9,
    weight_decay: Scalar | Schedule = 0.0,
    trust_coefficient: Scalar = 1e-3,
    eps: Scalar = 0.0,
    nesterov: bool = False,
    dampening: Scalar = 0.0,
    trust_clip: Scalar | None = None,
    ratio_in_buffer: bool = True,
    lr_in_buffer: bool = False,
    zero_rule: str = "gradient",
    mask: Mask | None = None,
) -> GradientTransformation:
    """The whole of `lars`, learning rate included, because two of its options need it."""
    check_flags(nesterov=nesterov, ratio_in_buffer=ratio_in_buffer, lr_in_buffer=lr_in_buffer)
    check_nonnegative(True, learning_rate=learning_rate, weight_decay=weight_decay)
    check_nonnegative(trust_coefficient=trust_coefficient, eps=eps)
    check_decay(momentum=momentum, dampening=dampening)
    if trust_clip is not None:
        check_bound(trust_clip=trust_clip)
    if zero_rule not in ("gradient", "denominator"):
        raise ValueError(f"zero_rule must be 'gradient' or 'denominator', got {zero_rule!r}")

    def init(params: Params) -> LarsState:
        check_params(params, "scale_by_lars")
        if mask is not None:
            check_labels("mask", mask, params, bool)
        return LarsState(zero_count(params), ABSENT if is_zero(momentum) else zeros(params))

    def update(updates: PyTree, state: LarsState, params: MaybeParams = None, **extra: Any) -> tuple[PyTree, LarsState]:
        need_params(params, "scale_by_lars")
        rate = value_at("learning_rate", learning_rate, state.count, updates)
        decay = value_at("weight_decay", weight_decay, state.count, updates)
        used = mask_values(mask, params)

        def trust(w: Tensor, g: Tensor, adapts: Tensor) -> Tensor:
            below = g + decay * w + eps
            valid = (w > 0) & ((g if zero_rule == "gradient" else below) > 0)
            ratio = ratio_or_one(trust_coefficient * w, below, valid)
            if trust_clip is not None:
                ratio = torch.clamp_max(ratio / rate, trust_clip)
            return torch.where(adapts > 0, ratio, 1.0)

        ratio = tree.elementwise(trust, tree.leaf_norm(params), tree.leaf_norm(updates), used)
        if not ratio_in_buffer:
            inside, outside = tree.elementwise(torch.ones_like, ratio), ratio
        else:
            inside, outside = ratio, tree.elementwise(torch.ones_like, ratio)
        early, late = (rate, 1.0) if lr_in_buffer else (1.0, rate)
        step = tree.elementwise(
            lambda g, p, r, m: early * r * (tree.wide(g) + decay * m * tree.wide(p)), updates, params, inside, used
        )
        trace = ABSENT
        if not is_zero(momentum):
            gain = 1.0 if is_zero(dampening) else 1 - dampening * (state.count > 0).to(scalar_dtype(updates))
            trace = tree.elementwise(lambda u, t: momentum * t + gain * u, step, state.trace)
            step = tree.elementwise(lambda u, t: u + momentum * t, step, trace) if nesterov else trace
        out = tree.elementwise(lambda u, r: -late * r * u, step, outside)
        return out, LarsState(state.count + 1, trace)

    return GradientTransformation(init, update)


# --- TAdam and NovoGrad --------------------------------------------------------------------------------------------


class TadamState(NamedTuple):
    """As `AdamState`, with the sum of weights that the moving average of each tensor has gathered."""

    count: Tensor  # type: ignore[assignment]
    mu: PyTree
    nu: PyTree
    weight: PyTree
    nu_max: PyTree = ABSENT


def scale_by_tadam(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    *,
    dof: float | None = None,
    k_dof: float = 1.0,
    amsgrad: bool = False,
) -> GradientTransformation:
    """Adam whose moving average trusts a gradient the less, the less it fits a Student-t distribution:

        w = (dof + size) / (dof + sum((g - mu)**2 / (nu + eps)))              # one number per tensor
        mu = (weight * mu + w * g) / (weight + w)
        weight = (2 * b1 - 1) / b1 * weight + w                               # starts at b1 / (1 - b1)

    and ``nu`` and the bias corrections of Adam. As ``nu`` starts at zero, the first gradient counts next to nothing.

    Args:
        b1: in [0.5, 1): below, weights would turn negative. The first ``W`` is made of it in ``init``.
        b2: in [0, 1).
        eps: added outside of the root, and to ``nu`` in ``w``.
        dof: degrees of freedom; None is ``k_dof * size``. Infinity is Adam.
        k_dof: degrees of freedom per element.
        amsgrad: divide by the root of the largest ``nu`` so far, debiased afterwards.

    Source: Ilboudo et al., "TAdam" (arXiv 2003.00179).
    """
    check_flags(amsgrad=amsgrad)
    check_decay(b1=b1, b2=b2)
    check_nonnegative(eps=eps)
    check_bound(k_dof=k_dof)
    if (number := known(b1)) is not None and number < 0.5:
        raise ValueError(f"b1 must be in [0.5, 1), got {number}")
    if dof is not None:
        check_bound(dof=dof)
        if (number := known(dof)) == 0:
            raise ValueError(f"dof must be above 0, got {number}")

    def init(params: Params) -> TadamState:
        count, mu, nu, nu_max = adam_state(params, "scale_by_tadam", amsgrad)
        weight = tree.map(lambda p: torch.zeros_like(tree.wide(p).sum()) + b1 / (1 - b1), params)
        return TadamState(count, mu, nu, weight, nu_max)

    def fit(distance: Tensor, size: Tensor) -> Tensor:
        freedom = torch.zeros_like(size) + (k_dof * size if dof is None else dof)
        is_adam = freedom.isinf()
        freedom = torch.where(is_adam, 1.0, freedom)
        return torch.where(is_adam, 1.0, (freedom + size) / (freedom + distance))

    def update(
        updates: PyTree, state: TadamState, params: MaybeParams = None, **extra: Any
    ) -> tuple[PyTree, TadamState]:
        count = state.count + 1
        weight = state.weight
        if any(isinstance(x, float) and math.isinf(x) for x in (dof, k_dof)):
            w = tree.elementwise(torch.ones_like, weight)
        else:
            distance = tree.elementwise(
                lambda g, m, v: bounded((tree.wide(g) - m).square()) / (v + eps),
                updates,
                state.mu,
                state.nu,
            )
            w = tree.elementwise(fit, tree.leaf_sum(distance), sizes(updates))
        share = tree.elementwise(lambda total, new: new / (total + new), weight, w)
        mu = tree.elementwise(lambda g, m, s: m + s * (tree.wide(g) - m), updates, state.mu, share)
        nu = squares_average(updates, state.nu, b2)
        nu_max = tree.elementwise(torch.maximum, state.nu_max, nu) if amsgrad else ABSENT
        weight = tree.elementwise(lambda total, new: (2 * b1 - 1) / b1 * total + new, weight, w)
        c1, c2 = gains(b1, b2, count, scalar_dtype(updates))
        out = tree.elementwise(lambda m, v: m * c1 / (root(v, c2) + eps), mu, nu_max if amsgrad else nu)
        return out, TadamState(count, mu, nu, weight, nu_max)

    return GradientTransformation(init, update)


class NovogradState(NamedTuple):
    """Updates so far, momentum, and a moving average of the squared norm of each tensor's gradient."""

    count: Tensor  # type: ignore[assignment]
    mu: PyTree
    nu: PyTree


def scale_by_novograd(
    b1: Scalar = 0.95,
    b2: Scalar = 0.98,
    eps: Scalar = 1e-8,
    *,
    weight_decay: Scalar = 0.0,
) -> GradientTransformation:
    """``mu = b1 * mu + g / (sqrt(nu) + eps) + weight_decay * p`` with ``nu = b2 * nu + (1 - b2) * norm(g)**2``.

    ``nu`` is one number per tensor, and starts as the first ``norm(g)**2``.

    Source: Ginsburg et al., "Stochastic gradient methods with layer-wise adaptive moments" (arXiv 1905.11286).
    """
    check_decay(b1=b1, b2=b2)
    check_nonnegative(eps=eps, weight_decay=weight_decay)

    def init(params: Params) -> NovogradState:
        check_params(params, "scale_by_novograd")
        nu = tree.map(lambda p: torch.zeros_like(tree.wide(p).sum()), params)
        return NovogradState(zero_count(params), zeros(params), nu)

    def update(
        updates: PyTree, state: NovogradState, params: MaybeParams = None, **extra: Any
    ) -> tuple[PyTree, NovogradState]:
        need_params(params, "scale_by_novograd")
        squares = tree.leaf_sum(tree.elementwise(lambda g: tree.wide(g).square(), updates))
        keep = tree.hoist(b2 * (state.count > 0).to(scalar_dtype(updates)))
        nu = tree.elementwise(lambda s, v: s + keep * (v - bounded(s)), squares, state.nu)
        mu = tree.elementwise(
            lambda g, p, m, v: b1 * m + tree.wide(g) / (tree.safe_sqrt(v) + eps) + weight_decay * tree.wide(p),
            updates,
            params,
            state.mu,
            nu,
        )
        return mu, NovogradState(state.count + 1, mu, nu)

    return GradientTransformation(init, update)


# --- bounds and scales by layer ------------------------------------------------------------------------------------


def clip_by_block_rms(threshold: Scalar) -> GradientTransformation:
    """Scale each tensor's update down to a root mean square of at most ``threshold``.

    Source: Shazeer and Stern, Adafactor (arXiv 1804.04235), section 6.
    """
    check_bound(threshold=threshold)

    def fn(updates: PyTree, params: MaybeParams) -> PyTree:
        return tree.elementwise(
            lambda u, rms: tree.wide(u) / (rms / threshold).clamp_min(1.0), updates, block_rms(updates)
        )

    return stateless(fn, "clip_by_block_rms")


def normalize_by_update_norm(eps: Scalar = 1e-6) -> GradientTransformation:
    """``u / (norm(u) + eps)``, with the norm of all tensors together."""
    check_nonnegative(eps=eps)

    def fn(updates: PyTree, params: MaybeParams) -> PyTree:
        factor = tree.hoist(1 / (tree.global_norm(updates) + eps))
        return tree.elementwise(lambda u: tree.wide(u) * factor, updates)

    return stateless(fn, "normalize_by_update_norm")


def scale_by_param_block_norm(min_scale: Scalar = 1e-3) -> GradientTransformation:
    """``u * max(norm(p), min_scale)``, for each tensor."""
    return _scale_by_block(tree.leaf_norm, min_scale, "scale_by_param_block_norm")


def scale_by_param_block_rms(min_scale: Scalar = 1e-3) -> GradientTransformation:
    """``u * max(rms(p), min_scale)``, for each tensor."""
    return _scale_by_block(block_rms, min_scale, "scale_by_param_block_rms")


def _scale_by_block(measure: Any, min_scale: Scalar, name: str) -> GradientTransformation:
    check_nonnegative(min_scale=min_scale)

    def fn(updates: PyTree, params: MaybeParams) -> PyTree:
        need_params(params, name)
        return tree.elementwise(lambda u, s: tree.wide(u) * s.clamp_min(min_scale), updates, measure(params))

    return stateless(fn, name)
