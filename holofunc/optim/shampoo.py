"""Shampoo, grafting, and any rule in the eigenbasis of Shampoo's preconditioner: SOAP apart from its Adam, KL-SOAP."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from holofunc import tree
from holofunc.compile import opaque
from holofunc.optim.adam import scale_by_adam
from holofunc.optim.base import GradientTransformation, MaybeParams, as_transformation, composed, inside
from holofunc.optim.labels import Mask
from holofunc.optim.matrices import eigenvectors, eyes, new_bases, noise_of, outer_product, rotated, steady
from holofunc.optim.numerics import far_norm, ratio_or_one
from holofunc.optim.ranges import check_count, check_decay, check_flags, check_nonnegative
from holofunc.optim.scalars import zero_count
from holofunc.optim.transforms import descend, ema, moving_average
from holofunc.typing import Params, PyTree, Scalar, Schedule

__all__ = ["EigenbasisState", "GraftState", "ShampooState", "graft", "in_eigenbasis", "scale_by_shampoo", "shampoo"]


class EigenbasisState(NamedTuple):
    """Updates so far; for each axis that is rotated, as ``"path/axis"``, the average of the gradient's outer products
    and its eigenvectors; the state of the rule.
    """

    step: Tensor
    outer: dict[str, Tensor]
    basis: dict[str, Tensor]
    inner: PyTree


def in_eigenbasis(
    tx: GradientTransformation,
    *,
    beta: Scalar = 0.95,
    every: int = 10,
    max_dim: int = 10_000,
    kl: bool = False,
    eps: Scalar = 1e-12,
) -> GradientTransformation:
    """Apply ``tx`` to gradients that are rotated into the slowly changing eigenbasis of Shampoo's preconditioner, and
    rotate what it returns back. For a matrix ``g``:

        u = QL @ tx(QL.T @ g @ QR) @ QR.T
        L = beta * L + (1 - beta) * g @ g.T;  R = beta * R + (1 - beta) * g.T @ g
        QL = qr(L @ QL);  QR = qr(R @ QR)                                   # every so many updates

    The first gradient only sets the bases, and moves nothing. This is `soap` without its Adam:
    ``in_eigenbasis(scale_by_adam(b1=0.0))`` is ``scale_by_soap(b1=0.0)``, and whitens what a rule after it sees, as in
    ``chain(in_eigenbasis(scale_by_adam(b1=0.0)), scale_by_muon())``. Moments inside ``tx`` stay as they are when the
    basis turns.

    Args:
        tx: a rule for each element. Sees the parameters as they are, not rotated.
        beta: in [0, 1), of ``L`` and ``R``.
        every: updates between new bases.
        max_dim: longer axes, and axes of length 1, are not rotated.
        kl: matrices measure each side in the metric of the other, ``L += g @ inv(R) @ g.T / columns`` and likewise
            ``R``: the minimizer of a Kullback-Leibler divergence.
        eps: added to the eigenvalues that ``kl`` divides by, which count with what rounding leaves at least.

    Source: Vyas et al., SOAP (arXiv 2409.11321); kl: Lin et al., "Understanding and improving Shampoo and SOAP via
    Kullback-Leibler minimization" (arXiv 2509.03378).

    Example:
        >>> from holofunc import optim
        >>> rule = optim.in_eigenbasis(optim.scale_by_adam(b1=0.0), kl=True)
        >>> tx = optim.chain(rule, optim.ema(0.9), optim.scale_by_learning_rate(3e-3))
    """
    tx = inside("in_eigenbasis", tx)
    check_decay(beta=beta)
    check_count(every=every, max_dim=max_dim)
    check_flags(kl=kl)
    check_nonnegative(eps=eps)

    def init(params: Params) -> EigenbasisState:
        basis = eyes(params, max_dim)
        return EigenbasisState(zero_count(params), tree.zeros_like(basis), basis, tx.init(params))

    def update(
        updates: PyTree, state: EigenbasisState, params: MaybeParams = None, **extra: Any
    ) -> tuple[PyTree, EigenbasisState]:
        later = state.step > 0
        rotated = opaque(_to_basis, updates, state.basis)
        steps, inner = tx.update(rotated, state.inner, params, **extra)
        inner = tree.where(tree.hoist(later), inner, state.inner)
        steps = tree.elementwise(lambda u: torch.where(later, u, torch.zeros_like(u)), steps)
        out = opaque(_from_basis, steps, state.basis)
        due = later & (state.step % every == 0)
        outer, basis = opaque(
            _renewed_kl if kl else _renewed, updates, state.outer, state.basis, state.step == 0, due, beta, eps
        )
        return out, EigenbasisState(state.step + 1, outer, basis, inner)

    return composed(init, update, tx)


def _to_basis(updates: PyTree, basis: Mapping[str, Tensor]) -> PyTree:
    kept = {key.rpartition("/")[0]: q.dtype for key, q in basis.items()}
    flat = [(path, tree.upcast(g)) for path, g in tree.leaves_with_path(updates)]
    return rotated(tree.rebuild(updates, [g.to(kept.get(path, g.dtype)) for path, g in flat]), basis)


def _from_basis(updates: PyTree, basis: Mapping[str, Tensor]) -> PyTree:
    return rotated(updates, basis, back=True)


def _renewed(
    updates: PyTree, outer: dict[str, Tensor], basis: dict[str, Tensor], first: Tensor, due: Tensor, *numbers: Scalar
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    grads = dict(tree.leaves_with_path(updates))
    products = {
        key: outer_product(grads[key.rpartition("/")[0]].to(x.dtype), int(key.rpartition("/")[2]))
        for key, x in outer.items()
    }
    outer = moving_average(products, outer, numbers[0])
    return outer, new_bases(updates, outer, basis, first, due)


def _renewed_kl(
    updates: PyTree, outer: dict[str, Tensor], basis: dict[str, Tensor], first: Tensor, due: Tensor, *numbers: Scalar
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    grads, products = dict(tree.leaves_with_path(updates)), {}
    for key in outer:
        path, _, axis = key.rpartition("/")
        g, other = grads[path].to(outer[key].dtype), f"{path}/{1 - int(axis)}"
        if g.ndim == 2 and other in basis:
            q, n = basis[other], g.shape[1 - int(axis)]
            values = (q * (outer[other] @ q)).sum(0)
            values = torch.maximum(values, noise_of(values)) + numbers[1]  # rounding leaves noise in a null space
            weights = torch.where(first, 1.0, 1 / torch.where(values > 0, values, 1.0))
            rows = (g if axis == "0" else g.mT) @ q
            products[key] = (rows * weights) @ rows.mT / n
        else:
            products[key] = outer_product(g, int(axis))
    outer = moving_average(products, outer, numbers[0])
    return outer, new_bases(updates, outer, basis, first, due)


class ShampooState(NamedTuple):
    """Updates so far; for each axis, as ``"path/axis"``, the average of outer products and its inverse root."""

    step: Tensor
    outer: dict[str, Tensor]
    root: dict[str, Tensor]


def scale_by_shampoo(
    beta: Scalar = 0.95,
    eps: Scalar = 1e-12,
    *,
    every: int = 1,
    max_dim: int = 8192,
    one_sided: bool = False,
    exponent: float | None = None,
) -> GradientTransformation:
    """Precondition each axis by an inverse root of the average of the gradient's outer products. For a matrix:

        L = beta * L + (1 - beta) * g @ g.T;  R = beta * R + (1 - beta) * g.T @ g
        u = (L + eps * trace)**(-1/4) @ g @ (R + eps * trace)**(-1/4)

    and ``-1/(2 * axes)`` for tensors with more axes. Vectors pass. The size of ``u`` is not that of a step: `graft` it.

    Args:
        beta: in [0, 1). The averages are debiased.
        eps: share of the greatest eigenvalue that is added to all.
        every: updates between new roots.
        max_dim: longer axes, and axes of length 1, are left alone.
        one_sided: precondition the shorter side of each matrix alone, (first axis, all others), with exponent 1/2.
        exponent: of the inverse roots; None is the one above.

    Source: Gupta et al., "Shampoo: preconditioned stochastic tensor optimization" (arXiv 1802.09568), with averages in
    place of sums; one-sided: Xie et al., "Structured preconditioners in adaptive optimization" (arXiv 2503.10537).
    """
    check_decay(beta=beta)
    check_nonnegative(eps=eps)
    check_count(every=every, max_dim=max_dim)
    check_flags(one_sided=one_sided)
    if exponent is not None:
        check_nonnegative(exponent=exponent)

    def init(params: Params) -> ShampooState:
        seen = tree.map(lambda p: p.flatten(1) if one_sided and p.ndim > 1 and p.numel() else p, params)
        roots = eyes(seen, max_dim)
        if one_sided:
            shapes = {path: p.shape for path, p in tree.leaves_with_path(seen)}
            short = {path: min(range(2), key=lambda i: s[i]) for path, s in shapes.items() if len(s) == 2}
            roots = {key: x for key, x in roots.items() if int(key.rpartition("/")[2]) == short[key.rpartition("/")[0]]}
        return ShampooState(zero_count(params), tree.zeros_like(roots), roots)

    def update(updates: PyTree, state: ShampooState) -> tuple[PyTree, ShampooState]:
        due = state.step % every == 0
        rule = functools.partial(_preconditioned, one_sided, exponent)
        out, outer, roots = opaque(rule, updates, state.outer, state.root, due, beta, eps)
        return out, ShampooState(state.step + 1, outer, roots)

    return GradientTransformation(init, update)


def _preconditioned(
    one_sided: bool,
    exponent: float | None,
    updates: PyTree,
    outer: dict[str, Tensor],
    roots: dict[str, Tensor],
    due: Tensor,
    beta: Scalar,
    eps: Scalar,
) -> tuple[PyTree, dict[str, Tensor], dict[str, Tensor]]:
    kept = {key.rpartition("/")[0]: x.dtype for key, x in outer.items()}
    grads = {path: g.to(kept.get(path, tree.upcast(g).dtype)) for path, g in tree.leaves_with_path(updates)}
    seen = {path: g.flatten(1) if one_sided and g.ndim > 1 and g.numel() else g for path, g in grads.items()}
    where = {key: (key.rpartition("/")[0], int(key.rpartition("/")[2])) for key in outer}
    outer = moving_average({key: outer_product(seen[path], axis) for key, (path, axis) in where.items()}, outer, beta)
    new = {}
    for key, (path, _) in where.items():
        power = exponent if exponent is not None else 0.5 if one_sided else 0.5 / seen[path].ndim
        x, old = outer[key], roots[key]
        new[key] = tree.either(due, lambda: steady(_inverse_root(x, power, eps), x, old), lambda: old)  # noqa: B023
    out = rotated(seen, new)
    return tree.rebuild(updates, [out[path].reshape(g.shape) for path, g in grads.items()]), outer, new


def _inverse_root(x: Tensor, power: float, eps: Scalar) -> Tensor:
    vectors = eigenvectors(x)
    values = (vectors * (x @ vectors)).sum(0)
    values = values.clamp_min(0) + eps * values.amax()
    scale = torch.where(values > 0, torch.where(values > 0, values, 1.0) ** -power, 0.0)
    return (vectors * scale) @ vectors.mT


class GraftState(NamedTuple):
    """The states of the two rules."""

    direction: PyTree
    magnitude: PyTree


def graft(direction: GradientTransformation, magnitude: GradientTransformation) -> GradientTransformation:
    """The update of ``direction``, in the norm of that of ``magnitude``, for each tensor.

    Args:
        direction: a rule; where its update is zero, so is the result.
        magnitude: a rule whose step size is known, such as `scale_by_adam`.

    Source: Agarwal et al., "Learning rate grafting" (arXiv 2002.11803).

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, g = optim.graft(optim.identity(), optim.scale(10.0)), {"w": torch.tensor([3.0, 4.0])}
        >>> tx.update(g, tx.init(g))[0]
        {'w': tensor([30., 40.])}
    """
    direction = as_transformation("direction", direction)
    magnitude = as_transformation("magnitude", magnitude)

    def init(params: Params) -> GraftState:
        return GraftState(direction.init(params), magnitude.init(params))

    def update(
        updates: PyTree, state: GraftState, params: MaybeParams = None, **extra: Any
    ) -> tuple[PyTree, GraftState]:
        along, first = direction.update(updates, state.direction, params, **extra)
        size, second = magnitude.update(updates, state.magnitude, params, **extra)
        norms = far_norm(tree.leaf_norm, along), far_norm(tree.leaf_norm, size)
        ratio = tree.elementwise(lambda n, m: ratio_or_one(m, n, n > 0), *norms)
        return tree.elementwise(lambda u, r: tree.upcast(u) * r, along, ratio), GraftState(first, second)

    return composed(init, update, direction, magnitude)


def shampoo(
    learning_rate: Scalar | Schedule,
    *,
    beta: Scalar = 0.95,
    eps: Scalar = 1e-12,
    every: int = 1,
    max_dim: int = 8192,
    one_sided: bool = False,
    momentum: Scalar = 0.9,
    grafting: GradientTransformation | None = None,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    """Shampoo in the step size of Adam: ``p - learning_rate * (mu_hat + weight_decay * p)``, where ``mu`` averages the
    direction of `scale_by_shampoo` in the norm of another rule: `graft`.

    Args:
        learning_rate: a number, a 0-d tensor or a schedule; that of the grafted rule.
        beta, eps, every, max_dim, one_sided: as `scale_by_shampoo`.
        momentum: in [0, 1), of the moving average of the grafted updates.
        grafting: the rule whose norm is taken; None is ``scale_by_adam(b1=0.0)``.
        weight_decay, mask: as `add_decayed_weights`, decoupled.

    Source: Anil et al., "Scalable second order optimization for deep learning" (arXiv 2002.09018).

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.shampoo(0.1, momentum=0.0), {"w": torch.eye(2)}
        >>> tx.update(params, tx.init(params), params)[0]["w"].diagonal()
        tensor([-0.1000, -0.1000])
    """
    check_decay(momentum=momentum)
    size = scale_by_adam(0.0) if grafting is None else grafting
    size = as_transformation("grafting", size)
    rule = scale_by_shampoo(beta, eps, every=every, max_dim=max_dim, one_sided=one_sided)
    rules = {"shampoo": graft(rule, size), "momentum": ema(momentum)}
    return descend(learning_rate, weight_decay, mask, decoupled=True, **rules)
