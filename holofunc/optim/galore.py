"""Rules for matrices that keep less than the size of the parameters: SM3, GaLore."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from holofunc import tree
from holofunc.compile import opaque
from holofunc.optim.adam import gains, root, squares_average
from holofunc.optim.base import GradientTransformation, MaybeParams, check_params
from holofunc.optim.checks import check_paths
from holofunc.optim.muon import in_stacks
from holofunc.optim.numerics import check_count, check_decay, check_nonnegative, scalar_dtype, zero_count, zeros
from holofunc.optim.soap import eigenvectors, steady
from holofunc.optim.transforms import moving_average
from holofunc.typing import Params, PyTree, Scalar

__all__ = ["GaloreState", "Sm3State", "scale_by_galore", "scale_by_sm3"]

# --- SM3 ---------------------------------------------------------------------------------------------------------


class Sm3State(NamedTuple):
    """For each axis of each parameter, as ``"path/axis"``, a bound on the sum of the squares along it."""

    bounds: dict[str, Tensor]


def scale_by_sm3(decay: Scalar | None = None, eps: Scalar = 1e-8) -> GradientTransformation:
    """Adagrad from the least of one bound per axis. For a matrix ``g``:

        nu[i, j] = min(rows[i], columns[j]) + g[i, j]**2
        rows[i] = max(nu[i, :]),  columns[j] = max(nu[:, j])
        u = g / (sqrt(nu) + eps)

    and likewise for tensors with more axes. A matrix of shape (n, m) costs n + m numbers; a vector gets Adagrad.

    Args:
        decay: in [0, 1): ``nu = decay * min(...) + (1 - decay) * g**2``, a memory that fades; None is the sum.
        eps: added outside of the root.

    Source: Anil et al., "Memory-efficient adaptive optimization" (arXiv 1901.11150), SM3-II.
    """
    if decay is not None:
        check_decay(decay=decay)
    check_nonnegative(eps=eps)

    def init(params: Params) -> Sm3State:
        check_params(params, "scale_by_sm3")
        flat = tree.leaves_with_path(zeros(params))
        return Sm3State({f"{path}/{axis}": x.clone() for path, z in flat for axis, x in enumerate(_maxima(z))})

    def update(updates: PyTree, state: Sm3State, params: MaybeParams = None, **extra: Any) -> tuple[PyTree, Sm3State]:
        check_paths(updates, {name.rpartition("/")[0]: bound for name, bound in state.bounds.items()})
        keep = (1.0, 1.0) if decay is None else (decay, 1 - decay)
        out, bounds = opaque(_scaled_by_sm3, updates, state.bounds, *keep, eps)
        return out, Sm3State(bounds)

    return GradientTransformation(init, update)


def _maxima(x: Tensor) -> list[Tensor]:
    """For each axis, the greatest element at each of its places; zeros where the other axes have no elements."""
    if x.numel() == 0:
        return [x.new_zeros(n) for n in x.shape]
    found = []
    while x.ndim > 1:  # what is left of an axis is enough for those after it
        found.append(x.flatten(1).amax(1))
        x = x.amax(0)
    return [*found, x]


def _scaled_by_sm3(
    updates: PyTree, bounds: dict[str, Tensor], old: Scalar, new: Scalar, eps: Scalar
) -> tuple[PyTree, dict[str, Tensor]]:
    out, renewed = [], {}
    for path, g in tree.leaves_with_path(updates):
        g = tree.wide(g)
        least = bounds[f"{path}/0"]
        if g.ndim > 1:
            least = least.view(-1, *[1] * (g.ndim - 1))
            for axis in range(1, g.ndim):
                least = torch.minimum(least, bounds[f"{path}/{axis}"].view(-1, *[1] * (g.ndim - 1 - axis)))
        nu = old * least + new * g.square()
        below = root(nu) + eps
        out.append(g / torch.where(below > 0, below, 1.0))
        renewed.update({f"{path}/{axis}": x for axis, x in enumerate(_maxima(nu))})
    return tree.rebuild(updates, out), {name: renewed[name] for name in bounds}


# --- GaLore ------------------------------------------------------------------------------------------------------


class GaloreState(NamedTuple):
    """Updates so far; averages of the projected gradients and of their squares, and the projections, by path."""

    count: Tensor  # type: ignore[assignment]
    mu: dict[str, Tensor]
    nu: dict[str, Tensor]
    basis: dict[str, Tensor]


def scale_by_galore(
    rank: int,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    scale: Scalar = 0.25,
    update_every: int = 200,
) -> GradientTransformation:
    """Adam in the space of the ``rank`` largest singular vectors of each matrix, of its shorter side:

        Q = left singular vectors of g, the first rank of them              # every update_every updates
        r = Q.T @ g;  mu = b1 * mu + (1 - b1) * r;  nu = b2 * nu + (1 - b2) * r**2
        u = scale * Q @ (mu_hat / (sqrt(nu_hat) + eps))

    and from the right for matrices with fewer columns than rows. A tensor of more than two axes counts as (first axis,
    all others); vectors, and matrices with a side of at most ``rank``, get Adam. Gradients flow through ``Q`` to first
    order.

    Args:
        rank: at least 1.
        b1, b2: in [0, 1).
        eps: added outside of the root.
        scale: of the updates of projected matrices, at least 0.
        update_every: updates between new projections; under `vmap` each update computes them, and uses them when it is
            time. Moments stay as they are, and each vector of a new ``Q`` points to the side of the old one.

    Source: Zhao et al., "GaLore: memory-efficient LLM training by gradient low-rank projection" (arXiv 2403.03507).
    """
    check_count(rank=rank, update_every=update_every)
    check_decay(b1=b1, b2=b2)
    check_nonnegative(eps=eps, scale=scale)

    def init(params: Params) -> GaloreState:
        check_params(params, "scale_by_galore")
        mu, basis = {}, {}
        for path, z in tree.leaves_with_path(zeros(params)):
            rows, columns = (len(z), math.prod(z.shape[1:])) if z.ndim > 1 else (0, 0)
            short, long = sorted((rows, columns))
            mu[path] = z if short <= rank else z.new_zeros((rank, long))
            if short > rank:
                basis[path] = torch.eye(short, rank, dtype=z.dtype, device=z.device)
        return GaloreState(zero_count(params), mu, {path: m.clone() for path, m in mu.items()}, basis)

    def update(
        updates: PyTree, state: GaloreState, params: MaybeParams = None, **extra: Any
    ) -> tuple[PyTree, GaloreState]:
        check_paths(updates, state.mu)
        count = state.count + 1
        due = state.count % update_every == 0
        factors = gains(b1, b2, count, scalar_dtype(updates))
        parts = opaque(_projected_adam, updates, *state[1:], due, *factors, b1, b2, eps, scale)
        return parts[0], GaloreState(count, *parts[1:])

    return GradientTransformation(init, update)


def _projected_adam(
    updates: PyTree,
    mu: dict[str, Tensor],
    nu: dict[str, Tensor],
    basis: dict[str, Tensor],
    due: Tensor,
    c1: Tensor,
    c2: Tensor,
    b1: Scalar,
    b2: Scalar,
    eps: Scalar,
    scale: Scalar,
) -> tuple[PyTree, dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    grads = {path: g.to(mu[path].dtype) for path, g in tree.leaves_with_path(updates)}
    wide = {path: _lying(grads[path]) for path in basis}
    basis = in_stacks(lambda q, x: tree.either(due, lambda: _largest(x, q), lambda: q), basis, wide)
    seen = {path: basis[path].mT @ wide[path] if path in basis else grads[path] for path in mu}
    mu, nu = moving_average(seen, mu, b1), squares_average(seen, nu, b2)
    steps = tree.elementwise(lambda m, v: m * c1 / (root(v, c2) + eps), mu, nu)

    def back(path: str, g: Tensor) -> Tensor:
        if path not in basis:
            return steps[path]
        full = scale * (basis[path] @ steps[path])
        return (full if len(full) == len(g) else full.mT).reshape(g.shape)

    return tree.rebuild(updates, [back(path, g) for path, g in grads.items()]), mu, nu, basis


def _lying(g: Tensor) -> Tensor:
    """``g`` as a matrix that is at least as wide as high."""
    matrix = g.flatten(1)
    return matrix.mT if len(matrix) > matrix.shape[1] else matrix


def _largest(x: Tensor, before: Tensor) -> Tensor:
    """The left singular vectors of stacked matrices to their largest values, each on the side of the one ``before``."""
    outer = x @ x.mT
    vectors = steady(eigenvectors(outer)[..., : before.shape[-1]], outer, before)
    agree = (vectors * before).sum(-2, keepdim=True)
    turned = torch.where(agree < 0, -vectors, vectors)
    return turned.clone(memory_format=torch.contiguous_format)  # as `init` lays it out, also for one vector
