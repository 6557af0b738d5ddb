"""Matrices: stacks of equal shapes, eigenvectors and power iterations, with derivatives that stay finite."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from holofunc import tree
from holofunc.optim.numerics import zeros
from holofunc.typing import Params, PyTree

__all__ = []


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


def rotated(values: PyTree, basis: Mapping[str, Tensor], back: bool = False) -> PyTree:
    """Each leaf multiplied by ``Q.T`` along each of its axes that has a basis, or by ``Q`` to go back."""

    def rotate(path: str, x: Tensor) -> Tensor:
        for axis in range(x.ndim):
            if f"{path}/{axis}" in basis:
                q = basis[f"{path}/{axis}"]
                x = torch.tensordot(x, q.mT if back else q, dims=([axis], [0])).movedim(-1, axis)
        return x

    return tree.rebuild(values, [rotate(path, x) for path, x in tree.leaves_with_path(values)])


def rotatable(shape: torch.Size, max_dim: int) -> list[int]:
    """The axes of a tensor that have a basis of their own."""
    return [axis for axis, n in enumerate(shape) if len(shape) > 1 and 1 < n <= max_dim]


def eyes(params: Params, max_dim: int) -> dict[str, Tensor]:
    """An identity matrix for each of these axes, as ``"path/axis"``."""
    return {
        f"{path}/{i}": torch.eye(z.shape[i], dtype=z.dtype, device=z.device)
        for path, z in tree.leaves_with_path(zeros(params))
        for i in rotatable(z.shape, max_dim)
    }


def unfolded(g: Tensor, axis: int) -> Tensor:
    """A tensor as a matrix whose rows belong to the indices of an axis."""
    return g.movedim(axis, 0).flatten(1)


def outer_product(g: Tensor, axis: int) -> Tensor:
    rows = unfolded(g, axis)
    return rows @ rows.mT


def new_bases(
    grads: PyTree, outer: dict[str, Tensor], basis: dict[str, Tensor], first: Tensor, due: Tensor
) -> dict[str, Tensor]:
    """For averages of outer products by ``"path/axis"``: their eigenvectors after the ``first`` of the ``grads``, and
    one power iteration from the old bases where that is ``due``.
    """
    flat = dict(tree.leaves_with_path(grads))

    def begun(key: str, q: Tensor) -> Tensor:
        (path, _, axis), x = key.rpartition("/"), outer[key]

        def start() -> Tensor:
            return steady(eigenvectors(x, unfolded(flat[path].to(x.dtype), int(axis))), x, q)

        return tree.either(first, start, lambda: q)

    def refined(x: Tensor, q: Tensor) -> Tensor:
        return tree.either(due, lambda: steady(power_iteration(x, q), x, q), lambda: q)

    return in_stacks(refined, outer, {key: begun(key, q) for key, q in basis.items()})


# --- decompositions ----------------------------------------------------------------------------------------------


def eigenvectors(x: Tensor, columns: Tensor | None = None) -> Tensor:
    """Those of symmetric matrices, by falling eigenvalues; any basis for what is not finite, where LAPACK raises.

    ``columns`` span those of ``x``, if they are known: where they are few, the other eigenvalues need no search.
    """
    x = torch.where(_are_finite(x), x, 0.0)
    values, vectors = _eigh(x.detach(), columns)
    if not _is_differentiated(x):
        return vectors
    gaps = values[..., None, :] - values[..., :, None]
    apart = gaps.abs() > noise_of(values)[..., None]
    turned = vectors.mT @ (x - x.detach()) @ vectors / torch.where(apart, gaps, 1.0)
    return vectors + vectors @ torch.where(apart, turned, 0.0)


def _eigh(x: Tensor, columns: Tensor | None) -> tuple[Tensor, Tensor]:
    if columns is None or columns.shape[-1] >= x.shape[-1]:
        values, vectors = torch.linalg.eigh(x)
        return values.flip(-1), vectors.flip(-1).contiguous()
    columns = columns.detach()
    basis, _ = torch.linalg.qr(torch.where(_are_finite(columns), columns, 0.0), mode="complete")
    inside, outside = basis.tensor_split([columns.shape[-1]], dim=-1)
    values, turned = _eigh(inside.mT @ x @ inside, None)
    values = torch.cat([values, values.new_zeros(*values.shape[:-1], outside.shape[-1])], dim=-1)
    return values, torch.cat([inside @ turned, outside], dim=-1)


def power_iteration(x: Tensor, q: Tensor) -> Tensor:
    """One power iteration from the eigenvectors ``q``."""
    if not (_is_differentiated(x) or _is_differentiated(q)):
        return torch.linalg.qr(x @ q)[0].contiguous()  # as `init` lays it out
    product = x @ q
    new, upper = torch.linalg.qr(product.detach())
    sizes = upper.diagonal(dim1=-2, dim2=-1).abs()
    regular = sizes > noise_of(sizes)
    upper = upper + torch.diag_embed(torch.where(regular, 0.0, 1.0).to(upper.dtype))
    turned = torch.linalg.solve_triangular(upper, new.mT @ (product - product.detach()), upper=True, left=False)
    turned = torch.where(regular[..., None, :], turned, 0.0).tril(-1)
    return new + new @ (turned - turned.mT)


def steady(new: Tensor, x: Tensor, old: Tensor) -> Tensor:
    """The bases ``new`` of the matrices ``x``, or ``old`` ones where such a matrix has a NaN or has overflowed."""
    return torch.where(_are_finite(x), new, old)


def _are_finite(x: Tensor) -> Tensor:
    return x.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)


def _is_differentiated(x: Tensor) -> bool:
    """Whether anybody may ask for a derivative: for one, zero is added whose derivative is that of the result."""
    compiled = torch.compiler.is_compiling()  # nobody knows
    return x.requires_grad or compiled or torch.func.debug_unwrap(x) is not x


def noise_of(x: Tensor) -> Tensor:
    """The size below which nothing in the last axis differs from zero."""
    return 100 * torch.finfo(x.dtype).eps * x.abs().amax(-1, keepdim=True)
