"""Optimizers that torch has too: each a docstring over a chain of named pieces, ``name(learning_rate, *, ...)``."""

import torch
from torch import Tensor

from holofunc.optim.adam import scale_by_adam, scale_by_nadam, scale_by_radam
from holofunc.optim.base import GradientTransformation, named_chain
from holofunc.optim.labels import Mask
from holofunc.optim.layerwise import scale_by_param_block_rms
from holofunc.optim.muon import scale_by_factored_rms
from holofunc.optim.numerics import check_decay, check_flags, check_nonnegative, is_zero
from holofunc.optim.rmsprop import (
    scale_by_adadelta,
    scale_by_adamax,
    scale_by_lion,
    scale_by_rms,
    scale_by_rprop,
    scale_by_rss,
)
from holofunc.optim.transforms import add_decayed_weights, ema, scale, scale_by_learning_rate, trace
from holofunc.typing import Scalar, Schedule

__all__ = [
    "adadelta",
    "adafactor",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "lion",
    "nadam",
    "radam",
    "rmsprop",
    "rprop",
    "sgd",
]


def descend(
    learning_rate: Scalar | Schedule,
    weight_decay: Scalar | Schedule,
    mask: Mask | None,
    *,
    decoupled: bool,
    **rules: GradientTransformation,
) -> GradientTransformation:
    """The shape of nearly all optimizers: weight decay, rules (decoupled: the other way round), learning rate."""
    check_flags(decoupled=decoupled)
    decay = {"weight_decay": add_decayed_weights(weight_decay, mask)}
    parts = {**rules, **decay} if decoupled else {**decay, **rules}
    return named_chain(**parts, learning_rate=scale_by_learning_rate(learning_rate))


def _momentum(momentum: Scalar, nesterov: bool = False, dampening: Scalar = 0.0) -> dict[str, GradientTransformation]:
    """No momentum, no buffer."""
    check_decay(momentum=momentum, dampening=dampening)
    check_flags(nesterov=nesterov)
    return {} if is_zero(momentum) else {"momentum": trace(momentum, nesterov=nesterov, dampening=dampening)}


