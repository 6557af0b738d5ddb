"""Augmentation as pure functions ``augment(batch, key) -> batch``: random per sample, batched, in the compiled step."""

from holofunc.transforms.composing import Augment, compose, denormalized, one_of
from holofunc.transforms.mixing import cutmix, mixup
from holofunc.transforms.mosaics import mosaic
from holofunc.transforms.pixels import color_jitter, random_erasing
from holofunc.transforms.policies import rand_augment
from holofunc.transforms.resizing import RandomZoomOut, Resize
from holofunc.transforms.views import view, view_boxes, view_labels
from holofunc.transforms.windows import (
    large_scale_jitter,
    random_crop,
    random_flip,
    random_resized_crop,
    windowed,
    zoom_out,
)

__all__ = [
    "Augment",
    "RandomZoomOut",
    "Resize",
    "color_jitter",
    "compose",
    "cutmix",
    "denormalized",
    "large_scale_jitter",
    "mixup",
    "mosaic",
    "one_of",
    "rand_augment",
    "random_crop",
    "random_erasing",
    "random_flip",
    "random_resized_crop",
    "view",
    "view_boxes",
    "view_labels",
    "windowed",
    "zoom_out",
]
