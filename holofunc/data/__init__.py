"""Batches in a resumable order, prefetching, and the datasets the command line knows."""

from holofunc.data.batches import Batches, collate
from holofunc.data.datasets import BrokenImage, Source, check, check_folder, open_dataset
from holofunc.data.embedded import digits
from holofunc.data.inspecting import ImageSizes, find_image_size, parallel
from holofunc.data.mapping import map, on_device
from holofunc.data.prefetching import prefetch
from holofunc.data.splits import holdout

__all__ = [
    "Batches",
    "BrokenImage",
    "ImageSizes",
    "Source",
    "check",
    "check_folder",
    "collate",
    "digits",
    "find_image_size",
    "holdout",
    "map",
    "on_device",
    "open_dataset",
    "parallel",
    "prefetch",
]
