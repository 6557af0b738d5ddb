"""Attention over pixels and channels."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from holofunc.nn.downsample import ZPool

__all__ = ["SAM", "LambdaLayer", "TripletAttention"]


class SAM(nn.Module):
    """Spatial attention ``x * sigmoid(conv(x))``, with one weight per pixel.

    Args:
        in_channels: channels of the images.

    Source: YOLOv4 (arXiv 2004.10934), the spatial attention of CBAM (arXiv 1807.06521) without pooling.

    Example:
        >>> import torch
        >>> from holofunc import nn
        >>> y = nn.SAM(4)(torch.ones(1, 4, 2, 2))
        >>> bool(((y > 0) & (y < 1)).all()), bool((y == y[:, :1]).all())  # one weight for all channels
        (True, True)
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.conv(x))


class DimAttention(nn.Module):
    """Attention over the two dimensions that remain after pooling dimension ``dim``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.compress = nn.Sequential(ZPool(dim), conv, nn.BatchNorm2d(1, momentum=0.01), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        pool, *gate = self.compress
        y = pool(x).transpose(1, self.dim)  # transposes the pooled plane instead of x
        for layer in gate:
            y = layer(y)
        return y.transpose(1, self.dim)


class TripletAttention(nn.Module):
    """``x`` times the mean of three attention gates, one for each pair of channels, height and width.

    Source: Misra et al., "Rotate to attend: convolutional triplet attention module" (arXiv 2010.03045).

    Example:
        >>> import torch
        >>> from holofunc import nn
        >>> y = nn.TripletAttention()(torch.ones(2, 3, 4, 5))
        >>> y.shape, bool(((y > 0) & (y < 1)).all())
        (torch.Size([2, 3, 4, 5]), True)
    """

    def __init__(self) -> None:
        super().__init__()
        self.c_branch = DimAttention(1)
        self.h_branch = DimAttention(2)
        self.w_branch = DimAttention(3)

    def forward(self, x: Tensor) -> Tensor:
        return x * ((self.c_branch(x) + self.h_branch(x) + self.w_branch(x)) / 3.0)


class LambdaLayer(nn.Module):
    """Each query is multiplied by a matrix computed from its context: from all content, and from relative positions.

    ``y[h] = q[h] @ (softmax(k) @ v + embedding @ v)``, with ``num_heads`` queries of size ``dim_k`` per pixel, which
    share the matrix in parentheses.

    Args:
        in_channels: channels of the images.
        out_channels: divisible by ``num_heads``.
        dim_k: size of queries and keys.
        n: number of pixels (H * W) of the images, for an embedding of every pair of them.
        r: odd side of a window, for embeddings of relative positions in it; images of any size. Overrides ``n``.
        num_heads: queries per pixel.
        dim_u: intra-depth.

    Raises:
        ValueError: neither ``n`` nor ``r`` is given; ``r`` is even; ``out_channels`` is not divisible by ``num_heads``;
            in a call, the images do not have ``n`` pixels.

    Source: Bello, "LambdaNetworks: modeling long-range interactions without attention" (arXiv 2102.08602).

    Example:
        >>> import torch
        >>> from holofunc import nn
        >>> layer = nn.LambdaLayer(8, 16, dim_k=4, r=3)
        >>> layer(torch.zeros(2, 8, 6, 5)).shape
        torch.Size([2, 16, 6, 5])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        dim_k: int,
        n: int | None = None,
        r: int | None = None,
        num_heads: int = 4,
        dim_u: int = 1,
    ) -> None:
        super().__init__()
        if out_channels % num_heads:
            raise ValueError(f"out_channels must be divisible by num_heads={num_heads}, got {out_channels}")
        if r is not None and (r < 1 or r % 2 == 0):
            raise ValueError(f"r must be odd and positive, got {r}")
        self.dim_k, self.num_heads, self.dim_u, self.n, self.r = dim_k, num_heads, dim_u, n, r
        self.to_q = nn.Conv2d(in_channels, dim_k * num_heads, 1, bias=False)
        self.to_k = nn.Conv2d(in_channels, dim_k * dim_u, 1, bias=False)
        self.to_v = nn.Conv2d(in_channels, out_channels // num_heads * dim_u, 1, bias=False)
        self.norm_q = nn.BatchNorm2d(dim_k * num_heads)
        self.norm_v = nn.BatchNorm2d(out_channels // num_heads * dim_u)
        if r is not None:
            self.R = nn.Parameter(nn.init.normal_(torch.empty(dim_k, dim_u, 1, r, r)))
        elif n is not None:
            self.pos_emb = nn.Parameter(nn.init.normal_(torch.empty(n, n, dim_k, dim_u)))
        else:
            raise ValueError("the number of pixels n or the side of the window r must be given, got neither")

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        # via (N, -1), because torch's CPU batch norm misreads permuted strides in gradients of a batch of one
        q = self.norm_q(self.to_q(x)).flatten(1).unflatten(1, (self.num_heads, self.dim_k, -1))
        k = self.to_k(x).flatten(2).softmax(-1).unflatten(1, (self.dim_k, self.dim_u))
        v = self.norm_v(self.to_v(x)).flatten(1).unflatten(1, (-1, self.dim_u, height * width))
        content = torch.einsum("nkup,nvup->nvk", k, v)[..., None]
        y = torch.einsum("nhkp,nvkp->nhvp", q, content + self.positions(v, height, width))
        return y.flatten(1, 2).unflatten(-1, (height, width))

    def positions(self, v: Tensor, height: int, width: int) -> Tensor:
        """The position lambdas, (N, V, dim_k, H * W), of values (N, V, dim_u, H * W)."""
        if self.r is not None:
            images = v.flatten(0, 1).unflatten(-1, (height, width))
            return F.conv2d(images, self.R[:, :, 0], padding=self.r // 2).flatten(2).unflatten(0, v.shape[:2])
        if height * width != self.n:
            raise ValueError(f"x must have n={self.n} pixels, got {height} x {width}; use r=... for images of any size")
        return torch.einsum("pmku,nvum->nvkp", self.pos_emb, v)

    def extra_repr(self) -> str:
        return f"dim_k={self.dim_k}, n={self.n}, r={self.r}, num_heads={self.num_heads}, dim_u={self.dim_u}"
