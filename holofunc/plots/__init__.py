"""Figures of results computed elsewhere: each function takes plain data and returns a matplotlib `Figure`.

Nothing is shown or saved, and matplotlib's global state (`pyplot`) is never touched, so that figures can be made in a
thread, on a machine without a screen, and in the middle of somebody else's drawing. A figure is the value of a notebook
cell, or ``figure.savefig("curves.png")``.
"""

from holofunc.plots.analysis import agreement, data_map, heat, landscape, neighbours, recall, spectrum
from holofunc.plots.classification import confusion, images, top_losses
from holofunc.plots.detection import detections
from holofunc.plots.predictions import recognition, segmentation
from holofunc.plots.training import curves, image_sizes, lr_search, schedule

__all__ = [
    "agreement",
    "confusion",
    "curves",
    "data_map",
    "detections",
    "heat",
    "image_sizes",
    "images",
    "landscape",
    "lr_search",
    "neighbours",
    "recall",
    "recognition",
    "schedule",
    "segmentation",
    "spectrum",
    "top_losses",
]
