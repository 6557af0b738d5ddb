"""SM3: Adagrad from one bound per row and column."""

from typing import NamedTuple

import torch
from torch import Tensor

from holofunc import tree
from holofunc.compile import opaque
from holofunc.optim.base import GradientTransformation
from holofunc.optim.checks import check_paths
from holofunc.optim.labels import Mask
from holofunc.optim.numerics import divisor, is_zero, root, zeros
from holofunc.optim.ranges import check_decay, check_nonnegative
from holofunc.optim.transforms import descend, ema
from holofunc.typing import Params, PyTree, Scalar, Schedule

__all__ = ["Sm3State", "scale_by_sm3", "sm3"]


class Sm3State(NamedTuple):
    """For each axis of each parameter, as ``"path/axis"``, a bound on the sum of the squares along it."""

    bounds: dict[str, Tensor]


def scale_by_sm3(decay: Scalar | None = None, eps: Scalar = 1e-8) -> GradientTransformation:
    """Adagrad from the least of one bound per axis. For a matrix ``g``:

        nu[i, j] = min(rows[i], columns[j]) + g[i, j]**2
        rows[i] = max(nu[i, :]),  columns[j] = max(nu[:, j])
        u = g / (sqrt(nu) + eps)

    and likewise for tensors with more axes. A matrix of shape (n, m) costs n + m numbers; a vector gets Adagrad.

    Args:
        decay: in [0, 1): ``nu = decay * min(...) + (1 - decay) * g**2``, a memory that fades; None is the sum.
        eps: added outside of the root.

    Source: Anil et al., "Memory-efficient adaptive optimization" (arXiv 1901.11150), SM3-II.
    """
    if decay is not None:
        check_decay(decay=decay)
    check_nonnegative(eps=eps)

    def init(params: Params) -> Sm3State:
        flat = tree.leaves_with_path(zeros(params))
        return Sm3State({f"{path}/{axis}": x.clone() for path, z in flat for axis, x in enumerate(_maxima(z))})

    def update(updates: PyTree, state: Sm3State) -> tuple[PyTree, Sm3State]:
        check_paths(updates, {name.rpartition("/")[0]: bound for name, bound in state.bounds.items()})
        keep = (1.0, 1.0) if decay is None else (decay, 1 - decay)
        out, bounds = opaque(_scaled_by_sm3, updates, state.bounds, *keep, eps)
        return out, Sm3State(bounds)

    return GradientTransformation(init, update)


def _maxima(x: Tensor) -> list[Tensor]:
    """For each axis, the greatest element at each of its places; zeros where the other axes have no elements."""
    if x.numel() == 0:
        return [x.new_zeros(n) for n in x.shape]
    found = []
    while x.ndim > 1:  # what is left of an axis is enough for those after it
        found.append(x.flatten(1).amax(1))
        x = x.amax(0)
    return [*found, x]


def _scaled_by_sm3(
    updates: PyTree, bounds: dict[str, Tensor], old: Scalar, new: Scalar, eps: Scalar
) -> tuple[PyTree, dict[str, Tensor]]:
    out, renewed = [], {}
    for path, g in tree.leaves_with_path(updates):
        g = tree.upcast(g)
        least = bounds[f"{path}/0"]
        if g.ndim > 1:
            least = least.view(-1, *[1] * (g.ndim - 1))
            for axis in range(1, g.ndim):
                least = torch.minimum(least, bounds[f"{path}/{axis}"].view(-1, *[1] * (g.ndim - 1 - axis)))
        nu = old * least + new * g.square()
        out.append(g / divisor(root(nu), eps))
        renewed.update({f"{path}/{axis}": x for axis, x in enumerate(_maxima(nu))})
    return tree.rebuild(updates, out), {name: renewed[name] for name in bounds}


def sm3(
    learning_rate: Scalar | Schedule,
    *,
    momentum: Scalar = 0.9,
    decay: Scalar | None = None,
    eps: Scalar = 1e-8,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    """Adagrad that keeps one bound per row and column: ``p - learning_rate * (mu + weight_decay * p)``, where ``mu`` is
    the moving average of ``u`` of `scale_by_sm3`.

    Args:
        learning_rate, weight_decay, mask: as `adamw`.
        momentum: of the average, in [0, 1). The Python number 0 keeps none, and with it hardly any state.
        decay, eps: as `scale_by_sm3`.

    Source: Anil et al. (arXiv 1901.11150).

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.sm3(0.1, momentum=0.0), {"w": torch.ones(2, 2)}
        >>> tx.update({"w": torch.tensor([[3.0, 0.0], [4.0, 0.0]])}, tx.init(params), params)[1]["sm3"].bounds
        {'w/0': tensor([ 9., 16.]), 'w/1': tensor([16.,  0.])}
    """
    check_decay(momentum=momentum)
    rules = {"sm3": scale_by_sm3(decay, eps)}
    if not is_zero(momentum):
        rules["momentum"] = ema(momentum, debias=False)
    return descend(learning_rate, weight_decay, mask, decoupled=True, **rules)
