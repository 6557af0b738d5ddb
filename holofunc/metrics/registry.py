"""Metrics by name, for configurations and command lines."""

import re
from collections.abc import Callable
from typing import Any

from holofunc.metrics.aggregation import collect, max, mean, min, sum
from holofunc.metrics.agreement import calibration_error, class_scores, kappa, matthews
from holofunc.metrics.base import Metric
from holofunc.metrics.classification import accuracy, binary_accuracy, confusion
from holofunc.metrics.coco import coco
from holofunc.metrics.counts import f_beta, hamming, iou, precision, recall, specificity
from holofunc.metrics.detection import detection_errors
from holofunc.metrics.images import psnr, ssim
from holofunc.metrics.ranking import auroc, average_precision
from holofunc.metrics.regression import mae, mse, pearson, r2, spearman
from holofunc.metrics.segmentation import segmentation
from holofunc.metrics.texts import char_error_rate, word_error_rate

__all__ = ["available", "get"]

METRICS: dict[str, Callable[..., Metric]] = {
    fn.__name__: fn
    for fn in (
        *(accuracy, auroc, average_precision, binary_accuracy, calibration_error, char_error_rate, class_scores, coco),
        *(collect, confusion, detection_errors, f_beta, hamming, iou, kappa, mae, matthews, max, mean, min, mse),
        *(pearson, precision, psnr, r2, recall, segmentation, spearman, specificity, ssim, sum, word_error_rate),
    )
}
TORCHMETRICS = {  # what torchmetrics calls them, in snake case and without what says nothing
    "auc": "auroc",
    "cat": "collect",
    "cohen_kappa": "kappa",
    "confusion_matrix": "confusion",
    "f1": "f_beta",
    "f_beta_score": "f_beta",
    "f1_score": "f_beta",
    "fbeta": "f_beta",
    "fbeta_score": "f_beta",
    "hamming_distance": "hamming",
    "io_u": "iou",
    "jaccard_index": "iou",
    "matthews_corr_coef": "matthews",
    "matthews_corrcoef": "matthews",
    "mean_absolute_error": "mae",
    "mean_average_precision": "coco",
    "mean_squared_error": "mse",
    "peak_signal_noise_ratio": "psnr",
    "pearson_corr_coef": "pearson",
    "pearson_corrcoef": "pearson",
    "r2_score": "r2",
    "spearman_corr_coef": "spearman",
    "spearman_corrcoef": "spearman",
    "structural_similarity_index_measure": "ssim",
    "wer": "word_error_rate",
}


def available() -> list[str]:
    """The names that `get` knows, sorted.

    Example:
        >>> from holofunc import metrics
        >>> metrics.available()[:3]
        ['accuracy', 'auroc', 'average_precision']
    """
    return sorted(METRICS)


def get(name: str, **options: Any) -> Metric:
    """Build a metric by its name.

    Args:
        name: one of `available`, or what torchmetrics calls it: ``"F1Score"``, ``"JaccardIndex"``,
            ``"MeanSquaredError"``.
        **options: of that metric.

    Raises:
        ValueError: if there is no metric of that name.

    Example:
        >>> from holofunc import metrics
        >>> metrics.get("accuracy", topk=5).init()
        Average(total=tensor(0., dtype=torch.float64), weight=tensor(0., dtype=torch.float64))
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a text, got {name!r}")
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower().removesuffix("_metric")
    found = METRICS.get(TORCHMETRICS.get(snake, snake))
    if found is None:
        raise ValueError(f"name must be one of {', '.join(available())}, got {name!r}; from_torchmetrics wraps others")
    return found(**options)
