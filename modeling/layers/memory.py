"""How this process holds memory."""

from __future__ import annotations

import ctypes
import sys
from functools import cache


@cache
def keep_freed_memory() -> bool:
    """Tell glibc, once a process, to keep freed memory instead of returning it page by page at every step of a training
    and every request of a server.

    Blocks of megabytes are otherwise mapped, faulted in and unmapped again for every tensor.

    Returns:
        Whether it does; without glibc nothing happens.
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None)
    mallopt = getattr(libc, "mallopt", None)
    if mallopt is None:
        return False
    trim_threshold = -1
    top_pad = -2
    mmap_max = -4
    # Of what was read until now, and is no longer held
    libc.malloc_trim(0)
    wanted = {mmap_max: 0, trim_threshold: 1 << 30, top_pad: 1 << 26}
    outcomes = [mallopt(parameter, value) for parameter, value in wanted.items()]
    # Which are 1 where a parameter was set
    return outcomes == [1] * len(wanted)
