"""GaLore: Adam of gradients projected to a low rank."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from holofunc import tree
from holofunc.compile import opaque
from holofunc.optim.base import GradientTransformation
from holofunc.optim.checks import check_paths
from holofunc.optim.deprecation import renamed
from holofunc.optim.labels import Mask
from holofunc.optim.matrices import eigenvectors, in_stacks, steady
from holofunc.optim.numerics import divisor, root, scalar_dtype, squares_average, zeros
from holofunc.optim.ranges import check_count, check_decay, check_nonnegative
from holofunc.optim.scalars import gains, zero_count
from holofunc.optim.transforms import descend, moving_average
from holofunc.typing import Params, PyTree, Scalar, Schedule

__all__ = ["GaloreState", "galore", "scale_by_galore"]


class GaloreState(NamedTuple):
    """Updates so far; averages of the projected gradients and of their squares, and the projections, by path."""

    step: Tensor
    mu: dict[str, Tensor]
    nu: dict[str, Tensor]
    basis: dict[str, Tensor]


@renamed(update_every="every")
def scale_by_galore(
    rank: int, *, b1: Scalar = 0.9, b2: Scalar = 0.999, eps: Scalar = 1e-8, scale: Scalar = 0.25, every: int = 200
) -> GradientTransformation:
    """Adam in the space of the ``rank`` largest singular vectors of each matrix, of its shorter side:

        Q = left singular vectors of g, the first rank of them              # every so many updates
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
        every: updates between new projections; under `vmap` each update computes them, and uses them when it is
            time. Moments stay as they are, and each vector of a new ``Q`` points to the side of the old one.

    Source: Zhao et al., "GaLore: memory-efficient LLM training by gradient low-rank projection" (arXiv 2403.03507).
    """
    check_count(rank=rank, every=every)
    check_decay(b1=b1, b2=b2)
    check_nonnegative(eps=eps, scale=scale)

    def init(params: Params) -> GaloreState:
        mu, basis = {}, {}
        for path, z in tree.leaves_with_path(zeros(params)):
            rows, columns = (len(z), math.prod(z.shape[1:])) if z.ndim > 1 else (0, 0)
            short, long = sorted((rows, columns))
            mu[path] = z if short <= rank else z.new_zeros((rank, long))
            if short > rank:
                basis[path] = torch.eye(short, rank, dtype=z.dtype, device=z.device)
        return GaloreState(zero_count(params), mu, {path: m.clone() for path, m in mu.items()}, basis)

    def update(updates: PyTree, state: GaloreState) -> tuple[PyTree, GaloreState]:
        check_paths(updates, state.mu)
        step = state.step + 1
        due = state.step % every == 0
        factors = gains(b1, b2, step, scalar_dtype(updates))
        parts = opaque(_projected_adam, updates, *state[1:], due, *factors, b1, b2, eps, scale)
        return parts[0], GaloreState(step, *parts[1:])

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
    steps = tree.elementwise(lambda m, v: m * c1 / divisor(root(v, c2), eps), mu, nu)

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


@renamed(update_every="every")
def galore(
    learning_rate: Scalar | Schedule,
    *,
    rank: int = 128,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    scale: Scalar = 0.25,
    every: int = 200,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    """Adam of gradients projected to a low rank: ``p - learning_rate * (u + weight_decay * p)``, with ``u`` of
    `scale_by_galore`.

    Args:
        learning_rate, weight_decay, mask: as `adamw`.
        rank, b1, b2, eps, scale, every: as `scale_by_galore`.

    Source: Zhao et al. (arXiv 2403.03507).

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.galore(0.1, rank=2, scale=1.0), {"w": torch.ones(4, 50)}
        >>> {name: tuple(m.shape) for name, m in tx.init(params)["galore"].mu.items()}
        {'w': (2, 50)}
    """
    rule = scale_by_galore(rank, b1=b1, b2=b2, eps=eps, scale=scale, every=every)
    return descend(learning_rate, weight_decay, mask, decoupled=True, galore=rule)
