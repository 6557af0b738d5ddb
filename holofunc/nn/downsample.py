"""Pooling and downsampling."""

from collections.abc import Sequence

from torch import Tensor, nn

from holofunc.nn import functional

__all__ = ["SPP", "BlurPool2d", "ConcatDownsample2d", "GlobalAvgPool2d", "GlobalMaxPool2d", "ZPool"]


class GlobalAvgPool2d(nn.Module):
    """The mean of each channel: (N, C, 1, 1), or (N, C) if ``flatten``.

    Example:
        >>> import torch
        >>> from holofunc import nn
        >>> nn.GlobalAvgPool2d(flatten=True)(torch.arange(8.0).view(1, 2, 2, 2))
        tensor([[1.5000, 5.5000]])
    """

    def __init__(self, flatten: bool = False) -> None:
        super().__init__()
        self.flatten = flatten

    def forward(self, x: Tensor) -> Tensor:
        return functional.global_avg_pool2d(x, self.flatten)

    def extra_repr(self) -> str:
        return f"flatten={self.flatten}"


class GlobalMaxPool2d(nn.Module):
    """The maximum of each channel: (N, C, 1, 1), or (N, C) if ``flatten``.

    Example:
        >>> import torch
        >>> from holofunc import nn
        >>> nn.GlobalMaxPool2d(flatten=True)(torch.arange(8.0).view(1, 2, 2, 2))
        tensor([[3., 7.]])
    """

    def __init__(self, flatten: bool = False) -> None:
        super().__init__()
        self.flatten = flatten

    def forward(self, x: Tensor) -> Tensor:
        return functional.global_max_pool2d(x, self.flatten)

    def extra_repr(self) -> str:
        return f"flatten={self.flatten}"


class ZPool(nn.Module):
    """`holofunc.nn.functional.z_pool` as a layer: maximum and mean over ``dim``.

    Example:
        >>> import torch
        >>> from holofunc import nn
        >>> nn.ZPool()(torch.arange(8.0).view(1, 2, 2, 2)).flatten(2)
        tensor([[[4., 5., 6., 7.],
                 [2., 3., 4., 5.]]])
    """

    def __init__(self, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return functional.z_pool(x, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class ConcatDownsample2d(nn.Module):
    """`holofunc.nn.functional.concat_downsample2d` as a layer: space to depth.

    Example:
        >>> import torch
        >>> from holofunc import nn
        >>> nn.ConcatDownsample2d(2)(torch.zeros(1, 3, 4, 6)).shape
        torch.Size([1, 12, 2, 3])
    """

    def __init__(self, scale_factor: int) -> None:
        super().__init__()
        if scale_factor < 1:
            raise ValueError(f"scale_factor must be at least 1, got {scale_factor}")
        self.scale_factor = scale_factor

    def forward(self, x: Tensor) -> Tensor:
        return functional.concat_downsample2d(x, self.scale_factor)

    def extra_repr(self) -> str:
        return f"scale_factor={self.scale_factor}"


ConcatDownsample2dJit = ConcatDownsample2d  # Holocron's name of the torch.jit version


class BlurPool2d(nn.Module):
    """`holofunc.nn.functional.blur_pool2d` with a binomial filter.

    The filter is a non-persistent buffer: it moves with the module, but is not in the state dict.

    Args:
        channels: of the images.
        kernel_size: of the filter, at least 2.
        stride: at least 1.

    Example:
        >>> import torch
        >>> from holofunc import nn
        >>> nn.BlurPool2d(1)(torch.eye(4)[None, None])[0, 0]
        tensor([[0.5000, 0.1250],
                [0.1250, 0.3750]])
    """

    kernel: Tensor

    def __init__(self, channels: int, kernel_size: int = 3, stride: int = 2) -> None:
        super().__init__()
        if kernel_size < 2:
            raise ValueError(f"kernel_size must be at least 2, got {kernel_size}")
        if stride < 1:
            raise ValueError(f"stride must be at least 1, got {stride}")
        self.channels, self.kernel_size, self.stride = channels, kernel_size, stride
        self.register_buffer("kernel", functional.binomial_kernel2d(kernel_size), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.channels:
            raise ValueError(f"x must have {self.channels} channels, got shape {tuple(x.shape)}")
        return functional.blur_pool2d(x, self.kernel, self.stride)

    def extra_repr(self) -> str:
        return f"{self.channels}, kernel_size={self.kernel_size}, stride={self.stride}"


class SPP(nn.Module):
    """`holofunc.nn.functional.spatial_pyramid_pool2d` as a layer.

    Args:
        kernel_sizes: odd; the output has ``1 + len(kernel_sizes)`` times the input channels.

    Example:
        >>> import torch
        >>> from holofunc import nn
        >>> nn.SPP([3])(torch.eye(3)[None, None]).flatten(2)
        tensor([[[1., 0., 0., 0., 1., 0., 0., 0., 1.],
                 [1., 1., 1., 1., 1., 1., 1., 1., 1.]]])
    """

    def __init__(self, kernel_sizes: Sequence[int]) -> None:
        super().__init__()
        if not kernel_sizes or any(size < 1 or size % 2 == 0 for size in kernel_sizes):
            raise ValueError(f"kernel_sizes must be odd and positive, got {list(kernel_sizes)}")
        self.kernel_sizes = tuple(kernel_sizes)

    def forward(self, x: Tensor) -> Tensor:
        return functional.spatial_pyramid_pool2d(x, self.kernel_sizes)

    def extra_repr(self) -> str:
        return f"kernel_sizes={self.kernel_sizes}"
