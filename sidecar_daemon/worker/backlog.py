"""The bounded hand-off between leasing and embedding: windows wait here for an idle inference thread."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING

from sidecar_daemon.domain.batching import next_batch, remaining

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sidecar_daemon.domain.messages import Batch, Document, Lane, Window
    from sidecar_daemon.domain.pacing import RunBudget


class Backlog:
    """Windows that wait, oldest first. No timer: an idle thread takes what is there."""

    def __init__(self, *, lane_tokens: int, lane_windows: int, budget: RunBudget, max_windows: int) -> None:
        """Bound each lane to about so many real tokens and windows, and every batch to the other two."""
        self._lane_tokens = lane_tokens
        self._lane_windows = lane_windows
        self._budget = budget
        self._max_windows = max_windows
        self._pending: list[Window] = []
        self._tokens: Counter[Lane] = Counter()
        """Real tokens that wait, by lane: with the windows, what holds leasing back."""
        self._windows: Counter[Lane] = Counter()
        """Where a run takes few windows, many short ones are much work, however few their tokens."""
        self._changed = asyncio.Condition()
        self._closed = False

    def __len__(self) -> int:
        """Windows that wait."""
        return len(self._pending)

    def has_room(self, lane: Lane) -> bool:
        """Whether a lane is less than half full."""
        return self._fill(lane) < 1 / 2

    def room_tokens(self, lane: Lane) -> int:
        """Tokens that a lane still takes."""
        return max(0, self._lane_tokens - self._tokens[lane])

    def room_windows(self, lane: Lane) -> int:
        """Windows that a lane still takes."""
        return max(0, self._lane_windows - self._windows[lane])

    def full(self, lane: Lane) -> bool:
        """Whether a lane takes no document now."""
        return self._fill(lane) >= 1

    async def room(self, lane: Lane) -> bool:
        """Wait until a lane is less than half full, so that a lease refills it while the model runs.

        Returns:
            False once the backlog is closed.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: self._closed or self.has_room(lane))
            return not self._closed

    async def put(self, windows: Sequence[Window]) -> bool:
        """Add one document's windows once its lane has room. False, and nothing added, once closed.

        A suspect's go first: it has begun, and whatever breaks until it has ended may be blamed on it.
        """
        lane = windows[0].document.lane
        async with self._changed:
            await self._changed.wait_for(lambda: self._closed or not self.full(lane))
            if not self._closed:
                place = 0 if windows[0].document.suspect else len(self._pending)
                self._pending[place:place] = windows
                self._tokens[lane] += sum(window.length for window in windows)
                self._windows[lane] += len(windows)
                self._changed.notify_all()
            return not self._closed

    async def take(self) -> Batch | None:
        """Wait for windows and take one batch; None once closed."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._closed or self._pending)
            if not self._pending:
                return None
            return self._taken_from(self._pending)

    async def remove(self, document: Document) -> None:
        """Take a document's windows out: it failed, or its leases are lost."""
        async with self._changed:
            self._drop([window for window in self._pending if window.document is document])

    async def close(self) -> list[Document]:
        """Take nothing more in or out. Returns the documents that still waited, once each."""
        async with self._changed:
            self._closed = True
            waiting = list({id(window.document): window.document for window in self._pending}.values())
            self._drop(list(self._pending))
            return waiting

    def _fill(self, lane: Lane) -> float:
        """The share of a lane that is taken, by the bound that it is nearer to."""
        return max(self._tokens[lane] / self._lane_tokens, self._windows[lane] / self._lane_windows)

    def _taken_from(self, pending: Sequence[Window]) -> Batch:
        batch = next_batch(pending, max_padded_tokens=self._budget.tokens, max_windows=self._max_windows)
        self._drop(batch.windows)
        return batch

    def _drop(self, windows: Sequence[Window]) -> None:
        """Windows that wait no longer. Whoever waits for room looks again."""
        self._pending = remaining(self._pending, windows)
        for window in windows:
            self._tokens[window.document.lane] -= window.length
            self._windows[window.document.lane] -= 1
        self._changed.notify_all()