def sgd(
    learning_rate: Scalar | Schedule,
    *,
    momentum: Scalar = 0.0,
    nesterov: bool = False,
    dampening: Scalar = 0.0,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    """Gradient descent with momentum, the rule of ``torch.optim.SGD``:

        g = g + weight_decay * p
        trace = momentum * trace + (1 - dampening) * g
        p = p - learning_rate * trace                          # nesterov: g + momentum * trace

    Args:
        learning_rate: a number, a 0-d tensor or a schedule.
        momentum: in [0, 1).
        nesterov: look one step ahead.
        dampening: in [0, 1); does not apply to the first gradient.
        weight_decay: L2 regularisation.
        mask: True where weights decay; None is everywhere.

    Source: Robbins and Monro (1951); momentum: Polyak (1964); nesterov: Sutskever et al., "On the importance of
    initialization and momentum in deep learning" (ICML 2013). These have the learning rate inside of the momentum; as
    in torch it stands outside, so that a new rate acts at once.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> params = {"w": torch.ones(1)}
        >>> tx = optim.sgd(0.1, momentum=0.9)
        >>> tx.update({"w": torch.ones(1)}, tx.init(params), params)[0]
        {'w': tensor([-0.1000])}
    """
    momenta = _momentum(momentum, nesterov, dampening)
    return descend(learning_rate, weight_decay, mask, decoupled=False, **momenta)


def adam(
    learning_rate: Scalar | Schedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    nesterov: bool = False,
    amsgrad: bool = False,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
    mu_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    """Adam:

        mu = b1 * mu + (1 - b1) * g
        nu = b2 * nu + (1 - b2) * g**2
        p = p - learning_rate * mu_hat / (sqrt(nu_hat) + eps)

    Args:
        learning_rate: a number, a 0-d tensor or a schedule.
        b1, b2, eps, eps_root, nesterov, amsgrad, mu_dtype: of `scale_by_adam`.
        weight_decay: L2 regularisation, added to ``g``; `adamw` decouples it.
        mask: True where weights decay; None is everywhere.

    Source: Kingma and Ba (arXiv 1412.6980), algorithm 1; ``nesterov``, ``amsgrad`` and the decay came later.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> params = {"w": torch.ones(1)}
        >>> tx = optim.adam(0.1)
        >>> tx.update({"w": torch.ones(1)}, tx.init(params), params)[0]
        {'w': tensor([-0.1000])}
    """
    rule = scale_by_adam(b1, b2, eps, eps_root=eps_root, nesterov=nesterov, amsgrad=amsgrad, mu_dtype=mu_dtype)
    return descend(learning_rate, weight_decay, mask, decoupled=False, adam=rule)


def adamw(
    learning_rate: Scalar | Schedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    nesterov: bool = False,
    amsgrad: bool = False,
    weight_decay: Scalar | Schedule = 1e-2,
    mask: Mask | None = None,
    mu_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    """Adam with decoupled weight decay: ``p - learning_rate * (mu_hat / (sqrt(nu_hat) + eps) + weight_decay * p)``.

    Args:
        learning_rate: a number, a 0-d tensor or a schedule.
        b1, b2, eps, eps_root, nesterov, amsgrad, mu_dtype: of `scale_by_adam`.
        weight_decay: decoupled; a number, a 0-d tensor or a schedule.
        mask: True where weights decay, e.g. `no_decay_mask`; None is everywhere.

    Source: Loshchilov and Hutter (arXiv 1711.05101), with the decay scaled by the learning rate as in torch and optax.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> params = {"w": torch.ones(1)}
        >>> tx = optim.adamw(optim.schedules.cosine(0.1, 1000), mask=optim.no_decay_mask)
        >>> tx.update({"w": torch.ones(1)}, tx.init(params), params)[0]
        {'w': tensor([-0.1000])}
    """
    rule = scale_by_adam(b1, b2, eps, eps_root=eps_root, nesterov=nesterov, amsgrad=amsgrad, mu_dtype=mu_dtype)
    return descend(learning_rate, weight_decay, mask, decoupled=True, adam=rule)


def nadam(
    learning_rate: Scalar | Schedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    momentum_decay: Scalar = 4e-3,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
    decoupled: bool = True,
) -> GradientTransformation:
    """Adam with Nesterov momentum that warms up; ``adam(nesterov=True)`` has constant momentum. With ``mu`` and ``nu``
    of `adam`, and ``product(t)`` of the momenta 1 to t:

        momentum(t) = b1 * (1 - 0.5 * 0.96**(t * momentum_decay))
        u = momentum(t + 1) * mu / (1 - product(t + 1)) + (1 - momentum(t)) * g / (1 - product(t))
        p = p - learning_rate * (u / (sqrt(nu_hat) + eps) + weight_decay * p)

    Args:
        learning_rate: a number, a 0-d tensor or a schedule.
        b1, b2, eps, momentum_decay: of `scale_by_nadam`.
        weight_decay: a number, a 0-d tensor or a schedule.
        mask: True where weights decay; None is everywhere.
        decoupled: False adds the decay to the gradient, as ``torch.optim.NAdam`` does by default.

    Source: Dozat, "Incorporating Nesterov momentum into Adam" (2016), in the form of ``torch.optim.NAdam``: ``mu``
    averages with ``b1`` throughout. The decay is decoupled by default.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.nadam(0.1), {"w": torch.ones(1)}
        >>> tx.update(params, tx.init(params), params)[0]
        {'w': tensor([-0.1056])}
    """
    rule = scale_by_nadam(b1, b2, eps, momentum_decay=momentum_decay)
    return descend(learning_rate, weight_decay, mask, decoupled=decoupled, nadam=rule)


def radam(
    learning_rate: Scalar | Schedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    threshold: float = 5.0,
    eps_scaled: bool = False,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
    decoupled: bool = True,
) -> GradientTransformation:
    """Rectified Adam: until the variance of its step can be told, the momentum alone. With ``mu`` and ``nu`` of `adam`:

        rho_inf = 2 / (1 - b2) - 1
        rho = rho_inf - 2 * count * b2**count / (1 - b2**count)
        r = sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
        u = r * mu_hat / (sqrt(nu_hat) + eps) if rho > threshold, otherwise mu_hat
        p = p - learning_rate * (u + weight_decay * p)

    Args:
        learning_rate: a number, a 0-d tensor or a schedule.
        b1, b2, eps, threshold, eps_scaled: of `scale_by_radam`; ``eps_scaled=True`` is ``torch.optim.RAdam``.
        weight_decay: a number, a 0-d tensor or a schedule.
        mask: True where weights decay; None is everywhere.
        decoupled: False adds the decay to the gradient.

    Source: Liu et al. (arXiv 1908.03265), with the threshold of the authors' code; the paper's is 4, and it has no
    decay.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.radam(0.1), {"w": torch.full((1,), 2.0)}
        >>> tx.update(params, tx.init(params), params)[0]
        {'w': tensor([-0.2000])}
    """
    rule = scale_by_radam(b1, b2, eps, threshold=threshold, eps_scaled=eps_scaled)
    return descend(learning_rate, weight_decay, mask, decoupled=decoupled, radam=rule)


def adamax(
    learning_rate: Scalar | Schedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
    decoupled: bool = True,
) -> GradientTransformation:
    """Adam with the maximum norm in place of the root:

        mu = b1 * mu + (1 - b1) * g;  nu = max(b2 * nu, abs(g) + eps)
        p = p - learning_rate * (mu_hat / nu + weight_decay * p)

    Args:
        learning_rate: a number, a 0-d tensor or a schedule.
        b1, b2, eps: of `scale_by_adamax`.
        weight_decay, mask, decoupled: as in `nadam`.

    Source: Kingma and Ba (arXiv 1412.6980), algorithm 2, which has no ``eps`` (here where torch has it) and no decay.
    """
    return descend(learning_rate, weight_decay, mask, decoupled=decoupled, adamax=scale_by_adamax(b1, b2, eps))


def rmsprop(
    learning_rate: Scalar | Schedule,
    *,
    decay: Scalar = 0.99,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    centered: bool = False,
    momentum: Scalar = 0.0,
    nesterov: bool = False,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    """Divide by the root of a moving average of the squares, with optional momentum afterwards:

        nu = decay * nu + (1 - decay) * g**2
        p = p - learning_rate * g / (sqrt(nu) + eps)

    Args:
        learning_rate: a number, a 0-d tensor or a schedule.
        decay, eps, eps_root, centered: of `scale_by_rms`; torch calls ``decay`` alpha.
        momentum, nesterov: of `trace`, after the division.
        weight_decay: L2 regularisation.
        mask: True where weights decay; None is everywhere.

    Source: Hinton, lecture 6e of "Neural networks for machine learning" (2012), which has no ``eps``; centered: Graves
    (arXiv 1308.0850).

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.rmsprop(0.1, decay=0.75), {"w": torch.ones(1)}
        >>> tx.update(params, tx.init(params), params)[0]
        {'w': tensor([-0.2000])}
    """
    rule = scale_by_rms(decay, eps, eps_root=eps_root, centered=centered)
    return descend(learning_rate, weight_decay, mask, decoupled=False, rms=rule, **_momentum(momentum, nesterov))


def adagrad(
    learning_rate: Scalar | Schedule,
    *,
    initial: float = 0.0,
    eps: Scalar = 1e-10,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    """Divide by the root of the sum of all squares so far: ``p - learning_rate * g / (sqrt(total) + eps)``.

    Args:
        learning_rate: a number, a 0-d tensor or a schedule.
        initial: first value of the sum. Used in ``init`` alone.
        eps: added outside of the root.
        weight_decay: L2 regularisation.
        mask: True where weights decay; None is everywhere.

    Source: Duchi et al. (JMLR 2011), in the form of ``torch.optim.Adagrad``.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.adagrad(0.1), {"w": torch.ones(1)}
        >>> tx.update(params, tx.init(params), params)[0]
        {'w': tensor([-0.1000])}
    """
    return descend(learning_rate, weight_decay, mask, decoupled=False, adagrad=scale_by_rss(initial, eps))


def adadelta(
    learning_rate: Scalar | Schedule = 1.0,
    *,
    decay: Scalar = 0.9,
    eps: Scalar = 1e-6,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    """Steps in units of the parameters:

        nu = decay * nu + (1 - decay) * g**2
        u = sqrt(delta + eps) / sqrt(nu + eps) * g;  delta = decay * delta + (1 - decay) * u**2
        p = p - learning_rate * u

    Args:
        learning_rate: a number, a 0-d tensor or a schedule.
        decay, eps: of `scale_by_adadelta`.
        weight_decay: L2 regularisation.
        mask: True where weights decay; None is everywhere.

    Source: Zeiler (arXiv 1212.5701), which has no learning rate (1) and no weight decay.
    """
    return descend(learning_rate, weight_decay, mask, decoupled=False, adadelta=scale_by_adadelta(decay, eps))


def rprop(
    learning_rate: float,
    *,
    eta_minus: Scalar = 0.5,
    eta_plus: Scalar = 1.2,
    min_step: Scalar = 1e-6,
    max_step: Scalar = 50.0,
) -> GradientTransformation:
    """Steps of their own for all elements, for full-batch gradients:

        step = clamp(step * eta_plus, or eta_minus where the sign of g has changed, min_step, max_step)
        p = p - step * sign(g)                                 # nothing where the sign has changed

    Args:
        learning_rate: the first step, a number. Used in ``init`` alone.
        eta_minus, eta_plus, min_step, max_step: of `scale_by_rprop`.

    Source: Riedmiller and Braun (1993), in the form of ``torch.optim.Rprop``: the step before a change of sign is not
    taken back.
    """
    rule = scale_by_rprop(learning_rate, eta_minus=eta_minus, eta_plus=eta_plus, min_step=min_step, max_step=max_step)
    return named_chain(rprop=rule, descent=scale(-1.0))


def lion(
    learning_rate: Scalar | Schedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    """Signs of a momentum, with decoupled weight decay:

        p = p - learning_rate * (sign(b1 * mu + (1 - b1) * g) + weight_decay * p)
        mu = b2 * mu + (1 - b2) * g

    Args:
        learning_rate: a number, a 0-d tensor or a schedule; a third to a tenth of Adam's.
        b1, b2: in [0, 1).
        weight_decay: a number, a 0-d tensor or a schedule; three to ten times AdamW's.
        mask: True where weights decay; None is everywhere.

    Source: Chen et al. (arXiv 2302.06675), algorithm 2, equal to it.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.lion(0.1), {"w": torch.tensor([5.0, -0.1])}
        >>> tx.update(params, tx.init(params), params)[0]
        {'w': tensor([-0.1000,  0.1000])}
    """
    return descend(learning_rate, weight_decay, mask, decoupled=True, lion=scale_by_lion(b1, b2))


def adafactor(
    learning_rate: Scalar | Schedule = 1e-2,
    *,
    relative_step: bool = True,
    decay_rate: float = 0.8,
    eps: Scalar = 1e-30,
    min_scale: Scalar = 1e-3,
    clip_threshold: Scalar = 1.0,
    b1: Scalar = 0.0,
    min_dim_size_to_factor: int = 2,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    """Adam without momentum, and with the second moment of a matrix factored into its rows and columns:

        u = g / sqrt(nu);  u = u / max(1, rms(u) / clip_threshold)
        p = p - rate * max(min_scale, rms(p)) * u,  rate = min(learning_rate, 1 / sqrt(count))

    Args:
        learning_rate: a number, a 0-d tensor or a schedule.
        relative_step: False takes ``learning_rate`` as it is.
        decay_rate, eps, min_dim_size_to_factor: of `scale_by_factored_rms`.
        min_scale: least root mean square that parameters count with.
        clip_threshold: greatest root mean square of ``u``.
        b1: of a moving average of the updates; 0 keeps none.
        weight_decay: decoupled; scaled by ``rate``.
        mask: True where weights decay; None is everywhere.

    Source: Shazeer and Stern (arXiv 1804.04235), algorithms 4 and 5, which have no decay. A tensor of more axes counts
    as (first axis, all others).

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.adafactor(), {"w": torch.ones(2, 3)}
        >>> [tuple(x.shape) for x in (tx.init(params)["factored"].rows["w"], tx.init(params)["factored"].columns["w"])]
        [(2,), (3,)]
    """
    check_flags(relative_step=relative_step)
    check_nonnegative(True, learning_rate=learning_rate)
    check_decay(b1=b1)

    def rate(count: Tensor) -> Tensor:
        limit = (count + 1).to(torch.float64).rsqrt()
        return limit.clamp_max(learning_rate(count) if callable(learning_rate) else learning_rate)

    momenta = {} if is_zero(b1) else {"momentum": ema(b1, debias=False)}
    factored = scale_by_factored_rms(
        decay_rate, eps, min_dim_size_to_factor=min_dim_size_to_factor, clip_threshold=clip_threshold
    )
    return descend(
        rate if relative_step else learning_rate,
        weight_decay,
        mask,
        decoupled=True,
        factored=factored,
        scale=scale_by_param_block_rms(min_scale),
        **momenta,
    )
