"""RMSProp, Adagrad, Adadelta, MADGRAD: the gradient over a root of accumulated squares."""

from typing import NamedTuple

import torch
from torch import Tensor

from holofunc import tree
from holofunc.optim.base import GradientTransformation, MaybeParams, composed, named_chain
from holofunc.optim.capabilities import Descends, KeepsStart
from holofunc.optim.checks import need_params
from holofunc.optim.deprecation import renamed
from holofunc.optim.labels import Mask
from holofunc.optim.numerics import ABSENT, bounded, copies, divisor, root, scalar_dtype, squares_average, zeros
from holofunc.optim.ranges import check_decay, check_flags, check_nonnegative
from holofunc.optim.scalars import value_at, zero_count
from holofunc.optim.sgd import momentum_or_none
from holofunc.optim.transforms import add_decayed_weights, descend, moving_average
from holofunc.typing import Params, PyTree, Scalar, Schedule

__all__ = [
    "AdadeltaState", "MadgradState", "RmsState", "RssState", "adadelta", "adagrad", "madgrad", "rmsprop",
    "scale_by_adadelta", "scale_by_madgrad", "scale_by_rms", "scale_by_rss",
]  # fmt: skip


# --- RMSProp -----------------------------------------------------------------------------------------------------


class RmsState(NamedTuple):
    """Moving average of the squares; that of the gradients if centered."""

    nu: PyTree
    mu: PyTree = ABSENT


@renamed(initial="initial_scale")
def scale_by_rms(
    decay: Scalar = 0.9,
    eps: Scalar = 1e-8,
    *,
    eps_root: Scalar = 0.0,
    initial_scale: float = 0.0,
    centered: bool = False,
) -> GradientTransformation:
    """``g / (sqrt(nu + eps_root) + eps)`` with ``nu = decay * nu + (1 - decay) * g**2``.

    Args:
        decay: in [0, 1).
        eps: added outside of the root.
        eps_root: added inside of it.
        initial_scale: first value of ``nu``.
        centered: divide by the standard deviation: ``nu - mu**2`` in place of ``nu``.

    Source: Hinton, lecture 6e of "Neural networks for machine learning" (2012); centered: Graves (arXiv 1308.0850).
    """
    check_flags(centered=centered)
    check_decay(decay=decay)
    check_nonnegative(eps=eps, eps_root=eps_root, initial_scale=initial_scale)

    def init(params: Params) -> RmsState:
        nu = tree.elementwise(lambda v: v + initial_scale, zeros(params))
        return RmsState(nu, zeros(params) if centered else ABSENT)

    def update(updates: PyTree, state: RmsState) -> tuple[PyTree, RmsState]:
        nu = squares_average(updates, state.nu, decay)
        mu = moving_average(updates, state.mu, decay) if centered else ABSENT
        spread = nu
        if centered:  # what has overflowed stays infinite
            spread = tree.elementwise(lambda v, m: (v - bounded(m * m)).clamp_min(0), nu, mu)
        out = tree.elementwise(lambda g, v: tree.upcast(g) / divisor(root(v, 1.0, eps_root), eps), updates, spread)
        return out, RmsState(nu, mu)

    return GradientTransformation(init, update)


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
    ``p - learning_rate * u``, with ``u`` of `scale_by_rms`.

    Args:
        learning_rate, weight_decay, mask: as `adam`.
        decay, eps, eps_root, centered: as `scale_by_rms`; torch calls ``decay`` alpha.
        momentum, nesterov: as `trace`, after the division.

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
    return descend(learning_rate, weight_decay, mask, decoupled=False, rms=rule, **momentum_or_none(momentum, nesterov))


# --- Adagrad -----------------------------------------------------------------------------------------------------


class RssState(NamedTuple):
    """Sum of the squares."""

    total: PyTree


@renamed(initial="initial_accumulator_value")
def scale_by_rss(initial_accumulator_value: float = 0.0, eps: Scalar = 1e-10) -> GradientTransformation:
    """``g / (sqrt(total) + eps)`` with ``total = total + g**2``.

    Args:
        initial_accumulator_value: first value of the sum. Used in ``init`` alone.
        eps: added outside of the root.

    Source: Duchi et al., "Adaptive subgradient methods" (JMLR 2011).
    """
    check_nonnegative(initial_accumulator_value=initial_accumulator_value, eps=eps)

    def init(params: Params) -> RssState:
        return RssState(tree.elementwise(lambda v: v + initial_accumulator_value, zeros(params)))

    def update(updates: PyTree, state: RssState) -> tuple[PyTree, RssState]:
        total = tree.elementwise(lambda g, s: s + tree.upcast(g).square(), updates, state.total)
        return tree.elementwise(lambda g, s: tree.upcast(g) / divisor(root(s), eps), updates, total), RssState(total)

    return GradientTransformation(init, update)


