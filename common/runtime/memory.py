"""Memory of CPU tensors, kept between the steps."""

from __future__ import annotations

import ctypes
import sys

# Of glibc's malloc.h; mallopt(3).
M_TRIM_THRESHOLD = -1
M_TOP_PAD = -2
M_MMAP_MAX = -4


def keep_freed_memory() -> None:
    """Let the process keep freed memory for the next tensors, where the C library is glibc.

    By default it hands the memory of large tensors back at once, and every step pays again for
    getting and zeroing each page: half the time of the crops at 32 px. The process then holds as
    much as its largest step has needed.
    """
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return
    library.mallopt(M_MMAP_MAX, 0)
    library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    library.mallopt(M_TOP_PAD, 64 * 2**20)
