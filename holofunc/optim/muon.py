"""Muon: orthogonalized momentum for matrices, and which parameters of a network it suits."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from holofunc import tree
from holofunc.compile import opaque
from holofunc.optim.adam import adamw
from holofunc.optim.base import GradientTransformation, named_chain
from holofunc.optim.deprecation import renamed
from holofunc.optim.labels import Mask, check_labels, resolve
from holofunc.optim.masking import masked
from holofunc.optim.matrices import in_stacks
from holofunc.optim.numerics import ABSENT, divisor, far_norm, is_zero, zeros
from holofunc.optim.ranges import check_count, check_decay, check_dtype, check_finite, check_flags, check_nonnegative
from holofunc.optim.transforms import descend, moving_average
from holofunc.typing import Params, PyTree, Scalar, Schedule

__all__ = ["MuonState", "muon", "orthogonalize", "scale_by_muon", "suits_muon", "with_adam"]


# --- orthogonalization -------------------------------------------------------------------------------------------


Coefficients: TypeAlias = str | tuple[float, float, float] | Sequence[tuple[float, float, float]]
"""``(a, b, c)`` of each step, or of all; or a name of `NEWTON_SCHULZ`."""


NEWTON_SCHULZ: dict[str, Sequence[tuple[float, float, float]]] = {
    "classic": [(3.4445, -4.7750, 2.0315)],
    "quintic": [
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ],
    "polar_express": [
        (a / 1.01, b / 1.01**3, c / 1.01**5)  # a margin for the rounding of bfloat16
        for a, b, c in [
            (8.28721201814563, -23.595886519098837, 17.300387312530933),
            (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
            (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
            (3.3184196573706015, -2.488488024314874, 0.51004894012372),
            (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
            (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
        ]
    ]
    + [(1.875, -1.25, 0.375)],
}
"""Quintics for each step, the last one for all further ones. The classic one is the steepest at zero that keeps
singular values between 0.7 and 1.2; the others take the steps together, and bring them nearer to 1.

Source: Jordan et al. (2024); quintic: the sequence of the modded-nanogpt records; polar_express: Amsel et al., "The
Polar Express" (arXiv 2505.16932), for singular values above 1e-3 of the norm.
"""


def orthogonalize(
    x: Tensor,
    steps: int = 5,
    *,
    coefficients: Coefficients = "classic",
    eps: float = 1e-7,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: singular values between 0.7 and 1.2 in place of those of ``x``.

    ``x = a * x + (b * y + c * y @ y) @ x`` with ``y = x @ x.T``, ``steps`` times, from ``x / norm(x)``.

    Args:
        x: matrices, shape (..., rows, columns).
        steps: of the Newton-Schulz iteration.
        coefficients: ``(a, b, c)``, a list of them for one step after the other, or a name of `NEWTON_SCHULZ`:
            ``"classic"``, ``"quintic"``, ``"polar_express"``.
        eps: least norm to divide by.
        dtype: to compute in; None is that of ``x``, bfloat16 is what the authors use on GPUs.

    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024).

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> s = torch.linalg.svdvals(optim.orthogonalize(torch.tensor([[3.0, 1.0], [0.0, 2.0]])))
        >>> bool(((s > 0.6) & (s < 1.3)).all())
        True
    """
    each = _each_step(coefficients)
    check_dtype(dtype=dtype)
    if x.ndim < 2:
        raise ValueError(f"x must be matrices, of shape (..., rows, columns), got shape {tuple(x.shape)}")
    y = tree.upcast(x) if dtype is None else x.to(dtype)
    tall = y.shape[-2] > y.shape[-1]
    y = y.mT if tall else y
    norm = far_norm(lambda y: tree.safe_sqrt(y.square().sum((-2, -1), keepdim=True)), y)
    y = y / divisor(norm.clamp_min(eps), 0.0).to(y.dtype)
    for i in range(steps):
        a, b, c = each[min(i, len(each) - 1)]
        gram = y @ y.mT
        y = a * y + (b * gram + c * (gram @ gram)) @ y
    return (y.mT if tall else y).to(tree.upcast(x).dtype)