@renamed(initial="initial_accumulator_value")
def adagrad(
    learning_rate: Scalar | Schedule,
    *,
    initial_accumulator_value: float = 0.0,
    eps: Scalar = 1e-10,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    """Divide by the root of the sum of all squares so far: ``p - learning_rate * u``, with ``u`` of `scale_by_rss`.

    Args:
        learning_rate, weight_decay, mask: as `adam`.
        initial_accumulator_value, eps: as `scale_by_rss`.

    Source: Duchi et al. (JMLR 2011), in the form of ``torch.optim.Adagrad``.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.adagrad(0.1), {"w": torch.ones(1)}
        >>> tx.update(params, tx.init(params), params)[0]
        {'w': tensor([-0.1000])}
    """
    return descend(
        learning_rate, weight_decay, mask, decoupled=False, adagrad=scale_by_rss(initial_accumulator_value, eps)
    )


# --- Adadelta ----------------------------------------------------------------------------------------------------


class AdadeltaState(NamedTuple):
    """Moving averages of the squares of gradients and of updates."""

    nu: PyTree
    delta: PyTree


@renamed(decay="rho")
def scale_by_adadelta(rho: Scalar = 0.9, eps: Scalar = 1e-6) -> GradientTransformation:
    """The gradient in units of the parameters:

        nu = rho * nu + (1 - rho) * g**2
        u = sqrt(delta + eps) / sqrt(nu + eps) * g
        delta = rho * delta + (1 - rho) * u**2

    Args:
        rho: in [0, 1).
        eps: added inside of both roots.

    Source: Zeiler (arXiv 1212.5701).
    """
    check_decay(rho=rho)
    check_nonnegative(eps=eps)

    def update(updates: PyTree, state: AdadeltaState) -> tuple[PyTree, AdadeltaState]:
        nu = squares_average(updates, state.nu, rho)
        out = tree.elementwise(
            lambda g, v, d: torch.sqrt(d + eps) / torch.sqrt(divisor(v, eps)) * tree.upcast(g), updates, nu, state.delta
        )
        return out, AdadeltaState(nu, squares_average(out, state.delta, rho))

    return GradientTransformation(lambda params: AdadeltaState(zeros(params), zeros(params)), update)


@renamed(decay="rho")
def adadelta(
    learning_rate: Scalar | Schedule = 1.0,
    *,
    rho: Scalar = 0.9,
    eps: Scalar = 1e-6,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    """Steps in units of the parameters: ``p - learning_rate * u``, with ``u`` of `scale_by_adadelta`.

    Args:
        learning_rate, weight_decay, mask: as `adam`.
        rho, eps: as `scale_by_adadelta`.

    Source: Zeiler (arXiv 1212.5701), which has no learning rate (1) and no weight decay.
    """
    return descend(learning_rate, weight_decay, mask, decoupled=False, adadelta=scale_by_adadelta(rho, eps))


# --- MADGRAD -----------------------------------------------------------------------------------------------------


class MadgradState(NamedTuple):
    """Updates so far, weighted sums of the gradients and of their squares, initial parameters."""

    step: Tensor
    total: PyTree
    squares: PyTree
    start: PyTree


def scale_by_madgrad(
    learning_rate: Scalar | Schedule, momentum: Scalar = 0.9, eps: Scalar = 1e-6
) -> GradientTransformation:
    """Dual averaging under a cube root; returns the descent itself:

        total = total + rate * g,  squares = squares + rate * g**2          # rate = learning_rate * sqrt(step)
        z = start - total / (cbrt(squares) + eps)
        p = momentum * p + (1 - momentum) * z

    Args:
        learning_rate: a number, a 0-d tensor or a schedule. It is inside of the root: four times as much moves 2.5
            times as far.
        momentum: in [0, 1).
        eps: added outside of the root.

    Source: Defazio and Jelassi, "Adaptivity without compromise" (arXiv 2101.11075).
    """
    check_nonnegative(True, learning_rate=learning_rate)
    check_decay(momentum=momentum)
    check_nonnegative(eps=eps)

    def init(params: Params) -> MadgradState:
        return MadgradState(zero_count(params), zeros(params), zeros(params), copies(params))

    def update(updates: PyTree, state: MadgradState, params: MaybeParams = None) -> tuple[PyTree, MadgradState]:
        need_params(params, "scale_by_madgrad")
        count, dtype = state.step + 1, scalar_dtype(updates)
        rate = value_at("learning_rate", learning_rate, state.step, updates)
        rate = tree.hoist(rate * count.to(dtype).sqrt())
        total = tree.elementwise(lambda g, s: s + rate * tree.upcast(g), updates, state.total)
        squares = tree.elementwise(lambda g, v: v + rate * tree.upcast(g).square(), updates, state.squares)

        def rule(p: Tensor, start: Tensor, s: Tensor, v: Tensor) -> Tensor:
            moved = v > 0
            step = torch.where(moved, s / (torch.where(moved, v, 1.0) ** (1 / 3) + eps), 0.0)
            return (1 - momentum) * (start - step - tree.upcast(p))

        out = tree.elementwise(rule, params, state.start, total, squares)
        return out, MadgradState(count, total, squares, state.start)

    return composed(init, update, adds=(Descends, KeepsStart))


def madgrad(
    learning_rate: Scalar | Schedule,
    *,
    momentum: Scalar = 0.9,
    eps: Scalar = 1e-6,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    """Dual averaging under a cube root: `scale_by_madgrad` with ``g = g + weight_decay * p``, which descends by itself:

        p = momentum * p + (1 - momentum) * z

    Args:
        learning_rate: a number, a 0-d tensor or a schedule.
        momentum, eps: as `scale_by_madgrad`.
        weight_decay, mask: as `add_decayed_weights`, in front of the rule: L2 regularisation. The authors use less of
            it than with others, often none.

    Source: Defazio and Jelassi (arXiv 2101.11075).

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.madgrad(0.001, momentum=0.0, eps=0.0), {"w": torch.ones(1)}
        >>> tx.update({"w": torch.ones(1)}, tx.init(params), params)[0]
        {'w': tensor([-0.0100])}
    """
    rule = scale_by_madgrad(learning_rate, momentum, eps)
    return named_chain(weight_decay=add_decayed_weights(weight_decay, mask), madgrad=rule)
