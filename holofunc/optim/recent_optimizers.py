"""Muon, SOAP, Prodigy and the schedule-free pair: what neither torch nor Holocron has as a pure function."""

from typing import Any

import torch
from torch import Tensor

from holofunc import tree
from holofunc.optim.base import GradientTransformation, check_params, named_chain
from holofunc.optim.labels import Mask, check_labels, resolve
from holofunc.optim.lookahead import schedule_free
from holofunc.optim.masking import masked
from holofunc.optim.muon import Coefficients, scale_by_muon
from holofunc.optim.numerics import check_nonnegative, is_zero
from holofunc.optim.optimizers import adamw, descend, sgd
from holofunc.optim.prodigy import scale_by_prodigy
from holofunc.optim.soap import scale_by_soap
from holofunc.typing import Params, PyTree, Scalar, Schedule

__all__ = ["muon", "prodigy", "schedule_free_adamw", "schedule_free_sgd", "soap", "with_adam"]


def muon(
    learning_rate: Scalar | Schedule,
    *,
    momentum: Scalar = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    ns_coefficients: Coefficients = "classic",
    ns_dtype: torch.dtype | None = None,
    adjust: str = "original",
    conv: str = "flatten",
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
    matrices: Mask | None = None,
    adam_learning_rate: Scalar | Schedule | None = None,
    b1: Scalar = 0.9,
    b2: Scalar = 0.95,
    eps: Scalar = 1e-10,
) -> GradientTransformation:
    """Orthogonalized momentum for matrices, AdamW for everything else:

        mu = momentum * mu + (1 - momentum) * g
        u = orthogonalize(momentum * mu + (1 - momentum) * g) * sqrt(max(1, rows / columns))
        p = p - learning_rate * (u + weight_decay * p)

    Args:
        learning_rate: a number, a 0-d tensor or a schedule.
        momentum, nesterov, ns_steps, ns_coefficients, ns_dtype, adjust, conv: of `scale_by_muon`.
        weight_decay: decoupled.
        mask: True where weights decay; None is everywhere.
        matrices: True where Muon applies; None is every tensor of two or more axes. The authors leave embeddings and
            the last layer to Adam: `suits_muon` does so, and leaves out what is no matrix in convolutional networks.
        adam_learning_rate: of AdamW; None is ``learning_rate``, which suits ``adjust="match_rms"``.
        b1, b2, eps: of AdamW.

    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024); they orthogonalize in
    bfloat16, and leave AdamW to another optimizer.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.muon(0.02, adam_learning_rate=3e-4), {"w": torch.eye(2), "b": torch.ones(2)}
        >>> list(tx.init(params)["muon"]["muon"].mu), list(tx.init(params)["adam"]["adam"].mu)
        (['w'], ['b'])
    """

    rule = scale_by_muon(
        momentum,
        nesterov=nesterov,
        ns_steps=ns_steps,
        ns_coefficients=ns_coefficients,
        ns_dtype=ns_dtype,
        adjust=adjust,
        conv=conv,
    )
    main = descend(learning_rate, weight_decay, mask, decoupled=True, muon=rule)
    rate = learning_rate if adam_learning_rate is None else adam_learning_rate
    return with_adam(main, rate, matrices, name="muon", weight_decay=weight_decay, mask=mask, b1=b1, b2=b2, eps=eps)


def with_adam(
    tx: GradientTransformation,
    adam_learning_rate: Scalar | Schedule,
    matrices: Mask | None = None,
    *,
    name: str = "main",
    mask: Mask | None = None,
    **options: Any,
) -> GradientTransformation:
    """An optimizer for matrices, and AdamW for everything else.

    Args:
        tx: the optimizer of the matrices, a whole one.
        adam_learning_rate: of AdamW.
        matrices: True where ``tx`` applies; None is every tensor of two or more axes; see `suits_muon`.
        name: of its part of the state; the other one is called ``"adam"``.
        mask: of AdamW's decay, for all parameters.
        options: further ones of `adamw`.

    Example:
        >>> from holofunc import optim
        >>> tx = optim.with_adam(optim.chain(optim.scale_by_muon(), optim.scale(-0.02)), 3e-4, weight_decay=0.01)
    """
    check_nonnegative(True, adam_learning_rate=adam_learning_rate)

    def is_matrix(params: Params) -> PyTree:
        return tree.map_shapes(lambda shape: len(shape) > 1, params) if matrices is None else resolve(matrices, params)

    def is_other(params: Params) -> PyTree:
        return tree.map(lambda use: not use, is_matrix(params))

    adam = adamw(adam_learning_rate, mask=mask, **options)
    parts = named_chain(**{name: masked(tx, is_matrix), "adam": masked(adam, is_other)})

    def init(params: Params) -> PyTree:
        check_params(params, name)
        for what, labels in (("mask", mask), ("matrices", matrices)):
            if labels is not None:
                check_labels(what, labels, params, bool)
        return parts.init(params)

    return GradientTransformation(init, parts.update)


