"""Adafactor, CAME: second moments of rows and columns in place of those of elements."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from holofunc import tree
from holofunc.compile import opaque
from holofunc.optim.base import GradientTransformation, identity
from holofunc.optim.checks import check_paths
from holofunc.optim.clipping import clip_by_block_rms
from holofunc.optim.deprecation import renamed
from holofunc.optim.labels import Mask
from holofunc.optim.numerics import divisor, is_zero, scalar_dtype, shortening, zeros
from holofunc.optim.ranges import check_bound, check_count, check_decay, check_flags, check_nonnegative
from holofunc.optim.scalars import zero_count
from holofunc.optim.transforms import descend, ema, scale_by_param_block_rms
from holofunc.typing import Params, PyTree, Scalar, Schedule

__all__ = ["CameState", "FactoredState", "adafactor", "came", "scale_by_came", "scale_by_factored_rms"]


# --- Adafactor ---------------------------------------------------------------------------------------------------


class FactoredState(NamedTuple):
    """Updates so far; means of the squares over rows and over columns of matrices; of each element elsewhere."""

    step: Tensor
    rows: dict[str, Tensor]
    columns: dict[str, Tensor]
    nu: dict[str, Tensor]


@renamed(clip_threshold="threshold")
def scale_by_factored_rms(
    decay_rate: float = 0.8, eps: Scalar = 1e-30, *, min_dim_size_to_factor: int = 2, threshold: Scalar | None = None
) -> GradientTransformation:
    """``g / sqrt(nu)``, where ``nu`` of a matrix is the outer product of its row and column means, over their mean:

        decay = 1 - step**-decay_rate
        rows = decay * rows + (1 - decay) * mean(g**2 + eps, columns),   columns likewise
        nu = rows[:, None] * columns[None, :] / mean(rows)

    A matrix of shape (n, m) costs n + m numbers. A tensor of more axes counts as (first axis, all others).

    Args:
        decay_rate: how fast the memory becomes long.
        eps: added to the squares.
        min_dim_size_to_factor: matrices with a shorter side, and vectors, keep a full ``nu``.
        threshold: of `clip_by_block_rms` afterwards; None clips nothing.

    Source: Shazeer and Stern, "Adafactor" (arXiv 1804.04235).
    """
    check_nonnegative(decay_rate=decay_rate, eps=eps)
    check_count(min_dim_size_to_factor=min_dim_size_to_factor)
    if threshold is not None:
        check_bound(threshold=threshold)
    clip = identity() if threshold is None else clip_by_block_rms(threshold)

    def factored(p: Tensor) -> bool:
        return p.ndim > 1 and min(len(p), math.prod(p.shape[1:])) >= min_dim_size_to_factor

    def init(params: Params) -> FactoredState:
        flat = dict(tree.leaves_with_path(zeros(params)))
        return FactoredState(
            zero_count(params),
            {path: z.flatten(1)[:, 0].clone() for path, z in flat.items() if factored(z)},
            {path: z[0].flatten().clone() for path, z in flat.items() if factored(z)},
            {path: z for path, z in flat.items() if not factored(z)},
        )

    def update(updates: PyTree, state: FactoredState) -> tuple[PyTree, FactoredState]:
        check_paths(updates, {**state.rows, **state.nu})
        step = state.step + 1
        share = tree.hoist(step.to(scalar_dtype(updates)) ** -decay_rate)  # 1 - decay, which is near 1 in fp32
        matrices, others = tree.partition(updates, [list(state.rows), list(state.nu)])
        out, rows, columns, nu = [], state.rows, state.columns, state.nu
        if matrices:
            scaled, rows, columns = opaque(_scaled_by_factors, matrices, rows, columns, share, eps)
            out.append(scaled)
        if others:
            most = torch.finfo(torch.float32).max
            nu = tree.elementwise(
                lambda g, v: v + share * ((g.to(v.dtype).square() + eps).clamp_max(most) - v), others, nu
            )
            out.append(tree.elementwise(lambda g, v: g.to(v.dtype) * safe_rsqrt(v), others, nu))
        return clip.update(tree.combine(out, updates), (), None)[0], FactoredState(step, rows, columns, nu)

    return GradientTransformation(init, update)


def _scaled_by_factors(
    updates: PyTree, rows: dict[str, Tensor], columns: dict[str, Tensor], share: Tensor, eps: Scalar
) -> tuple[PyTree, dict[str, Tensor], dict[str, Tensor]]:
    out, new_rows, new_columns = [], {}, {}
    for path, g in tree.leaves_with_path(updates):  # each to its end, while it is in the cache
        matrix = _with_square_sum(g.to(rows[path].dtype)).flatten(1)
        square = matrix.square()
        new_rows[path] = rows[path] + share * (square.mean(1) + eps - rows[path])
        new_columns[path] = columns[path] + share * (square.mean(0) + eps - columns[path])
        row, column = safe_rsqrt(new_rows[path] / divisor(new_rows[path].mean(), 0.0)), safe_rsqrt(new_columns[path])
        out.append((matrix * row[:, None] * column).view(g.shape))
    return tree.rebuild(updates, out), new_rows, new_columns


def _with_square_sum(g: Tensor) -> Tensor:
    """``g``, clipped so far that the sum of its squares does not overflow."""
    most = (0.5 * torch.finfo(g.dtype).max / max(g.numel(), 1)) ** 0.5
    return g.clamp(-most, most)


def safe_rsqrt(x: Tensor) -> Tensor:
    """``1 / sqrt(x)``, 0 at 0; no gradient flows where it would overflow in fp32."""
    steep = x < 1e-24
    return torch.where(steep, divisor(x.detach(), 0.0).rsqrt(), torch.where(steep, 1.0, x).rsqrt())


@renamed(clip_threshold="threshold", b1="momentum")
def adafactor(
    learning_rate: Scalar | Schedule = 1e-2,
    *,
    relative_step: bool = True,
    decay_rate: float = 0.8,
    eps: Scalar = 1e-30,
    min_scale: Scalar = 1e-3,
    threshold: Scalar = 1.0,
    momentum: Scalar = 0.0,
    min_dim_size_to_factor: int = 2,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    """Adam without momentum, and with the second moment of a matrix factored. With ``u`` of `scale_by_factored_rms`:

        p = p - rate * max(min_scale, rms(p)) * u,  rate = min(learning_rate, 1 / sqrt(step))

    Args:
        learning_rate: a number, a 0-d tensor or a schedule.
        relative_step: False takes ``learning_rate`` as it is.
        decay_rate, eps, min_dim_size_to_factor, threshold: as `scale_by_factored_rms`.
        min_scale: as `scale_by_param_block_rms`.
        momentum: of a moving average of the updates; 0 keeps none.
        weight_decay, mask: as `add_decayed_weights`, decoupled; scaled by ``rate``.

    Source: Shazeer and Stern (arXiv 1804.04235), algorithms 4 and 5, which have no decay.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.adafactor(), {"w": torch.ones(2, 3)}
        >>> [tuple(x.shape) for x in (tx.init(params)["factored"].rows["w"], tx.init(params)["factored"].columns["w"])]
        [(2,), (3,)]
    """
    check_flags(relative_step=relative_step)
    check_nonnegative(True, learning_rate=learning_rate)
    check_decay(momentum=momentum)

    def rate(count: Tensor) -> Tensor:
        limit = (count + 1).to(torch.float64).rsqrt()
        return limit.clamp_max(learning_rate(count) if callable(learning_rate) else learning_rate)

    momenta = {} if is_zero(momentum) else {"momentum": ema(momentum, debias=False)}
    factored = scale_by_factored_rms(
        decay_rate, eps, min_dim_size_to_factor=min_dim_size_to_factor, threshold=threshold
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


# --- CAME --------------------------------------------------------------------------------------------------------


class CameState(NamedTuple):
    """Momentum; for matrices, means over rows and columns of squared gradients and of squared surprises, by
    ``"path/0"`` and ``"path/1"``; for the others, whole averages of the squared gradients.
    """

    mu: PyTree
    squares: dict[str, Tensor]
    surprises: dict[str, Tensor]
    nu: dict[str, Tensor]


@renamed(clip_threshold="threshold")
def scale_by_came(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    b3: Scalar = 0.9999,
    *,
    eps: Scalar = 1e-30,
    eps2: Scalar = 1e-16,
    threshold: Scalar = 1.0,
) -> GradientTransformation:
    """Adafactor whose momentum is divided by its own factored instability:

        u = g / sqrt(factored average of g**2 + eps, with b2),  clipped to a root mean square of threshold
        mu = b1 * mu + (1 - b1) * u
        update = mu / sqrt(factored average of (u - mu)**2 + eps2, with b3)

    Vectors have no factors: their update is ``mu``. A tensor of more than two axes counts as (first axis, all others).

    Args:
        b1, b2, b3: in [0, 1).
        eps, eps2: added to squares.
        threshold: as `clip_by_block_rms`.

    Source: Luo et al., "CAME: confidence-guided adaptive memory efficient optimization" (arXiv 2307.02047).
    """
    check_decay(b1=b1, b2=b2, b3=b3)
    check_nonnegative(eps=eps, eps2=eps2)
    check_bound(threshold=threshold)

    def init(params: Params) -> CameState:
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

    def update(updates: PyTree, state: CameState) -> tuple[PyTree, CameState]:
        check_paths(updates, dict(tree.leaves_with_path(state.mu)))
        return opaque(_came, updates, state, b1, b2, b3, eps, eps2, threshold)

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
        return x * safe_rsqrt(rows / divisor(rows.mean(), 0.0))[:, None] * safe_rsqrt(columns)

    for path, g in tree.leaves_with_path(updates):
        m, shape = old[path], g.shape
        g = _with_square_sum(g.to(m.dtype))
        if path in state.nu:
            nu[path] = state.nu[path] + (1 - b2) * (g.square() + eps - state.nu[path])
            u = g * safe_rsqrt(nu[path])
        else:
            g, m = g.flatten(1), m.flatten(1)
            pair = factors(state.squares, path, g.square() + eps, b2)
            squares[f"{path}/0"], squares[f"{path}/1"] = pair
            u = divided(g, *pair)
        rms = tree.safe_sqrt(u.square().sum() / max(u.numel(), 1))
        u = u * shortening(rms, threshold)
        m = m + (1 - b1) * (u - m)
        new[path] = m.view(shape)
        if path not in state.nu:
            pair = factors(state.surprises, path, (u - m).square() + eps2, b3)
            surprises[f"{path}/0"], surprises[f"{path}/1"] = pair
            m = divided(m, *pair)
        out.append(m.view(shape))
    mu = tree.rebuild(state.mu, [new[path] for path in old])
    return tree.rebuild(updates, out), CameState(mu, squares, surprises, nu)


@renamed(clip_threshold="threshold")
def came(
    learning_rate: Scalar | Schedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    b3: Scalar = 0.9999,
    eps: Scalar = 1e-30,
    eps2: Scalar = 1e-16,
    threshold: Scalar = 1.0,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    """``p - learning_rate * (u + weight_decay * p)``, with ``u`` of `scale_by_came`.

    Args:
        learning_rate: a number, a 0-d tensor or a schedule; the paper has 2e-4 where Adam has 1e-3.
        b1, b2, b3, eps, eps2, threshold: as `scale_by_came`.
        weight_decay, mask: as `add_decayed_weights`, decoupled.

    Source: Luo et al. (arXiv 2307.02047).
    """
    rule = scale_by_came(b1, b2, b3, eps=eps, eps2=eps2, threshold=threshold)
    return descend(learning_rate, weight_decay, mask, decoupled=True, came=rule)
