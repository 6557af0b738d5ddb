"""Target networks: parameters that follow others, smoothly or from time to time."""

import torch
from torch import Tensor

from holofunc import tree
from holofunc.optim.numerics import check_count, check_fraction
from holofunc.typing import Params, Scalar

__all__ = ["incremental_update", "periodic_update"]


def incremental_update(new: Params, old: Params, step_size: Scalar) -> Params:
    """``step_size * new + (1 - step_size) * old``, in the dtype of ``old``; `ema_params` does it in every update.

    Args:
        new: parameters.
        old: what follows them: a tree of their structure.
        step_size: in (0, 1].

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> optim.incremental_update({"w": torch.ones(1)}, {"w": torch.zeros(1)}, 0.25)
        {'w': tensor([0.2500])}
    """
    check_fraction(step_size=step_size)
    return tree.elementwise(
        lambda n, o: (tree.wide(o) + step_size * (tree.wide(n) - tree.wide(o))).to(o.dtype), new, old
    )


def periodic_update(new: Params, old: Params, count: Tensor | int, every: int) -> Params:
    """``new`` where ``count`` is a multiple of ``every``, otherwise ``old``, in the dtype of ``old``.

    Args:
        new: parameters.
        old: what follows them: a tree of their structure.
        count: an int or a 0-d tensor.
        every: at least 1.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> new, old = {"w": torch.ones(1)}, {"w": torch.zeros(1)}
        >>> [optim.periodic_update(new, old, torch.tensor(t), every=2)["w"].item() for t in range(4)]
        [1.0, 0.0, 1.0, 0.0]
    """
    check_count(every=every)
    due = tree.hoist(torch.as_tensor(count) % every == 0)
    return tree.elementwise(lambda n, o: torch.where(due, n.to(o.dtype), o), new, old)