def _each_step(coefficients: Coefficients) -> Sequence[tuple[float, float, float]]:
    if isinstance(coefficients, str):
        if coefficients not in NEWTON_SCHULZ:
            raise ValueError(f"coefficients must be one of {list(NEWTON_SCHULZ)}, got {coefficients!r}")
        return NEWTON_SCHULZ[coefficients]
    alone = isinstance(coefficients, (tuple, list)) and not any(isinstance(x, (tuple, list)) for x in coefficients)
    rows: Any = [coefficients] if alone else coefficients
    if not isinstance(rows, (tuple, list)) or any(not isinstance(row, (tuple, list)) or len(row) != 3 for row in rows):
        raise ValueError(f"coefficients must be (a, b, c), a list of such or a name, got {coefficients!r}")
    place = "ns_coefficients[{j}]" if alone else "ns_coefficients[{i}][{j}]"
    check_finite(**{place.format(i=i, j=j): c for i, row in enumerate(rows) for j, c in enumerate(row)})
    return rows


# --- Muon --------------------------------------------------------------------------------------------------------


class MuonState(NamedTuple):
    """Moving average of the gradients."""

    mu: PyTree


def scale_by_muon(
    momentum: Scalar = 0.95,
    *,
    nesterov: bool = True,
    ns_steps: int = 5,
    ns_coefficients: Coefficients = "classic",
    ns_dtype: torch.dtype | None = None,
    adjust: str = "original",
    conv: str = "flatten",
) -> GradientTransformation:
    """The momentum of each matrix, orthogonalized. Matrices of one shape are computed together.

    Args:
        momentum: in [0, 1). The Python number 0 keeps no ``mu``.
        nesterov: look one step ahead.
        ns_steps, ns_coefficients, ns_dtype: as `orthogonalize`.
        adjust: factor of the result: ``"original"`` is ``sqrt(max(1, rows / columns))``, ``"match_rms"`` is
            ``0.2 * sqrt(max(rows, columns))``, which makes updates as large as Adam's (torch's ``"match_rms_adamw"``),
            ``"rms_to_rms"`` is ``sqrt(rows / columns)``, ``"none"`` is 1.
        conv: what a tensor of more than two axes is: ``"flatten"``, a matrix (first axis, all others); ``"batched"``, a
            matrix of the first two axes at each place of the others, divided by the root of their number.

    Raises:
        ValueError: in ``init``, a parameter of fewer than two axes.

    Source: Jordan et al. (2024); match_rms: Liu et al., "Muon is scalable for LLM training" (arXiv 2502.16982);
    rms_to_rms: Bernstein and Newhouse, "Old optimizer, new norm" (arXiv 2409.20325).
    """
    check_decay(momentum=momentum)
    check_flags(nesterov=nesterov)
    check_dtype(ns_dtype=ns_dtype)
    if adjust not in ("original", "match_rms", "match_rms_adamw", "rms_to_rms", "none"):
        raise ValueError(f"adjust must be 'original', 'match_rms', 'rms_to_rms' or 'none', got {adjust!r}")
    if conv not in ("flatten", "batched"):
        raise ValueError(f"conv must be 'flatten' or 'batched', got {conv!r}")
    _each_step(ns_coefficients)
    if isinstance(ns_steps, bool) or not isinstance(ns_steps, int) or ns_steps < 1:
        raise ValueError(f"ns_steps must be an int of at least 1, got {ns_steps!r}")

    def init(params: Params) -> MuonState:
        for path, p in tree.leaves_with_path(params):
            if p.ndim < 2:
                raise ValueError(f"scale_by_muon: parameters must have at least two axes, got {path!r} with {p.ndim}")
        return MuonState(ABSENT if is_zero(momentum) else zeros(params))

    def rule(u: Tensor) -> Tensor:
        places = math.prod(u.shape[3:]) if conv == "batched" else 1
        matrix = u.flatten(3).movedim(3, 1) if places > 1 else u.flatten(2)
        rows, columns = matrix.shape[-2:]
        factor = {
            "original": max(1.0, rows / max(columns, 1)) ** 0.5,
            "match_rms": 0.2 * max(rows, columns) ** 0.5,
            "match_rms_adamw": 0.2 * max(rows, columns) ** 0.5,
            "rms_to_rms": (rows / max(columns, 1)) ** 0.5,
            "none": 1.0,
        }
        out = orthogonalize(matrix, ns_steps, coefficients=ns_coefficients, dtype=ns_dtype)
        out = out * (factor[adjust] / places**0.5)
        return (out.movedim(1, 3) if places > 1 else out).reshape(u.shape)

    def update(updates: PyTree, state: MuonState) -> tuple[PyTree, MuonState]:
        mu = ABSENT if is_zero(momentum) else moving_average(updates, state.mu, momentum)
        ahead = tree.elementwise(tree.upcast, updates) if is_zero(momentum) else mu
        if nesterov and not is_zero(momentum):
            ahead = tree.elementwise(lambda g, m: m + (1 - momentum) * (tree.upcast(g) - m), updates, mu)
        return opaque(lambda stacked: in_stacks(rule, stacked), ahead), MuonState(mu)

    return GradientTransformation(init, update)


