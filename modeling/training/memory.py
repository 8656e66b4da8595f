"""How this process holds memory."""

from __future__ import annotations

import ctypes
import sys


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory instead of returning it page by page at every step; elsewhere
    nothing happens.

    Blocks of megabytes are otherwise mapped, faulted in and unmapped again for every tensor.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    mallopt = getattr(libc, "mallopt", None)
    if mallopt is not None:
        trim_threshold = -1
        top_pad = -2
        mmap_max = -4
        # What reading the data left behind
        libc.malloc_trim(0)
        for parameter, value in ((mmap_max, 0), (trim_threshold, 1 << 30), (top_pad, 1 << 26)):
            mallopt(parameter, value)
