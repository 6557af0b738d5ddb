"""Batches in a resumable order, prefetching, and the datasets the command line knows."""

from holofunc.data.batches import Batches, collate
from holofunc.data.datasets import Source, open_dataset
from holofunc.data.digits import digits
from holofunc.data.holdout import holdout
from holofunc.data.prefetch import prefetch

__all__ = ["Batches", "Source", "collate", "digits", "holdout", "open_dataset", "prefetch"]
