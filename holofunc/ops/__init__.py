"""Pure functions of tensors: box operators, targets of detectors, and the merging of convolution branches."""

from holofunc.ops import assignment, boxes, reparam, targets

__all__ = ["assignment", "boxes", "reparam", "targets"]
