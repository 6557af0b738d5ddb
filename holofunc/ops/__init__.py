"""Pure functions of tensors: boxes, who answers for them, CTC outputs, and the merging of convolution branches."""

from holofunc.ops import assignment, boxes, ctc, matching, reparam, targets

__all__ = ["assignment", "boxes", "ctc", "matching", "reparam", "targets"]
