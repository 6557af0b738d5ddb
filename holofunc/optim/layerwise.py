"""LARS, LAMB, RaLars, NovoGrad: rules with one scalar per tensor."""

from typing import NamedTuple

import torch
from torch import Tensor

from holofunc import tree
from holofunc.optim.adam import scale_by_adam
from holofunc.optim.base import GradientTransformation, MaybeParams, named_chain, stateless
from holofunc.optim.capabilities import KeepsProgress
from holofunc.optim.checks import need_params
from holofunc.optim.deprecation import moved_to_holocron, renamed
from holofunc.optim.labels import Mask, check_mask, mask_values
from holofunc.optim.numerics import ABSENT, bounded, divisor, far_norm, is_zero, ratio_or_one, scalar_dtype, zeros
from holofunc.optim.radam import scale_by_radam
from holofunc.optim.ranges import check_bound, check_decay, check_flags, check_nonnegative
from holofunc.optim.scalars import value_at, zero_count
from holofunc.optim.transforms import add_decayed_weights, scale_by_learning_rate
from holofunc.typing import Params, PyTree, Scalar, Schedule

__all__ = [
    "LarsState", "NovogradState", "lamb", "lars", "ralars", "scale_by_lars", "scale_by_novograd",
    "scale_by_trust_ratio",
]  # fmt: skip


# --- trust ratios ------------------------------------------------------------------------------------------------


