"""Pure functions of tensors: box operators and the merging of convolution branches."""

from holofunc.ops import boxes, reparam

__all__ = ["boxes", "reparam"]
