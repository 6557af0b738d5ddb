"""Rules that treat each element on its own: Adam and its relatives, sign and root-mean-square rules."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from holofunc import tree
from holofunc.optim.base import GradientTransformation, check_params
from holofunc.optim.scalars import (
    bias_correction,
    check_decay,
    check_nonnegative,
    is_zero,
    scalar_dtype,
    zero_count,
    zeros,
)
from holofunc.optim.transforms import moving_average
from holofunc.typing import Params, PyTree, Scalar

__all__ = ["AdamState", "scale_by_adam"]


def squares_average(updates: PyTree, average: PyTree, decay: Scalar) -> PyTree:
    """``decay * average + (1 - decay) * updates**2``."""
    return tree.elementwise(lambda u, a: a + (1 - decay) * (tree.wide(u).square() - a), updates, average)


class AdamState(NamedTuple):
    """Updates so far, moving averages of gradients and of their squares; ``nu_max`` with amsgrad only."""

    count: Tensor
    mu: PyTree
    nu: PyTree
    nu_max: PyTree = None


def scale_by_adam(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    *,
    eps_root: Scalar = 0.0,
    nesterov: bool = False,
    amsgrad: bool = False,
    bias_corrected: bool = True,
    mu_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    """``mu_hat / (sqrt(nu_hat + eps_root) + eps)``, where

        mu = b1 * mu + (1 - b1) * g           mu_hat = mu / (1 - b1**count)
        nu = b2 * nu + (1 - b2) * g**2        nu_hat = nu / (1 - b2**count)

    Args:
        b1: in [0, 1).
        b2: in [0, 1).
        eps: added outside of the root.
        eps_root: added inside of it.
        nesterov: look one step ahead: ``b1 * mu / (1 - b1**(count + 1)) + (1 - b1) * g / (1 - b1**count)`` in place of
            ``mu_hat``.
        amsgrad: divide by the root of the largest ``nu`` so far, debiased afterwards, as torch does.
        bias_corrected: False leaves out the divisions by ``1 - b**count``.
        mu_dtype: of ``mu``; None is fp32 for half precision, otherwise the parameter's own.

    Source: Kingma and Ba (arXiv 1412.6980); Dozat, "Incorporating Nesterov momentum into Adam" (2016); Reddi et al.,
    "On the convergence of Adam and beyond" (arXiv 1904.09237).
    """
    check_decay(b1=b1, b2=b2)
    check_nonnegative(eps=eps, eps_root=eps_root)

    def init(params: Params) -> AdamState:
        check_params(params, "scale_by_adam")
        nu_max = zeros(params) if amsgrad else None
        return AdamState(zero_count(params), zeros(params, mu_dtype), zeros(params), nu_max)

    def update(
        updates: PyTree, state: AdamState, params: Params | None = None, **extra: Any
    ) -> tuple[PyTree, AdamState]:
        count, dtype = state.count + 1, scalar_dtype(updates)
        mu, nu = moving_average(updates, state.mu, b1), squares_average(updates, state.nu, b2)
        nu_max = tree.elementwise(torch.maximum, state.nu_max, nu) if amsgrad else None
        c1 = tree.hoist(1 / bias_correction(b1, count, dtype)) if bias_corrected else 1.0
        c2 = tree.hoist(bias_correction(b2, count, dtype).rsqrt()) if bias_corrected else 1.0
        if nesterov:
            ahead = tree.hoist(1 / bias_correction(b1, count + 1, dtype)) if bias_corrected else 1.0
            c1 = c1 * (1 - b1)
            first = tree.elementwise(lambda g, m: b1 * ahead * tree.wide(m) + c1 * tree.wide(g), updates, mu)
        else:
            first = tree.elementwise(lambda m: tree.wide(m) * c1, mu)
        out = tree.elementwise(lambda m, v: m / (root(v, c2, eps_root) + eps), first, nu_max if amsgrad else nu)
        return out, AdamState(count, mu, nu, nu_max)

    return GradientTransformation(init, update)


def root(nu: Tensor, gain: Scalar = 1.0, eps_root: Scalar = 0.0) -> Tensor:
    """``sqrt(nu * gain**2 + eps_root)``, whose gradient at zero is zero."""
    if is_zero(eps_root):
        return tree.safe_sqrt(nu) * gain
    return torch.sqrt(nu * (gain * gain) + eps_root)
