"""Losses: pure functions ``(logits, targets, *, reduction="mean", weight=None, ignore_index=-100, ...) -> loss``."""

from holofunc.losses.balanced import class_balanced
from holofunc.losses.binary import binary_cross_entropy, sigmoid_focal
from holofunc.losses.classification import (
    cross_entropy,
    focal,
    multilabel_cross_entropy,
    poly,
)
from holofunc.losses.complement import complement_cross_entropy
from holofunc.losses.contract import check_labels
from holofunc.losses.distillation import kl_divergence
from holofunc.losses.embedding import cosine, nt_xent, supervised_contrastive, triplet
from holofunc.losses.fine_grained import mutual_channel
from holofunc.losses.recognition import ctc
from holofunc.losses.regression import huber, smooth_l1
from holofunc.losses.segmentation import dice, generalized_dice, lovasz, tversky

__all__ = [
    "binary_cross_entropy",
    "check_labels",
    "class_balanced",
    "complement_cross_entropy",
    "cosine",
    "cross_entropy",
    "ctc",
    "dice",
    "focal",
    "generalized_dice",
    "huber",
    "kl_divergence",
    "lovasz",
    "multilabel_cross_entropy",
    "mutual_channel",
    "nt_xent",
    "poly",
    "sigmoid_focal",
    "smooth_l1",
    "supervised_contrastive",
    "triplet",
    "tversky",
]
