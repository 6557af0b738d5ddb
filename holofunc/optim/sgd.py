"""Steps of one size: signs, and the linear minimization oracles of norms that Scion takes."""

from typing import Any

from torch import Tensor

from holofunc import tree
from holofunc.compile import opaque
from holofunc.optim.base import GradientTransformation, chain, named_chain, stateless
from holofunc.optim.labels import Mask, mask_flags
from holofunc.optim.masking import masked
from holofunc.optim.muon import Coefficients, scale_by_muon
from holofunc.optim.numerics import check_decay, check_flags, check_positive
from holofunc.optim.optimizers import descend
from holofunc.optim.transforms import add_decayed_weights, ema, scale, scale_by_learning_rate, scale_by_sign
from holofunc.typing import Params, PyTree, Scalar, Schedule

__all__ = ["normalize_rms", "scion", "sign_sgd", "signum"]


def sign_sgd(
    learning_rate: Scalar | Schedule, *, weight_decay: Scalar | Schedule = 0.0, mask: Mask | None = None
) -> GradientTransformation:
    """``p - learning_rate * (sign(g) + weight_decay * p)``.

    Args:
        learning_rate: a number, a 0-d tensor or a schedule.
        weight_decay: decoupled.
        mask: True where weights decay; None is everywhere.

    Source: Bernstein et al., "signSGD: compressed optimisation for non-convex problems" (arXiv 1802.04434).
    """
    return descend(learning_rate, weight_decay, mask, decoupled=True, sign=scale_by_sign())


def signum(
    learning_rate: Scalar | Schedule,
    *,
    momentum: Scalar = 0.9,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    """Signs of the momentum: ``p - learning_rate * (sign(mu) + weight_decay * p)``.

    Args:
        learning_rate: a number, a 0-d tensor or a schedule.
        momentum: in [0, 1), of the moving average ``mu``.
        weight_decay: decoupled.
        mask: True where weights decay; None is everywhere.

    Source: Bernstein et al. (arXiv 1802.04434), algorithm 2.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.signum(0.1), {"w": torch.tensor([5.0, -0.1])}
        >>> tx.update(params, tx.init(params), params)[0]
        {'w': tensor([-0.1000,  0.1000])}
    """
    check_decay(momentum=momentum)
    rules = {"momentum": ema(momentum, debias=False), "sign": scale_by_sign()}
    return descend(learning_rate, weight_decay, mask, decoupled=True, **rules)


def normalize_rms() -> GradientTransformation:
    """Give each tensor a root mean square of 1; what is zero stays so."""

    def rule(u: Tensor) -> Tensor:
        u = tree.wide(u)
        square = u.square().sum() / max(u.numel(), 1)
        return u * (square > 0) / tree.safe_sqrt(square + (square == 0).to(u.dtype))

    return stateless(lambda updates, params: opaque(lambda u: tree.map(rule, u), updates), "normalize_rms")


def scion(
    learning_rate: Scalar | Schedule,
    *,
    momentum: Scalar = 0.9,
    radius: float = 50.0,
    sign_radius: float = 3000.0,
    constrained: bool = False,
    ns_steps: int = 5,
    ns_coefficients: Coefficients = "classic",
    outputs: Mask | None = None,
) -> GradientTransformation:
    """Steps along the steepest direction of a norm for each layer, at a moving average ``d`` of the gradients:

        matrices        radius * sqrt(rows / columns) * orthogonalize(d)           # spectral norm, RMS to RMS
        outputs         sign_radius / columns * sign(d)                            # largest element
        vectors         radius * d / rms(d)

        p = p - learning_rate * that

    Args:
        learning_rate: a number, a 0-d tensor or a schedule: the share of the radius in one step.
        momentum: in [0, 1); the paper's alpha is ``1 - momentum``.
        radius, sign_radius: of the balls of the hidden layers and of ``outputs``.
        constrained: keep weights in these balls, by ``p = (1 - learning_rate) * p - ...``, instead of decaying them.
        ns_steps, ns_coefficients: of `orthogonalize`.
        outputs: True for the last layer, and embeddings: a bool for each parameter, or a function; None is none.

    Source: Pethick et al., "Training deep learning models with norm-constrained LMOs" (arXiv 2502.07529), with their
    defaults for language models; vectors as in their code's bias rule.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.scion(0.01, radius=1.0), {"w": torch.eye(2), "b": torch.tensor([3.0, 4.0])}
        >>> tx.update(params, tx.init(params), params)[0]["b"]
        tensor([-0.0085, -0.0113])
    """
    check_decay(momentum=momentum)
    check_positive(radius=radius, sign_radius=sign_radius)
    check_flags(constrained=constrained)
    kinds = {
        "spectral": chain(
            scale_by_muon(0.0, nesterov=False, ns_steps=ns_steps, ns_coefficients=ns_coefficients, adjust="rms_to_rms"),
            scale(radius),
        ),
        "sign": chain(scale_by_sign(), stateless(lambda u, p: opaque(_over_columns, u)), scale(sign_radius)),
        "vector": chain(normalize_rms(), scale(radius)),
    }

    def kind(is_output: bool, ndim: int) -> str:
        return "sign" if is_output else "spectral" if ndim > 1 else "vector"

    def of_kind(name: str) -> Any:
        def mask(params: Params) -> PyTree:
            flags = mask_flags(outputs, params) if outputs else tree.map_shapes(lambda _: False, params)
            return tree.map(lambda is_output, ndim: kind(is_output, ndim) == name, flags, tree.map_shapes(len, params))

        return mask

    return named_chain(
        momentum=ema(momentum, debias=False),
        **{name: masked(tx, of_kind(name)) for name, tx in kinds.items()},
        weight_decay=add_decayed_weights(1.0 if constrained else 0.0),
        learning_rate=scale_by_learning_rate(learning_rate),
    )


def _over_columns(updates: PyTree) -> PyTree:
    return tree.map(lambda u: u / max(u[0].numel() if u.ndim and len(u) else 1, 1), updates)
