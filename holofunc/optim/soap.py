"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner."""

from typing import NamedTuple

import torch
from torch import Tensor

from holofunc import tree
from holofunc.compile import opaque
from holofunc.optim.base import GradientTransformation
from holofunc.optim.deprecation import renamed
from holofunc.optim.labels import Mask
from holofunc.optim.matrices import eyes, new_bases, outer_product, rotatable, rotated
from holofunc.optim.numerics import bounded, divisor, is_zero, root, scalar_dtype, zeros
from holofunc.optim.ranges import check_count, check_decay, check_nonnegative
from holofunc.optim.scalars import gains, zero_count
from holofunc.optim.transforms import descend, moving_average
from holofunc.typing import Params, PyTree, Scalar, Schedule

__all__ = ["SoapState", "scale_by_soap", "soap"]


class SoapState(NamedTuple):
    """Updates so far; averages of the gradients, and of the squares of the rotated ones; for each axis that is rotated,
    as ``"path/axis"``, the average of the gradient's outer products and its eigenvectors.
    """

    step: Tensor
    mu: PyTree
    nu: PyTree
    outer: dict[str, Tensor]
    basis: dict[str, Tensor]


@renamed(precondition_frequency="every", max_precond_dim="max_dim")
def scale_by_soap(
    b1: Scalar = 0.95,
    b2: Scalar = 0.95,
    eps: Scalar = 1e-8,
    *,
    shampoo_beta: Scalar | None = None,
    every: int = 10,
    max_dim: int = 10_000,
) -> GradientTransformation:
    """Adam in the slowly changing eigenbasis of Shampoo's preconditioner. For a matrix ``g``:

        mu = b1 * mu + (1 - b1) * g
        nu = b2 * nu + (1 - b2) * (QL.T @ g @ QR)**2
        u = QL @ ((QL.T @ mu_hat @ QR) / (sqrt(nu_hat) + eps)) @ QR.T
        L = b2 * L + (1 - b2) * g @ g.T;  R = b2 * R + (1 - b2) * g.T @ g
        QL = qr(L @ QL);  QR = qr(R @ QR)                                   # every so many updates

    and likewise along each axis of tensors with more. The first gradient only initializes the bases (by its
    eigenvectors) and moves nothing. Tensors of one axis get Adam. Gradients flow through the bases to first order: a
    second derivative would lack their part.

    Args:
        b1, b2: in [0, 1).
        eps: added outside of the root.
        shampoo_beta: of ``L`` and ``R``; None is ``b2``.
        every: updates between new bases; under `vmap` each update computes them, and uses them when it
            is time.
        max_dim: longer axes, and axes of length 1, are not rotated.

    Source: Vyas et al., "SOAP: improving and stabilizing Shampoo using Adam" (arXiv 2409.11321), algorithms 3 and 4.
    """
    check_decay(b1=b1, b2=b2)
    check_nonnegative(eps=eps)
    check_count(every=every, max_dim=max_dim)
    outer_decay = b2 if shampoo_beta is None else shampoo_beta
    check_decay(shampoo_beta=outer_decay)

    def init(params: Params) -> SoapState:
        basis = eyes(params, max_dim)
        return SoapState(zero_count(params), zeros(params), zeros(params), tree.zeros_like(basis), basis)

    def rule(
        updates: PyTree, state: SoapState, b1: Scalar, b2: Scalar, eps: Scalar, outer_decay: Scalar
    ) -> tuple[PyTree, SoapState]:
        grads, dtype = tree.map(lambda g, m: g.to(m.dtype), updates, state.mu), scalar_dtype(updates)
        first, later = state.step == 0, (state.step > 0).to(dtype)
        mu = tree.elementwise(lambda g, m: m + later * (1 - b1) * (g - m), grads, state.mu)
        c1, c2 = gains(b1, b2, state.step.clamp_min(1), dtype)

        def square_average(g: Tensor, v: Tensor) -> Tensor:
            return v + later * (1 - b2) * (g.square() - bounded(v))

        def step(m: Tensor, v: Tensor) -> Tensor:
            return later * m * c1 / divisor(root(v, c2), eps)

        # what is computed in between has no names: at the end of the rule they would still hold it
        nu = tree.elementwise(square_average, rotated(grads, state.basis), state.nu)
        out = rotated(tree.elementwise(step, rotated(mu, state.basis), nu), state.basis, back=True)
        outer = moving_average(
            {
                f"{path}/{i}": outer_product(g, i)
                for path, g in tree.leaves_with_path(grads)
                for i in rotatable(g.shape, max_dim)
            },
            state.outer,
            outer_decay,
        )
        due = (state.step > 0) & (state.step % every == 0)
        basis = new_bases(grads, outer, state.basis, first, due)
        return out, SoapState(state.step + 1, mu, nu, outer, basis)

    def update(updates: PyTree, state: SoapState) -> tuple[PyTree, SoapState]:
        return opaque(rule, updates, state, b1, b2, eps, outer_decay)

    return GradientTransformation(init, update)


@renamed(precondition_frequency="every", max_precond_dim="max_dim")
def soap(
    learning_rate: Scalar | Schedule,
    *,
    b1: Scalar = 0.95,
    b2: Scalar = 0.95,
    eps: Scalar = 1e-8,
    shampoo_beta: Scalar | None = None,
    every: int = 10,
    max_dim: int = 10_000,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    """Adam in the eigenbasis of Shampoo's preconditioner: ``p - learning_rate * (u + weight_decay * p)``, with ``u`` of
    `scale_by_soap`; nothing in the first update, which only sets the bases.

    Args:
        learning_rate: a number, a 0-d tensor or a schedule.
        b1, b2, eps, shampoo_beta, every, max_dim: as `scale_by_soap`.
        weight_decay, mask: as `add_decayed_weights`, decoupled; from the second update on.

    Source: Vyas et al. (arXiv 2409.11321), algorithms 3 and 4. New bases are computed in each update, and used when
    due.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.soap(0.1), {"w": torch.eye(2)}
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> updates["w"].abs().sum()                      # the first gradient only sets the basis
        tensor(0.)
    """
    rule = scale_by_soap(b1, b2, eps, shampoo_beta=shampoo_beta, every=every, max_dim=max_dim)
    check_nonnegative(True, weight_decay=weight_decay)

    def from_the_second(count: Tensor) -> Tensor:
        return (count > 0).to(torch.float64) * (weight_decay(count) if callable(weight_decay) else weight_decay)

    decay = weight_decay if is_zero(weight_decay) else from_the_second
    return descend(learning_rate, decay, mask, decoupled=True, soap=rule)
