"""Further rules that treat each element on its own: roots of accumulated squares, signs, and what they grew into."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from holofunc import tree
from holofunc.optim.adam import AdamState, adam_state, gains, root, squares_average
from holofunc.optim.base import GradientTransformation, MaybeParams, check_params
from holofunc.optim.numerics import (
    ABSENT,
    bias_correction,
    bounded,
    check_bound,
    check_decay,
    check_finite,
    check_flags,
    check_nonnegative,
    known,
    scalar_dtype,
    zero_count,
    zeros,
)
from holofunc.optim.transforms import moving_average
from holofunc.typing import Params, PyTree, Scalar

__all__ = [
    "AdadeltaState",
    "AdamaxState",
    "LionState",
    "OptimisticState",
    "RmsState",
    "RpropState",
    "RssState",
    "scale_by_adadelta",
    "scale_by_adamax",
    "scale_by_lion",
    "scale_by_optimistic_gradient",
    "scale_by_rms",
    "scale_by_rprop",
    "scale_by_rss",
    "scale_by_yogi",
]


class RmsState(NamedTuple):
    """Moving average of the squares; that of the gradients if centered."""

    nu: PyTree
    mu: PyTree = ABSENT


def scale_by_rms(
    decay: Scalar = 0.9,
    eps: Scalar = 1e-8,
    *,
    eps_root: Scalar = 0.0,
    initial: float = 0.0,
    centered: bool = False,
) -> GradientTransformation:
    """``g / (sqrt(nu + eps_root) + eps)`` with ``nu = decay * nu + (1 - decay) * g**2``.

    Args:
        decay: in [0, 1).
        eps: added outside of the root.
        eps_root: added inside of it.
        initial: first value of ``nu``.
        centered: divide by the standard deviation: ``nu - mu**2`` in place of ``nu``.

    Source: Hinton, lecture 6e of "Neural networks for machine learning" (2012); centered: Graves (arXiv 1308.0850).
    """
    check_flags(centered=centered)
    check_decay(decay=decay)
    check_nonnegative(eps=eps, eps_root=eps_root, initial=initial)

    def init(params: Params) -> RmsState:
        check_params(params, "scale_by_rms")
        nu = tree.elementwise(lambda v: v + initial, zeros(params))
        return RmsState(nu, zeros(params) if centered else ABSENT)

    def update(updates: PyTree, state: RmsState, params: MaybeParams = None, **extra: Any) -> tuple[PyTree, RmsState]:
        nu = squares_average(updates, state.nu, decay)
        mu = moving_average(updates, state.mu, decay) if centered else ABSENT
        spread = nu
        if centered:  # what has overflowed stays infinite
            spread = tree.elementwise(lambda v, m: (v - bounded(m * m)).clamp_min(0), nu, mu)
        out = tree.elementwise(lambda g, v: tree.wide(g) / (root(v, 1.0, eps_root) + eps), updates, spread)
        return out, RmsState(nu, mu)

    return GradientTransformation(init, update)


class RssState(NamedTuple):
    """Sum of the squares."""

    total: PyTree


def scale_by_rss(initial: float = 0.0, eps: Scalar = 1e-10) -> GradientTransformation:
    """``g / (sqrt(total) + eps)`` with ``total = total + g**2``.

    Source: Duchi et al., "Adaptive subgradient methods" (JMLR 2011).
    """
    check_nonnegative(initial=initial, eps=eps)

    def init(params: Params) -> RssState:
        check_params(params, "scale_by_rss")
        return RssState(tree.elementwise(lambda v: v + initial, zeros(params)))

    def update(updates: PyTree, state: RssState, params: MaybeParams = None, **extra: Any) -> tuple[PyTree, RssState]:
        total = tree.elementwise(lambda g, s: s + tree.wide(g).square(), updates, state.total)
        return tree.elementwise(lambda g, s: tree.wide(g) / (root(s) + eps), updates, total), RssState(total)

    return GradientTransformation(init, update)


class AdadeltaState(NamedTuple):
    """Moving averages of the squares of gradients and of updates."""

    nu: PyTree
    delta: PyTree


def scale_by_adadelta(decay: Scalar = 0.9, eps: Scalar = 1e-6) -> GradientTransformation:
    """``u = sqrt(delta + eps) / sqrt(nu + eps) * g``, then ``delta = decay * delta + (1 - decay) * u**2``.

    Source: Zeiler (arXiv 1212.5701).
    """
    check_decay(decay=decay)
    check_nonnegative(eps=eps)

    def init(params: Params) -> AdadeltaState:
        check_params(params, "scale_by_adadelta")
        return AdadeltaState(zeros(params), zeros(params))

    def update(
        updates: PyTree, state: AdadeltaState, params: MaybeParams = None, **extra: Any
    ) -> tuple[PyTree, AdadeltaState]:
        nu = squares_average(updates, state.nu, decay)
        out = tree.elementwise(
            lambda g, v, d: torch.sqrt(d + eps) / torch.sqrt(v + eps) * tree.wide(g), updates, nu, state.delta
        )
        return out, AdadeltaState(nu, squares_average(out, state.delta, decay))

    return GradientTransformation(init, update)


class LionState(NamedTuple):
    """Moving average of the gradients."""

    mu: PyTree


def scale_by_lion(b1: Scalar = 0.9, b2: Scalar = 0.99) -> GradientTransformation:
    """``sign(b1 * mu + (1 - b1) * g)``, then ``mu = b2 * mu + (1 - b2) * g``.

    Source: Chen et al., "Symbolic discovery of optimization algorithms" (arXiv 2302.06675).
    """
    check_decay(b1=b1, b2=b2)

    def init(params: Params) -> LionState:
        check_params(params, "scale_by_lion")
        return LionState(zeros(params))

    def update(updates: PyTree, state: LionState, params: MaybeParams = None, **extra: Any) -> tuple[PyTree, LionState]:
        out = tree.elementwise(torch.sign, moving_average(updates, state.mu, b1))
        return out, LionState(moving_average(updates, state.mu, b2))

    return GradientTransformation(init, update)


class AdamaxState(NamedTuple):
    """Updates so far, moving average of the gradients, decaying maximum of their sizes."""

    count: Tensor  # type: ignore[assignment]
    mu: PyTree
    nu: PyTree


def scale_by_adamax(b1: Scalar = 0.9, b2: Scalar = 0.999, eps: Scalar = 1e-8) -> GradientTransformation:
    """``mu_hat / nu`` with ``nu = max(b2 * nu, |g| + eps)``.

    Source: Kingma and Ba (arXiv 1412.6980), section 7.
    """
    check_decay(b1=b1, b2=b2)
    check_nonnegative(eps=eps)

    def init(params: Params) -> AdamaxState:
        check_params(params, "scale_by_adamax")
        return AdamaxState(zero_count(params), zeros(params), zeros(params))

    def update(
        updates: PyTree, state: AdamaxState, params: MaybeParams = None, **extra: Any
    ) -> tuple[PyTree, AdamaxState]:
        count = state.count + 1
        mu = moving_average(updates, state.mu, b1)
        nu = tree.elementwise(lambda g, v: torch.maximum(b2 * v, tree.wide(g).abs() + eps), updates, state.nu)
        c1 = tree.hoist(1 / bias_correction(b1, count, scalar_dtype(updates)))
        return tree.elementwise(lambda m, v: m * c1 / v, mu, nu), AdamaxState(count, mu, nu)

    return GradientTransformation(init, update)


def scale_by_yogi(
    b1: Scalar = 0.9, b2: Scalar = 0.999, eps: Scalar = 1e-3, *, initial: float = 1e-6
) -> GradientTransformation:
    """Adam with ``nu = nu - (1 - b2) * sign(nu - g**2) * g**2``, which falls more slowly.

    Source: Zaheer et al., "Adaptive methods for nonconvex optimization" (NeurIPS 2018).
    """
    check_decay(b1=b1, b2=b2)
    check_nonnegative(eps=eps, initial=initial)

    def init(params: Params) -> AdamState:
        state = adam_state(params, "scale_by_yogi")
        return state._replace(nu=tree.elementwise(lambda v: v + initial, state.nu))

    def square_step(g: Tensor, v: Tensor) -> Tensor:
        square = bounded(tree.wide(g).square())
        return v - (1 - b2) * torch.sign(v - square) * square

    def update(updates: PyTree, state: AdamState, params: MaybeParams = None, **extra: Any) -> tuple[PyTree, AdamState]:
        count = state.count + 1
        mu, nu = moving_average(updates, state.mu, b1), tree.elementwise(square_step, updates, state.nu)
        c1, c2 = gains(b1, b2, count, scalar_dtype(updates))
        return tree.elementwise(lambda m, v: m * c1 / (root(v, c2) + eps), mu, nu), AdamState(count, mu, nu)

    return GradientTransformation(init, update)


class RpropState(NamedTuple):
    """The step size of each element, and the previous gradient."""

    steps: PyTree
    previous: PyTree


def scale_by_rprop(
    learning_rate: float,
    *,
    eta_minus: Scalar = 0.5,
    eta_plus: Scalar = 1.2,
    min_step: Scalar = 1e-6,
    max_step: Scalar = 50.0,
) -> GradientTransformation:
    """``step * sign(g)`` with a step for each element, which grows while the sign stays, and shrinks when it changes.

    After a change of sign the element rests for one update. The signs are those of ascent: `scale` by -1 comes next.

    Args:
        learning_rate: the first step. Used in ``init`` alone.
        eta_minus, eta_plus: factors of the step.
        min_step, max_step: its bounds.

    Source: Riedmiller and Braun (1993), in the form of ``torch.optim.Rprop``.
    """
    check_nonnegative(learning_rate=learning_rate, eta_minus=eta_minus, eta_plus=eta_plus, min_step=min_step)
    check_bound(max_step=max_step)
    low, high = known(eta_minus), known(eta_plus)
    if (low is not None and low >= 1) or (high is not None and high <= 1):
        raise ValueError(f"eta_minus must be below 1 and eta_plus above, got {eta_minus} and {eta_plus}")

    def init(params: Params) -> RpropState:
        check_params(params, "scale_by_rprop")
        steps = tree.elementwise(lambda z: z + learning_rate, zeros(params))
        return RpropState(steps, zeros(params))

    def change(g: Tensor, before: Tensor) -> Tensor:
        agreement = torch.sign(tree.wide(g) * before)
        return torch.where(agreement > 0, eta_plus, torch.where(agreement < 0, eta_minus, torch.ones_like(before)))

    def update(
        updates: PyTree, state: RpropState, params: MaybeParams = None, **extra: Any
    ) -> tuple[PyTree, RpropState]:
        factor = tree.elementwise(change, updates, state.previous)
        steps = tree.elementwise(lambda s, f: (s * f).clamp_min(min_step).clamp_max(max_step), state.steps, factor)
        kept = tree.elementwise(
            lambda g, before: torch.where(tree.wide(g) * before < 0, torch.zeros_like(before), tree.wide(g)),
            updates,
            state.previous,
        )
        out = tree.elementwise(lambda g, s: torch.sign(g) * s, kept, steps)
        return out, RpropState(steps, kept)

    return GradientTransformation(init, update)


class OptimisticState(NamedTuple):
    """Updates so far, and the previous gradient."""

    count: Tensor  # type: ignore[assignment]
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

    def init(params: Params) -> OptimisticState:
        check_params(params, "scale_by_optimistic_gradient")
        return OptimisticState(zero_count(params), zeros(params))

    def update(
        updates: PyTree, state: OptimisticState, params: MaybeParams = None, **extra: Any
    ) -> tuple[PyTree, OptimisticState]:
        grads = tree.elementwise(tree.wide, updates)
        later = tree.hoist(beta * (state.count > 0).to(scalar_dtype(updates)))
        out = tree.elementwise(lambda g, before: alpha * g + later * (g - before), grads, state.previous)
        return out, OptimisticState(state.count + 1, grads)

    return GradientTransformation(init, update)