def scale_by_trust_ratio(
    trust_coefficient: Scalar = 1.0, eps: Scalar = 0.0, *, clip: tuple[float, float] | None = None
) -> GradientTransformation:
    """``u * trust_coefficient * norm(p) / (norm(u) + eps)`` for each tensor; ``u`` where a norm is zero.

    Args:
        trust_coefficient: at least 0.
        eps: at least 0.
        clip: ``(low, high)`` to which ``norm(p)`` is clamped first.

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
        ratios = tree.elementwise(ratio, tree.leaf_norm(params), far_norm(tree.leaf_norm, updates))
        return tree.elementwise(lambda u, r: tree.upcast(u) * r, updates, ratios)

    return stateless(fn)


@renamed(bias_correction="bias_corrected")
def lamb(
    learning_rate: Scalar | Schedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-6,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
    bias_corrected: bool = True,
    clip: tuple[float, float] | None = None,
) -> GradientTransformation:
    """Adam with a learning rate for each tensor, in proportion to its norm. With ``u`` of `scale_by_adam`:

        u = u + weight_decay * p
        p = p - learning_rate * norm(p) / norm(u) * u                  # the ratio is 1 where a norm is zero

    Args:
        learning_rate, weight_decay, mask: as `adamw`.
        b1, b2, eps: as `scale_by_adam`.
        bias_corrected: False takes ``mu`` and ``nu`` as they are (version 3 of the paper's text).
        clip: ``(low, high)`` to which ``norm(p)`` is clamped.

    Source: You et al. (arXiv 1904.00962).

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.lamb(0.1), {"w": torch.tensor([3.0, 4.0])}
        >>> tx.update({"w": torch.tensor([0.0, 7.0])}, tx.init(params), params)[0]
        {'w': tensor([-0.0000, -0.5000])}
    """
    check_flags(bias_corrected=bias_corrected)
    return named_chain(
        adam=scale_by_adam(b1, b2, eps, bias_corrected=bias_corrected),
        weight_decay=add_decayed_weights(weight_decay, mask),
        trust_ratio=scale_by_trust_ratio(clip=clip),
        learning_rate=scale_by_learning_rate(learning_rate),
    )


def ralars(
    learning_rate: Scalar | Schedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
    threshold: float = 4.0,
    force_adaptive_momentum: bool = False,
    clip: tuple[float, float] | None = (0.0, 10.0),
) -> GradientTransformation:
    """RAdam with a learning rate for each tensor, in proportion to its norm (at most 10). With ``u`` of
    `scale_by_radam`:

        u = u + weight_decay * p
        p = p - learning_rate * clamp(norm(p), *clip) / norm(u) * u    # the ratio is 1 where a norm is zero

    Args:
        learning_rate, weight_decay, mask: as `adamw`.
        b1, b2, eps, threshold, force_adaptive_momentum: as `scale_by_radam`.
        clip: ``(low, high)`` to which ``norm(p)`` is clamped; None is no clamp.

    Source: Holocron 0.3.0, equal to it; RAdam: Liu et al. (arXiv 1908.03265); ratio: You et al. (arXiv 1904.00962).

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.ralars(0.1), {"w": torch.tensor([3.0, 4.0])}
        >>> tx.update({"w": torch.tensor([0.0, 7.0])}, tx.init(params), params)[0]
        {'w': tensor([-0.0000, -0.5000])}
    """
    return named_chain(
        radam=scale_by_radam(b1, b2, eps, threshold=threshold, force_adaptive_momentum=force_adaptive_momentum),
        weight_decay=add_decayed_weights(weight_decay, mask),
        trust_ratio=scale_by_trust_ratio(clip=clip),
        learning_rate=scale_by_learning_rate(learning_rate),
    )


# --- LARS --------------------------------------------------------------------------------------------------------


class _Lars(NamedTuple):
    step: Tensor
    trace: PyTree


class LarsState(_Lars, KeepsProgress):
    """Updates so far, and the momentum buffer (absent without momentum)."""

    __slots__ = ()


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
    """The whole of `lars`, learning rate included, because two of its options need it.

    Args:
        learning_rate, momentum, weight_decay, trust_coefficient, eps, nesterov, dampening, trust_clip, lr_in_buffer,
            mask: as `lars`.
        ratio_in_buffer: False multiplies the whole momentum by the ratio of this update.
        zero_rule: the ratio is 1 where ``norm(p)``, or: ``"gradient"`` ``norm(g)``, ``"denominator"`` the denominator,
            is zero. The latter makes weights without a gradient shrink by a fixed fraction, whatever the decay.

    Source: You et al. (arXiv 1708.03888).
    """
    check_flags(nesterov=nesterov, ratio_in_buffer=ratio_in_buffer, lr_in_buffer=lr_in_buffer)
    check_nonnegative(True, learning_rate=learning_rate, weight_decay=weight_decay)
    check_nonnegative(trust_coefficient=trust_coefficient, eps=eps)
    check_decay(momentum=momentum, dampening=dampening)
    if trust_clip is not None:
        check_bound(trust_clip=trust_clip)
    if zero_rule not in ("gradient", "denominator"):
        raise ValueError(f"zero_rule must be 'gradient' or 'denominator', got {zero_rule!r}")

    def init(params: Params) -> LarsState:
        check_mask(mask, params)
        return LarsState(zero_count(params), ABSENT if is_zero(momentum) else zeros(params))

    def update(updates: PyTree, state: LarsState, params: MaybeParams = None) -> tuple[PyTree, LarsState]:
        need_params(params, "scale_by_lars")
        rate = value_at("learning_rate", learning_rate, state.step, updates)
        decay = value_at("weight_decay", weight_decay, state.step, updates)
        used = mask_values(mask, params)

        def trust(w: Tensor, g: Tensor, adapts: Tensor) -> Tensor:
            below = g + decay * w + eps
            valid = (w > 0) & ((g if zero_rule == "gradient" else below) > 0)
            ratio = ratio_or_one(trust_coefficient * w, below, valid)
            if trust_clip is not None:
                ratio = torch.clamp_max(ratio / rate, trust_clip)
            return torch.where(adapts > 0, ratio, 1.0)

        ratio = tree.elementwise(trust, tree.leaf_norm(params), far_norm(tree.leaf_norm, updates), used)
        if not ratio_in_buffer:
            inside, outside = tree.elementwise(torch.ones_like, ratio), ratio
        else:
            inside, outside = ratio, tree.elementwise(torch.ones_like, ratio)
        early, late = (rate, 1.0) if lr_in_buffer else (1.0, rate)
        step = tree.elementwise(
            lambda g, p, r, m: early * r * (tree.upcast(g) + decay * m * tree.upcast(p)), updates, params, inside, used
        )
        trace = ABSENT
        if not is_zero(momentum):
            gain = 1.0 if is_zero(dampening) else 1 - dampening * (state.step > 0).to(scalar_dtype(updates))
            trace = tree.elementwise(lambda u, t: momentum * t + gain * u, step, state.trace)
            step = tree.elementwise(lambda u, t: u + momentum * t, step, trace) if nesterov else trace
        out = tree.elementwise(lambda u, r: -late * r * u, step, outside)
        return out, LarsState(state.step + 1, trace)

    return GradientTransformation(init, update)


@moved_to_holocron(ratio_in_buffer=True, zero_rule="gradient")
def lars(
    learning_rate: Scalar | Schedule,
    *,
    momentum: Scalar = 0.9,
    weight_decay: Scalar | Schedule = 0.0,
    trust_coefficient: Scalar = 1e-3,
    eps: Scalar = 0.0,
    nesterov: bool = False,
    dampening: Scalar = 0.0,
    trust_clip: Scalar | None = None,
    lr_in_buffer: bool = False,
    mask: Mask | None = None,
) -> GradientTransformation:
    """Momentum with a learning rate for each tensor, in proportion to its norm:

        ratio = trust_coefficient * norm(p) / (norm(g) + weight_decay * norm(p) + eps)
        trace = momentum * trace + ratio * (g + weight_decay * p)
        p = p - learning_rate * trace

    Args:
        learning_rate: a number, a 0-d tensor or a schedule.
        momentum: in [0, 1).
        weight_decay: inside the ratio.
        trust_coefficient: at least 0.
        eps: added to the denominator.
        nesterov, dampening: as in `sgd`.
        trust_clip: greatest ``ratio / learning_rate``; 1 is LARC.
        lr_in_buffer: multiply by the learning rate before the momentum, as the paper prints it; both are the same while
            the learning rate stays.
        mask: True where ratio and decay apply; None is everywhere. Usually `no_decay_mask`.

    Source: You et al. (arXiv 1708.03888), with a ratio of 1 where ``norm(p)`` or ``norm(g)`` is zero.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.lars(1.0, trust_coefficient=0.1), {"w": torch.tensor([3.0, 4.0])}
        >>> tx.update({"w": torch.tensor([0.0, 10.0])}, tx.init(params), params)[0]
        {'w': tensor([-0.0000, -0.5000])}
    """
    return named_chain(
        lars=scale_by_lars(
            learning_rate,
            momentum=momentum,
            weight_decay=weight_decay,
            trust_coefficient=trust_coefficient,
            eps=eps,
            nesterov=nesterov,
            dampening=dampening,
            trust_clip=trust_clip,
            lr_in_buffer=lr_in_buffer,
            mask=mask,
        )
    )


# --- NovoGrad ----------------------------------------------------------------------------------------------------


class NovogradState(NamedTuple):
    """Updates so far, momentum, and a moving average of the squared norm of each tensor's gradient."""

    step: Tensor
    mu: PyTree
    nu: PyTree


def scale_by_novograd(
    b1: Scalar = 0.95, b2: Scalar = 0.98, eps: Scalar = 1e-8, *, weight_decay: Scalar = 0.0
) -> GradientTransformation:
    """``mu = b1 * mu + g / (sqrt(nu) + eps) + weight_decay * p`` with ``nu = b2 * nu + (1 - b2) * norm(g)**2``.

    ``nu`` is one scalar per tensor, and starts as the first ``norm(g)**2``.

    Source: Ginsburg et al., "Stochastic gradient methods with layer-wise adaptive moments" (arXiv 1905.11286).
    """
    check_decay(b1=b1, b2=b2)
    check_nonnegative(eps=eps, weight_decay=weight_decay)

    def init(params: Params) -> NovogradState:
        nu = tree.map(lambda p: torch.zeros_like(tree.upcast(p).sum()), params)
        return NovogradState(zero_count(params), zeros(params), nu)

    def update(updates: PyTree, state: NovogradState, params: MaybeParams = None) -> tuple[PyTree, NovogradState]:
        need_params(params, "scale_by_novograd")
        squares = tree.leaf_sum(tree.elementwise(lambda g: tree.upcast(g).square(), updates))
        keep = tree.hoist(b2 * (state.step > 0).to(scalar_dtype(updates)))
        nu = tree.elementwise(lambda s, v: s + keep * (v - bounded(s)), squares, state.nu)
        mu = tree.elementwise(
            lambda g, p, m, v: (
                b1 * m + tree.upcast(g) / divisor(tree.safe_sqrt(v), eps) + weight_decay * tree.upcast(p)
            ),
            updates,
            params,
            state.mu,
            nu,
        )
        return mu, NovogradState(state.step + 1, mu, nu)

    return GradientTransformation(init, update)
