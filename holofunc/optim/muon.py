"""Rules that need a tensor as a matrix: Muon, Adafactor, clipping by output unit."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from holofunc import tree
from holofunc.compile import opaque
from holofunc.optim.base import GradientTransformation, MaybeParams, check_params, identity, need_params, stateless
from holofunc.optim.checks import check_paths
from holofunc.optim.layerwise import clip_by_block_rms
from holofunc.optim.numerics import (
    ABSENT,
    check_bound,
    check_count,
    check_decay,
    check_finite,
    check_flags,
    check_nonnegative,
    is_zero,
    scalar_dtype,
    zero_count,
    zeros,
)
from holofunc.optim.transforms import moving_average
from holofunc.typing import Params, PyTree, Scalar

__all__ = [
    "FactoredState",
    "MuonState",
    "adaptive_grad_clip",
    "orthogonalize",
    "scale_by_factored_rms",
    "scale_by_muon",
]


def in_stacks(fn: Callable[..., Tensor], values: PyTree, *rest: PyTree) -> PyTree:
    """`tree.map` for an ``fn`` of stacks ``(n, *shape)``: leaves of one shape are computed together."""
    flats = [dict(tree.leaves_with_path(v)) for v in (values, *rest)]
    groups: dict[Any, list[str]] = {}
    for path in flats[0]:
        groups.setdefault(tuple((x.shape, x.dtype, x.device) for x in (f[path] for f in flats)), []).append(path)
    done: dict[str, Tensor] = {}
    for group in groups.values():
        parts = [[flat[path] for path in group] for flat in flats]
        out = fn(*(torch.stack(xs) if len(xs) > 1 else xs[0][None] for xs in parts))  # one needs no copy
        done.update(zip(group, out.unbind(), strict=True))
    return tree.rebuild(values, [done[path] for path in flats[0]])


# --- Muon --------------------------------------------------------------------------------------------------------

Coefficients: TypeAlias = str | tuple[float, float, float] | Sequence[tuple[float, float, float]]
"""``(a, b, c)`` of each step, or of all; or a name of `NEWTON_SCHULZ`."""

NEWTON_SCHULZ: dict[str, Sequence[tuple[float, float, float]]] = {
    "classic": [(3.4445, -4.7750, 2.0315)],
    "quintic": [
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ],
    "polar_express": [
        (a / 1.01, b / 1.01**3, c / 1.01**5)  # a margin for the rounding of bfloat16
        for a, b, c in [
            (8.28721201814563, -23.595886519098837, 17.300387312530933),
            (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
            (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
            (3.3184196573706015, -2.488488024314874, 0.51004894012372),
            (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
            (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
        ]
    ]
    + [(1.875, -1.25, 0.375)],
}
"""Quintics for each step, the last one for all further ones. The classic one is the steepest at zero that keeps
singular values between 0.7 and 1.2; the others take the steps together, and bring them nearer to 1.

Source: Jordan et al. (2024); quintic: the sequence of the modded-nanogpt records; polar_express: Amsel et al., "The
Polar Express" (arXiv 2505.16932), for singular values above 1e-3 of the norm.
"""


def orthogonalize(
    x: Tensor,
    steps: int = 5,
    *,
    coefficients: Coefficients = "classic",
    eps: float = 1e-7,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: singular values between 0.7 and 1.2 in place of those of ``x``.

    ``x = a * x + (b * y + c * y @ y) @ x`` with ``y = x @ x.T``, ``steps`` times, from ``x / norm(x)``.

    Args:
        x: matrices, shape (..., rows, columns).
        steps: of the Newton-Schulz iteration.
        coefficients: ``(a, b, c)``, a list of them for one step after the other, or a name of `NEWTON_SCHULZ`:
            ``"classic"``, ``"quintic"``, ``"polar_express"``.
        eps: least norm to divide by.
        dtype: to compute in; None is that of ``x``, bfloat16 is what the authors use on GPUs.

    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024).

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> s = torch.linalg.svdvals(optim.orthogonalize(torch.tensor([[3.0, 1.0], [0.0, 2.0]])))
        >>> bool(((s > 0.6) & (s < 1.3)).all())
        True
    """
    each = _each_step(coefficients)
    y = tree.wide(x) if dtype is None else x.to(dtype)
    tall = y.shape[-2] > y.shape[-1]
    y = y.mT if tall else y
    square = y.square().sum((-2, -1), keepdim=True)
    y = y / tree.safe_sqrt(square).clamp_min(eps)
    for i in range(steps):
        a, b, c = each[min(i, len(each) - 1)]
        gram = y @ y.mT
        y = a * y + (b * gram + c * (gram @ gram)) @ y
    return (y.mT if tall else y).to(tree.wide(x).dtype)


