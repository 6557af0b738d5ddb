"""Gradient descent: SGD with momentum, its signs (signSGD, Signum, Lion, Rprop), the optimistic gradient."""

from typing import NamedTuple

import torch
from torch import Tensor

from holofunc import tree
from holofunc.optim.base import GradientTransformation, named_chain
from holofunc.optim.deprecation import renamed
from holofunc.optim.labels import Mask
from holofunc.optim.numerics import is_zero, scalar_dtype, zeros
from holofunc.optim.ranges import check_bound, check_decay, check_finite, check_flags, check_nonnegative, known
from holofunc.optim.scalars import zero_count
from holofunc.optim.transforms import descend, ema, moving_average, scale, scale_by_sign, trace
from holofunc.typing import Params, PyTree, Scalar, Schedule

__all__ = [
    "LionState", "OptimisticState", "RpropState", "lion", "rprop", "scale_by_lion", "scale_by_optimistic_gradient",
    "scale_by_rprop", "sgd", "sign_sgd", "signum",
]  # fmt: skip


# --- SGD ---------------------------------------------------------------------------------------------------------


def momentum_or_none(
    momentum: Scalar, nesterov: bool = False, dampening: Scalar = 0.0
) -> dict[str, GradientTransformation]:
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
        learning_rate, weight_decay, mask: as `adam`.
        momentum: in [0, 1).
        nesterov: look one step ahead.
        dampening: in [0, 1); does not apply to the first gradient.

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
    momenta = momentum_or_none(momentum, nesterov, dampening)
    return descend(learning_rate, weight_decay, mask, decoupled=False, **momenta)


class OptimisticState(NamedTuple):
    """Updates so far, and the previous gradient."""

    step: Tensor
    previous: PyTree


def scale_by_optimistic_gradient(alpha: Scalar = 1.0, beta: Scalar = 1.0) -> GradientTransformation:
    """``alpha * g + beta * (g - previous)``, for games between networks; the first difference counts as zero.

    Source: Mokhtari et al. (arXiv 1901.08511).

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx = optim.scale_by_optimistic_gradient()
        >>> first, state = tx.update(torch.tensor([3.0]), tx.init(torch.zeros(1)))
        >>> first, tx.update(torch.tensor([5.0]), state)[0]
        (tensor([3.]), tensor([7.]))
    """
    check_finite(alpha=alpha, beta=beta)

    def update(updates: PyTree, state: OptimisticState) -> tuple[PyTree, OptimisticState]:
        grads = tree.elementwise(tree.upcast, updates)
        later = tree.hoist(beta * (state.step > 0).to(scalar_dtype(updates)))
        out = tree.elementwise(lambda g, before: alpha * g + later * (g - before), grads, state.previous)
        return out, OptimisticState(state.step + 1, grads)

    return GradientTransformation(lambda params: OptimisticState(zero_count(params), zeros(params)), update)


# --- signs -------------------------------------------------------------------------------------------------------


def sign_sgd(
    learning_rate: Scalar | Schedule, *, weight_decay: Scalar | Schedule = 0.0, mask: Mask | None = None
) -> GradientTransformation:
    """``p - learning_rate * (sign(g) + weight_decay * p)``.

    Args:
        learning_rate, weight_decay, mask: as `adamw`.

    Source: Bernstein et al., "signSGD: compressed optimisation for non-convex problems" (arXiv 1802.04434).
    """
    return descend(learning_rate, weight_decay, mask, decoupled=True, sign=scale_by_sign())


