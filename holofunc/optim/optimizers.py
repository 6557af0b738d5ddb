"""Optimizers: a docstring over a chain of named pieces, each ``name(learning_rate, *, ...)``."""

from holofunc.optim.adam import scale_by_adam
from holofunc.optim.base import GradientTransformation, named_chain
from holofunc.optim.labels import Mask
from holofunc.optim.scalars import is_zero
from holofunc.optim.transforms import add_decayed_weights, scale_by_learning_rate, trace
from holofunc.typing import Scalar, Schedule

__all__ = ["adam", "adamw", "sgd"]


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

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> params = {"w": torch.ones(1)}
        >>> tx = optim.sgd(0.1, momentum=0.9)
        >>> tx.update({"w": torch.ones(1)}, tx.init(params), params)[0]
        {'w': tensor([-0.1000])}
    """
    momenta = {} if is_zero(momentum) else {"momentum": trace(momentum, nesterov=nesterov, dampening=dampening)}
    return named_chain(
        weight_decay=add_decayed_weights(weight_decay, mask),
        **momenta,
        learning_rate=scale_by_learning_rate(learning_rate),
    )


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
) -> GradientTransformation:
    """Adam:

        mu = b1 * mu + (1 - b1) * g
        nu = b2 * nu + (1 - b2) * g**2
        p = p - learning_rate * mu_hat / (sqrt(nu_hat) + eps)

    Args:
        learning_rate: a number, a 0-d tensor or a schedule.
        b1, b2, eps, eps_root, nesterov, amsgrad: of `scale_by_adam`.
        weight_decay: L2 regularisation, added to ``g``; `adamw` decouples it.
        mask: True where weights decay; None is everywhere.

    Source: Kingma and Ba (arXiv 1412.6980).

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> params = {"w": torch.ones(1)}
        >>> tx = optim.adam(0.1)
        >>> tx.update({"w": torch.ones(1)}, tx.init(params), params)[0]
        {'w': tensor([-0.1000])}
    """
    return named_chain(
        weight_decay=add_decayed_weights(weight_decay, mask),
        adam=scale_by_adam(b1, b2, eps, eps_root=eps_root, nesterov=nesterov, amsgrad=amsgrad),
        learning_rate=scale_by_learning_rate(learning_rate),
    )


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
) -> GradientTransformation:
    """Adam with decoupled weight decay: ``p - learning_rate * (mu_hat / (sqrt(nu_hat) + eps) + weight_decay * p)``.

    Args:
        learning_rate: a number, a 0-d tensor or a schedule.
        b1, b2, eps, eps_root, nesterov, amsgrad: of `scale_by_adam`.
        weight_decay: decoupled; a number, a 0-d tensor or a schedule.
        mask: True where weights decay, e.g. `no_decay_mask`; None is everywhere.

    Source: Loshchilov and Hutter (arXiv 1711.05101).

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> params = {"w": torch.ones(1)}
        >>> tx = optim.adamw(optim.schedules.cosine(0.1, 1000), mask=optim.no_decay_mask)
        >>> tx.update({"w": torch.ones(1)}, tx.init(params), params)[0]
        {'w': tensor([-0.1000])}
    """
    return named_chain(
        adam=scale_by_adam(b1, b2, eps, eps_root=eps_root, nesterov=nesterov, amsgrad=amsgrad),
        weight_decay=add_decayed_weights(weight_decay, mask),
        learning_rate=scale_by_learning_rate(learning_rate),
    )