@renamed(b1="adam_b1", b2="adam_b2", eps="adam_eps")
def muon(
    learning_rate: Scalar | Schedule,
    *,
    momentum: Scalar = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    ns_coefficients: Coefficients = "classic",
    ns_dtype: torch.dtype | None = None,
    adjust: str = "original",
    conv: str = "flatten",
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
    matrices: Mask | None = None,
    adam_learning_rate: Scalar | Schedule | None = None,
    adam_b1: Scalar = 0.9,
    adam_b2: Scalar = 0.95,
    adam_eps: Scalar = 1e-10,
) -> GradientTransformation:
    """Orthogonalized momentum for matrices, AdamW for everything else:

        mu = momentum * mu + (1 - momentum) * g
        u = orthogonalize(momentum * mu + (1 - momentum) * g) * sqrt(max(1, rows / columns))
        p = p - learning_rate * (u + weight_decay * p)

    Args:
        learning_rate, weight_decay, mask: as `adamw`.
        momentum, nesterov, ns_steps, ns_coefficients, ns_dtype, adjust, conv: as `scale_by_muon`.
        matrices: True where Muon applies; None is every tensor of two or more axes. The authors leave embeddings and
            the last layer to Adam: `suits_muon` does so, and leaves out what is no matrix in convolutional networks.
        adam_learning_rate: of AdamW; None is ``learning_rate``, which suits ``adjust="match_rms"``.
        adam_b1, adam_b2, adam_eps: of AdamW, there ``b1``, ``b2``, ``eps``.

    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024); they orthogonalize in
    bfloat16, and leave AdamW to another optimizer.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.muon(0.02, adam_learning_rate=3e-4), {"w": torch.eye(2), "b": torch.ones(2)}
        >>> list(tx.init(params)["muon"]["muon"].mu), list(tx.init(params)["adam"]["adam"].mu)
        (['w'], ['b'])
    """
    check_decay(adam_b1=adam_b1, adam_b2=adam_b2)
    check_nonnegative(adam_eps=adam_eps)
    rule = scale_by_muon(
        momentum,
        nesterov=nesterov,
        ns_steps=ns_steps,
        ns_coefficients=ns_coefficients,
        ns_dtype=ns_dtype,
        adjust=adjust,
        conv=conv,
    )
    main = descend(learning_rate, weight_decay, mask, decoupled=True, muon=rule)
    rate = learning_rate if adam_learning_rate is None else adam_learning_rate
    return with_adam(
        main, rate, matrices, name="muon", weight_decay=weight_decay, mask=mask, b1=adam_b1, b2=adam_b2, eps=adam_eps
    )