def signum(
    learning_rate: Scalar | Schedule,
    *,
    momentum: Scalar = 0.9,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    """Signs of the momentum: ``p - learning_rate * (sign(mu) + weight_decay * p)``.

    Args:
        learning_rate, weight_decay, mask: as `adamw`.
        momentum: in [0, 1), of the moving average ``mu``.

    Source: Bernstein et al. (arXiv 1802.04434), algorithm 2.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.signum(0.1), {"w": torch.tensor([5.0, -0.1])}
        >>> tx.update(params, tx.init(params), params)[0]
        {'w': tensor([-0.1000,  0.1000])}
    """
    check_decay(momentum=momentum)
    rules = {"momentum": ema(momentum, debias=False), "sign": scale_by_sign()}
    return descend(learning_rate, weight_decay, mask, decoupled=True, **rules)


class LionState(NamedTuple):
    """Moving average of the gradients."""

    mu: PyTree


def scale_by_lion(b1: Scalar = 0.9, b2: Scalar = 0.99) -> GradientTransformation:
    """``sign(b1 * mu + (1 - b1) * g)``, then ``mu = b2 * mu + (1 - b2) * g``.

    Source: Chen et al., "Symbolic discovery of optimization algorithms" (arXiv 2302.06675).
    """
    check_decay(b1=b1, b2=b2)

    def update(updates: PyTree, state: LionState) -> tuple[PyTree, LionState]:
        out = tree.elementwise(torch.sign, moving_average(updates, state.mu, b1))
        return out, LionState(moving_average(updates, state.mu, b2))

    return GradientTransformation(lambda params: LionState(zeros(params)), update)


def lion(
    learning_rate: Scalar | Schedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    """Signs of a momentum: ``p - learning_rate * (u + weight_decay * p)``, with ``u`` of `scale_by_lion`.

    Args:
        learning_rate: a number, a 0-d tensor or a schedule; a third to a tenth of Adam's.
        b1, b2: as `scale_by_lion`.
        weight_decay, mask: as `add_decayed_weights`, decoupled; three to ten times AdamW's.

    Source: Chen et al. (arXiv 2302.06675), algorithm 2, equal to it.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.lion(0.1), {"w": torch.tensor([5.0, -0.1])}
        >>> tx.update(params, tx.init(params), params)[0]
        {'w': tensor([-0.1000,  0.1000])}
    """
    return descend(learning_rate, weight_decay, mask, decoupled=True, lion=scale_by_lion(b1, b2))


# --- Rprop -------------------------------------------------------------------------------------------------------


class RpropState(NamedTuple):
    """The step size of each element, and the previous gradient."""

    steps: PyTree
    previous: PyTree


@renamed(min_step="min_step_size", max_step="max_step_size")
def scale_by_rprop(
    learning_rate: float,
    *,
    eta_minus: Scalar = 0.5,
    eta_plus: Scalar = 1.2,
    min_step_size: Scalar = 1e-6,
    max_step_size: Scalar = 50.0,
) -> GradientTransformation:
    """``step * sign(g)`` with a step for each element, which grows while the sign stays, and shrinks when it changes.

    After a change of sign the element rests for one update. The signs are those of ascent: `scale` by -1 comes next.

    Args:
        learning_rate: the first step. Used in ``init`` alone.
        eta_minus, eta_plus: factors of the step.
        min_step_size, max_step_size: its bounds.

    Source: Riedmiller and Braun (1993), in the form of ``torch.optim.Rprop``.
    """
    check_nonnegative(learning_rate=learning_rate, eta_minus=eta_minus, eta_plus=eta_plus, min_step_size=min_step_size)
    check_bound(max_step_size=max_step_size)
    low, high = known(eta_minus), known(eta_plus)
    if (low is not None and low >= 1) or (high is not None and high <= 1):
        raise ValueError(f"eta_minus must be below 1 and eta_plus above, got {eta_minus} and {eta_plus}")

    def init(params: Params) -> RpropState:
        steps = tree.elementwise(lambda z: z + learning_rate, zeros(params))
        return RpropState(steps, zeros(params))

    def change(g: Tensor, before: Tensor) -> Tensor:
        agreement = torch.sign(tree.upcast(g) * before)
        return torch.where(agreement > 0, eta_plus, torch.where(agreement < 0, eta_minus, torch.ones_like(before)))

    def update(updates: PyTree, state: RpropState) -> tuple[PyTree, RpropState]:
        factor = tree.elementwise(change, updates, state.previous)
        steps = tree.elementwise(
            lambda s, f: (s * f).clamp_min(min_step_size).clamp_max(max_step_size), state.steps, factor
        )
        kept = tree.elementwise(
            lambda g, before: torch.where(tree.upcast(g) * before < 0, torch.zeros_like(before), tree.upcast(g)),
            updates,
            state.previous,
        )
        out = tree.elementwise(lambda g, s: torch.sign(g) * s, kept, steps)
        return out, RpropState(steps, kept)

    return GradientTransformation(init, update)


@renamed(min_step="min_step_size", max_step="max_step_size")
def rprop(
    learning_rate: float,
    *,
    eta_minus: Scalar = 0.5,
    eta_plus: Scalar = 1.2,
    min_step_size: Scalar = 1e-6,
    max_step_size: Scalar = 50.0,
) -> GradientTransformation:
    """Steps of their own for all elements, for full-batch gradients:

        step = clamp(step * eta_plus, or eta_minus where the sign of g has changed, min_step_size, max_step_size)
        p = p - step * sign(g)                                 # nothing where the sign has changed

    Args:
        learning_rate: the first step, a number. Used in ``init`` alone.
        eta_minus, eta_plus, min_step_size, max_step_size: as `scale_by_rprop`.

    Source: Riedmiller and Braun (1993), in the form of ``torch.optim.Rprop``: the step before a change of sign is not
    taken back.
    """
    rule = scale_by_rprop(
        learning_rate, eta_minus=eta_minus, eta_plus=eta_plus, min_step_size=min_step_size, max_step_size=max_step_size
    )
    return named_chain(rprop=rule, descent=scale(-1.0))
