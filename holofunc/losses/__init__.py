"""Losses: pure functions ``(logits, targets, *, reduction="mean", weight=None, ignore_index=-100, ...) -> loss``."""

from holofunc.losses.balanced import class_balanced
from holofunc.losses.binary import binary_cross_entropy
from holofunc.losses.classification import (
    complement_cross_entropy,
    cross_entropy,
    focal,
    multilabel_cross_entropy,
    poly,
)
from holofunc.losses.fine_grained import mutual_channel
from holofunc.losses.recognition import ctc
from holofunc.losses.reduction import check_labels
from holofunc.losses.segmentation import dice

__all__ = [
    "binary_cross_entropy",
    "check_labels",
    "class_balanced",
    "complement_cross_entropy",
    "cross_entropy",
    "ctc",
    "dice",
    "focal",
    "multilabel_cross_entropy",
    "mutual_channel",
    "poly",
]
