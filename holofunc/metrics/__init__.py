"""Metrics as four pure functions of device tensors, `init`, `update`, `merge`, `compute`; exact for any batch size."""

from holofunc.metrics.adapters import from_torchmetrics
from holofunc.metrics.aggregation import collect, max, mean, min, sum
from holofunc.metrics.agreement import calibration_error, class_scores, kappa, matthews
from holofunc.metrics.base import Average, Metric, Rows, combine
from holofunc.metrics.classification import accuracy, binary_accuracy, confusion, confusion_scores
from holofunc.metrics.coco import coco
from holofunc.metrics.counts import f_beta, hamming, iou, precision, recall, specificity
from holofunc.metrics.detection import detection_errors
from holofunc.metrics.images import psnr, ssim
from holofunc.metrics.ranking import auroc, average_precision
from holofunc.metrics.registry import available, get
from holofunc.metrics.regression import mae, mse, pearson, r2, spearman
from holofunc.metrics.segmentation import segmentation
from holofunc.metrics.texts import char_error_rate, word_error_rate

__all__ = [
    "Average",
    "Metric",
    "Rows",
    "accuracy",
    "auroc",
    "available",
    "average_precision",
    "binary_accuracy",
    "calibration_error",
    "char_error_rate",
    "class_scores",
    "coco",
    "collect",
    "combine",
    "confusion",
    "confusion_scores",
    "detection_errors",
    "f_beta",
    "from_torchmetrics",
    "get",
    "hamming",
    "iou",
    "kappa",
    "mae",
    "matthews",
    "max",
    "mean",
    "min",
    "mse",
    "pearson",
    "precision",
    "psnr",
    "r2",
    "recall",
    "segmentation",
    "spearman",
    "specificity",
    "ssim",
    "sum",
    "word_error_rate",
]
