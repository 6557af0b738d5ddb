"""Holocron's optimizers: the rules of Holocron 0.3.0 (``pylocron``) where they deviate from those of their authors.

The names of `holofunc.optim`, with Holocron's numbers by default; arguments that are not described here are those of
the function of the same name there. The learning rate is to be given.

    >>> from holofunc import optim
    >>> tx = optim.holocron.lamb(1e-3, weight_decay=0.01)

"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, cast

from holofunc.optim.adam_variants import tadam as authors_tadam
from holofunc.optim.adamp import scale_by_adamp
from holofunc.optim.adan import scale_by_adan, scale_by_proximal_descent
from holofunc.optim.ademamix import ademamix as authors_ademamix
from holofunc.optim.base import GradientTransformation, named_chain
from holofunc.optim.deprecation import renamed
from holofunc.optim.labels import Mask
from holofunc.optim.layerwise import lamb as authors_lamb
from holofunc.optim.layerwise import ralars, scale_by_lars
from holofunc.optim.lookahead import lookahead, scout_of
from holofunc.optim.radam import adabelief as authors_adabelief
from holofunc.optim.ranges import check_flags
from holofunc.optim.transforms import add_decayed_weights, descend, scale_by_learning_rate
from holofunc.typing import Scalar, Schedule

__all__ = ["adabelief", "adamp", "adan", "ademamix", "lamb", "lars", "lookahead", "ralars", "scout", "tadam"]

P = ParamSpec("P")
Builder = Callable[P, GradientTransformation]


def _like(builder: Builder[P], **defaults: Any) -> Callable[[Callable[..., GradientTransformation]], Builder[P]]:
    """Give a function the arguments of ``builder``, with other ``defaults`` for some."""
    signature = inspect.signature(builder)
    changed = [p.replace(default=defaults.get(n, p.default)) for n, p in signature.parameters.items()]

    def decorate(fn: Callable[..., GradientTransformation]) -> Builder[P]:
        @functools.wraps(fn)
        def filled(*args: Any, **options: Any) -> GradientTransformation:
            return fn(*args, **{**defaults, **options})

        filled.__signature__ = signature.replace(parameters=changed)  # type: ignore[attr-defined]
        return cast(Builder[P], filled)

    return decorate


@_like(scale_by_lars, momentum=0.0, trust_coefficient=1.0, ratio_in_buffer=False, zero_rule="denominator")
def lars(learning_rate: Scalar | Schedule, **options: Any) -> GradientTransformation:
    """`holofunc.optim.lars` whose ratio multiplies the whole momentum, without a trust coefficient.

    Holocron's ``scale_clip`` has no effect there, and is left out.

    Args:
        ratio_in_buffer, zero_rule: as `scale_by_lars`.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.holocron.lars(1.0), {"w": torch.tensor([3.0, 4.0])}
        >>> tx.update({"w": torch.tensor([0.0, 10.0])}, tx.init(params), params)[0]
        {'w': tensor([-0., -5.])}
    """
    return named_chain(lars=scale_by_lars(learning_rate, **options))


@renamed(bias_correction="bias_corrected")
@_like(authors_lamb, eps=1e-8, bias_corrected=False, clip=(0.0, 10.0))
def lamb(learning_rate: Scalar | Schedule, **options: Any) -> GradientTransformation:
    """`holofunc.optim.lamb` of moments that are not debiased, with norms of parameters cut at 10."""
    return authors_lamb(learning_rate, **options)


@_like(authors_tadam, decoupled=False)
def tadam(learning_rate: Scalar | Schedule, **options: Any) -> GradientTransformation:
    """`holofunc.optim.tadam` with L2 regularisation."""
    return authors_tadam(learning_rate, **options)


@_like(authors_adabelief, eps=1e-8, eps_root=0.0, decoupled=False)
def adabelief(learning_rate: Scalar | Schedule, **options: Any) -> GradientTransformation:
    """`holofunc.optim.adabelief` without ``eps_root``, with L2 regularisation."""
    return authors_adabelief(learning_rate, **options)


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
    views: tuple[str, ...] = ("layer",),
    absolute: bool = False,
    min_ndim: int = 0,
    decoupled: bool = False,
) -> GradientTransformation:
    """`holofunc.optim.adamp` that keeps the sign of its cosine, so that a bias that wants to grow cannot; L2.

    Args:
        views, absolute, min_ndim: as `scale_by_adamp`.
        decoupled: False adds the decay to the gradient, without ``wd_ratio``.
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
    prev: str = "zero",
    l2_too: bool = True,
) -> GradientTransformation:
    """`holofunc.optim.adan` without a previous gradient, and so without Nesterov's term; weights decay twice.

    Args:
        prev: as `scale_by_adan`.
        l2_too: add the decay to the gradient as well.
    """
    check_flags(prox=prox, l2_too=l2_too)
    parts = {"l2": add_decayed_weights(weight_decay, mask)} if l2_too else {}
    parts["adan"] = scale_by_adan(b1, b2, b3, eps, amsgrad=amsgrad, prev=prev)
    if prox:
        return named_chain(**parts, descent=scale_by_proximal_descent(learning_rate, weight_decay, mask))
    return descend(learning_rate, weight_decay, mask, decoupled=True, **parts)


@_like(authors_ademamix, decoupled=False)
def ademamix(learning_rate: Scalar | Schedule, **options: Any) -> GradientTransformation:
    """`holofunc.optim.ademamix` with L2 regularisation."""
    return authors_ademamix(learning_rate, **options)


def scout(
    tx: GradientTransformation, sync_rate: Scalar = 0.5, sync_period: int = 6, *, compat: bool = True
) -> GradientTransformation:
    """`holofunc.optim.scout` with the raw statistic.

    Args:
        compat: equal updates make NaN, which throws the weights back to the last sync.
    """
    return scout_of(tx, sync_rate, sync_period, compat=compat)
