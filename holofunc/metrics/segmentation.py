"""Segmentation metrics: pixel accuracy and IoU, over the data set or per image."""

import torch
from torch import Tensor

from holofunc.metrics.base import Average, Metric, row_weights, zeros
from holofunc.metrics.classification import class_indices, confusion, confusion_scores

__all__ = ["segmentation"]


def segmentation(num_classes: int, *, ignore_index: int = -100, per_image: bool = False) -> Metric:
    """Pixel accuracy and mean IoU of segmented images.

    Classes that neither occur nor are predicted are left out of the mean. Give ``ignore_index`` the value that the loss
    has.

    `update` takes scores (B, C, H, W) or predicted classes (B, H, W), and targets (B, H, W).

    Args:
        num_classes: `C`, at least 1.
        ignore_index: pixels that are not counted.
        per_image: False: both scores from the counts over all images, as benchmarks report. True: from the counts of
            each image, averaged over images, so that small images and rare classes count as much.

    Returns:
        A metric that computes ``{"accuracy": ..., "mean_iou": ...}``, both 0-d; images without a counted pixel are left
        out.

    Raises:
        ValueError: if ``num_classes`` is below 1; in `update`, if shapes do not fit.

    Example:
        >>> import torch
        >>> from holofunc import metrics
        >>> metric = metrics.segmentation(2, ignore_index=255)
        >>> state = metric.update(metric.init(), torch.tensor([[[0, 1, 1]]]), torch.tensor([[[0, 0, 255]]]))
        >>> {name: value.item() for name, value in metric.compute(state).items()}
        {'accuracy': 0.5, 'mean_iou': 0.25}
    """
    counting = confusion(num_classes, ignore_index=ignore_index)

    def of_set(matrix: Tensor) -> dict[str, Tensor]:
        scores = confusion_scores(matrix)
        return {name: scores[name] for name in ("accuracy", "mean_iou")}

    if not per_image:
        return counting._replace(compute=of_set)

    def init(*, device: torch.device | str | None = None) -> Average:
        return Average(zeros((2,), device), zeros((2,), device))

    def update(state: Average, outputs: Tensor, targets: Tensor, *, weights: Tensor | None = None) -> Average:
        if outputs.is_floating_point():
            class_indices(targets, outputs, ignore_index)  # whose message names the whole batch
        matrices = torch.func.vmap(lambda x, t: counting.update(counting.init(device=x.device), x[None], t[None]))
        scores = torch.func.vmap(of_set)(matrices(outputs, targets))
        values = torch.stack(list(scores.values()), 1).to(state.total.dtype)
        weight = row_weights(weights, values).to(state.weight.dtype) * ~values.isnan()
        return Average(state.total + torch.where(weight == 0, 0, values * weight).sum(0), state.weight + weight.sum(0))

    def merge(a: Average, b: Average) -> Average:
        return Average(a.total + b.total, a.weight + b.weight)

    def compute(state: Average) -> dict[str, Tensor]:
        accuracy, mean_iou = (state.total / state.weight).unbind()
        return {"accuracy": accuracy, "mean_iou": mean_iou}

    return Metric(init, update, merge, compute)
