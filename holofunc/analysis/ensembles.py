"""Ensembles of stacked members: selection, copies, averages and predictions."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from holofunc import tree
from holofunc.analysis.populations import num_members
from holofunc.model import Model
from holofunc.typing import Buffers, Params, PyTree

__all__ = ["Ensemble", "ensemble", "resample", "soup"]


def resample(states: PyTree, members: Tensor) -> PyTree:
    """A population in which member i is a copy of the former member ``members[i]``; its size may change.

    Example:
        >>> import torch
        >>> from holofunc import analysis
        >>> analysis.resample({"w": torch.tensor([1.0, 2.0, 3.0])}, torch.tensor([2, 2, 0]))
        {'w': tensor([3., 3., 1.])}
    """
    count = num_members(states)
    if members.ndim != 1 or members.is_floating_point() or len(members) == 0:
        raise ValueError(f"members must be integers (K,), at least one, got {members.dtype} of {tuple(members.shape)}")
    if members.device.type == "cpu" and tree.is_known(members) and not bool(((members >= 0) & (members < count)).all()):
        raise ValueError(f"members must be in [0, {count}), got {members.tolist()}")
    return tree.map(lambda x: x[members], states)


def soup(states: PyTree, weights: Tensor | None = None) -> PyTree:
    """The weighted mean of the members' floating-point leaves; other leaves are those of the first member.

    Members average well if they started from one point. BatchNorm statistics of the mean are not the mean of the
    statistics: `calibrate` them.

    Source: Wortsman et al., "Model soups" (ICML 2022).

    Example:
        >>> import torch
        >>> from holofunc import analysis
        >>> analysis.soup({"w": torch.tensor([1.0, 3.0])})
        {'w': tensor(2.)}
    """
    count = num_members(states)
    if weights is not None and weights.shape != (count,):
        raise ValueError(f"weights must have shape ({count},), one per member, got {tuple(weights.shape)}")

    def mean(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x[0]
        return x.mean(0) if weights is None else torch.tensordot(weights.to(x) / weights.sum().to(x), x, 1)

    return tree.map(mean, states)


class Ensemble(NamedTuple):
    """What `ensemble` returns.

    Attributes:
        outputs: of each member, (K, N, classes, ...).
        probabilities: their mean, (N, classes, ...).
        prediction: (N, ...).
        disagreement: share of members that predict another class, (N, ...).
        entropy: of the mean probabilities, in nats, (N, ...): all uncertainty.
        mutual_information: what of it comes from members contradicting each other, (N, ...).
    """

    outputs: Tensor
    probabilities: Tensor
    prediction: Tensor
    disagreement: Tensor
    entropy: Tensor
    mutual_information: Tensor


def ensemble(
    model: Model, params: Params, buffers: Buffers, images: Tensor, *, method: Literal["vmap", "loop"] = "vmap"
) -> Ensemble:
    """The joint prediction of stacked members in eval mode, and their disagreement.

    Args:
        model: a classifier, of images or of their pixels.
        params: stacked.
        buffers: stacked.
        images: (N, C, H, W).
        method: as for `population`.

    Raises:
        ValueError: an unknown method; outputs that are no scores of classes, (N, classes, ...).

    Source: Lakshminarayanan et al., "Simple and scalable predictive uncertainty estimation using deep ensembles"
        (NeurIPS 2017).

    Example:
        >>> import torch
        >>> from holofunc import analysis, lift, optim, random
        >>> model = lift(torch.nn.Linear, 3, 2)
        >>> states = analysis.create_population(model, optim.sgd(0.1), random.split(random.key(0), 4))
        >>> analysis.ensemble(model, states.params, states.buffers, torch.ones(5, 3)).probabilities.shape
        torch.Size([5, 2])
    """
    if method not in ("vmap", "loop"):
        raise ValueError(f"method must be 'vmap' or 'loop', got {method!r}")

    def one(params: Params, buffers: Buffers) -> Tensor:
        out = model.apply(params, buffers, images)[0]
        if not isinstance(out, Tensor) or out.ndim < 2:
            raise ValueError(f"{model.name} must be a classifier with outputs (N, classes, ...), got {_kind(out)}")
        return out

    if method == "loop":
        pairs = zip(tree.unstack(params), tree.unstack(buffers) if buffers else [{}] * num_members(params), strict=True)
        outputs = torch.stack([one(*pair) for pair in pairs])
    else:
        outputs = torch.vmap(one)(params, buffers)
    each = torch.softmax(outputs, 2)
    p = each.mean(0)
    prediction = p.argmax(1)
    entropy, inner = _entropy(p, 1), _entropy(each, 2).mean(0)
    apart = (outputs.argmax(2) != prediction).to(p.dtype).mean(0)
    return Ensemble(outputs, p, prediction, apart, entropy, (entropy - inner).clamp_min(0))


def _kind(out: Any) -> str:
    return str(tuple(out.shape)) if isinstance(out, Tensor) else type(out).__name__


def _entropy(p: Tensor, classes: int) -> Tensor:
    return -torch.special.xlogy(p, p).sum(classes)
