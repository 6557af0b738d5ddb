"""Losses: pure functions ``(logits, targets, *, reduction="mean", weight=None, ignore_index=-100, ...) -> loss``."""

from holofunc.losses.classification import cross_entropy
from holofunc.losses.reduction import check_labels

__all__ = ["check_labels", "cross_entropy"]
