"""Pure functions of tensors: box operators, reading CTC outputs, and the merging of convolution branches."""

from holofunc.ops import boxes, ctc, reparam

__all__ = ["boxes", "ctc", "reparam"]
