"""Recomputing BatchNorm statistics, for averaged or loaded weights."""

from collections.abc import Iterable

import torch
from torch import nn

from holofunc import random
from holofunc.model import Model
from holofunc.train.objective import pair
from holofunc.typing import Batch, Buffers, Key, Params

__all__ = ["update_bn"]

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def update_bn(
    model: Model, params: Params, buffers: Buffers, data: Iterable[Batch], *, key: Key | None = None
) -> Buffers:
    """Buffers with BatchNorm statistics recomputed as means over the batches of ``data``.

    Args:
        model: evaluated in train mode.
        params: for instance an average: ``optim.eval_params(state.opt_state, state.params)``.
        buffers: other buffers are kept.
        data: batches ``(images, targets)``, weighted by their size.
        key: for random layers.

    Raises:
        ValueError: ``data`` has no batch.

    Source: `torch.optim.swa_utils.update_bn`, which weights all batches equally.

    Example:
        >>> import torch
        >>> from holofunc import lift, random, train
        >>> model = lift(torch.nn.BatchNorm1d, 2)
        >>> params, buffers = model.init(random.key(0))
        >>> images = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
        >>> train.update_bn(model, params, buffers, [(images, None)])["running_mean"]
        tensor([1., 2.])
    """
    momenta: dict[str, float] = {}
    for path, module in model.skeleton.named_modules():
        if isinstance(module, NORMS) and module.track_running_stats:
            for name in ("running_mean", "running_var"):
                momenta[f"{path}.{name}".lstrip(".")] = 1.0 if module.momentum is None else module.momentum
    zero = {
        n: torch.zeros_like(b) if n in momenta or n.endswith("num_batches_tracked") else b for n, b in buffers.items()
    }
    sums, samples = {name: torch.zeros_like(buffers[name]) for name in momenta}, 0
    with torch.no_grad():
        for number, batch in enumerate(data):
            images, _ = pair(batch)
            own = None if key is None else random.fold_in(key, number)
            _, new = model.apply(params, zero, images, train=True, key=own)
            for name, momentum in momenta.items():  # starting from zero, one batch gives momentum times its statistics
                sums[name] = sums[name] + len(images) * new[name] / momentum
            samples += len(images)
    if not samples:
        raise ValueError("data must hold at least one batch, got none")
    return {**buffers, **{name: total / samples for name, total in sums.items()}}
