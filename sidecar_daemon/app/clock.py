"""The daemon's own clock, for durations only: what time it is, Postgres says."""

from __future__ import annotations

import time


def elapsed() -> float:
    """Seconds on a monotonic clock that goes on while the machine is suspended, where the platform has one."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
