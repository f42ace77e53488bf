"""The C library's allocator, told to keep few heaps.

glibc gives threads heaps of their own, eight a core; what one of them frees is kept
where the others do not look for it, and the process grows for days though nothing is held.
"""

from __future__ import annotations

import ctypes
import os

HEAPS = 2
"""For all threads together."""
_M_ARENA_MAX = -8
"""``M_ARENA_MAX`` of glibc's malloc.h."""


def keep_few_heaps() -> bool:
    """Limit malloc to ``HEAPS``, from here on. To be called before threads start.

    Returns:
        Whether it did: not where ``MALLOC_ARENA_MAX`` says otherwise, nor in a C library without ``mallopt``.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or "MALLOC_ARENA_MAX" in os.environ:
        return False
    return bool(mallopt(_M_ARENA_MAX, HEAPS) == 1)
