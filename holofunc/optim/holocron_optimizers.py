"""Optimizers that Holocron has too, by their authors' rules; options bring back Holocron 0.3.0's where it differs."""

from holofunc.optim.adam import scale_by_adam, scale_by_radam
from holofunc.optim.adamp import scale_by_adamp
from holofunc.optim.adan import scale_by_adan, scale_by_ademamix, scale_by_belief, scale_by_proximal_descent
from holofunc.optim.base import GradientTransformation, named_chain
from holofunc.optim.labels import Mask
from holofunc.optim.layerwise import scale_by_lars, scale_by_tadam, scale_by_trust_ratio
from holofunc.optim.numerics import check_count, check_decay, check_flags, check_nonnegative
from holofunc.optim.optimizers import descend
from holofunc.optim.schedules import half_life, linear
from holofunc.optim.transforms import add_decayed_weights, scale_by_learning_rate
from holofunc.typing import Scalar, Schedule

__all__ = ["adabelief", "adamp", "adan", "ademamix", "lamb", "lars", "ralars", "tadam"]


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
    ratio_in_buffer: bool = True,
    lr_in_buffer: bool = False,
    zero_rule: str = "gradient",
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
        ratio_in_buffer: False multiplies the whole momentum by today's ratio.
        lr_in_buffer: multiply by the learning rate before the momentum, as the paper prints it; both are the same while
            the learning rate stays.
        zero_rule: the ratio is 1 where ``norm(p)``, or: ``"gradient"`` ``norm(g)``, ``"denominator"`` the denominator,
            is zero. The latter makes weights without a gradient shrink by a fixed fraction, whatever the decay.
        mask: True where ratio and decay apply; None is everywhere. Usually `no_decay_mask`.

    Source: You et al. (arXiv 1708.03888). Holocron 0.3.0: ``ratio_in_buffer=False, trust_coefficient=1,
    zero_rule="denominator"``; its ``scale_clip`` has no effect.

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
            ratio_in_buffer=ratio_in_buffer,
            lr_in_buffer=lr_in_buffer,
            zero_rule=zero_rule,
            mask=mask,
        )
    )