def _each_step(coefficients: Coefficients) -> Sequence[tuple[float, float, float]]:
    if isinstance(coefficients, str):
        if coefficients not in NEWTON_SCHULZ:
            raise ValueError(f"coefficients must be one of {list(NEWTON_SCHULZ)}, got {coefficients!r}")
        return NEWTON_SCHULZ[coefficients]
    rows = [coefficients] if isinstance(coefficients[0], (int, float)) else coefficients
    place = "ns_coefficients[{j}]" if rows[0] is coefficients else "ns_coefficients[{i}][{j}]"
    check_finite(**{place.format(i=i, j=j): c for i, row in enumerate(rows) for j, c in enumerate(row)})  # type: ignore[arg-type]
    return rows  # type: ignore[return-value]


class MuonState(NamedTuple):
    """Moving average of the gradients."""

    mu: PyTree


def scale_by_muon(
    momentum: Scalar = 0.95,
    *,
    nesterov: bool = True,
    ns_steps: int = 5,
    ns_coefficients: Coefficients = "classic",
    ns_dtype: torch.dtype | None = None,
    adjust: str = "original",
    conv: str = "flatten",
) -> GradientTransformation:
    """The momentum of each matrix, orthogonalized. Matrices of one shape are computed together.

    Args:
        momentum: in [0, 1). The Python number 0 keeps no ``mu``.
        nesterov: look one step ahead.
        ns_steps, ns_coefficients, ns_dtype: of `orthogonalize`.
        adjust: factor of the result: ``"original"`` is ``sqrt(max(1, rows / columns))``, ``"match_rms"`` is
            ``0.2 * sqrt(max(rows, columns))``, which makes updates as large as Adam's (torch's ``"match_rms_adamw"``),
            ``"rms_to_rms"`` is ``sqrt(rows / columns)``, ``"none"`` is 1.
        conv: what a tensor of more than two axes is: ``"flatten"``, a matrix (first axis, all others); ``"batched"``, a
            matrix of the first two axes at each place of the others, divided by the root of their number.

    Raises:
        ValueError: in ``init``, a parameter of fewer than two axes.

    Source: Jordan et al. (2024); match_rms: Liu et al., "Muon is scalable for LLM training" (arXiv 2502.16982);
    rms_to_rms: Bernstein and Newhouse, "Old optimizer, new norm" (arXiv 2409.20325).
    """
    check_decay(momentum=momentum)
    check_flags(nesterov=nesterov)
    if adjust not in ("original", "match_rms", "match_rms_adamw", "rms_to_rms", "none"):
        raise ValueError(f"adjust must be 'original', 'match_rms', 'rms_to_rms' or 'none', got {adjust!r}")
    if conv not in ("flatten", "batched"):
        raise ValueError(f"conv must be 'flatten' or 'batched', got {conv!r}")
    _each_step(ns_coefficients)
    if isinstance(ns_steps, bool) or not isinstance(ns_steps, int) or ns_steps < 1:
        raise ValueError(f"ns_steps must be an int of at least 1, got {ns_steps!r}")

    def init(params: Params) -> MuonState:
        check_params(params, "scale_by_muon")
        for path, p in tree.leaves_with_path(params):
            if p.ndim < 2:
                raise ValueError(f"scale_by_muon: parameters must have at least two axes, got {path!r} with {p.ndim}")
        return MuonState(ABSENT if is_zero(momentum) else zeros(params))

    def rule(u: Tensor) -> Tensor:
        places = math.prod(u.shape[3:]) if conv == "batched" else 1
        matrix = u.flatten(3).movedim(3, 1) if places > 1 else u.flatten(2)
        rows, columns = matrix.shape[-2:]
        factor = {
            "original": max(1.0, rows / max(columns, 1)) ** 0.5,
            "match_rms": 0.2 * max(rows, columns) ** 0.5,
            "match_rms_adamw": 0.2 * max(rows, columns) ** 0.5,
            "rms_to_rms": (rows / max(columns, 1)) ** 0.5,
            "none": 1.0,
        }
        out = orthogonalize(matrix, ns_steps, coefficients=ns_coefficients, dtype=ns_dtype)
        out = out * (factor[adjust] / places**0.5)
        return (out.movedim(1, 3) if places > 1 else out).reshape(u.shape)

    def update(updates: PyTree, state: MuonState, params: MaybeParams = None, **extra: Any) -> tuple[PyTree, MuonState]:
        mu = ABSENT if is_zero(momentum) else moving_average(updates, state.mu, momentum)
        ahead = tree.elementwise(tree.wide, updates) if is_zero(momentum) else mu
        if nesterov and not is_zero(momentum):
            ahead = tree.elementwise(lambda g, m: m + (1 - momentum) * (tree.wide(g) - m), updates, mu)
        return opaque(lambda stacked: in_stacks(rule, stacked), ahead), MuonState(mu)

    return GradientTransformation(init, update)


