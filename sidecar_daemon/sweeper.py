"""The sweep loop of one pipeline: finds what has no vector of its current text and model, and enqueues it."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sidecar_daemon.domain.errors import Poison, Transient

if TYPE_CHECKING:
    from collections.abc import Callable

    from sidecar_daemon.domain.messages import PipelineName, SweepWindow
    from sidecar_daemon.domain.pulse import Beat, Pulse
    from sidecar_daemon.patience import Patience
    from sidecar_daemon.ports import Queue
    from sidecar_daemon.telemetry import Telemetry

FIRST_ROWS = 200
"""Rows of the first window: how long a row takes, its text's length decides, and nobody has measured it yet."""
FEWEST_ROWS = 100
"""Fewer only where these take a second: what a window costs beside its rows is paid for each."""
SLOW_SECONDS = 0.5
"""A window that took longer is halved, so that no transaction of ours lives for a second."""
LONGEST_SECONDS = 1.0
QUICK_SECONDS = 0.1
LONGEST_REST = 60.0
OVERLONG = frozenset({"statement_timeout", "transaction_timeout", "timeout"})
"""The world's faults that a window of fewer rows may not meet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepLimits:
    """How often and how hard."""

    interval: float
    """Seconds from the start of one routine walk to the start of the next."""
    rows: int
    """Rows of one window at most."""
    duty: float
    """Share of one core that a routine walk may use; a backfill is held back by its lane's depth instead."""


class Sweeper:
    """Walks one pipeline's source, window by window, for ever."""

    def __init__(
        self,
        pipeline: PipelineName,
        *,
        queue: Queue,
        limits: SweepLimits,
        telemetry: Telemetry,
        patience: Patience,
        uniform: Callable[[float, float], float],
        pulse: Pulse,
    ) -> None:
        """Bind a pipeline; ``uniform`` spreads the replicas' turns, ``pulse`` judges this one's."""
        self._pipeline = pipeline
        self._queue = queue
        self._limits = limits
        self._telemetry = telemetry
        self._patience = patience
        self._uniform = uniform
        self._pulse = pulse
        self._wake = asyncio.Event()
        self._rows = min(FIRST_ROWS, limits.rows)

    def wake(self) -> None:
        """Look at once: somebody asked for a sweep."""
        self._wake.set()

    async def run(self) -> None:
        """Sweep until cancelled. Raises ``Refused`` when the pipeline is paused or detached."""
        with self._pulse.watch(f"{self._pipeline}: sweeping", excused=lambda: self._patience.away) as (beat,):
            await self._walk(beat)

    async def _walk(self, beat: Beat) -> None:
        while True:
            self._wake.clear()
            try:
                window, seconds = await self._patience(self._window)
            except Poison as error:  # a row that cannot be rendered: it may hold up this walk, not the process
                rest = min(self._limits.interval, LONGEST_REST)
                self._telemetry.fault(f"{self._pipeline} sweep", error, waiting=rest)
                await self._sleep(rest, beat)
                continue
            self._telemetry.swept(self._pipeline, window, seconds)
            if window.scanned:  # else it looked at no row, and its time says nothing of them
                full = window.state == "walked"  # one that was not full would have taken longer
                self._rows = next_rows(self._rows, seconds, most=self._limits.rows if full else self._rows)
            await self._sleep(self._rest(window, seconds), beat)

    async def _window(self) -> tuple[SweepWindow, float]:
        """Walk one window, and its seconds. One that ran out of time is asked for again with fewer rows."""
        started = time.monotonic()
        try:
            window = await self._queue.sweep(rows=self._rows, interval=self._limits.interval)
        except Transient as error:
            if error.code in OVERLONG:
                self._rows = fewer_rows(self._rows, time.monotonic() - started)
            raise
        return window, time.monotonic() - started

    async def _sleep(self, seconds: float, beat: Beat) -> None:
        seconds *= self._uniform(0.8, 1.2)
        with suppress(TimeoutError), beat.asleep(seconds):
            async with asyncio.timeout(seconds):
                await self._wake.wait()

    def _rest(self, window: SweepWindow, seconds: float) -> float:
        """Seconds until the next call."""
        if window.state == "walked":
            return 0.0 if window.backfill else seconds * (1 / self._limits.duty - 1)
        if window.state == "waiting":
            return 1.0
        return min(self._limits.interval, LONGEST_REST) / 4


def next_rows(rows: int, seconds: float, *, most: int) -> int:
    """Rows of the next window: half after a slow one, twice after a quick one, within bounds."""
    if seconds > LONGEST_SECONDS:
        return fewer_rows(rows, seconds)
    if seconds > SLOW_SECONDS:
        return max(min(FEWEST_ROWS, rows), rows // 2)
    return min(most, rows * 2) if seconds < QUICK_SECONDS else rows


def fewer_rows(rows: int, seconds: float) -> int:
    """Rows of the next window after one that took far too long, or did not end in that time: at most half, at least 1.

    Rows that take ``SLOW_SECONDS`` by this measure, so that a server that gives up late is not asked many times.
    """
    return max(1, min(rows // 2, int(rows * SLOW_SECONDS / max(seconds, SLOW_SECONDS))))
