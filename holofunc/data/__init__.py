"""Batches in a resumable order, prefetching, the datasets the command line knows, and sets drawn from a key."""

from holofunc.data.batches import Batches, collate
from holofunc.data.datasets import BrokenImage, Source, check, check_folder, open_dataset
from holofunc.data.embedded import digits
from holofunc.data.inspecting import ImageSizes, find_image_size, parallel
from holofunc.data.mapping import map, on_device
from holofunc.data.prefetching import prefetch
from holofunc.data.shapes import SHAPES, Shapes, draw_shapes
from holofunc.data.splits import holdout
from holofunc.data.text import CTCCodec, draw_text_lines, find_fonts, render_text

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
    "SHAPES",
    "Batches",
    "CTCCodec",
    "Shapes",
    "Source",
    "collate",
    "digits",
    "draw_shapes",
    "draw_text_lines",
    "find_fonts",
    "holdout",
    "open_dataset",
    "prefetch",
    "render_text",
]