# --- Adafactor -----------------------------------------------------------------------------------------------------


class FactoredState(NamedTuple):
    """Updates so far; means of the squares over rows and over columns of matrices; of each element elsewhere."""

    count: Tensor  # type: ignore[assignment]
    rows: dict[str, Tensor]
    columns: dict[str, Tensor]
    nu: dict[str, Tensor]


def scale_by_factored_rms(
    decay_rate: float = 0.8,
    eps: Scalar = 1e-30,
    *,
    min_dim_size_to_factor: int = 2,
    clip_threshold: Scalar | None = None,
) -> GradientTransformation:
    """``g / sqrt(nu)``, where ``nu`` of a matrix is the outer product of its row and column means, over their mean:

        decay = 1 - count**-decay_rate
        rows = decay * rows + (1 - decay) * mean(g**2 + eps, columns),   columns likewise
        nu = rows[:, None] * columns[None, :] / mean(rows)

    A matrix of shape (n, m) costs n + m numbers. A tensor of more axes counts as (first axis, all others).

    Args:
        decay_rate: how fast the memory becomes long.
        eps: added to the squares.
        min_dim_size_to_factor: matrices with a shorter side, and vectors, keep a full ``nu``.
        clip_threshold: as `clip_by_block_rms` afterwards, which would read and write each update once more.

    Source: Shazeer and Stern, "Adafactor" (arXiv 1804.04235).
    """
    check_nonnegative(decay_rate=decay_rate, eps=eps)
    check_count(min_dim_size_to_factor=min_dim_size_to_factor)
    if clip_threshold is not None:
        check_bound(clip_threshold=clip_threshold)
    clip = identity() if clip_threshold is None else clip_by_block_rms(clip_threshold)

    def factored(p: Tensor) -> bool:
        return p.ndim > 1 and min(len(p), math.prod(p.shape[1:])) >= min_dim_size_to_factor

    def init(params: Params) -> FactoredState:
        check_params(params, "scale_by_factored_rms")
        flat = dict(tree.leaves_with_path(zeros(params)))
        return FactoredState(
            zero_count(params),
            {path: z.flatten(1)[:, 0].clone() for path, z in flat.items() if factored(z)},
            {path: z[0].flatten().clone() for path, z in flat.items() if factored(z)},
            {path: z for path, z in flat.items() if not factored(z)},
        )

    def update(
        updates: PyTree, state: FactoredState, params: MaybeParams = None, **extra: Any
    ) -> tuple[PyTree, FactoredState]:
        check_paths(updates, {**state.rows, **state.nu})
        count = state.count + 1
        share = tree.hoist(count.to(scalar_dtype(updates)) ** -decay_rate)  # 1 - decay, which is near 1 in fp32
        matrices, others = tree.parted(updates, [list(state.rows), list(state.nu)])
        out, rows, columns, nu = [], state.rows, state.columns, state.nu
        if matrices:
            numbers = share, eps, clip_threshold
            scaled, rows, columns = opaque(_scaled_by_factors, matrices, rows, columns, *numbers)
            out.append(scaled)
        if others:
            most = torch.finfo(torch.float32).max
            nu = tree.elementwise(
                lambda g, v: v + share * ((g.to(v.dtype).square() + eps).clamp_max(most) - v), others, nu
            )
            scaled = tree.elementwise(lambda g, v: g.to(v.dtype) * safe_rsqrt(v), others, nu)
            out.append(clip.update(scaled, (), None)[0])
        return tree.together(out, updates), FactoredState(count, rows, columns, nu)

    return GradientTransformation(init, update)


