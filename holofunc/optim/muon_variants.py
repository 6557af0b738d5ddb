"""NorMuon, whose rows take steps of one size; Scion, the steepest direction of a norm for each layer."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from holofunc import tree
from holofunc.compile import opaque
from holofunc.optim.base import GradientTransformation, MaybeParams, chain, named_chain, stateless
from holofunc.optim.deprecation import renamed
from holofunc.optim.labels import Mask, check_labels, resolve
from holofunc.optim.masking import masked
from holofunc.optim.muon import Coefficients, scale_by_muon, with_adam
from holofunc.optim.numerics import block_rms, divisor, far_norm, zeros
from holofunc.optim.ranges import check_decay, check_flags, check_nonnegative, check_positive
from holofunc.optim.transforms import add_decayed_weights, descend, ema, scale, scale_by_learning_rate, scale_by_sign
from holofunc.typing import Params, PyTree, Scalar, Schedule

__all__ = ["NormuonState", "normalize_rms", "normuon", "scale_by_normuon", "scion"]


# --- NorMuon -----------------------------------------------------------------------------------------------------


class NormuonState(NamedTuple):
    """Moving average of the mean square of each row."""

    nu: dict[str, Tensor]


def scale_by_normuon(b2: Scalar = 0.95, eps: Scalar = 1e-8, *, rms: Scalar | None = 0.2) -> GradientTransformation:
    """Divide each row by the root of a moving average of its mean square, behind `scale_by_muon`:

        nu = b2 * nu + (1 - b2) * mean(u**2, all axes but the first)
        u = u / (sqrt(nu) + eps),  times what gives it the root mean square ``rms``

    Args:
        b2: in [0, 1).
        eps: added outside of the root.
        rms: root mean square of the result, that of Adam's updates being about 0.2; None keeps that of ``u``.

    Source: Li et al., "NorMuon: making Muon more efficient and scalable" (arXiv 2510.05491), algorithm 1.
    """
    check_decay(b2=b2)
    check_nonnegative(eps=eps, **({} if rms is None else {"rms": rms}))

    def init(params: Params) -> NormuonState:
        return NormuonState(
            {
                path: z.flatten(1)[:, 0].clone() if z.ndim > 1 and z.numel() else z.new_zeros(len(z) if z.ndim else ())
                for path, z in tree.leaves_with_path(zeros(params))
            }
        )

    def update(updates: PyTree, state: NormuonState) -> tuple[PyTree, NormuonState]:
        return opaque(_by_rows, updates, state, b2, eps, rms)

    return GradientTransformation(init, update)


def _by_rows(
    updates: PyTree, state: NormuonState, b2: Scalar, eps: Scalar, rms: Scalar | None
) -> tuple[PyTree, NormuonState]:
    out, nu = [], {}
    for path, u in tree.leaves_with_path(updates):
        u, old = tree.upcast(u), state.nu[path]
        rows = u.flatten(1) if u.ndim > 1 else u.view(-1, 1)
        square = rows.square().sum(1) / max(rows.shape[1], 1)
        nu[path] = old + (1 - b2) * (square.view(old.shape) - old)
        scaled = rows / divisor(tree.safe_sqrt(nu[path]).view(-1, 1), eps)
        before, after = far_norm(block_rms, rows), far_norm(block_rms, scaled)
        target = before if rms is None else rms * (before > 0)
        out.append((scaled * (target / torch.where(after > 0, after, 1.0))).view(u.shape))
    return tree.rebuild(updates, out), NormuonState(nu)


@renamed(b1="adam_b1", b2="adam_b2", eps="adam_eps")
def normuon(
    learning_rate: Scalar | Schedule,
    *,
    momentum: Scalar = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    ns_coefficients: Coefficients = "classic",
    conv: str = "flatten",
    norm_b2: Scalar = 0.95,
    rms: Scalar | None = 0.2,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
    matrices: Mask | None = None,
    adam_learning_rate: Scalar | Schedule | None = None,
    adam_b1: Scalar = 0.9,
    adam_b2: Scalar = 0.95,
    adam_eps: Scalar = 1e-10,
) -> GradientTransformation:
    """Muon whose rows (neurons, output channels) take steps of one size:
    ``p - learning_rate * (u + weight_decay * p)``, with ``u`` of `scale_by_muon`, then `scale_by_normuon`; AdamW for
    everything else.

    Args:
        learning_rate: a number, a 0-d tensor or a schedule.
        momentum, nesterov, ns_steps, ns_coefficients, conv: as `scale_by_muon`.
        norm_b2, rms: as `scale_by_normuon`, there ``b2`` and ``rms``.
        weight_decay, mask, matrices, adam_learning_rate, adam_b1, adam_b2, adam_eps: as in `muon`.

    Source: Li et al. (arXiv 2510.05491).
    """
    check_decay(norm_b2=norm_b2, adam_b1=adam_b1, adam_b2=adam_b2)
    check_nonnegative(adam_eps=adam_eps)
    rule = chain(
        scale_by_muon(
            momentum, nesterov=nesterov, ns_steps=ns_steps, ns_coefficients=ns_coefficients, conv=conv, adjust="none"
        ),
        scale_by_normuon(norm_b2, rms=rms),
    )
    main = descend(learning_rate, weight_decay, mask, decoupled=True, normuon=rule)
    rate = learning_rate if adam_learning_rate is None else adam_learning_rate
    return with_adam(
        main, rate, matrices, name="normuon", weight_decay=weight_decay, mask=mask, b1=adam_b1, b2=adam_b2, eps=adam_eps
    )


# --- Scion -------------------------------------------------------------------------------------------------------


def normalize_rms() -> GradientTransformation:
    """Give each tensor a root mean square of 1; what is zero stays so."""

    def fn(updates: PyTree, params: MaybeParams) -> PyTree:
        sizes = far_norm(block_rms, updates)
        return tree.elementwise(lambda u, rms: tree.upcast(u) / torch.where(rms > 0, rms, 1.0), updates, sizes)

    return stateless(fn)


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
        ns_steps, ns_coefficients: as `orthogonalize`.
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
            flags = tree.map_shapes(lambda _: False, params) if outputs is None else resolve(outputs, params)
            return tree.map(lambda is_output, ndim: kind(is_output, ndim) == name, flags, tree.map_shapes(len, params))

        return mask

    parts = named_chain(
        momentum=ema(momentum, debias=False),
        **{name: masked(tx, of_kind(name)) for name, tx in kinds.items()},
        weight_decay=add_decayed_weights(1.0 if constrained else 0.0),
        learning_rate=scale_by_learning_rate(learning_rate),
    )

    def init(params: Params) -> PyTree:
        if outputs is not None:
            check_labels("outputs", outputs, params, bool)
        return parts.init(params)

    return GradientTransformation(init, parts.update)


def _over_columns(updates: PyTree) -> PyTree:
    return tree.map(lambda u: u / max(u[0].numel() if u.ndim and len(u) else 1, 1), updates)
