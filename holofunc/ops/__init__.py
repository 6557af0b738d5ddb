"""Pure functions of tensors: box operators, assignment, CTC outputs, and the merging of convolution branches."""

from holofunc.ops import assignment, boxes, ctc, reparam

__all__ = ["assignment", "boxes", "ctc", "reparam"]
