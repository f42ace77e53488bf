"""The C library's allocator, told to give back what is freed.

By itself glibc gives threads heaps of their own, eight a core, and raises the size from which memory is mapped apart
with the largest block that was freed. asyncio reads into blocks of 256 KiB: after the first they come from the heap,
whatever outlives them splits it, and the process grows by megabytes an hour though nothing more is held.
"""

from __future__ import annotations

import ctypes

MAPPED_BYTES = 128 * 1024
"""Blocks from this size on are mapped, and unmapped when they are freed: glibc's first threshold, now fixed."""
_M_ARENA_MAX, _M_MMAP_THRESHOLD = -8, -3
"""Of glibc's malloc.h."""


def give_memory_back(heaps: int) -> bool:
    """Limit malloc to so many heaps, and to small blocks in them, from here on. To be called before threads start.

    Returns:
        Whether it did: not in a C library without ``mallopt``. glibc's ``MALLOC_*`` variables have no say any more.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_ARENA_MAX, heaps) == 1 and mallopt(_M_MMAP_THRESHOLD, MAPPED_BYTES) == 1)
