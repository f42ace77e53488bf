"""The C library's allocator, told to keep few heaps.

glibc gives threads heaps of their own, eight a core; what one of them frees is kept where the others do not look for
it, and the process grows for days though nothing is held.
"""

from __future__ import annotations

import ctypes

_M_ARENA_MAX = -8
"""``M_ARENA_MAX`` of glibc's malloc.h."""


def keep_few_heaps(heaps: int) -> bool:
    """Limit malloc to so many, for all threads together, from here on. To be called before threads start.

    Returns:
        Whether it did: not in a C library without ``mallopt``. ``MALLOC_ARENA_MAX`` has no say any more.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_ARENA_MAX, heaps) == 1)
