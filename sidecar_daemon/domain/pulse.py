"""Whether the daemon moves: each loop records its turns; one that stands still without excuse is stuck. Pure.

A wait is an excuse only while what it waits for has not come: a run of the model that is not done, a queue that is
empty, a moment that has not passed. A loop that sleeps on behind its work has none. What a thread of ours computes is
an excuse for so long and no longer: its run may hang as well as be slow.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

STILL_SECONDS = 180.0
"""Longer than a call of the database lasts at most, its timeouts and retries added up: no call is taken for a hang."""
COMPUTING_SECONDS = 900.0
"""A run of the model is cut to about a quarter of a second, and loading one takes seconds: what takes thousands of
times as long, beyond any swapping machine, hangs."""
GLANCE = 0.1
"""A gap between two looks counts for this share of it at most. Whoever looks stands still with the loops: a longer gap
is a process that was frozen, with its container or with its machine, and says nothing about any of them."""


def _never() -> bool:
    return False


class Beat:
    """The turns of one loop."""

    def __init__(self, name: str, clock: Callable[[], float], excused: Callable[[], bool]) -> None:
        """Start at a turn; ``excused`` says whether standing still is right at any time."""
        self.name = name
        self._clock = clock
        self._always = excused
        self._excuse: Callable[[], bool] = _never
        self._moved = clock()

    def turn(self) -> None:
        """The loop has moved."""
        self._moved = self._clock()

    @contextmanager
    def waiting(self, excused: Callable[[], bool]) -> Iterator[None]:
        """Stand still for as long as ``excused`` says; its end is a turn."""
        self._excuse = excused
        try:
            yield
        finally:
            self._excuse = _never
            self.turn()

    @contextmanager
    def computing(self, done: Callable[[], bool]) -> Iterator[None]:
        """Stand still until a thread is ``done``, for ``COMPUTING_SECONDS`` at most; its end is a turn."""
        latest = self._clock() + COMPUTING_SECONDS
        with self.waiting(lambda: not done() and self._clock() < latest):
            yield

    @contextmanager
    def asleep(self, seconds: float) -> Iterator[None]:
        """Stand still for this long at most; its end is a turn."""
        wakes = self._clock() + seconds
        with self.waiting(lambda: self._clock() < wakes):
            yield

    def forgive(self, seconds: float) -> None:
        """Leave out a time in which nothing could move."""
        self._moved = min(self._clock(), self._moved + seconds)

    def still(self) -> float:
        """Seconds without a turn, those with an excuse left out as far as somebody looked meanwhile."""
        if self._always() or self._excuse():
            self.turn()
        return self._clock() - self._moved


class Pulse:
    """The loops that must move."""

    def __init__(self, clock: Callable[[], float], still_seconds: float = STILL_SECONDS) -> None:
        """Judge nothing yet.

        Args:
            clock: seconds; monotonic, and standing still while the machine sleeps, as the loops do.
            still_seconds: how long a loop may go without a turn and without excuse.
        """
        self._clock = clock
        self._still_seconds = still_seconds
        self._beats: list[Beat] = []
        self._looked = clock()

    @contextmanager
    def watch(self, *names: str, excused: Callable[[], bool] = _never) -> Iterator[list[Beat]]:
        """Expect turns of these loops until the block ends: a loop that ends before without a word is stuck.

        Args:
            names: as ``/livez`` shall name them.
            excused: whether all of them may stand still now, for one because the database is away.
        """
        beats = [Beat(name, self._clock, excused) for name in names]
        self._beats += beats
        try:
            yield beats
        finally:
            self._beats = [beat for beat in self._beats if beat not in beats]

    def stuck(self) -> str | None:
        """The loop that has stood still for too long, in one line; None while all move.

        To be asked every few seconds: an excuse counts from the last look on, and a time in which nobody looked for
        next to nothing.
        """
        unseen = self._clock() - self._looked - GLANCE * self._still_seconds
        self._looked = self._clock()
        if unseen > 0:
            for beat in self._beats:
                beat.forgive(unseen)
        still, name = max(((beat.still(), beat.name) for beat in self._beats), default=(0.0, ""))
        return f"{name} has not moved for {still:.0f} s" if still > self._still_seconds else None
