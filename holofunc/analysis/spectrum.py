"""Eigenvalues of the curvature by the Lanczos method: the extreme ones, and the spectral density."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from holofunc import random
from holofunc.analysis.hessians import Kind, curvature, flat_product, flat_signs, flatten, unflatten
from holofunc.typing import Batch, Buffers, Key, Objective, Params

__all__ = ["Eigenpairs", "SpectralDensity", "hessian_eigenvalues", "spectral_density"]


class Eigenpairs(NamedTuple):
    """The result of `hessian_eigenvalues`, largest eigenvalue first.

    Attributes:
        values: (k,).
        vectors: of length 1, by name, each (k, *shape).
        residuals: ``||H @ v - value * v||`` of each, (k,): no further than this from the value is an eigenvalue.
        converged: whether the residual is at most ``tol`` times the largest absolute value, bool (k,).
    """

    values: Tensor
    vectors: Params
    residuals: Tensor
    converged: Tensor


def hessian_eigenvalues(
    objective: Objective,
    params: Params,
    buffers: Buffers,
    batch: Batch,
    *,
    k: int,
    key: Key,
    which: Literal["largest", "smallest", "magnitude"] = "largest",
    iterations: int | None = None,
    tol: float = 1e-3,
    kind: Kind = "hessian",
) -> Eigenpairs:
    """The ``k`` extreme eigenvalues and their vectors, by Lanczos' method with full reorthogonalization.

    Costs ``iterations`` products (`hvp`), and keeps as many vectors of the size of the parameters. Compiling one
    iteration is `holofunc.jit` of `hvp`.

    Args:
        objective: as for `hvp`.
        params: where to look.
        buffers: statistics.
        batch: N samples.
        k: how many, at least 1.
        key: of the vector that the iteration starts from, and of an objective that draws.
        which: the largest, the smallest (most negative), or those of the largest absolute value.
        iterations: at least ``k``; by default ``3 * k + 17``, and never more than there are parameters.
        tol: relative residual that counts as converged.
        kind: as for `hvp`.

    Raises:
        ValueError: ``k`` below 1 or above the number of parameters; fewer iterations than ``k``.

    Source: Lanczos (1950); convergence by the residual of Paige (1972).

    Example:
        >>> import torch
        >>> from holofunc import analysis, random
        >>> loss = lambda params, buffers, batch, key: ((params["w"] ** 3).sum(), None)
        >>> w = {"w": torch.tensor([1.0, 2.0, 3.0])}
        >>> analysis.hessian_eigenvalues(loss, w, {}, torch.zeros(1), k=2, key=random.key(0)).values.round(decimals=3)
        tensor([18., 12.])
    """
    size = flatten(params).numel()
    if not 1 <= k <= size:
        raise ValueError(f"k must be in [1, {size}], the number of parameters, got {k}")
    if which not in ("largest", "smallest", "magnitude"):
        raise ValueError(f"which must be 'largest', 'smallest' or 'magnitude', got {which!r}")
    iterations = min(size, 3 * k + 17 if iterations is None else iterations)
    if iterations < k:
        raise ValueError(f"iterations must be at least k={k}, got {iterations}")
    multiply = flat_product(curvature(objective, params, buffers, batch, kind=kind, key=key), params)
    basis, tridiagonal, beyond = lanczos(multiply, flatten(params), iterations, key)
    values, coefficients = _eigenpairs(tridiagonal)
    score = {"largest": values, "smallest": -values, "magnitude": values.abs()}[which]
    first = torch.argsort(score, descending=True)[:k]
    vectors = [unflatten(v, params) for v in (coefficients[:, first].mT @ basis).unbind()]
    residuals = (beyond * coefficients[-1, first]).abs()
    scale = values.abs().max()
    stacked = {name: torch.stack([v[name] for v in vectors]) for name in params}
    return Eigenpairs(values[first], stacked, residuals, residuals <= tol * scale)


class SpectralDensity(NamedTuple):
    """The result of `spectral_density`: the ``density`` (points,) of eigenvalues on the ``grid``."""

    grid: Tensor
    density: Tensor


def spectral_density(
    objective: Objective,
    params: Params,
    buffers: Buffers,
    batch: Batch,
    *,
    key: Key,
    probes: int = 4,
    iterations: int = 40,
    points: int = 1024,
    width: float = 0.01,
    kind: Kind = "hessian",
) -> SpectralDensity:
    """The density of eigenvalues by stochastic Lanczos quadrature: ``probes * iterations`` products.

    Args:
        objective: as for `hvp`.
        params: where to look.
        buffers: statistics.
        batch: N samples.
        key: of the probes, and of an objective that draws.
        probes: vectors of random signs to average over, at least 1.
        iterations: of Lanczos' method, at least 2: as many moments are exact, twice.
        points: of the grid.
        width: standard deviation of the Gaussian that each eigenvalue is drawn as, as a share of the range.
        kind: as for `hvp`.

    Returns:
        A density that integrates to 1 over the grid.

    Source: Ghorbani et al., "An investigation into neural net optimization via Hessian eigenvalue density" (ICML 2019).

    Example:
        >>> import torch
        >>> from holofunc import analysis, random
        >>> loss = lambda params, buffers, batch, key: ((params["w"] ** 3).sum(), None)
        >>> w = {"w": torch.tensor([1.0, 1.0, 3.0])}
        >>> grid, density = analysis.spectral_density(loss, w, {}, torch.zeros(1), key=random.key(0))
        >>> torch.trapezoid(density, grid).round(decimals=3)
        tensor(1.)
    """
    for name, number, least in (("probes", probes, 1), ("iterations", iterations, 2), ("points", points, 2)):
        if number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")
    like = flatten(params)
    multiply = flat_product(curvature(objective, params, buffers, batch, kind=kind, key=key), params)
    iterations = min(iterations, like.numel())
    start_key, rest_key = random.split(key)
    starts = zip(flat_signs(start_key, params, probes), random.split(rest_key, probes).unbind(), strict=True)
    pairs = [_eigenpairs(lanczos(multiply, like, iterations, k, start=z)[1]) for z, k in starts]
    nodes = torch.stack([values for values, _ in pairs])
    weights = torch.stack([vectors[0].square() for _, vectors in pairs]) / probes
    low, high = nodes.min(), nodes.max()
    spread = torch.maximum(high - low, 1e-6 * nodes.abs().max())
    sigma = width * torch.where(spread > 0, spread, 1.0)
    steps = torch.linspace(0, 1, points, dtype=nodes.dtype, device=nodes.device)
    grid = low - 6 * sigma + steps * (high - low + 12 * sigma)
    bumps = torch.exp(-0.5 * ((grid - nodes.unsqueeze(-1)) / sigma) ** 2)
    density = (weights.unsqueeze(-1) * bumps).sum((0, 1))
    return SpectralDensity(grid, density / torch.trapezoid(density, grid))


def lanczos(
    multiply: Callable[[Tensor], Tensor], like: Tensor, iterations: int, key: Key, *, start: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """An orthonormal basis (iterations, P), the matrix in it, tridiagonal, and the norm of what leads out of it.

    Where the iteration has closed (the next direction is nothing but rounding), it goes on with a random one, which
    starts a new block of the matrix.
    """
    keys = random.split(key.to(like.device), iterations + 1)
    q = random.normal(keys[-1], like.shape, dtype=like.dtype) if start is None else start
    q = q / torch.linalg.vector_norm(q)
    basis, diagonal, beside = [q], [], []
    scale = torch.zeros((), dtype=like.dtype, device=like.device)
    for i in range(iterations):
        w = multiply(q)
        diagonal.append(q @ w)
        scale = torch.maximum(scale, torch.linalg.vector_norm(w))
        known = torch.stack(basis)
        w = _without(_without(w, known), known)
        beta = torch.linalg.vector_norm(w)
        closed = beta <= 100 * torch.finfo(like.dtype).eps * scale
        beside.append(torch.where(closed, 0.0, beta))
        if i + 1 < iterations:
            fresh = random.normal(keys[i], like.shape, dtype=like.dtype)
            fresh = _without(_without(fresh, known), known)
            w = torch.where(closed, fresh, w)
            q = w / torch.linalg.vector_norm(w)
            basis.append(q)
    off = torch.stack(beside[:-1]) if iterations > 1 else like.new_zeros(0)
    matrix = torch.diag(torch.stack(diagonal)) + torch.diag(off, 1) + torch.diag(off, -1)
    return torch.stack(basis), matrix, beside[-1]


def _eigenpairs(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Of a matrix that is not finite, NaN; LAPACK raises there, or does not, as it happens."""
    finite = matrix.isfinite().all()
    values, vectors = torch.linalg.eigh(torch.where(finite, matrix, 0.0))
    return torch.where(finite, values, torch.nan), vectors


def _without(w: Tensor, basis: Tensor) -> Tensor:
    return w - basis.mT @ (basis @ w)
