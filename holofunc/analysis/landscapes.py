"""Loss landscapes: on a plane through parameters, and along the line between two solutions."""

from typing import NamedTuple

import torch
from torch import Tensor

from holofunc import random, tree
from holofunc.analysis.mapped import value
from holofunc.analysis.statistics import calibrate
from holofunc.model import Model
from holofunc.typing import Batch, Buffers, Key, Objective, Params

__all__ = ["Landscape", "filter_normalized", "interpolation", "loss_landscape"]


class Landscape(NamedTuple):
    """Losses on a line or plane.

    Attributes:
        places: along each direction, (points,).
        losses: (points,) for one direction, (points, points) for two, the first direction first.
        directions: one or two, of the structure of the parameters.
    """

    places: Tensor
    losses: Tensor
    directions: tuple[Params, ...]


def loss_landscape(
    objective: Objective,
    params: Params,
    buffers: Buffers,
    batch: Batch,
    *,
    key: Key,
    dims: int = 2,
    points: int = 11,
    extent: float = 1.0,
    recalibrate: Model | None = None,
) -> Landscape:
    """The loss at ``params + a * d1 + b * d2`` along random, filter-normalized directions.

    Costs ``points ** dims`` forward passes, one after the other.

    Args:
        objective: as in training.
        params: the middle.
        buffers: statistics.
        batch: N samples.
        key: of the directions, and of an objective that draws: the same draws at every place.
        dims: 1 or 2.
        points: along each direction, at least 2; an odd number has the middle among them.
        extent: places go from ``-extent`` to ``extent``, in units of the length of the parameters.
        recalibrate: a model whose BatchNorm statistics are renewed on the batch at every place (`calibrate`), without
            which an objective in eval mode shows statistics that are off rather than the loss.

    Raises:
        ValueError: ``dims`` other than 1 and 2; too few points.

    Source: Li et al., "Visualizing the loss landscape of neural nets" (NeurIPS 2018).

    Example:
        >>> import torch
        >>> from holofunc import analysis, random
        >>> loss = lambda params, buffers, batch, key: (params["w"].square().sum(), None)
        >>> w = {"w": torch.ones(2, 3)}
        >>> analysis.loss_landscape(loss, w, {}, torch.zeros(1), key=random.key(0), points=3).losses[1, 1]
        tensor(6.)
    """
    if dims not in (1, 2):
        raise ValueError(f"dims must be 1 or 2, got {dims}")
    if points < 2:
        raise ValueError(f"points must be at least 2, got {points}")
    directions = tuple(filter_normalized(k, params) for k in random.split(key, dims).unbind())
    first = next(iter(params.values()))
    places = torch.linspace(-extent, extent, points, dtype=first.dtype, device=first.device)
    found = [
        _loss_at(objective, _moved(params, directions, where), buffers, batch, recalibrate, key)
        for where in torch.cartesian_prod(*[places] * dims).view(-1, dims).unbind()
    ]
    return Landscape(places, torch.stack(found).view(*[points] * dims), directions)


def interpolation(
    objective: Objective,
    start: Params,
    end: Params,
    buffers: Buffers,
    batch: Batch,
    *,
    points: int = 11,
    recalibrate: Model | None = None,
    key: Key | None = None,
) -> Landscape:
    """The loss along the line from ``start`` (at 0) to ``end`` (at 1), which shows a barrier if there is one.

    Args:
        objective: as in training.
        start: parameters of one run.
        end: of another, of the same structure.
        buffers: statistics, used at every place unless they are renewed.
        batch: N samples.
        points: at least 2.
        recalibrate: as for `loss_landscape`.
        key: for an objective that draws.

    Source: Frankle et al., "Linear mode connectivity and the lottery ticket hypothesis" (ICML 2020).

    Example:
        >>> import torch
        >>> from holofunc import analysis
        >>> loss = lambda params, buffers, batch, key: (params["w"].square().sum(), None)
        >>> a, b = {"w": torch.tensor([-1.0])}, {"w": torch.tensor([1.0])}
        >>> analysis.interpolation(loss, a, b, {}, torch.zeros(1), points=3).losses
        tensor([1., 0., 1.])
    """
    if points < 2:
        raise ValueError(f"points must be at least 2, got {points}")
    direction = tree.map(torch.sub, end, start)
    first = next(iter(start.values()))
    places = torch.linspace(0, 1, points, dtype=first.dtype, device=first.device)
    found = [
        _loss_at(objective, _moved(start, (direction,), place.unsqueeze(0)), buffers, batch, recalibrate, key)
        for place in places.unbind()
    ]
    return Landscape(places, torch.stack(found), (direction,))


def filter_normalized(key: Key, params: Params) -> Params:
    """A random direction whose filters (rows of the first axis) have the norms of the parameters' filters.

    Biases and affine parameters of norms, of one axis, do not move.

    Example:
        >>> import torch
        >>> from holofunc import analysis, random
        >>> direction = analysis.filter_normalized(random.key(0), {"w": torch.ones(2, 4), "b": torch.ones(2)})
        >>> direction["w"].norm(dim=1).round(decimals=3), direction["b"]
        (tensor([2., 2.]), tensor([0., 0.]))
    """
    keys = random.split(key, len(params)).unbind()
    return {name: _as_long_as(p, k.to(p.device)) for (name, p), k in zip(params.items(), keys, strict=True)}


def _as_long_as(p: Tensor, key: Key) -> Tensor:
    if p.ndim < 2:
        return torch.zeros_like(p)
    drawn = random.normal(key, p.shape, dtype=p.dtype)
    axes = list(range(1, p.ndim))
    lengths = torch.linalg.vector_norm(drawn, dim=axes, keepdim=True)
    wanted = torch.linalg.vector_norm(p, dim=axes, keepdim=True)
    return drawn * (wanted / lengths)


def _moved(params: Params, directions: tuple[Params, ...], where: Tensor) -> Params:
    for direction, place in zip(directions, where.unbind(), strict=True):
        params = tree.map(lambda p, d, place=place: p + place * d, params, direction)
    return params


def _loss_at(
    objective: Objective, params: Params, buffers: Buffers, batch: Batch, model: Model | None, key: Key | None
) -> Tensor:
    if model is not None:
        buffers = calibrate(model, params, buffers, batch, key=key)
    return value(objective, params, buffers, batch, key)
