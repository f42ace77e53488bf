"""How durations and counts are worded for people. Pure."""

from __future__ import annotations

_MINUTE = 60.0
_HOUR = 3600.0
_DAY = 86400.0


def span(seconds: float) -> str:
    """A duration in its natural unit: ``27 ms``, ``3.2 s``, ``48 s``, ``12 min``, ``5 h``, ``3 d``.

    Args:
        seconds: below 0 counts as 0, for two clocks never agree.
    """
    seconds = max(0.0, seconds)
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if seconds < 99.5 * _MINUTE:
        return f"{seconds / _MINUTE:.0f} min"
    return f"{seconds / _HOUR:.0f} h" if seconds < 2 * _DAY else f"{seconds / _DAY:.0f} d"


def counted(number: int, noun: str) -> str:
    """``1 message``, ``2 messages``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def amount(size: int) -> str:
    """A number of bytes: ``640 kB``, ``64 MB``, ``2.3 GB``; in powers of 1,024, as PostgreSQL counts."""
    for unit, base in (("GB", 1 << 30), ("MB", 1 << 20)):
        if size >= base:
            return f"{size / base:.1f} {unit}" if size < 10 * base else f"{size / base:,.0f} {unit}"
    return f"{size / 1024:.0f} kB"