def lamb(
    learning_rate: Scalar | Schedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-6,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
    bias_correction: bool = True,
    clip: tuple[float, float] | None = None,
) -> GradientTransformation:
    """Adam with a learning rate for each tensor, in proportion to its norm:

        u = mu_hat / (sqrt(nu_hat) + eps) + weight_decay * p
        p = p - learning_rate * norm(p) / norm(u) * u                  # the ratio is 1 where a norm is zero

    Args:
        learning_rate: a number, a 0-d tensor or a schedule.
        b1, b2, eps: of `scale_by_adam`.
        weight_decay: a number, a 0-d tensor or a schedule.
        mask: True where weights decay; None is everywhere.
        bias_correction: False takes ``mu`` and ``nu`` as they are (version 3 of the paper's text).
        clip: ``(low, high)`` to which ``norm(p)`` is clamped.

    Source: You et al. (arXiv 1904.00962). Holocron 0.3.0: ``bias_correction=False, clip=(0, 10), eps=1e-8``.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.lamb(0.1), {"w": torch.tensor([3.0, 4.0])}
        >>> tx.update({"w": torch.tensor([0.0, 7.0])}, tx.init(params), params)[0]
        {'w': tensor([-0.0000, -0.5000])}
    """
    check_flags(bias_correction=bias_correction)
    return named_chain(
        adam=scale_by_adam(b1, b2, eps, bias_corrected=bias_correction),
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
    """RAdam with a learning rate for each tensor, in proportion to its norm (at most 10).

        u = r * mu_hat / (sqrt(nu_hat) + eps), or mu_hat while rho <= threshold;  u = u + weight_decay * p
        p = p - learning_rate * clamp(norm(p), *clip) / norm(u) * u    # the ratio is 1 where a norm is zero

    Args:
        learning_rate: a number, a 0-d tensor or a schedule.
        b1, b2, eps, threshold, force_adaptive_momentum: of `scale_by_radam`.
        weight_decay: a number, a 0-d tensor or a schedule.
        mask: True where weights decay; None is everywhere.
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


def tadam(
    learning_rate: Scalar | Schedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
    amsgrad: bool = False,
    dof: float | None = None,
    k_dof: float = 1.0,
    decoupled: bool = False,
) -> GradientTransformation:
    """Adam that discounts outliers among the gradients, tensor by tensor (d: its size):

        w = (dof + d) / (dof + sum((g - mu)**2 / (nu + eps)))
        mu = (W * mu + w * g) / (W + w);  W = (2 * b1 - 1) / b1 * W + w
        nu = b2 * nu + (1 - b2) * g**2
        p = p - learning_rate * mu_hat / (sqrt(nu_hat) + eps)

    Args:
        learning_rate: a number, a 0-d tensor or a schedule.
        b1, b2, eps, amsgrad, dof, k_dof: of `scale_by_tadam`. ``dof=inf`` is Adam. The first ``W`` is ``b1 / (1 - b1)``
            by the ``b1`` of ``init``.
        weight_decay: L2 regularisation.
        mask: True where weights decay; None is everywhere.
        decoupled: add the decay behind the rule instead.

    Source: Ilboudo et al. (arXiv 2003.00179). Holocron 0.3.0 is the same; its docstring shows another rule.

    Example:
        >>> import math, torch
        >>> from holofunc import optim
        >>> tx, params = optim.tadam(0.1, dof=math.inf), {"w": torch.ones(1)}
        >>> tx.update(params, tx.init(params), params)[0]
        {'w': tensor([-0.1000])}
    """
    rule = scale_by_tadam(b1, b2, eps, dof=dof, k_dof=k_dof, amsgrad=amsgrad)
    return descend(learning_rate, weight_decay, mask, decoupled=decoupled, tadam=rule)


def adabelief(
    learning_rate: Scalar | Schedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-16,
    eps_root: Scalar = 1e-16,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
    decoupled: bool = True,
    rectify: bool = False,
    amsgrad: bool = False,
    nesterov: bool = False,
) -> GradientTransformation:
    """Adam whose steps are long where gradients are as expected:

        nu = b2 * nu + (1 - b2) * (g - mu)**2 + eps_root
        p = p - learning_rate * (mu_hat / (sqrt(nu_hat) + eps) + weight_decay * p)

    Args:
        learning_rate: a number, a 0-d tensor or a schedule.
        b1, b2, eps, eps_root, rectify, amsgrad, nesterov: of `scale_by_belief`.
        weight_decay: a number, a 0-d tensor or a schedule.
        mask: True where weights decay; None is everywhere.
        decoupled: False adds the decay to the gradient.

    Source: Zhuang et al. (arXiv 2010.07468); the authors' code rectifies by default. Holocron 0.3.0:
    ``eps_root=0, eps=1e-8, decoupled=False``.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.adabelief(0.1), {"w": torch.ones(1)}
        >>> tx.update(params, tx.init(params), params)[0]
        {'w': tensor([-0.1111])}
    """
    rule = scale_by_belief(b1, b2, eps, eps_root=eps_root, rectify=rectify, amsgrad=amsgrad, nesterov=nesterov)
    return descend(learning_rate, weight_decay, mask, decoupled=decoupled, belief=rule)


def adamp(
    learning_rate: Scalar | Schedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
    delta: Scalar = 0.1,
    wd_ratio: Scalar = 0.1,
    nesterov: bool = False,
    amsgrad: bool = False,
    views: tuple[str, ...] = ("channel", "layer"),
    absolute: bool = True,
    min_ndim: int = 2,
    decoupled: bool = True,
) -> GradientTransformation:
    """Adam without the part of the update that only makes scale-invariant weights longer:

        u = mu_hat / (sqrt(nu_hat) + eps)
        if abs(cos(g, p)) < delta / sqrt(size):                # for the rows of a view: `scale_by_adamp`
            u = u - <u, p> * p / norm(p)**2;  weight_decay = weight_decay * wd_ratio
        p = p - learning_rate * (u + weight_decay * p)

    Args:
        learning_rate: a number, a 0-d tensor or a schedule.
        b1, b2, eps, delta, wd_ratio, nesterov, amsgrad, views, absolute, min_ndim: of `scale_by_adamp`.
        weight_decay: a number, a 0-d tensor or a schedule.
        mask: True where weights decay; None is everywhere.
        decoupled: False adds the decay to the gradient, without ``wd_ratio``.

    Source: Heo et al. (arXiv 2006.08217), the authors' rule. Holocron 0.3.0: ``views=("layer",), absolute=False,
    min_ndim=0, decoupled=False``, with which a bias that wants to grow cannot.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.adamp(0.1), {"w": torch.tensor([[1.0, 0.0]])}
        >>> tx.update({"w": torch.tensor([[0.0, 1.0]])}, tx.init(params), params)[0]
        {'w': tensor([[-0.0000, -0.1000]])}
    """
    check_flags(decoupled=decoupled)
    rule = scale_by_adamp(
        b1,
        b2,
        eps,
        weight_decay=weight_decay if decoupled else 0.0,
        mask=mask,
        delta=delta,
        wd_ratio=wd_ratio,
        nesterov=nesterov,
        amsgrad=amsgrad,
        views=views,
        absolute=absolute,
        min_ndim=min_ndim,
    )
    if decoupled:
        return named_chain(adamp=rule, learning_rate=scale_by_learning_rate(learning_rate))
    return descend(learning_rate, weight_decay, mask, decoupled=False, adamp=rule)


def adan(
    learning_rate: Scalar | Schedule,
    *,
    b1: Scalar = 0.98,
    b2: Scalar = 0.92,
    b3: Scalar = 0.99,
    eps: Scalar = 1e-8,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
    prox: bool = True,
    amsgrad: bool = False,
    prev: str = "grad",
    l2_too: bool = False,
) -> GradientTransformation:
    """Adam with Nesterov momentum from differences of gradients, ``d = g - previous g`` (0 at first):

        mu = b1 * mu + (1 - b1) * g;  delta = b2 * delta + (1 - b2) * d;  nu = b3 * nu + (1 - b3) * (g + b2 * d)**2
        u = (mu_hat + b2 * delta_hat) / (sqrt(nu_hat) + eps)
        p = (p - learning_rate * u) / (1 + learning_rate * weight_decay)

    Args:
        learning_rate: a number, a 0-d tensor or a schedule.
        b1, b2, b3, eps, amsgrad, prev: of `scale_by_adan`; the betas are 1 minus the paper's.
        weight_decay: a number, a 0-d tensor or a schedule.
        mask: True where weights decay; None is everywhere.
        prox: False decays as `adamw` does.
        l2_too: add the decay to the gradient as well.

    Source: Xie et al. (arXiv 2208.06677), the authors' code without its optional clipping (`clip_by_global_norm`).
    Holocron 0.3.0: ``prev="zero", l2_too=True``.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.adan(0.1), {"w": torch.ones(1)}
        >>> tx.update(params, tx.init(params), params)[0]
        {'w': tensor([-0.1000])}
    """
    check_flags(prox=prox, l2_too=l2_too)
    parts = {"l2": add_decayed_weights(weight_decay, mask)} if l2_too else {}
    parts["adan"] = scale_by_adan(b1, b2, b3, eps, amsgrad=amsgrad, prev=prev)
    if prox:
        return named_chain(**parts, descent=scale_by_proximal_descent(learning_rate, weight_decay, mask))
    return descend(learning_rate, weight_decay, mask, decoupled=True, **parts)


def ademamix(
    learning_rate: Scalar | Schedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    b3: Scalar | Schedule = 0.9999,
    alpha: Scalar | Schedule = 5.0,
    eps: Scalar = 1e-8,
    alpha_warmup: int | None = None,
    b3_warmup: int | None = None,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
    decoupled: bool = True,
) -> GradientTransformation:
    """AdamW with a second, slower momentum:

        mu_slow = b3 * mu_slow + (1 - b3) * g
        p = p - learning_rate * ((mu_hat + alpha * mu_slow) / (sqrt(nu_hat) + eps) + weight_decay * p)

    Args:
        learning_rate: a number, a 0-d tensor or a schedule.
        b1, b2, b3, alpha, eps: of `scale_by_ademamix`. ``b1=0`` keeps no fast momentum.
        alpha_warmup: updates over which ``alpha``, a number, grows linearly from 0.
        b3_warmup: updates over which ``b3``, a number, grows from ``b1``, its half-life linearly.
        weight_decay: a number, a 0-d tensor or a schedule.
        mask: True where weights decay; None is everywhere.
        decoupled: False adds the decay to the gradient.

    Source: Pagliardini et al. (arXiv 2409.03137). The paper warms both up over the whole run. Holocron 0.3.0:
    ``decoupled=False``.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.ademamix(0.1, alpha_warmup=1000, b3_warmup=1000), {"w": torch.ones(1)}
        >>> tx.update(params, tx.init(params), params)[0]
        {'w': tensor([-0.1000])}
    """
    if alpha_warmup is not None:
        check_count(alpha_warmup=alpha_warmup)
        alpha = _counted_from_one(linear(0.0, _number(alpha=alpha), alpha_warmup))
    if b3_warmup is not None:
        check_count(b3_warmup=b3_warmup)
        check_decay(b1=b1)
        b3 = _counted_from_one(half_life(b1, _number(b3=b3), b3_warmup))
    rule = scale_by_ademamix(b1, b2, b3, alpha, eps)
    return descend(learning_rate, weight_decay, mask, decoupled=decoupled, ademamix=rule)


def _counted_from_one(schedule: Schedule) -> Schedule:
    return lambda step: schedule(step + 1)


def _number(**named: Scalar | Schedule) -> Scalar:
    ((name, value),) = named.items()
    if callable(value):
        raise TypeError(f"{name} must be a number where it is to be warmed up, got a schedule")
    check = check_decay if name == "b3" else check_nonnegative
    check(**named)
    return value