def with_adam(
    tx: GradientTransformation,
    adam_learning_rate: Scalar | Schedule,
    matrices: Mask | None = None,
    *,
    name: str = "main",
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: Scalar | Schedule = 1e-2,
    mask: Mask | None = None,
) -> GradientTransformation:
    """An optimizer for matrices, and AdamW for everything else.

    Args:
        tx: the optimizer of the matrices, a whole one.
        adam_learning_rate: of AdamW.
        matrices: True where ``tx`` applies; None is every tensor of two or more axes; see `suits_muon`.
        name: of its part of the state; the other one is called ``"adam"``.
        b1, b2, eps, weight_decay, mask: of AdamW; ``mask`` is for all parameters.

    Example:
        >>> from holofunc import optim
        >>> tx = optim.with_adam(optim.chain(optim.scale_by_muon(), optim.scale(-0.02)), 3e-4, weight_decay=0.01)
    """
    check_nonnegative(True, adam_learning_rate=adam_learning_rate)

    def is_matrix(params: Params) -> PyTree:
        return tree.map_shapes(lambda shape: len(shape) > 1, params) if matrices is None else resolve(matrices, params)

    def is_other(params: Params) -> PyTree:
        return tree.map(lambda use: not use, is_matrix(params))

    adam = adamw(adam_learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=mask)
    parts = named_chain(**{name: masked(tx, is_matrix), "adam": masked(adam, is_other)})

    def init(params: Params) -> PyTree:
        for what, labels in (("mask", mask), ("matrices", matrices)):
            if labels is not None:
                check_labels(what, labels, params, bool)
        return parts.init(params)

    return GradientTransformation(init, parts.update)


# --- what it suits -----------------------------------------------------------------------------------------------


HEADS = ("*embed*", "*token*", "head*", "*.head*", "classifier*", "*.classifier*", "fc.*", "*logits*")


def suits_muon(
    params: Params,
    *,
    exclude: str | Sequence[str] = HEADS,
    min_size: int = 4,
    max_aspect: float = 128.0,
    verbose: bool = False,
) -> PyTree:
    """The mask ``matrices=`` of `muon` for a vision network: True for what Muon is made for, False for Adam's share.

    To Adam go vectors and numbers; depthwise convolutions, whose filters see one channel each; embeddings, tokens and
    heads, by name; matrices (first axis, all others) with a side below ``min_size``, or far from square.

    Args:
        params: any tree.
        exclude: globs, or one, of the names of embeddings and heads. The default knows those of torchvision and timm.
        min_size: least length of the shorter side.
        max_aspect: largest ratio of the sides.
        verbose: print a line for each parameter: its path, its shape, and what takes it, and why.

    Returns:
        Bools in the structure of ``params``.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> shapes = {"conv.weight": (8, 4, 3, 3), "dw.weight": (8, 1, 3, 3), "head": (9, 8)}
        >>> params = {name: torch.ones(shape) for name, shape in shapes.items()}
        >>> optim.suits_muon(params, verbose=True)
        conv.weight  (8, 4, 3, 3)  muon
        dw.weight    (8, 1, 3, 3)  adam: depthwise
        head         (9, 8)        adam: by name
        {'conv.weight': True, 'dw.weight': False, 'head': False}
    """
    check_count(min_size=min_size)
    check_nonnegative(max_aspect=max_aspect)
    check_flags(verbose=verbose)
    patterns = [exclude] if isinstance(exclude, str) else exclude

    def reason(path: str, shape: torch.Size) -> str:
        if len(shape) < 2:
            return "fewer than two axes"
        if any(tree.matches(path.replace("/", "."), pattern) for pattern in patterns):
            return "by name"
        if len(shape) > 2 and shape[1] == 1:
            return "depthwise"
        short, long = sorted((shape[0], math.prod(shape[1:])))
        if short < min_size:
            return f"a side of {short}"
        return f"sides 1 : {long / short:.0f}" if long > max_aspect * short else ""

    shapes = [(path, p.shape) for path, p in tree.leaves_with_path(params)]
    why = [reason(path, shape) for path, shape in shapes]
    if verbose:
        wide, deep = (
            max(map(len, map(str, x)), default=0) for x in ([p for p, _ in shapes], [tuple(s) for _, s in shapes])
        )
        for (path, shape), text in zip(shapes, why, strict=True):
            print(f"{path:<{wide}}  {tuple(shape)!s:<{deep}}  {f'adam: {text}' if text else 'muon'}")  # noqa: T201
    return tree.rebuild(params, [not text for text in why])
