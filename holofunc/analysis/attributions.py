"""Which pixels a prediction depends on: input gradients, integrated gradients, Grad-CAM."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holofunc.model import Model
from holofunc.models.derived import Derived
from holofunc.models.maps import Taps
from holofunc.typing import Buffers, Params

__all__ = ["grad_cam", "input_gradients", "integrated_gradients"]


def input_gradients(
    model: Model, params: Params, buffers: Buffers, images: Tensor, *, labels: Tensor | None = None
) -> Tensor:
    """The derivative of each image's score with respect to its pixels. One batch gradient.

    Args:
        model: a classifier, in eval mode.
        params: of the model.
        buffers: its statistics.
        images: (N, C, H, W).
        labels: the classes whose scores (logits) are looked at, (N,); by default, the predicted ones.

    Source: Simonyan et al., "Deep inside convolutional networks" (arXiv 1312.6034).

    Example:
        >>> import torch
        >>> from holofunc import analysis, models, random
        >>> model = models.smallnet()
        >>> analysis.input_gradients(model, *model.init(random.key(0)), torch.ones(2, 3, 8, 8)).shape
        torch.Size([2, 3, 8, 8])
    """
    labels = _labels(model, params, buffers, images, labels)
    return torch.func.grad(lambda x: _scores(model, params, buffers, x, labels).sum())(images)


def integrated_gradients(
    model: Model,
    params: Params,
    buffers: Buffers,
    images: Tensor,
    *,
    labels: Tensor | None = None,
    baseline: Tensor | float = 0.0,
    steps: int = 32,
) -> Tensor:
    """The contribution of each pixel to the difference in score from a baseline. ``steps`` batch gradients.

    The shares of an image sum to that difference, up to the error of the midpoint rule.

    Args:
        model: a classifier, in eval mode.
        params: of the model.
        buffers: its statistics.
        images: (N, C, H, W).
        labels: as for `input_gradients`.
        baseline: an image without information, a number or a tensor that broadcasts.
        steps: points on the way, at least 1.

    Source: Sundararajan et al., "Axiomatic attribution for deep networks" (ICML 2017).

    Example:
        >>> import torch
        >>> from holofunc import analysis, models, random
        >>> model = models.smallnet()
        >>> analysis.integrated_gradients(model, *model.init(random.key(0)), torch.ones(2, 3, 8, 8), steps=2).shape
        torch.Size([2, 3, 8, 8])
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    labels = _labels(model, params, buffers, images, labels)
    baseline = torch.as_tensor(baseline, dtype=images.dtype, device=images.device)
    way = images - baseline
    slope = torch.func.grad(lambda x: _scores(model, params, buffers, x, labels).sum())
    total = torch.zeros_like(images)
    for i in range(steps):
        total = total + slope(baseline + (i + 0.5) / steps * way)
    return way * total / steps


def grad_cam(
    model: Model,
    params: Params,
    buffers: Buffers,
    images: Tensor,
    *,
    layer: str | int = -1,
    labels: Tensor | None = None,
    resize: bool = True,
) -> Tensor:
    """Heat maps of a class: the feature maps of a layer, weighted by their mean derivatives. One batch gradient.

    Args:
        model: a classifier, in eval mode.
        params: of the model.
        buffers: its statistics.
        images: (N, C, H, W).
        layer: the name of a module whose output are maps (of its last call, if there are several), or a stage as
            `holofunc.models.features` counts them: -1 is the last one.
        labels: as for `input_gradients`.
        resize: to the size of the images, bilinearly.

    Returns:
        (N, H, W), at least 0.

    Raises:
        ValueError: a layer that is not there, is not called, or whose output is no map, as in transformers.

    Source: Selvaraju et al., "Grad-CAM" (ICCV 2017).

    Example:
        >>> import torch
        >>> from holofunc import analysis, models, random
        >>> model = models.smallnet()
        >>> analysis.grad_cam(model, *model.init(random.key(0)), torch.ones(2, 3, 8, 8)).shape
        torch.Size([2, 8, 8])
    """
    labels = _labels(model, params, buffers, images, labels)
    path = layer if isinstance(layer, str) else Taps(model, [layer]).paths[layer]
    shifted = Derived(model, change=lambda module: _shifted(module, path))
    maps = shifted.apply(params, buffers, images)[0][1]

    def score(shift: Tensor) -> tuple[Tensor, Tensor]:
        outputs, seen = shifted.apply(params, buffers, images, shift=shift, calls=len(maps))[0]
        return _of_labels(model, outputs, labels).sum(), seen[-1]

    if not maps or not isinstance(maps[-1], Tensor) or maps[-1].ndim != 4:
        got = (maps[-1].shape if isinstance(maps[-1], Tensor) else type(maps[-1])) if maps else "none"
        raise ValueError(f"layer must have maps (N, C, H, W) as its output, {path!r} in {model.name} gives {got}")
    slopes = torch.func.grad(score, has_aux=True)(torch.zeros_like(maps[-1]))[0]
    cam = (slopes.mean((2, 3), keepdim=True) * maps[-1]).sum(1, keepdim=True).relu()
    if resize:
        cam = F.interpolate(cam, images.shape[2:], mode="bilinear", align_corners=False)
    return cam.squeeze(1)


def _shifted(module: nn.Module, path: str) -> nn.Module:
    """The module with something to add to the output of one of its parts, in the last of so many calls; it returns the
    outputs of all calls as well.
    """
    parts, forward = dict(module.named_modules()), module.forward
    if path not in parts:
        raise ValueError(f"layer must be a stage or one of {', '.join(map(repr, parts))}, got {path!r}")

    def both(images: Tensor, shift: Tensor | None = None, calls: int = 0) -> tuple[Tensor, list[Any]]:
        maps: list[Any] = []

        def add(part: nn.Module, inputs: Any, out: Any) -> Any:
            maps.append(out.clone() if isinstance(out, Tensor) else out)  # what follows may change it in place
            return out if shift is None or len(maps) < calls else out + shift

        with parts[path].register_forward_hook(add):
            return forward(images), maps

    module.forward = both
    return module


def _scores(model: Model, params: Params, buffers: Buffers, images: Tensor, labels: Tensor) -> Tensor:
    return _of_labels(model, model.apply(params, buffers, images)[0], labels)


def _of_labels(model: Model, outputs: Any, labels: Tensor) -> Tensor:
    _check_scores(model, outputs)
    return outputs.gather(1, labels.unsqueeze(1)).squeeze(1)


def _labels(model: Model, params: Params, buffers: Buffers, images: Tensor, labels: Tensor | None) -> Tensor:
    """Of the right shape, or the predicted ones."""
    if labels is None:
        with torch.no_grad():
            outputs = model.apply(params, buffers, images)[0]
        _check_scores(model, outputs)
        labels = outputs.argmax(1)
    if not isinstance(labels, Tensor):
        raise ValueError(f"labels must be integers of shape ({len(images)},), got {type(labels).__name__}")
    if labels.shape != images.shape[:1] or labels.is_floating_point():
        raise ValueError(f"labels must be integers of shape ({len(images)},), got {labels.dtype} {tuple(labels.shape)}")
    return labels.long()


def _check_scores(model: Model, outputs: Any) -> None:
    if not isinstance(outputs, Tensor) or outputs.ndim != 2:
        got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(f"{model.name} must be a classifier with outputs (N, classes), got {got}")
