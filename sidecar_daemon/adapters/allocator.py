"""The C library's allocator, told to keep few heaps.

glibc gives threads heaps of their own, eight a core; what one of them frees is kept where the others do not look for
it, and the process grows for days though nothing is held.
"""

from __future__ import annotations

import ctypes

HEAPS = 2
"""For all threads together."""
_M_ARENA_MAX = -8
"""``M_ARENA_MAX`` of glibc's malloc.h."""


def keep_few_heaps() -> bool:
    """Limit malloc to ``HEAPS``, from here on. To be called before threads start.

    Returns:
        Whether it did: not in a C library without ``mallopt``. ``MALLOC_ARENA_MAX`` has no say any more.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_ARENA_MAX, HEAPS) == 1)
