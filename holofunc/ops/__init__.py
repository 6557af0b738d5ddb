"""Pure functions of tensors: box operators, assignment, and the merging of convolution branches."""

from holofunc.ops import assignment, boxes, reparam

__all__ = ["assignment", "boxes", "reparam"]
