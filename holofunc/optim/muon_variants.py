"""NorMuon, and which parameters of a vision network suit Muon."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from holofunc import tree
from holofunc.compile import opaque
from holofunc.optim.base import GradientTransformation, MaybeParams, chain, check_params
from holofunc.optim.labels import Mask
from holofunc.optim.muon import Coefficients, scale_by_muon
from holofunc.optim.numerics import check_count, check_decay, check_nonnegative, zeros
from holofunc.optim.optimizers import descend
from holofunc.optim.recent_optimizers import with_adam
from holofunc.typing import Params, PyTree, Scalar, Schedule

__all__ = ["NormuonState", "normuon", "scale_by_normuon", "suits_muon"]

HEADS = ("*embed*", "*token*", "head*", "*.head*", "classifier*", "*.classifier*", "fc.*", "*logits*")


def suits_muon(
    params: Params,
    *,
    exclude: Sequence[str] = HEADS,
    min_size: int = 4,
    max_aspect: float = 128.0,
    verbose: bool = False,
) -> PyTree:
    """The mask ``matrices=`` of `muon` for a vision network: True for what Muon is made for, False for Adam's share.

    To Adam go vectors and numbers; depthwise convolutions, whose filters see one channel each; embeddings, tokens and
    heads, by name; matrices (first axis, all others) with a side below ``min_size``, or far from square.

    Args:
        params: any tree.
        exclude: globs of the names of embeddings and heads. The default knows those of torchvision and timm.
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

    def reason(path: str, shape: torch.Size) -> str:
        if len(shape) < 2:
            return "fewer than two axes"
        if any(tree.matches(path.replace("/", "."), pattern) for pattern in exclude):
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
        check_params(params, "scale_by_normuon")
        return NormuonState(
            {
                path: z.flatten(1)[:, 0].clone() if z.ndim > 1 and z.numel() else z.new_zeros(len(z) if z.ndim else ())
                for path, z in tree.leaves_with_path(zeros(params))
            }
        )

    def update(
        updates: PyTree, state: NormuonState, params: MaybeParams = None, **extra: Any
    ) -> tuple[PyTree, NormuonState]:
        return opaque(_by_rows, updates, state, b2, eps, rms)

    return GradientTransformation(init, update)


def _by_rows(
    updates: PyTree, state: NormuonState, b2: Scalar, eps: Scalar, rms: Scalar | None
) -> tuple[PyTree, NormuonState]:
    out, nu = [], {}
    for path, u in tree.leaves_with_path(updates):
        u, old = tree.wide(u), state.nu[path]
        rows = u.flatten(1) if u.ndim > 1 else u.view(-1, 1)
        square = rows.square().sum(1) / max(rows.shape[1], 1)
        nu[path] = old + (1 - b2) * (square.view(old.shape) - old)
        scaled = rows / (tree.safe_sqrt(nu[path]).view(-1, 1) + eps)
        before, after = (tree.safe_sqrt(x.square().sum() / max(x.numel(), 1)) for x in (rows, scaled))
        target = before if rms is None else rms * (before > 0)
        out.append((scaled * (target / torch.where(after > 0, after, 1.0))).view(u.shape))
    return tree.rebuild(updates, out), NormuonState(nu)


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
    b1: Scalar = 0.9,
    b2: Scalar = 0.95,
    eps: Scalar = 1e-10,
) -> GradientTransformation:
    """Muon whose rows (neurons, output channels) take steps of one size: `scale_by_muon`, then `scale_by_normuon`:

        u = orthogonalize(momentum of g);  nu averages mean(u**2) of each row
        p = p - learning_rate * (rms * u / (sqrt(nu) + eps) / rms of that + weight_decay * p)

    Args:
        learning_rate: a number, a 0-d tensor or a schedule.
        momentum, nesterov, ns_steps, ns_coefficients, conv: of `scale_by_muon`.
        norm_b2, rms: of `scale_by_normuon`, there ``b2`` and ``rms``.
        weight_decay, mask, matrices, adam_learning_rate, b1, b2, eps: as in `muon`.

    Source: Li et al. (arXiv 2510.05491).
    """
    check_decay(norm_b2=norm_b2)
    rule = chain(
        scale_by_muon(
            momentum, nesterov=nesterov, ns_steps=ns_steps, ns_coefficients=ns_coefficients, conv=conv, adjust="none"
        ),
        scale_by_normuon(norm_b2, rms=rms),
    )
    main = descend(learning_rate, weight_decay, mask, decoupled=True, normuon=rule)
    rate = learning_rate if adam_learning_rate is None else adam_learning_rate
    return with_adam(main, rate, matrices, name="normuon", weight_decay=weight_decay, mask=mask, b1=b1, b2=b2, eps=eps)
