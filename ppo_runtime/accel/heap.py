"""Freed memory kept for the next pass, where glibc would hand it back to the system.

A pass frees its activations at once, glibc returns hundreds of megabytes to the system at the end of each, and the next
pass gets them back page by page, cleared: a fifth of the time of a step on a CPU. torch has an allocator of its own for
GPUs that keeps what is freed; for CPUs it leaves that to the C library.

What was kept is not given back at the end either, but where it lies above all that is in use: to clear the rest would
have the next step fault it in again. The process takes it for its next tensors, and counts it as free
(:func:`ppo_runtime.common.memory.own_share`).
"""

import ctypes
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

# Names of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# As much as a C integer holds: larger tensors go their own ways.
_EVERYTHING = 2**31 - 1
# Where glibc's own adjustment ends on machines of 64 bits, once a program has freed large blocks.
_USUAL_MMAP, _USUAL_TRIM = 2**25, 2**26
# Somebody has chosen already.
_CHOICES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Inside, the process keeps the memory that it frees; afterwards what it frees then goes back as usual.

    For the whole process, so for other threads too: of several blocks the first to end ends it for all, which costs
    them time alone. Nobody counts them: a count that an interrupt leaves wrong would stay so. Nothing happens without
    glibc, or where environment variables of its own say what to keep.
    """
    adjust = _mallopt()
    if adjust is None or any(name in os.environ for name in _CHOICES):
        yield
        return
    try:
        adjust(_M_MMAP_THRESHOLD, _EVERYTHING)
        adjust(_M_TRIM_THRESHOLD, _EVERYTHING)
        yield
    finally:
        adjust(_M_MMAP_THRESHOLD, _USUAL_MMAP)
        adjust(_M_TRIM_THRESHOLD, _USUAL_TRIM)


@cache
def _mallopt() -> Callable[[int, int], int] | None:
    if platform.libc_ver()[0] != "glibc":
        return None
    return getattr(ctypes.CDLL(None), "mallopt", None)
