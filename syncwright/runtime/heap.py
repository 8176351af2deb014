"""The C library's heap: memory that a step frees is there for the next one."""

from __future__ import annotations

import ctypes
import os
import platform

LARGEST_NBYTES = 128 << 20
"""Of one allocation that comes from the heap and goes back to it."""
KEPT_NBYTES = 512 << 20
"""So much may lie free at the heap's end before it goes back to the system."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h


def keep_freed_memory() -> bool:
    """Has glibc keep freed memory; returns whether it does.

    As it is, glibc gives large blocks back to the system at once, and the next step pays for clearing each page anew: a
    server of 9.5 MB of parameters spent a third of its time so (docs/performance.md). Nothing is done where the user
    has set MALLOC_TRIM_THRESHOLD_ or MALLOC_MMAP_THRESHOLD_, for another C library, or with SYNCWRIGHT_KEEP_MEMORY=0.
    Elsewhere than in glibc's own allocator (jemalloc, tcmalloc) it changes nothing.
    """
    theirs = any(name in os.environ for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"))
    if theirs or os.environ.get("SYNCWRIGHT_KEEP_MEMORY", "1") == "0" or platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    return bool(library.mallopt(_MMAP_THRESHOLD, LARGEST_NBYTES) and library.mallopt(_TRIM_THRESHOLD, KEPT_NBYTES))
