"""Memory of CPU tensors: kept from step to step, and errors for lack of it."""

from __future__ import annotations

import ctypes
import sys

# Of glibc's malloc.h; mallopt(3).
M_TRIM_THRESHOLD = -1
M_TOP_PAD = -2
M_MMAP_MAX = -4


def keep_freed_memory() -> None:
    """Let the process keep freed memory for the next tensors, where the C library is glibc.

    By default the memory of a large tensor goes back to the system at once, and in each step the
    system has to find and zero every page again: half the time of the crops at 32 px. With this
    call the process keeps as much memory as its largest step has used.
    """
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return
    library.mallopt(M_MMAP_MAX, 0)
    library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    library.mallopt(M_TOP_PAD, 64 * 2**20)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, also one that a loader process has passed on as text, is a lack of memory.

    It may be Python's, NumPy's, or of torch's allocators: of CUDA and MPS, of CPU tensors on Linux
    and macOS, and on Windows.
    """
    signs = (
        "out of memory",
        "can't allocate memory",
        "not enough memory",
        "MemoryError",
        "Unable to allocate",
    )
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
