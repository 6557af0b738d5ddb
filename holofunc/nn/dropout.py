"""Random layers. Each call has its own key, which `holofunc.Model.apply` derives."""

from torch import Tensor

from holofunc.model import Drop, site_key
from holofunc.nn import functional

__all__ = ["DropBlock2d", "DropPath", "Dropout"]


class Dropout(Drop):
    """`holofunc.nn.functional.dropout` in train mode, the identity in eval mode.

    Example:
        >>> import torch
        >>> from holofunc import lift, nn, random
        >>> model = lift(nn.Dropout, 0.5)
        >>> params, buffers = model.init(random.key(0))
        >>> out, _ = model.apply(params, buffers, torch.ones(6), train=True, key=random.key(1))
        >>> sorted(set(out.tolist()))
        [0.0, 2.0]
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__(p)


class DropPath(Drop):
    """`holofunc.nn.functional.drop_path` in train mode, the identity in eval mode: stochastic depth.

    Example:
        >>> import torch
        >>> from holofunc import lift, nn, random
        >>> model = lift(nn.DropPath, 0.5)
        >>> params, buffers = model.init(random.key(0))
        >>> out, _ = model.apply(params, buffers, torch.ones(4, 2), train=True, key=random.key(1))
        >>> out
        tensor([[0., 0.],
                [0., 0.],
                [2., 2.],
                [0., 0.]])
    """

    def __init__(self, p: float = 0.1) -> None:
        super().__init__(p, shared=1)


class DropBlock2d(Drop):
    """`holofunc.nn.functional.dropblock2d` in train mode, the identity in eval mode.

    Args:
        p: the expected fraction of zeros, in [0, 1].
        block_size: side of the blocks, at least 1.
        inplace: accepted for compatibility with Holocron, without effect.
        per_channel: each channel draws its own blocks.

    Example:
        >>> import torch
        >>> from holofunc import lift, nn, random
        >>> model = lift(nn.DropBlock2d, 0.1, 7)
        >>> params, buffers = model.init(random.key(0))
        >>> out, _ = model.apply(params, buffers, torch.ones(1000, 1, 32, 32), train=True, key=random.key(1))
        >>> (out == 0).float().mean().round(decimals=2), out.mean().round(decimals=2)
        (tensor(0.1000), tensor(1.))
    """

    def __init__(
        self, p: float = 0.1, block_size: int = 7, inplace: bool = False, *, per_channel: bool = False
    ) -> None:
        super().__init__(p)
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        self.block_size, self.per_channel = block_size, per_channel

    @property
    def drop_prob(self) -> float:
        """The probability of a block at each position (gamma in the paper); each pixel is dropped with ``p``."""
        return 1.0 - (1.0 - self.p) ** (1.0 / self.block_size**2)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        return functional.dropblock2d(x, self.p, self.block_size, key=site_key(), per_channel=self.per_channel)

    def extra_repr(self) -> str:
        return f"p={self.p}, block_size={self.block_size}, per_channel={self.per_channel}"
