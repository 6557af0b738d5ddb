"""Layers that use the batch of all ranks in train mode."""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from holofunc import random, tree
from holofunc.distributed.collectives import collective
from holofunc.distributed.ranks import rank, world_size
from holofunc.model import Drop, Model, site_key

__all__ = ["sync_batch_norm", "sync_dropout"]


def sync_batch_norm(model: Model, group: Any = None) -> Model:
    """A model with batch statistics over all ranks: one small `all_gather` per BatchNorm and pass.

    Outputs, gradients (of losses that are means over the samples, averaged by `average_gradients`) and running
    statistics are those of one process with the whole batch, however uneven its parts are. Without it, ranks normalize
    each by their own part, and their running statistics differ: `pmean` of the buffers, now and then, is the cheap way.

    Parameters, buffers, their names and eval mode are those of ``model``.

    Args:
        model: with layers ``BatchNorm1d``, ``2d`` and ``3d``, or none.
        group: as for `psum`.

    Raises:
        ValueError: a layer that derives from these, and may do more than they do.

    Source: Ioffe and Szegedy (arXiv 1502.03167); statistics merged as in Chan et al., "Updating formulae and a pairwise
    algorithm for computing sample variances" (1979).

    Example:
        >>> from holofunc import distributed, models
        >>> distributed.sync_batch_norm(models.resnet18(num_classes=10))
        Model(resnet18, 11,181,642 parameters)
    """

    def synced(path: str, layer: nn.Module) -> nn.Module | None:
        if not isinstance(layer, nn.modules.batchnorm._BatchNorm):
            return None
        if type(layer) not in SYNCED:
            raise ValueError(f"{path!r} must be a BatchNorm of torch, got {type(layer).__name__}")
        other: Any = copy.copy(layer)  # all that it is, parameters and buffers by their names included
        other.__class__, other.group = SYNCED[type(layer)], group
        return other

    return model.with_layers(synced)


def sync_dropout(model: Model, group: Any = None) -> Model:
    """A model whose dropout (and stochastic depth) draws for each sample the mask of a single-process run.

    A rank then skips the draws for the samples of the ranks before it; that takes parts of one size, as
    ``drop_last=True`` gives them. Without it, all ranks draw the same for their first sample, their second and so on.

    Args:
        model: its layers ``Dropout``, ``Dropout1d``, ``2d`` and ``3d``, and the stochastic depth of `holofunc.models`,
            draw so. What is drawn elsewhere (in attention, by functions, ``AlphaDropout``) stays as it is.
        group: as for `psum`.

    Example:
        >>> from holofunc import distributed, models
        >>> model = distributed.sync_dropout(models.convnext_atto(num_classes=10))
    """

    def synced(path: str, layer: nn.Module) -> nn.Module | None:
        if isinstance(layer, Drop):
            return _SyncedDrop(layer.p, layer.shared, group)
        p: Any = getattr(layer, "p", None)
        return _SyncedDrop(p, SHARED[type(layer)], group) if type(layer) in SHARED else None

    return model.with_layers(synced)


class _Synced(nn.modules.batchnorm._BatchNorm):
    group: Any

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or world_size(self.group) == 1:
            return super().forward(input)
        self._check_input_dim(input)
        x = tree.upcast(input)
        over = [d for d in range(x.ndim) if d != 1]
        per_channel = [-1] + [1] * (x.ndim - 2)
        count, samples = x.numel() // x.shape[1], len(x)  # 0 on a rank without a sample
        own = x.sum(over) / max(count, 1)
        squares = (x - own.view(per_channel)).square().sum(over)
        facts = torch.cat([own, squares, x.new_full((1,), count)])[None]
        ranks = collective("gather", facts, self.group, weight=samples, divisor=max(samples, 1))
        means, squares, counts = ranks.split([x.shape[1], x.shape[1], 1], dim=1)
        total = counts.sum().clamp(min=1)
        mean = (counts * means).sum(0) / total
        squares = squares.sum(0) + (counts * (means - mean).square()).sum(0)
        y = (x - mean.view(per_channel)) * torch.rsqrt(squares / total + self.eps).view(per_channel)
        if self.affine:
            y = y * self.weight.view(per_channel) + self.bias.view(per_channel)
        self._remember(mean.detach(), (squares / (total - 1).clamp(min=1)).detach())
        return y.to(input.dtype)

    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1 / self.num_batches_tracked.to(mean.dtype) if self.momentum is None else self.momentum
        for old, new in ((self.running_mean, mean), (self.running_var, variance)):
            old.copy_(old + share * (new - old))


SYNCED: dict[type, type] = {
    kind: type(f"Synced{kind.__name__}", (_Synced, kind), {})
    for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
}

SHARED: dict[type, int | None] = {nn.Dropout: None, nn.Dropout1d: 2, nn.Dropout2d: 2, nn.Dropout3d: 2}
"""The dropouts of torch, and the first axis over which a draw is shared."""


class _SyncedDrop(Drop):
    def __init__(self, p: float, shared: int | None, group: Any) -> None:
        super().__init__(p, shared)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        shape = [n if self.shared is None or d < self.shared else 1 for d, n in enumerate(x.shape)]
        size = math.prod(shape)
        before = 0 if self.shared == 0 else rank(self.group) * size
        blocks, words = divmod(before, 4)  # a counter of a key stands for four words
        own = site_key()
        key = torch.stack([own[0], own[1] + blocks])
        kept = random.uniform(key, (words + size,))[words:].view(shape) >= self.p
        return torch.where(kept, x / max(1.0 - self.p, 2.0**-24), 0.0)
