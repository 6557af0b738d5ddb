"""Pictures of what others computed: each function takes plain data and returns a matplotlib `Figure`.

Nothing is shown or saved, and matplotlib's global state (`pyplot`) is never touched, so that figures can be made in a
thread, on a machine without a screen, and in the middle of somebody else's drawing. A figure is the value of a notebook
cell, or `figure.savefig("curves.png")`.
"""

from holofunc.plots.classification import confusion, images, top_losses
from holofunc.plots.detection import detections
from holofunc.plots.training import curves, lr_search, schedule

__all__ = ["confusion", "curves", "detections", "images", "lr_search", "schedule", "top_losses"]
