"""Batches in a resumable order, prefetching, datasets, and synthetic data."""

from holofunc.data.anchoring import anchor_iou, anchors
from holofunc.data.batches import Batches
from holofunc.data.boxed import Boxed, BoxedFiles, open_boxes
from holofunc.data.coco_files import coco, masks
from holofunc.data.datasets import BrokenImage, Source, check, check_folder, open_dataset
from holofunc.data.drawn import canvases
from holofunc.data.embedded import digits
from holofunc.data.inspecting import ImageSizes, find_image_size, parallel
from holofunc.data.mapping import map, on_device
from holofunc.data.mask_files import SegmentedFiles, open_masks
from holofunc.data.prefetching import prefetch
from holofunc.data.samples import collate
from holofunc.data.shapes import SHAPES, Shapes, draw_shapes
from holofunc.data.splits import holdout
from holofunc.data.targets import collate_boxes, pad_targets
from holofunc.data.text import CTCCodec, draw_text_lines, find_fonts, render_text
from holofunc.data.text_files import TextFiles, open_lines
from holofunc.data.voc_files import voc

__all__ = [
    "SHAPES",
    "Batches",
    "Boxed",
    "BoxedFiles",
    "BrokenImage",
    "CTCCodec",
    "ImageSizes",
    "SegmentedFiles",
    "Shapes",
    "Source",
    "TextFiles",
    "anchor_iou",
    "anchors",
    "canvases",
    "check",
    "check_folder",
    "coco",
    "collate",
    "collate_boxes",
    "digits",
    "draw_shapes",
    "draw_text_lines",
    "find_fonts",
    "find_image_size",
    "holdout",
    "map",
    "masks",
    "on_device",
    "open_boxes",
    "open_dataset",
    "open_lines",
    "open_masks",
    "pad_targets",
    "parallel",
    "prefetch",
    "render_text",
    "voc",
]