def soap(
    learning_rate: Scalar | Schedule,
    *,
    b1: Scalar = 0.95,
    b2: Scalar = 0.95,
    eps: Scalar = 1e-8,
    shampoo_beta: Scalar | None = None,
    precondition_frequency: int = 10,
    max_precond_dim: int = 10_000,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    """Adam in the eigenbasis of Shampoo's preconditioner. For a matrix, with the eigenvectors ``QL`` and ``QR`` of
    moving averages of ``g @ g.T`` and ``g.T @ g``:

        mu = b1 * mu + (1 - b1) * g
        nu = b2 * nu + (1 - b2) * (QL.T @ g @ QR)**2
        u = QL @ ((QL.T @ mu_hat @ QR) / (sqrt(nu_hat) + eps)) @ QR.T
        p = p - learning_rate * (u + weight_decay * p)         # not in the first update, which only sets the bases

    Args:
        learning_rate: a number, a 0-d tensor or a schedule.
        b1, b2, eps, shampoo_beta, precondition_frequency, max_precond_dim: of `scale_by_soap`.
        weight_decay: decoupled; from the second update on.
        mask: True where weights decay; None is everywhere.

    Source: Vyas et al. (arXiv 2409.11321), algorithms 3 and 4. New bases are computed in each update, and used when
    due.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.soap(0.1), {"w": torch.eye(2)}
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> updates["w"].abs().sum()                      # the first gradient only sets the basis
        tensor(0.)
    """
    rule = scale_by_soap(
        b1,
        b2,
        eps,
        shampoo_beta=shampoo_beta,
        precondition_frequency=precondition_frequency,
        max_precond_dim=max_precond_dim,
    )
    check_nonnegative(True, weight_decay=weight_decay)

    def from_the_second(count: Tensor) -> Tensor:
        return (count > 0).to(torch.float64) * (weight_decay(count) if callable(weight_decay) else weight_decay)

    decay = weight_decay if is_zero(weight_decay) else from_the_second
    return descend(learning_rate, decay, mask, decoupled=True, soap=rule)


def prodigy(
    learning_rate: Scalar | Schedule = 1.0,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    b3: Scalar | None = None,
    eps: Scalar = 1e-8,
    d0: float = 1e-6,
    d_coef: Scalar = 1.0,
    growth_rate: float | None = None,
    bias_corrected: bool = False,
    safeguard_warmup: bool = False,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    """Adam whose step size is an estimate ``d`` of the distance from the initial parameters to the solution:

        mu = b1 * mu + (1 - b1) * d * g
        nu = b2 * nu + (1 - b2) * (d * g)**2
        numerator = b3 * numerator + (1 - b3) * learning_rate * d**2 * <g, start - p>
        total = b3 * total + (1 - b3) * learning_rate * d**2 * g
        p = p - learning_rate * d * (mu / (sqrt(nu) + d * eps) + weight_decay * p)
        d = max(d, d_coef * numerator / norm1(total))

    Args:
        learning_rate: a factor: 1, or a schedule that ends at 0.
        b1, b2, b3, eps, d0, d_coef, growth_rate, bias_corrected, safeguard_warmup: of `scale_by_prodigy`; ``d0`` is
            used in ``init`` alone.
        weight_decay: decoupled; scaled by the estimated step size too.
        mask: True where weights decay; None is everywhere.

    Source: Mishchenko and Defazio (arXiv 2306.06101), algorithm 4; the options and the decay are those of their code.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.prodigy(), {"w": torch.ones(1)}
        >>> tx.init(params)["prodigy"].distance
        tensor(1.0000e-06)
    """
    rule = scale_by_prodigy(
        learning_rate,
        b1=b1,
        b2=b2,
        b3=b3,
        eps=eps,
        d0=d0,
        d_coef=d_coef,
        growth_rate=growth_rate,
        bias_corrected=bias_corrected,
        safeguard_warmup=safeguard_warmup,
        weight_decay=weight_decay,
        mask=mask,
    )
    return named_chain(prodigy=rule)


def schedule_free_sgd(
    learning_rate: Scalar | Schedule,
    *,
    b1: Scalar = 0.9,
    weight_power: float = 2.0,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    """Gradient descent whose averages replace momentum and schedule. The parameters are ``y``, where gradients are
    taken:

        z = z - learning_rate * (g + weight_decay * y)
        x = (1 - c) * x + c * z,  where c = weight / sum of weights and weight = (greatest learning_rate)**weight_power
        y = (1 - b1) * z + b1 * x

    Evaluate with `eval_params`, which returns ``x``.

    Args:
        learning_rate: a constant, or a warm-up.
        b1, weight_power: of `schedule_free`.
        weight_decay: L2 regularisation at the point where gradients are taken.
        mask: True where weights decay; None is everywhere.

    Source: Defazio et al. (arXiv 2405.15682). Their code warms up by an option of its own; here by a schedule.
    """
    return schedule_free(
        sgd(learning_rate, weight_decay=weight_decay, mask=mask), learning_rate, b1=b1, weight_power=weight_power
    )


def schedule_free_adamw(
    learning_rate: Scalar | Schedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_power: float = 2.0,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    """AdamW whose averages replace momentum and schedule. The parameters are ``y``, where gradients are taken:

        nu = b2 * nu + (1 - b2) * g**2
        z = z - learning_rate * (g / (sqrt(nu_hat) + eps) + weight_decay * y)
        x = (1 - c) * x + c * z,  where c = weight / sum of weights and weight = (greatest learning_rate)**weight_power
        y = (1 - b1) * z + b1 * x

    Evaluate with `eval_params`, which returns ``x``.

    Args:
        learning_rate: a constant, or a warm-up.
        b1, weight_power: of `schedule_free`.
        b2, eps: of `scale_by_adam`.
        weight_decay: decoupled, of the point where gradients are taken.
        mask: True where weights decay; None is everywhere.

    Source: Defazio et al. (arXiv 2405.15682), algorithm 1, with warm-up by a schedule and the bias correction in the
    denominator alone: it enters neither the weights nor the decay.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.schedule_free_adamw(0.1), {"w": torch.ones(1)}
        >>> updates, state = tx.update({"w": torch.ones(1)}, tx.init(params), params)
        >>> updates
        {'w': tensor([-0.1000])}
    """
    inner = adamw(learning_rate, b1=0.0, b2=b2, eps=eps, weight_decay=weight_decay, mask=mask)
    return schedule_free(inner, learning_rate, b1=b1, weight_power=weight_power)