def _scaled_by_factors(
    updates: PyTree,
    rows: dict[str, Tensor],
    columns: dict[str, Tensor],
    share: Tensor,
    eps: Scalar,
    clip_threshold: Scalar | None,
) -> tuple[PyTree, dict[str, Tensor], dict[str, Tensor]]:
    flat = {path: _with_square_sum(g.to(rows[path].dtype)) for path, g in tree.leaves_with_path(updates)}
    squares = {path: g.square().flatten(1) for path, g in flat.items()}
    rows = {n: a + share * (squares[n].mean(1) + eps - a) for n, a in rows.items()}
    columns = {n: a + share * (squares[n].mean(0) + eps - a) for n, a in columns.items()}

    def rule(path: str, g: Tensor) -> Tensor:
        row, column = safe_rsqrt(rows[path] / rows[path].mean()), safe_rsqrt(columns[path])
        if clip_threshold is not None:
            rms = tree.safe_sqrt(row.square() @ (squares[path] @ column.square()) / max(g.numel(), 1))
            row = row / (rms / clip_threshold).clamp_min(1.0)
        return (g.flatten(1) * row[:, None] * column).view(g.shape)

    return tree.rebuild(updates, [rule(path, g) for path, g in flat.items()]), rows, columns


def _with_square_sum(g: Tensor) -> Tensor:
    """``g``, clipped so far that the sum of its squares does not overflow."""
    most = (0.5 * torch.finfo(g.dtype).max / max(g.numel(), 1)) ** 0.5
    return g.clamp(-most, most)


def safe_rsqrt(x: Tensor) -> Tensor:
    """``1 / sqrt(x)``; no gradient flows where it would overflow in fp32."""
    steep = x < 1e-24
    return torch.where(steep, x.detach().rsqrt(), torch.where(steep, 1.0, x).rsqrt())


# --- clipping ----------------------------------------------------------------------------------------------------


def adaptive_grad_clip(clipping: Scalar = 0.01, eps: Scalar = 1e-3) -> GradientTransformation:
    """Shorten the update of each output unit to ``clipping`` times the norm of its weights.

    A unit is an index of the first axis; a vector or a number is one unit.

    Args:
        clipping: at least 0.
        eps: least norm that weights count with, so that zero weights can move.

    Source: Brock et al., "High-performance large-scale image recognition without normalization" (arXiv 2102.06171).

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> params, grads = {"w": torch.ones(2, 4)}, {"w": torch.tensor([[1.0] * 4, [0.0] * 4])}
        >>> optim.adaptive_grad_clip(0.5).update(grads, (), params)[0]["w"][:, 0]
        tensor([0.5000, 0.0000])
    """
    check_bound(clipping=clipping)
    check_nonnegative(eps=eps)

    def norm(x: Tensor) -> Tensor:
        axes = tuple(range(1, x.ndim)) if x.ndim > 1 else None
        return tree.safe_sqrt(x.square().sum(axes, keepdim=x.ndim > 1))

    def clip(u: Tensor, p: Tensor, clipping: Scalar, eps: Scalar) -> Tensor:
        u, largest = tree.wide(u), norm(tree.wide(p)).clamp_min(eps) * clipping
        size = norm(u)
        return u * torch.where(size > largest, largest / torch.where(size > largest, size, 1.0), 1.0)

    def fn(updates: PyTree, params: MaybeParams) -> PyTree:
        need_params(params, "adaptive_grad_clip")

        def clipped(updates: PyTree, params: PyTree, *bounds: Scalar) -> PyTree:
            return tree.map(lambda u, p: clip(u, p, *bounds), updates, params)

        return opaque(clipped, updates, params, clipping, eps)

    return stateless(fn, "adaptive_grad_clip")
