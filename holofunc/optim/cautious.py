"""Cautious updates: only what goes down the gradient."""

from typing import Any

from holofunc import tree
from holofunc.optim.adam import scale_by_adam
from holofunc.optim.base import GradientTransformation, MaybeParams, composed, held_by, inside, named_chain
from holofunc.optim.capabilities import Descends, PointsAnywhere
from holofunc.optim.decay import add_cautious_decay
from holofunc.optim.labels import Mask
from holofunc.optim.numerics import sizes
from holofunc.optim.ranges import check_flags
from holofunc.optim.transforms import descend, scale_by_learning_rate
from holofunc.typing import Params, PyTree, Scalar, Schedule

__all__ = ["cautious", "cautious_adamw"]


def cautious(tx: GradientTransformation, *, raw: bool | None = None) -> GradientTransformation:
    """Keep of the updates of ``tx`` only the elements that go down the gradient, and scale them up to make up for it.

    Each tensor is divided by the fraction that is kept (at least 1e-3).

    Args:
        tx: an optimizer, or a rule. Around a whole optimizer the mask covers its weight decay too; the paper's AdamW is
            ``named_chain(adam=cautious(scale_by_adam()), weight_decay=..., learning_rate=...)``. Wrappers
            that gather gradients, or keep weights that match the updates, belong around it, and are
            errors inside.
        raw: True says that ``tx`` is a rule before the learning rate, whose output points up the gradient; False, that
            it is an optimizer, whose updates descend. None is an optimizer where ``tx`` holds a learning rate or a
            negative factor, and otherwise a rule; of functions of the user's own, and of a factor whose sign is not
            known when building, it has to be said.

    Raises:
        ValueError: ``raw`` is not said where it has to be; or is True for what holds a learning rate.

    Source: Liang et al., "Cautious optimizers" (arXiv 2411.16085), with the scale of its later code: 1 / mean(mask).

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> params, tx = {"w": torch.zeros(2)}, optim.cautious(optim.sgd(1.0, momentum=0.9))
        >>> _, state = tx.update({"w": torch.tensor([1.0, 1.0])}, tx.init(params), params)
        >>> tx.update({"w": torch.tensor([1.0, -0.1])}, state, params)[0]["w"].abs()
        tensor([3.8000, 0.0000])
    """
    tx = inside("cautious", tx)
    if raw is not None:
        check_flags(raw=raw)
    descends = Descends in held_by(tx)
    if raw and descends:
        raise ValueError("raw must be False for a tx that holds a learning rate, whose updates descend, got True")
    unknown = raw is None and not descends and PointsAnywhere in held_by(tx)
    raw = not descends if raw is None else raw
    uphill = 1.0 if raw else -1.0

    def check_direction() -> None:  # not when building: what a tx contains may be an error of `init`
        if unknown:
            raise ValueError(
                "cautious must know where a tx of your own functions, or of a factor of unknown sign, points: write "
                "cautious(tx, raw=True) for a rule, whose output goes up the gradient, and raw=False for an optimizer"
            )

    def init(params: Params) -> PyTree:
        state = tx.init(params)
        check_direction()
        return state

    def update(updates: PyTree, state: PyTree, params: MaybeParams = None, **extra: Any) -> tuple[PyTree, PyTree]:
        check_direction()
        grads = updates
        updates, state = tx.update(grads, state, params, **extra)
        agree = tree.elementwise(
            lambda u, g: (uphill * u * tree.upcast(g) > 0).to(tree.upcast(u).dtype), updates, grads
        )
        gain = tree.elementwise(lambda kept, n: 1 / (kept / n).clamp_min(1e-3), tree.leaf_sum(agree), sizes(updates))
        return tree.elementwise(lambda u, a, s: u * a * s, updates, agree, gain), state

    return composed(init, update, tx)


def cautious_adamw(
    learning_rate: Scalar | Schedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: Scalar | Schedule = 0.01,
    mask: Mask | None = None,
    cautious_decay: bool = False,
) -> GradientTransformation:
    """AdamW whose update, or whose decay, acts only where it agrees: `cautious`, or `add_cautious_decay`:

        p = p - learning_rate * (u * mask / mean(mask) + weight_decay * p),  mask = mu * g > 0
        p = p - learning_rate * (u + weight_decay * p * (u * p >= 0))                             # cautious_decay

    Args:
        learning_rate, weight_decay, mask: as `adamw`.
        b1, b2, eps: as `scale_by_adam`.
        cautious_decay: False masks the update by the gradient, True the decay by the update, which leaves Adam's steps
            as they are.

    Source: Liang et al., "Cautious optimizers" (arXiv 2411.16085); Chen et al., "Cautious weight decay" (arXiv
    2510.12402).
    """
    check_flags(cautious_decay=cautious_decay)
    rule = scale_by_adam(b1, b2, eps)
    if cautious_decay:
        decay = add_cautious_decay(weight_decay, mask)
        return named_chain(adam=rule, weight_decay=decay, learning_rate=scale_by_learning_rate(learning_rate))
    return descend(learning_rate, weight_decay, mask, decoupled=True, adam=cautious(rule))
