"""Batches in a resumable order, prefetching, and the datasets the command line knows."""

from holofunc.data.batches import Batches, collate
from holofunc.data.datasets import Source, open_dataset
from holofunc.data.embedded import digits
from holofunc.data.prefetching import prefetch
from holofunc.data.splits import holdout

__all__ = ["Batches", "Source", "collate", "digits", "holdout", "open_dataset", "prefetch"]
