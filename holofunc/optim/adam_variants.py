"""LaProp, StableAdamW, TAdam: Adam with one thing changed, the order, a clip, the trust in each gradient."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from holofunc import tree
from holofunc.optim.adam import AdamState, adam_state, scale_by_adam
from holofunc.optim.base import GradientTransformation, chain
from holofunc.optim.labels import Mask
from holofunc.optim.numerics import ABSENT, bounded, divisor, root, scalar_dtype, sizes, squares_average
from holofunc.optim.ranges import check_bound, check_decay, check_flags, check_nonnegative, known
from holofunc.optim.scalars import gains
from holofunc.optim.transforms import descend, ema, moving_average
from holofunc.typing import Params, PyTree, Scalar, Schedule

__all__ = ["TadamState", "laprop", "scale_by_laprop", "scale_by_stable_adam", "scale_by_tadam", "stable_adamw", "tadam"]


# --- LaProp ------------------------------------------------------------------------------------------------------


def scale_by_laprop(b1: Scalar = 0.9, b2: Scalar = 0.999, eps: Scalar = 1e-15) -> GradientTransformation:
    """Momentum of the normalized gradient, instead of the normalized momentum of Adam:

        nu = b2 * nu + (1 - b2) * g**2
        mu = b1 * mu + (1 - b1) * g / (sqrt(nu_hat) + eps),  u = mu_hat

    Args:
        b1, b2: in [0, 1), and independent here: ``b2`` may be small.
        eps: added outside of the root.

    Source: Ziyin et al., "LaProp: separating momentum and adaptivity in Adam" (arXiv 2002.04839).
    """
    check_decay(b1=b1)
    return chain(scale_by_adam(0.0, b2, eps), ema(b1))


def laprop(
    learning_rate: Scalar | Schedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-15,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    """``p - learning_rate * (u + weight_decay * p)``, with ``u`` of `scale_by_laprop`.

    Args:
        learning_rate, weight_decay, mask: as `adamw`.
        b1, b2, eps: as `scale_by_laprop`.

    Source: Ziyin et al. (arXiv 2002.04839).

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.laprop(0.1), {"w": torch.full((1,), 2.0)}
        >>> tx.update(params, tx.init(params), params)[0]
        {'w': tensor([-0.1000])}
    """
    return descend(learning_rate, weight_decay, mask, decoupled=True, laprop=scale_by_laprop(b1, b2, eps))


# --- StableAdamW -------------------------------------------------------------------------------------------------


def scale_by_stable_adam(b1: Scalar = 0.9, b2: Scalar = 0.99, eps: Scalar = 1e-6) -> GradientTransformation:
    """`scale_by_adam`, shortened for each tensor whose gradient its ``nu`` has not seen coming:

        u = mu_hat / (sqrt(nu_hat) + eps) / max(1, rms),  rms = sqrt(mean(g**2 / max(nu_hat, eps**2)))

    which replaces the clipping of gradients.

    Args:
        b1, b2: in [0, 1).
        eps: added outside of the root; its square bounds ``nu_hat`` in ``rms``.

    Source: Wortsman et al., "Stable and low-precision training for large-scale vision-language models" (arXiv
    2304.13013), algorithm 2.
    """
    check_decay(b1=b1, b2=b2)
    check_nonnegative(eps=eps)

    def update(updates: PyTree, state: AdamState) -> tuple[PyTree, AdamState]:
        step = state.step + 1
        mu, nu = moving_average(updates, state.mu, b1), squares_average(updates, state.nu, b2)
        c1, c2 = gains(b1, b2, step, scalar_dtype(updates))

        def surprise(g: Tensor, v: Tensor) -> Tensor:
            return (tree.upcast(g) / divisor(root(v, c2).clamp_min(eps), 0.0)).square()

        mean = tree.elementwise(lambda s, n: s / n, tree.leaf_sum(tree.elementwise(surprise, updates, nu)), sizes(mu))
        shorten = tree.elementwise(lambda m: m.clamp_min(1.0).rsqrt(), mean)
        out = tree.elementwise(lambda m, v, s: s * (m * c1 / divisor(root(v, c2), eps)), mu, nu, shorten)
        return out, AdamState(step, mu, nu)

    return GradientTransformation(lambda params: adam_state(params), update)


def stable_adamw(
    learning_rate: Scalar | Schedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    eps: Scalar = 1e-6,
    weight_decay: Scalar | Schedule = 0.01,
    mask: Mask | None = None,
) -> GradientTransformation:
    """AdamW with Adafactor's clipping instead of that of gradients: ``p - learning_rate * (u + weight_decay * p)``.

    Args:
        learning_rate: a number, a 0-d tensor or a schedule.
        b1, b2, eps: as `scale_by_stable_adam`.
        weight_decay, mask: as `add_decayed_weights`, decoupled; not shortened.

    Source: Wortsman et al. (arXiv 2304.13013), whose decay is shortened too.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.stable_adamw(0.1, weight_decay=0.0), {"w": torch.full((1,), 2.0)}
        >>> tx.update(params, tx.init(params), params)[0]
        {'w': tensor([-0.1000])}
    """
    return descend(learning_rate, weight_decay, mask, decoupled=True, stable_adam=scale_by_stable_adam(b1, b2, eps))


# --- TAdam -------------------------------------------------------------------------------------------------------


class TadamState(NamedTuple):
    """As `AdamState`, with the sum of weights that the moving average of each tensor has gathered."""

    step: Tensor
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

        w = (dof + size) / (dof + sum((g - mu)**2 / (nu + eps)))              # one scalar per tensor
        mu = (weight * mu + w * g) / (weight + w)
        weight = (2 * b1 - 1) / b1 * weight + w                               # starts at b1 / (1 - b1)

    and ``nu`` and the bias corrections of Adam. As ``nu`` starts at zero, the first gradient counts next to nothing.

    Args:
        b1: in [0.5, 1): below, weights would turn negative. The first ``weight`` is made of it in ``init``.
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
        step, mu, nu, nu_max = adam_state(params, amsgrad)
        weight = tree.map(lambda p: torch.zeros_like(tree.upcast(p).sum()) + b1 / (1 - b1), params)
        return TadamState(step, mu, nu, weight, nu_max)

    def fit(distance: Tensor, size: Tensor) -> Tensor:
        freedom = torch.zeros_like(size) + (k_dof * size if dof is None else dof)
        is_adam = freedom.isinf()
        freedom = torch.where(is_adam, 1.0, freedom)
        return torch.where(is_adam, 1.0, (freedom + size) / (freedom + distance))

    def update(updates: PyTree, state: TadamState) -> tuple[PyTree, TadamState]:
        step = state.step + 1
        weight = state.weight
        if any(isinstance(x, float) and math.isinf(x) for x in (dof, k_dof)):
            w = tree.elementwise(torch.ones_like, weight)
        else:
            distance = tree.elementwise(
                lambda g, m, v: bounded((tree.upcast(g) - m).square()) / divisor(v, eps), updates, state.mu, state.nu
            )
            w = tree.elementwise(fit, tree.leaf_sum(distance), sizes(updates))
        share = tree.elementwise(lambda total, new: new / (total + new), weight, w)
        mu = tree.elementwise(lambda g, m, s: m + s * (tree.upcast(g) - m), updates, state.mu, share)
        nu = squares_average(updates, state.nu, b2)
        nu_max = tree.elementwise(torch.maximum, state.nu_max, nu) if amsgrad else ABSENT
        weight = tree.elementwise(lambda total, new: (2 * b1 - 1) / b1 * total + new, weight, w)
        c1, c2 = gains(b1, b2, step, scalar_dtype(updates))
        out = tree.elementwise(lambda m, v: m * c1 / divisor(root(v, c2), eps), mu, nu_max if amsgrad else nu)
        return out, TadamState(step, mu, nu, weight, nu_max)

    return GradientTransformation(init, update)


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
    decoupled: bool = True,
) -> GradientTransformation:
    """Adam that discounts outliers among the gradients, tensor by tensor:
    ``p - learning_rate * (u + weight_decay * p)``, with ``u`` of `scale_by_tadam`.

    Args:
        learning_rate, weight_decay, mask: as `adamw`.
        b1, b2, eps, amsgrad, dof, k_dof: as `scale_by_tadam`.
        decoupled: False adds the decay to the gradient, as the authors' code does.

    Source: Ilboudo et al. (arXiv 2003.00179).

    Example:
        >>> import math, torch
        >>> from holofunc import optim
        >>> tx, params = optim.tadam(0.1, dof=math.inf), {"w": torch.ones(1)}
        >>> tx.update(params, tx.init(params), params)[0]
        {'w': tensor([-0.1000])}
    """
    rule = scale_by_tadam(b1, b2, eps, dof=dof, k_dof=k_dof, amsgrad=amsgrad)
    return descend(learning_rate, weight_decay, mask, decoupled=decoupled, tadam=rule)
