"""Keeping memory that a training step frees for the next one."""

import ctypes
import functools
import os
import sys

__all__ = ["keep_freed_memory"]


@functools.cache
def keep_freed_memory() -> None:
    """Make the C library keep the memory that a step frees, for the next step.

    By default glibc returns it to the system, and a training step of ResNet-18 spends a tenth of its time on getting it
    back page by page. Blocks over 32 MiB are still returned, because keeping them causes fragmentation. It affects
    the whole process, only on Linux, and only its speed; ``MALLOC_...`` environment variables take precedence.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        mallopt(mmap_threshold, 2**25)  # what is mapped for itself is given back at once; glibc takes no larger one
        mallopt(trim_threshold, 2**31 - 1)
