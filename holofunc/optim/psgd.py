"""PSGD with Kronecker factors: whitening of gradients by triangular matrices that are learnt on a Lie group."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from holofunc import random, tree
from holofunc.compile import opaque
from holofunc.optim.base import GradientTransformation
from holofunc.optim.capabilities import KeepsProgress
from holofunc.optim.deprecation import renamed
from holofunc.optim.labels import Mask
from holofunc.optim.numerics import far_norm, in_shapes_of, scalar_dtype, shortening, zeros
from holofunc.optim.ranges import check_bound, check_count, check_decay, check_nonnegative, check_positive
from holofunc.optim.scalars import bias_correction, own_key, zero_count
from holofunc.optim.transforms import descend, moving_average
from holofunc.typing import Key, Params, PyTree, Scalar, Schedule

__all__ = ["KronState", "kron", "scale_by_kron"]


class _Kron(NamedTuple):
    step: Tensor
    key: Key
    mu: PyTree
    factors: dict[str, Tensor]


class KronState(_Kron, KeepsProgress):
    """Updates so far, the key of all probes, momentum; the factors of each side, as ``"path/side"``: an upper
    triangular matrix, or a vector for a diagonal one.
    """

    __slots__ = ()


@renamed(first="key")
def scale_by_kron(
    b1: Scalar = 0.9,
    *,
    key: Key,
    precond_learning_rate: Scalar = 0.1,
    every: int = 1,
    max_dim: int = 8192,
    init_scale: float = 1.0,
    max_rms: Scalar = 1.1,
) -> GradientTransformation:
    """Multiply the momentum ``m`` of each matrix by ``Q.T @ Q`` from both sides, where ``Q`` learns to make it white:

        A = QL @ m @ QR.T,  B = inv(QL).T @ v @ inv(QR)                     # v: normal noise
        QL = QL - rate / norm * triu(A @ A.T - B @ B.T) @ QL                # likewise QR, every so many updates
        u = QL.T @ QL @ m @ QR.T @ QR,  clipped to a root mean square of max_rms

    where ``norm`` is that of ``A @ A.T + B @ B.T``, estimated from below. Nothing is inverted but triangles. A tensor
    of more than two axes counts as (first axis, all others); of vectors, and of sides longer than ``max_dim``, the
    factor is diagonal.

    Args:
        key: of the probes ``v``, which are a function of it and of the number of the update.
        b1: in [0, 1), of the debiased momentum.
        precond_learning_rate: the rate of the factors, at least 0.
        every: updates between those of the factors. Each update computes them, under `vmap` and in graphs.
        max_dim: sides up to this length have a whole triangle.
        init_scale: of the first ``Q``: about one over the root of the gradients' size.
        max_rms: greatest root mean square of an update; infinity is any.

    Source: Li, "Preconditioned stochastic gradient descent" (arXiv 1512.04202) and "Preconditioner on matrix Lie group
    for SGD" (arXiv 1809.10232); the clipping and the default numbers as in public implementations of Kron.
    """
    random.check_key(key)
    check_decay(b1=b1)
    check_nonnegative(precond_learning_rate=precond_learning_rate)
    check_count(every=every, max_dim=max_dim)
    check_positive(init_scale=init_scale)
    check_bound(max_rms=max_rms)

    def init(params: Params) -> KronState:
        factors = {}
        for path, z in tree.leaves_with_path(zeros(params)):
            if not z.numel():
                continue
            sides = (len(z), math.prod(z.shape[1:])) if z.ndim > 1 else (z.numel(),)
            for i, n in enumerate(sides):
                one = torch.ones(n, dtype=z.dtype, device=z.device) * init_scale ** (1 / len(sides))
                factors[f"{path}/{i}"] = torch.diag(one) if 1 < n <= max_dim and len(sides) > 1 else one
        return KronState(zero_count(params), own_key(key, params), zeros(params), factors)

    def update(updates: PyTree, state: KronState) -> tuple[PyTree, KronState]:
        step, dtype = state.step + 1, scalar_dtype(updates)
        mu = moving_average(updates, state.mu, b1)
        c1 = tree.hoist(1 / bias_correction(b1, step, dtype))
        draws = random.normal(random.fold_in(state.key, state.step), (tree.size(updates),), dtype=dtype)
        due = state.step % every == 0
        out, factors = opaque(
            _whitened, mu, in_shapes_of(draws, mu), state.factors, due, c1, precond_learning_rate, max_rms
        )
        return out, KronState(step, state.key, mu, factors)

    return GradientTransformation(init, update)


def _whitened(
    mu: PyTree, noise: PyTree, factors: dict[str, Tensor], due: Tensor, c1: Tensor, rate: Scalar, max_rms: Scalar
) -> tuple[PyTree, dict[str, Tensor]]:
    probes, out, new = dict(tree.leaves_with_path(noise)), [], {}
    for path, m in tree.leaves_with_path(mu):
        sides = [factors[f"{path}/{i}"] for i in range(2) if f"{path}/{i}" in factors]
        if not sides:
            out.append(m)
            continue
        shape = (len(m), -1) if m.ndim > 1 else (-1, 1)
        x, v = (m * c1).reshape(shape), probes[path].to(m.dtype).reshape(shape)
        pair = sides if len(sides) > 1 else [sides[0], torch.ones_like(sides[0][:1])]
        moved = [_renewed(pair, i, x, v, rate, due) for i in range(len(sides))]
        new.update({f"{path}/{i}": q for i, q in enumerate(moved)})
        left, right = (*moved, pair[1]) if len(moved) < 2 else moved
        u = _times(left, _times(left, x), transposed=True)
        u = _times(right, _times(right, u.mT), transposed=True).mT
        rms = far_norm(lambda u: tree.safe_sqrt(u.square().mean()), u)
        out.append((u * shortening(rms, max_rms)).reshape(m.shape))
    return tree.rebuild(mu, out), new


def _renewed(pair: list[Tensor], side: int, x: Tensor, v: Tensor, rate: Scalar, due: Tensor) -> Tensor:
    return tree.either(due, lambda: _finite(_learnt(pair, side, x, v, rate), pair[side]), lambda: pair[side])


def _finite(new: Tensor, old: Tensor) -> Tensor:
    """``old`` where the products of gradients have overflowed."""
    return torch.where(new.isfinite().all(), new, old)


def _times(q: Tensor, x: Tensor, transposed: bool = False) -> Tensor:
    """``q @ x``, or ``q.T @ x``, for a triangular or a diagonal ``q``."""
    return q[:, None] * x if q.ndim == 1 else (q.mT if transposed else q) @ x


def _solved(q: Tensor, x: Tensor) -> Tensor:
    """``inv(q).T @ x``."""
    return x / q[:, None] if q.ndim == 1 else torch.linalg.solve_triangular(q.mT, x, upper=False)


def _learnt(pair: list[Tensor], side: int, x: Tensor, v: Tensor, rate: Scalar) -> Tensor:
    """The factor of one side, one step nearer to whitening ``x``."""
    left, right = pair
    a = _times(right, _times(left, x).mT).mT
    b = _solved(right, _solved(left, v).mT).mT
    q, a, b = (left, a, b) if side == 0 else (right, a.mT, b.mT)
    if q.ndim == 1:
        seen, probed = a.square().sum(1), b.square().sum(1)
        norm = (seen + probed).amax()
        return q - rate / torch.where(norm > 0, norm, 1.0) * (seen - probed) * q
    seen, probed = a @ a.mT, b @ b.mT
    norm = _norm_from_below(seen + probed)
    return q - rate / torch.where(norm > 0, norm, 1.0) * torch.triu(seen - probed) @ q


def _norm_from_below(x: Tensor) -> Tensor:
    """A lower bound of the spectral norm of a symmetric matrix: one power iteration from its longest row."""
    most = x.abs().amax()
    x = x / torch.where(most > 0, most, 1.0)
    row = x.index_select(0, x.square().sum(1).argmax()[None])[0]
    y = x @ row
    length = tree.safe_sqrt(y.square().sum())
    return most * tree.safe_sqrt((x @ (y / torch.where(length > 0, length, 1.0))).square().sum())


def kron(
    learning_rate: Scalar | Schedule,
    *,
    key: Key,
    b1: Scalar = 0.9,
    precond_learning_rate: Scalar = 0.1,
    every: int = 1,
    max_dim: int = 8192,
    init_scale: float = 1.0,
    max_rms: Scalar = 1.1,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    """PSGD Kron: ``p - learning_rate * (u + weight_decay * p)``, with ``u`` of `scale_by_kron`.

    Args:
        learning_rate: a number, a 0-d tensor or a schedule; about a third of AdamW's.
        key, b1, precond_learning_rate, every, max_dim, init_scale, max_rms: as `scale_by_kron`.
        weight_decay, mask: as `add_decayed_weights`, decoupled.

    Source: Li (arXiv 1512.04202, 1809.10232).

    Example:
        >>> from holofunc import optim, random
        >>> tx = optim.kron(3e-4, key=random.key(0), every=4)
    """
    rule = scale_by_kron(
        b1,
        key=key,
        precond_learning_rate=precond_learning_rate,
        every=every,
        max_dim=max_dim,
        init_scale=init_scale,
        max_rms=max_rms,
    )
    return descend(learning_rate, weight_decay, mask, decoupled=True, kron=rule)
