"""Pure functions of tensors: boxes, matching, CTC decoding, and merging of convolution branches."""

from holofunc.ops import assignment, boxes, ctc, matching, reparam, targets

__all__ = ["assignment", "boxes", "ctc", "matching", "reparam", "targets"]
