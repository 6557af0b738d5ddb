"""Parallel convolutions that are trained as many and run as one."""

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from holofunc.models.base import conv_bn
from holofunc.ops.reparam import fuse_conv_bn, identity_conv, merge_branches

__all__ = ["Branches", "below"]


class Branches(nn.ModuleList):
    """The sum of convolutions of odd kernels, each with a normalization, and of a normalization alone (an identity).

    Args:
        channels: in.
        out: channels out.
        kernel_sizes: one per convolution; None stands for the identity.
        stride: of all.
        groups: of all.
    """

    def __init__(
        self, channels: int, out: int, kernel_sizes: Sequence[int | None], stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__(
            nn.BatchNorm2d(out) if size is None else nn.Sequential(*conv_bn(channels, out, size, stride, groups=groups))
            for size in kernel_sizes
        )
        self.channels, self.groups = channels, groups
        size = max(size or 1 for size in kernel_sizes)
        self.deployed = partial(nn.Conv2d, channels, out, size, stride, size // 2, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = self
        out = first(x)
        for branch in rest:
            out = out + branch(x)
        return out

    def merge(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``weight`` and ``bias`` of the convolution equal to the sum in eval mode, from values by name."""
        convs = []
        for name, branch in self.named_children():
            if isinstance(branch, nn.BatchNorm2d):
                bn = below(values, name)
                mean = bn["running_mean"]
                conv = identity_conv(self.channels, groups=self.groups, dtype=mean.dtype, device=mean.device)
            else:
                conv, bn = below(values, f"{name}.0"), below(values, f"{name}.1")
            convs.append(fuse_conv_bn(conv, bn))
        return merge_branches(convs)


def below(values: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    """The values whose names begin with ``path.``, by the rest of their names."""
    return {name[len(path) + 1 :]: value for name, value in values.items() if name.startswith(path + ".")}
