"""Adam with one thing changed: LaProp's order, StableAdamW's clipping, CAME's confidence, NAdamW and cautious AdamW."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from holofunc import tree
from holofunc.compile import opaque
from holofunc.optim.adam import AdamState, adam_state, gains, root, scale_by_adam, squares_average
from holofunc.optim.base import GradientTransformation, MaybeParams, chain, check_params
from holofunc.optim.checks import check_paths
from holofunc.optim.decay import add_cautious_decay
from holofunc.optim.flatten import cautious
from holofunc.optim.labels import Mask
from holofunc.optim.layerwise import sizes
from holofunc.optim.muon import safe_rsqrt
from holofunc.optim.numerics import check_bound, check_decay, check_flags, check_nonnegative, scalar_dtype, zeros
from holofunc.optim.optimizers import adamw, descend
from holofunc.optim.transforms import ema, moving_average, scale_by_learning_rate
from holofunc.typing import Params, PyTree, Scalar, Schedule

__all__ = [
    "CameState",
    "came",
    "cautious_adamw",
    "laprop",
    "nadamw",
    "scale_by_came",
    "scale_by_laprop",
    "scale_by_stable_adam",
    "stable_adamw",
]

# --- compositions --------------------------------------------------------------------------------------------------


def nadamw(learning_rate: Scalar | Schedule, **options: Any) -> GradientTransformation:
    """`adamw` with ``nesterov=True``, the NAdamW of timm, optax and the AlgoPerf baselines:

        u = (b1 * mu_hat + (1 - b1) * g_hat) / (sqrt(nu_hat) + eps)
        p = p - learning_rate * (u + weight_decay * p)

    Args:
        learning_rate: a number, a 0-d tensor or a schedule.
        options: of `adamw`.

    Source: Dozat (2016), decoupled as in Loshchilov and Hutter (arXiv 1711.05101).
    """
    return adamw(learning_rate, nesterov=True, **options)


def cautious_adamw(
    learning_rate: Scalar | Schedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: Scalar | Schedule = 0.01,
    mask: Mask | None = None,
    cautious_decay: bool = False,
) -> GradientTransformation:
    """AdamW whose update, or whose decay, acts only where it agrees: `cautious`, or `add_cautious_decay`:

        p = p - learning_rate * (u * mask / mean(mask) + weight_decay * p),  mask = mu * g > 0
        p = p - learning_rate * (u + weight_decay * p * (u * p >= 0))                             # cautious_decay

    Args:
        learning_rate: a number, a 0-d tensor or a schedule.
        b1, b2, eps: of `scale_by_adam`.
        weight_decay: decoupled.
        mask: True where weights decay; None is everywhere.
        cautious_decay: False masks the update by the gradient, True the decay by the update, which leaves Adam's steps
            as they are.

    Source: Liang et al., "Cautious optimizers" (arXiv 2411.16085); Chen et al., "Cautious weight decay" (arXiv
    2510.12402).
    """
    check_flags(cautious_decay=cautious_decay)
    rule = scale_by_adam(b1, b2, eps)
    if cautious_decay:
        return chain(rule, add_cautious_decay(weight_decay, mask), scale_by_learning_rate(learning_rate))
    return descend(learning_rate, weight_decay, mask, decoupled=True, adam=cautious(rule))


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
        learning_rate: a number, a 0-d tensor or a schedule.
        b1, b2, eps: as `scale_by_laprop`.
        weight_decay: decoupled.
        mask: True where weights decay; None is everywhere.

    Source: Ziyin et al. (arXiv 2002.04839).

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.laprop(0.1), {"w": torch.full((1,), 2.0)}
        >>> tx.update(params, tx.init(params), params)[0]
        {'w': tensor([-0.1000])}
    """
    return descend(learning_rate, weight_decay, mask, decoupled=True, laprop=scale_by_laprop(b1, b2, eps))


