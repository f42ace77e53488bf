"""Keeps the leases of work in flight: extended at a third of their length, and at once when an outage ends.

A lost one ends its document's run.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sidecar_daemon.domain.messages import Lease
    from sidecar_daemon.domain.pulse import Beat
    from sidecar_daemon.worker.state import WorkerState


class Keeper:
    """Extends every lease that this worker holds."""

    def __init__(self, state: WorkerState, beat: Beat) -> None:
        """Bind a worker's state, and what records this loop's turns."""
        self._state = state
        self._beat = beat

    async def run(self) -> None:
        """Extend until cancelled."""
        seconds = self._state.limits.lease_seconds
        while True:
            with self._beat.asleep(seconds / 3):
                await self._state.patience.relief(within=seconds / 3)
            held = set(self._state.in_flight.leases)
            if held:
                kept = await self._state.patience(partial(self._state.queue.extend, held, seconds=seconds))
                await self._drop((held - kept) & self._state.in_flight.leases)

    async def _drop(self, lost: set[Lease]) -> None:
        """Forget lost leases; a document without any other is somebody else's now."""
        state = self._state
        if not lost:
            return
        state.done(lost)
        dropped = 0
        for job in state.in_flight.jobs:
            job.leases = [lease for lease in job.leases if lease not in lost]
            if not job.leases:
                state.in_flight.close(job)
                await state.backlog.remove(job.document)
                dropped += 1
        state.telemetry.event("leases_lost", pipeline=state.pipeline.name, messages=len(lost), documents=dropped)
