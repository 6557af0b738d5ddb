"""Metrics between images: PSNR and SSIM."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from holofunc.metrics.aggregation import mean
from holofunc.metrics.base import Metric, check_positive, check_tensors

__all__ = ["psnr", "ssim"]


def psnr(max_value: float = 1.0, *, per_image: bool = True) -> Metric:
    """Peak signal-to-noise ratio in decibels: ``10 log10(max_value^2 / MSE)``.

    `update` takes outputs and targets of one shape (B, ...).

    Args:
        max_value: range of the pixels, above 0.
        per_image: the mean of the images' ratios; False: the ratio of the error over all images.

    Returns:
        A metric that computes a 0-d tensor; infinite where there is no error.

    Raises:
        ValueError: if ``max_value`` is not above 0; in `update`, if the shapes differ.

    Example:
        >>> import torch
        >>> from holofunc import metrics
        >>> metric = metrics.psnr()
        >>> state = metric.update(metric.init(), torch.full((1, 1, 2, 2), 0.6), torch.full((1, 1, 2, 2), 0.5))
        >>> round(metric.compute(state).item(), 3)
        20.0
    """
    check_positive(max_value=max_value)

    def error(outputs: Tensor, targets: Tensor) -> Tensor:
        _check(outputs, targets)
        return (outputs.double() - targets.double()).square().flatten(1).mean(1)

    def decibels(error: Tensor) -> Tensor:
        return 10 * (2 * math.log10(max_value) - error.log10())

    if per_image:
        return mean(lambda outputs, targets: decibels(error(outputs, targets)))
    metric = mean(error)
    return metric._replace(compute=lambda state: decibels(metric.compute(state)))


def ssim(max_value: float = 1.0, *, window: int = 11, sigma: float = 1.5, k1: float = 0.01, k2: float = 0.03) -> Metric:
    """Structural similarity of images: luminance, contrast and structure in Gaussian windows, averaged.

    ``(2 m_x m_y + c_1) (2 s_xy + c_2) / ((m_x^2 + m_y^2 + c_1) (s_x^2 + s_y^2 + c_2))`` with means m, variances s^2 and
    covariance s_xy in each window, c_i = (k_i max_value)^2; windows lie inside of the image.

    `update` takes outputs and targets (B, C, H, W), H and W at least ``window``.

    Args:
        max_value: range of the pixels, above 0.
        window: side of a window, odd.
        sigma: its standard deviation, above 0.
        k1: stabilizes the first factor.
        k2: stabilizes the second.

    Returns:
        A metric that computes a 0-d tensor, at most 1: the mean over images.

    Raises:
        ValueError: if an option is out of range; in `update`, if shapes do not fit.

    Source: Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity" (TIP 2004).

    Example:
        >>> import torch
        >>> from holofunc import metrics
        >>> metric, image = metrics.ssim(), torch.arange(256.0).reshape(1, 1, 16, 16) / 255
        >>> round(metric.compute(metric.update(metric.init(), image, image)).item(), 6)
        1.0
    """
    check_positive(max_value=max_value, sigma=sigma)
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window must be odd and at least 1, got {window}")
    c1, c2 = (k1 * max_value) ** 2, (k2 * max_value) ** 2

    def similarity(outputs: Tensor, targets: Tensor) -> Tensor:
        _check(outputs, targets)
        if outputs.ndim != 4 or min(outputs.shape[2:]) < window:
            raise ValueError(
                f"outputs must be (B, C, H, W) with sides of at least {window}, got {tuple(outputs.shape)}"
            )
        channels = outputs.shape[1]
        place = torch.arange(window, device=outputs.device, dtype=torch.float32) - window // 2
        weight = torch.exp(-((place / sigma) ** 2) / 2)
        weight = (weight / weight.sum()).expand(channels, 1, -1)

        def blur(image: Tensor) -> Tensor:
            return F.conv2d(F.conv2d(image, weight[..., None], groups=channels), weight[:, :, None], groups=channels)

        x, y = outputs.float(), targets.float()
        mx, my, xx, yy, xy = (blur(image) for image in (x, y, x * x, y * y, x * y))
        above = (2 * mx * my + c1) * (2 * (xy - mx * my) + c2)
        below = (mx**2 + my**2 + c1) * (xx - mx**2 + yy - my**2 + c2)
        return (above / below).flatten(1).mean(1)

    return mean(similarity)


def _check(outputs: Tensor, targets: Tensor) -> None:
    check_tensors(outputs, targets)
    if outputs.shape != targets.shape or outputs.ndim < 2:
        raise ValueError(f"targets must have the shape of outputs {tuple(outputs.shape)}, got {tuple(targets.shape)}")