# --- StableAdamW -----------------------------------------------------------------------------------------------------


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

    def init(params: Params) -> AdamState:
        return adam_state(params, "scale_by_stable_adam")

    def update(updates: PyTree, state: AdamState, params: MaybeParams = None, **extra: Any) -> tuple[PyTree, AdamState]:
        count = state.count + 1
        mu, nu = moving_average(updates, state.mu, b1), squares_average(updates, state.nu, b2)
        c1, c2 = gains(b1, b2, count, scalar_dtype(updates))

        def surprise(g: Tensor, v: Tensor) -> Tensor:
            below = root(v, c2).clamp_min(eps)
            return (tree.wide(g) / torch.where(below > 0, below, 1.0)).square()

        mean = tree.elementwise(lambda s, n: s / n, tree.leaf_sum(tree.elementwise(surprise, updates, nu)), sizes(mu))
        shorten = tree.elementwise(lambda m: m.clamp_min(1.0).rsqrt(), mean)
        out = tree.elementwise(lambda m, v, s: s * (m * c1 / (root(v, c2) + eps)), mu, nu, shorten)
        return out, AdamState(count, mu, nu)

    return GradientTransformation(init, update)


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
        weight_decay: decoupled; not shortened.
        mask: True where weights decay; None is everywhere.

    Source: Wortsman et al. (arXiv 2304.13013), whose decay is shortened too.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.stable_adamw(0.1, weight_decay=0.0), {"w": torch.full((1,), 2.0)}
        >>> tx.update(params, tx.init(params), params)[0]
        {'w': tensor([-0.1000])}
    """
    return descend(learning_rate, weight_decay, mask, decoupled=True, stable_adam=scale_by_stable_adam(b1, b2, eps))


# --- CAME ----------------------------------------------------------------------------------------------------------


class CameState(NamedTuple):
    """Momentum; for matrices, means over rows and columns of squared gradients and of squared surprises, by
    ``"path/0"`` and ``"path/1"``; for the others, whole averages of the squared gradients.
    """

    mu: PyTree
    squares: dict[str, Tensor]
    surprises: dict[str, Tensor]
    nu: dict[str, Tensor]


def scale_by_came(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    b3: Scalar = 0.9999,
    *,
    eps: Scalar = 1e-30,
    eps2: Scalar = 1e-16,
    clip_threshold: Scalar = 1.0,
) -> GradientTransformation:
    """Adafactor whose momentum is divided by its own factored instability:

        u = g / sqrt(factored average of g**2 + eps, with b2),  clipped to a root mean square of clip_threshold
        mu = b1 * mu + (1 - b1) * u
        update = mu / sqrt(factored average of (u - mu)**2 + eps2, with b3)

    Vectors have no factors: their update is ``mu``. A tensor of more than two axes counts as (first axis, all others).

    Args:
        b1, b2, b3: in [0, 1).
        eps, eps2: added to squares.
        clip_threshold: as `clip_by_block_rms`.

    Source: Luo et al., "CAME: confidence-guided adaptive memory efficient optimization" (arXiv 2307.02047).
    """
    check_decay(b1=b1, b2=b2, b3=b3)
    check_nonnegative(eps=eps, eps2=eps2)
    check_bound(clip_threshold=clip_threshold)

    def init(params: Params) -> CameState:
        check_params(params, "scale_by_came")
        flat = dict(tree.leaves_with_path(zeros(params)))
        factored = {path: z for path, z in flat.items() if z.ndim > 1 and z.numel()}
        sums = {
            f"{path}/{i}": x.clone()
            for path, z in factored.items()
            for i, x in enumerate((z.flatten(1)[:, 0], z[0].flatten()))
        }
        others = {path: z for path, z in flat.items() if path not in factored}
        squares, residuals = ({n: x.clone() for n, x in sums.items()} for _ in range(2))
        return CameState(zeros(params), squares, residuals, others)

    def update(updates: PyTree, state: CameState, params: MaybeParams = None, **extra: Any) -> tuple[PyTree, CameState]:
        check_paths(updates, dict(tree.leaves_with_path(state.mu)))
        return opaque(_came, updates, state, b1, b2, b3, eps, eps2, clip_threshold)

    return GradientTransformation(init, update)


def _came(
    updates: PyTree, state: CameState, b1: Scalar, b2: Scalar, b3: Scalar, eps: Scalar, eps2: Scalar, threshold: Scalar
) -> tuple[PyTree, CameState]:
    old, out, new = dict(tree.leaves_with_path(state.mu)), [], {}
    squares, surprises, nu = {}, {}, {}

    def factors(kept: dict[str, Tensor], path: str, square: Tensor, decay: Scalar) -> tuple[Tensor, Tensor]:
        pair = kept[f"{path}/0"], kept[f"{path}/1"]
        return tuple(a + (1 - decay) * (square.mean(1 - i) - a) for i, a in enumerate(pair))  # type: ignore[return-value]

    def divided(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return x * safe_rsqrt(rows / rows.mean())[:, None] * safe_rsqrt(columns)

    for path, g in tree.leaves_with_path(updates):
        m, shape = old[path], g.shape
        g = g.to(m.dtype)
        if path in state.nu:
            nu[path] = state.nu[path] + (1 - b2) * (g.square() + eps - state.nu[path])
            u = g * safe_rsqrt(nu[path])
        else:
            g, m = g.flatten(1), m.flatten(1)
            pair = factors(state.squares, path, g.square() + eps, b2)
            squares[f"{path}/0"], squares[f"{path}/1"] = pair
            u = divided(g, *pair)
        rms = tree.safe_sqrt(u.square().sum() / max(u.numel(), 1))
        u = u / (rms / threshold).clamp_min(1.0)
        m = m + (1 - b1) * (u - m)
        new[path] = m.view(shape)
        if path not in state.nu:
            pair = factors(state.surprises, path, (u - m).square() + eps2, b3)
            surprises[f"{path}/0"], surprises[f"{path}/1"] = pair
            m = divided(m, *pair)
        out.append(m.view(shape))
    mu = tree.rebuild(state.mu, [new[path] for path in old])
    return tree.rebuild(updates, out), CameState(mu, squares, surprises, nu)


def came(
    learning_rate: Scalar | Schedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    b3: Scalar = 0.9999,
    eps: Scalar = 1e-30,
    eps2: Scalar = 1e-16,
    clip_threshold: Scalar = 1.0,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    """``p - learning_rate * (u + weight_decay * p)``, with ``u`` of `scale_by_came`.

    Args:
        learning_rate: a number, a 0-d tensor or a schedule; the paper has 2e-4 where Adam has 1e-3.
        b1, b2, b3, eps, eps2, clip_threshold: as `scale_by_came`.
        weight_decay: decoupled.
        mask: True where weights decay; None is everywhere.

    Source: Luo et al. (arXiv 2307.02047).
    """
    rule = scale_by_came(b1, b2, b3, eps=eps, eps2=eps2, clip_threshold=clip_threshold)
    return descend(learning_rate, weight_decay, mask, decoupled=True, came=rule)
