"""Batches in a resumable order, prefetching, and the datasets the command line knows."""

from holofunc.data.anchoring import anchor_iou, anchors
from holofunc.data.batches import Batches, collate
from holofunc.data.boxed import Boxed, BoxedFiles, open_boxes
from holofunc.data.coco_files import coco, masks
from holofunc.data.datasets import Source, open_dataset
from holofunc.data.drawn import canvases
from holofunc.data.embedded import digits
from holofunc.data.prefetching import prefetch
from holofunc.data.splits import holdout
from holofunc.data.targets import collate_boxes, pad_targets
from holofunc.data.voc_files import voc

__all__ = [
    "Batches",
    "Boxed",
    "BoxedFiles",
    "Source",
    "anchor_iou",
    "anchors",
    "canvases",
    "coco",
    "collate",
    "collate_boxes",
    "digits",
    "holdout",
    "masks",
    "open_boxes",
    "open_dataset",
    "pad_targets",
    "prefetch",
    "voc",
]
