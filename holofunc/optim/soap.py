"""SOAP, and the decompositions that it and other rules for matrices are differentiated through."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from holofunc import tree
from holofunc.compile import opaque
from holofunc.optim.adam import gains, root
from holofunc.optim.base import GradientTransformation, MaybeParams, check_params
from holofunc.optim.muon import in_stacks
from holofunc.optim.numerics import (
    bounded,
    check_count,
    check_decay,
    check_nonnegative,
    scalar_dtype,
    zero_count,
    zeros,
)
from holofunc.optim.transforms import moving_average
from holofunc.typing import Params, PyTree, Scalar

__all__ = ["SoapState", "scale_by_soap"]


class SoapState(NamedTuple):
    """Updates so far; averages of the gradients, and of the squares of the rotated ones; for each axis that is rotated,
    as ``"path/axis"``, the average of the gradient's outer products and its eigenvectors.
    """

    count: Tensor  # type: ignore[assignment]
    mu: PyTree
    nu: PyTree
    outer: dict[str, Tensor]
    basis: dict[str, Tensor]


def scale_by_soap(
    b1: Scalar = 0.95,
    b2: Scalar = 0.95,
    eps: Scalar = 1e-8,
    *,
    shampoo_beta: Scalar | None = None,
    precondition_frequency: int = 10,
    max_precond_dim: int = 10_000,
) -> GradientTransformation:
    """Adam in the slowly changing eigenbasis of Shampoo's preconditioner. For a matrix ``g``:

        mu = b1 * mu + (1 - b1) * g
        nu = b2 * nu + (1 - b2) * (QL.T @ g @ QR)**2
        u = QL @ ((QL.T @ mu_hat @ QR) / (sqrt(nu_hat) + eps)) @ QR.T
        L = b2 * L + (1 - b2) * g @ g.T;  R = b2 * R + (1 - b2) * g.T @ g
        QL = qr(L @ QL);  QR = qr(R @ QR)                                   # every precondition_frequency updates

    and likewise along each axis of tensors with more. The first gradient only initializes the bases (by its
    eigenvectors) and moves nothing. Tensors of one axis get Adam. Gradients flow through the bases to first order: a
    second derivative would lack their part.

    Args:
        b1, b2: in [0, 1).
        eps: added outside of the root.
        shampoo_beta: of ``L`` and ``R``; None is ``b2``.
        precondition_frequency: updates between new bases; under `vmap` each update computes them, and uses them when it
            is time.
        max_precond_dim: longer axes, and axes of length 1, are not rotated.

    Source: Vyas et al., "SOAP: improving and stabilizing Shampoo using Adam" (arXiv 2409.11321), algorithms 3 and 4.
    """
    check_decay(b1=b1, b2=b2)
    check_nonnegative(eps=eps)
    check_count(precondition_frequency=precondition_frequency, max_precond_dim=max_precond_dim)
    outer_decay = b2 if shampoo_beta is None else shampoo_beta
    check_decay(shampoo_beta=outer_decay)

    def axes(p: Tensor) -> list[int]:
        return [axis for axis, n in enumerate(p.shape) if p.ndim > 1 and 1 < n <= max_precond_dim]

    def init(params: Params) -> SoapState:
        check_params(params, "scale_by_soap")
        flat = dict(tree.leaves_with_path(zeros(params)))
        basis = {
            f"{path}/{i}": torch.eye(z.shape[i], dtype=z.dtype, device=z.device)
            for path, z in flat.items()
            for i in axes(z)
        }
        outer = {key: torch.zeros_like(q) for key, q in basis.items()}
        return SoapState(zero_count(params), zeros(params), zeros(params), outer, basis)

    def rule(
        updates: PyTree, state: SoapState, b1: Scalar, b2: Scalar, eps: Scalar, outer_decay: Scalar
    ) -> tuple[PyTree, SoapState]:
        grads, dtype = tree.map(lambda g, m: g.to(m.dtype), updates, state.mu), scalar_dtype(updates)
        first, later = state.count == 0, (state.count > 0).to(dtype)
        mu = tree.elementwise(lambda g, m: m + later * (1 - b1) * (g - m), grads, state.mu)
        c1, c2 = gains(b1, b2, state.count.clamp_min(1), dtype)

        def square_average(g: Tensor, v: Tensor) -> Tensor:
            return v + later * (1 - b2) * (g.square() - bounded(v))

        def step(m: Tensor, v: Tensor) -> Tensor:
            below = root(v, c2) + eps
            return later * m * c1 / torch.where(below > 0, below, 1.0)  # with eps=0, the first update of all

        # what is computed in between has no names: at the end of the rule they would still hold it
        nu = tree.elementwise(square_average, _rotated(grads, state.basis), state.nu)
        out = _rotated(tree.elementwise(step, _rotated(mu, state.basis), nu), state.basis, back=True)
        outer = moving_average(
            {f"{path}/{i}": _outer(g, i) for path, g in tree.leaves_with_path(grads) for i in axes(g)},
            state.outer,
            outer_decay,
        )
        due = (state.count > 0) & (state.count % precondition_frequency == 0)

        def renewed(x: Tensor, q: Tensor) -> Tensor:
            refined = functools.partial(tree.either, due, lambda: steady(_refined(x, q), x, q), lambda: q)
            return tree.either(first, lambda: steady(eigenvectors(x), x, q), refined)

        basis = in_stacks(renewed, outer, state.basis)
        return out, SoapState(state.count + 1, mu, nu, outer, basis)

    def update(updates: PyTree, state: SoapState, params: MaybeParams = None, **extra: Any) -> tuple[PyTree, SoapState]:
        return opaque(rule, updates, state, b1, b2, eps, outer_decay)

    return GradientTransformation(init, update)


def _rotated(values: PyTree, basis: Mapping[str, Tensor], back: bool = False) -> PyTree:
    """Each leaf multiplied by ``Q.T`` along each of its axes that has a basis, or by ``Q`` to go back."""

    def rotate(path: str, x: Tensor) -> Tensor:
        for axis in range(x.ndim):
            if f"{path}/{axis}" in basis:
                q = basis[f"{path}/{axis}"]
                x = torch.tensordot(x, q.mT if back else q, dims=([axis], [0])).movedim(-1, axis)
        return x

    return tree.rebuild(values, [rotate(path, x) for path, x in tree.leaves_with_path(values)])


def _outer(g: Tensor, axis: int) -> Tensor:
    rows = g.movedim(axis, 0).flatten(1)
    return rows @ rows.mT


def steady(new: Tensor, x: Tensor, old: Tensor) -> Tensor:
    """The bases ``new`` of the matrices ``x``, or ``old`` ones where such a matrix has a NaN or has overflowed."""
    return torch.where(_are_finite(x), new, old)


def _are_finite(x: Tensor) -> Tensor:
    return x.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)


def eigenvectors(x: Tensor) -> Tensor:
    """Those of symmetric matrices, by falling eigenvalues; any basis for what is not finite, where LAPACK raises."""
    x = torch.where(_are_finite(x), x, 0.0)
    values, vectors = (y.flip(-1) for y in torch.linalg.eigh(x.detach()))
    if not _is_differentiated(x):
        return vectors.contiguous()
    gaps = values[..., None, :] - values[..., :, None]
    apart = gaps.abs() > _noise(values)[..., None]
    turned = vectors.mT @ (x - x.detach()) @ vectors / torch.where(apart, gaps, 1.0)
    return vectors + vectors @ torch.where(apart, turned, 0.0)


def _refined(x: Tensor, q: Tensor) -> Tensor:
    """One power iteration from the eigenvectors ``q``."""
    if not (_is_differentiated(x) or _is_differentiated(q)):
        return torch.linalg.qr(x @ q)[0].contiguous()  # as `init` lays it out
    product = x @ q
    new, upper = torch.linalg.qr(product.detach())
    sizes = upper.diagonal(dim1=-2, dim2=-1).abs()
    regular = sizes > _noise(sizes)
    upper = upper + torch.diag_embed(torch.where(regular, 0.0, 1.0).to(upper.dtype))
    turned = torch.linalg.solve_triangular(upper, new.mT @ (product - product.detach()), upper=True, left=False)
    turned = torch.where(regular[..., None, :], turned, 0.0).tril(-1)
    return new + new @ (turned - turned.mT)


def _is_differentiated(x: Tensor) -> bool:
    """Whether anybody may ask for a derivative: for one, zero is added whose derivative is that of the result."""
    compiled = torch.compiler.is_compiling()  # nobody knows
    return x.requires_grad or compiled or torch.func.debug_unwrap(x) is not x


def _noise(x: Tensor) -> Tensor:
    """The size below which nothing in the last axis differs from zero."""
    return 100 * torch.finfo(x.dtype).eps * x.abs().amax(-1, keepdim=True)
