"""Attention over pixels and channels."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from holofunc.nn.downsample import ZPool

__all__ = ["SAM", "LambdaLayer", "TripletAttention"]


class SAM(nn.Module):
    """``x * sigmoid(conv(x))``: one attention weight per pixel.

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
    """One attention weight per place of the plane that is left when dimension ``dim`` is pooled, as if of size 1."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.compress = nn.Sequential(ZPool(dim), conv, nn.BatchNorm2d(1, momentum=0.01), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        pool, *gate = self.compress
        y = pool(x).transpose(1, self.dim)  # the pooled plane, not all of x
        for layer in gate:
            y = layer(y)
        return y.transpose(1, self.dim)


class TripletAttention(nn.Module):
    """``x`` times the mean of three gates, one for each pair of the dimensions channels, height and width.

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
    """Each query is mapped by a linear function made of its context: of all content, and of the positions around it.

    ``y[h] = q[h] @ (softmax(k) @ v + embedding @ v)`` with ``num_heads`` queries of ``dim_k`` numbers a pixel, which
    share the function in parentheses.

    Args:
        in_channels: channels of the images.
        out_channels: divisible by ``num_heads``.
        dim_k: of queries and keys.
        n: pixels (H * W) of the images, for a position embedding of all pairs of them.
        r: side of the window, odd, for relative positions in it; images of any size. Takes precedence over ``n``.
        num_heads: queries per pixel.
        dim_u: of the intra-depth.

    Raises:
        ValueError: neither ``n`` nor ``r``; an even ``r``; ``out_channels`` not divisible by ``num_heads``; at a
            call, images that do not have ``n`` pixels.

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
            raise ValueError("either the number of pixels n or the side of the window r must be given, got neither")

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        # by way of (N, -1): of a batch of one, torch's CPU batch norm misreads gradients with permuted strides
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
            raise ValueError(f"x must have n={self.n} pixels, got {height} x {width}; r=... takes images of any size")
        return torch.einsum("pmku,nvum->nvkp", self.pos_emb, v)

    def extra_repr(self) -> str:
        return f"dim_k={self.dim_k}, n={self.n}, r={self.r}, num_heads={self.num_heads}, dim_u={self.dim_u}"
