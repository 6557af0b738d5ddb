"""Parallel convolutions that are merged into one for inference."""

from collections.abc import Mapping, Sequence
from functools import partial, reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holofunc.models.base import conv_bn
from holofunc.ops.reparam import fuse_conv_bn, identity_conv, merge_branches, pad_kernel

__all__ = ["Branches", "below", "norm_together"]


class Branches(nn.ModuleList):
    """The sum of normalized convolutions with odd kernels and, optionally, a normalized identity.

    In eval mode the sum is computed as one convolution (`merge`). In train mode each branch has its own statistics, but
    branches of equal kernel size are computed as one convolution with concatenated filters and one normalization. All
    depthwise branches are computed in this way: smaller kernels and the identity are padded to the largest kernel.

    Args:
        channels: of the input.
        out: channels of the output.
        kernel_sizes: one per branch; None is the identity.
        stride: of all branches.
        depthwise: whether the convolutions are depthwise.
    """

    def __init__(
        self,
        channels: int,
        out: int,
        kernel_sizes: Sequence[int | None],
        stride: int = 1,
        *,
        depthwise: bool = False,
    ) -> None:
        groups = channels if depthwise else 1
        super().__init__(
            nn.BatchNorm2d(out) if size is None else nn.Sequential(*conv_bn(channels, out, size, stride, groups=groups))
            for size in kernel_sizes
        )
        size = max(size or 1 for size in kernel_sizes)
        self.channels, self.depthwise, self.stride, self.kernel_size = channels, depthwise, stride, size
        self.deployed = partial(nn.Conv2d, channels, out, size, stride, size // 2, groups=groups)
        kinds = ["all"] * len(kernel_sizes) if depthwise else list(kernel_sizes)
        self.groups = [[i for i, kind in enumerate(kinds) if kind == own] for own in dict.fromkeys(kinds)]

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            conv = self.merge({**dict(self.named_parameters(remove_duplicate=False)), **dict(self.named_buffers())})
            groups = self.channels if self.depthwise else 1
            return F.conv2d(x, conv["weight"], conv["bias"], self.stride, self.kernel_size // 2, groups=groups)
        outputs: dict[int, Tensor] = {}
        for group in self.groups:
            outputs.update(zip(group, self._concatenated(x, [self[i] for i in group]), strict=True))
        return reduce(
            torch.add, [outputs[i] for i in range(len(self))]
        )  # in order, for the same rounding as a plain sum

    def _concatenated(self, x: Tensor, branches: Sequence[Any]) -> Sequence[Tensor]:
        """The outputs of branches of equal kernel size, from one convolution and one normalization."""
        if len(branches) == 1:
            return [branches[0](x)]
        if self.depthwise:
            filters = torch.cat([self._padded(branch) for branch in branches])
            x, groups = torch.cat([x] * len(branches), 1), len(filters)  # `repeat` would lose channels_last
        else:
            filters, groups = torch.cat([branch[0].weight for branch in branches]), 1
        outputs = F.conv2d(x, filters, None, self.stride, filters.shape[-1] // 2, groups=groups)
        norms = [branch if isinstance(branch, nn.BatchNorm2d) else branch[1] for branch in branches]
        return norm_together(outputs, norms).chunk(len(branches), 1)

    def _padded(self, branch: Any) -> Tensor:
        if isinstance(branch, nn.BatchNorm2d):
            like = branch.weight
            conv = identity_conv(self.channels, groups=self.channels, dtype=like.dtype, device=like.device)
        else:
            conv = {"weight": branch[0].weight}
        return pad_kernel(conv["weight"], (self.kernel_size, self.kernel_size))

    def merge(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weight and bias of the convolution that equals the sum in eval mode, from values by name."""
        convs = []
        for name, branch in self.named_children():
            if isinstance(branch, nn.BatchNorm2d):
                bn = below(values, name)
                mean, groups = bn["running_mean"], self.channels if self.depthwise else 1
                conv = identity_conv(self.channels, groups=groups, dtype=mean.dtype, device=mean.device)
            else:
                conv, bn = below(values, f"{name}.0"), below(values, f"{name}.1")
            convs.append(fuse_conv_bn(conv, bn))
        return merge_branches(convs)


def norm_together(x: Tensor, norms: Sequence[Any]) -> Tensor:
    """BatchNorms of equal chunks of the channels, computed as one. Each updates its own statistics."""
    first = norms[0]
    if isinstance(first, nn.Identity):  # already merged into the convolutions
        return x
    mean, var, weight, bias = (
        torch.cat([getattr(norm, name) for norm in norms]) for name in ("running_mean", "running_var", "weight", "bias")
    )
    out = F.batch_norm(x, mean, var, weight, bias, first.training, first.momentum, first.eps)
    if first.training:
        for norm, new_mean, new_var in zip(norms, mean.chunk(len(norms)), var.chunk(len(norms)), strict=True):
            norm.running_mean.copy_(new_mean)
            norm.running_var.copy_(new_var)
            norm.num_batches_tracked.add_(1)
    return out


def below(values: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    """The values whose names start with ``path.``, by the rest of the name."""
    return {name[len(path) + 1 :]: value for name, value in values.items() if name.startswith(path + ".")}
