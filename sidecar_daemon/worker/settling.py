"""Stage 3: write vectors and acknowledge, many documents a transaction; what fails is settled document by document."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING

from sidecar_daemon.domain.errors import Poison, Refused, Transient
from sidecar_daemon.domain.outcomes import Outcome, Verdict
from sidecar_daemon.telemetry import BatchSettled
from sidecar_daemon.worker.failing import CONTENDED, bury, fail
from sidecar_daemon.worker.state import Job

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sidecar_daemon.domain.messages import Lease, Settled, Settlement
    from sidecar_daemon.domain.pulse import Beat
    from sidecar_daemon.worker.state import WorkerState

DOCUMENTS_AT_ONCE = 64
"""Documents of one transaction at most: it stays far below a second, and larger ones gain nothing."""
FRUITLESS = 3
"""Contended documents in a row, none settled between them, after which the world is told of, not one writer."""
ANSWERED = {Verdict.GONE: Outcome.GONE, Verdict.UNCHANGED: Outcome.UNCHANGED}
"""Verdicts that leave a message nothing to ask for."""


class Settler:
    """Settles whatever is complete; batches grow only while a transaction is under way."""

    def __init__(self, state: WorkerState, beat: Beat) -> None:
        """Bind a worker's state, and what records this loop's turns."""
        self._state = state
        self._beat = beat
        self._fruitless = 0

    async def run(self) -> None:
        """Settle until the last document is through."""
        queue = self._state.settlements
        while (first := await self._next()) is not None:
            ready = [first]
            while len(ready) < DOCUMENTS_AT_ONCE and not queue.empty():
                following = queue.get_nowait()
                if following is None:
                    queue.put_nowait(None)
                    break
                ready.append(following)
            await self._settle(await self._prepare(ready))
            self._state.in_flight.settled()

    async def _next(self) -> Job | Settlement | None:
        """Wait for something to settle. What was given back has come again, or is gone, after twice its delay."""
        while True:
            with suppress(TimeoutError), self._beat.waiting(self._state.settlements.empty):
                async with asyncio.timeout(2 * self._state.limits.poll_max):
                    return await self._state.settlements.get()
            self._fruitless = 0
            self._relieved()

    def _relieved(self) -> None:
        """What was told of a writer or of the model is over, unless the model still refuses whatever it is given."""
        if not self._state.runtime_failing:
            self._state.patience.relieved()

    async def _prepare(self, ready: Sequence[Job | Settlement]) -> list[tuple[Job | None, Settlement]]:
        """Make settlements; from here on, later messages of the same text start anew."""
        prepared: list[tuple[Job | None, Settlement]] = []
        for item in ready:
            self._beat.turn()
            if not isinstance(item, Job):
                prepared.append((None, item))
                continue
            if self._state.in_flight.job_of(item.document) is None:
                continue  # its leases were lost while it waited: it may be on its way once more
            try:
                prepared.append((item, item.settlement(self._state.pipeline.long_documents)))
            except Poison as error:
                await fail(self._state, item, error)
            else:
                self._state.in_flight.settling(item)
        return prepared

    async def _settle(self, prepared: Sequence[tuple[Job | None, Settlement]]) -> None:
        """Settle in one transaction; where that fails by one document's fault, in halves down to the culprit."""
        if not prepared:
            return
        self._beat.turn()
        started = time.monotonic()
        settlements = [settlement for _, settlement in prepared]
        try:
            results = await self._state.patience(lambda: self._state.queue.settle(settlements), raising=CONTENDED)
        except Refused:
            # Detached or switched to another model: these vectors are of no use; a detached queue has no messages.
            await self._give_back(settlements)
            raise
        except (Poison, Transient) as error:
            if len(prepared) > 1:
                await self._settle_apart(prepared, error)
            elif isinstance(error, Poison):
                await self._blame(*prepared[0], error)
            else:
                self._fruitless += 1
                if self._fruitless >= FRUITLESS:
                    self._state.patience.troubled(error, waiting=self._state.limits.poll_max)
                await self._give_back(settlements, delay=self._state.limits.poll_max)
        else:
            self._fruitless = 0
            self._relieved()
            self._tell(settlements, results, time.monotonic() - started)

    async def _settle_apart(self, prepared: Sequence[tuple[Job | None, Settlement]], error: Exception) -> None:
        """Poison: each document alone, so that nobody waits twice. Contention: halves, which may be all it takes."""
        size = 1 if isinstance(error, Poison) else len(prepared) // 2
        for first in range(0, len(prepared), size):
            await self._settle(prepared[first : first + size])

    async def _blame(self, job: Job | None, settlement: Settlement, error: Poison) -> None:
        """One document, alone, cannot be stored. A row deleted under it is the usual cause: then it is simply gone."""
        state = self._state
        self._beat.turn()  # settle has just been a call as long as one may be, and more follow
        (reading,) = await state.patience(lambda: state.queue.read([settlement.key]))
        if reading.verdict in ANSWERED or reading.content_hash != settlement.content_hash:
            # Gone, written by another replica, or edited since: an edit has a message of its own.
            await self._acknowledge(settlement.leases, ANSWERED.get(reading.verdict, Outcome.SUPERSEDED))
        elif job is None:
            await bury(
                state, settlement.leases, reason=error.code, detail=str(error), content_hash=settlement.content_hash
            )
        else:
            await fail(state, job, error)

    async def _acknowledge(self, leases: Sequence[Lease], outcome: Outcome) -> None:
        await self._state.patience(lambda: self._state.queue.acknowledge(leases))
        self._state.done(leases)
        self._state.count(Counter({outcome: 1}))

    async def _give_back(self, settlements: Sequence[Settlement], *, delay: float = 0.0) -> None:
        leases = [lease for settlement in settlements for lease in settlement.leases]
        self._beat.turn()
        with suppress(Refused):  # the queue went with its pipeline
            await self._state.patience(lambda: self._state.queue.release(leases, delay=delay))
        self._state.done(leases)
        self._state.count(Counter({Outcome.RELEASED: len(settlements)}))

    def _tell(self, settlements: Sequence[Settlement], results: Sequence[Settled], seconds: float) -> None:
        for settlement in settlements:
            self._state.done(settlement.leases)
        fresh = [
            (settlement.lane, result.freshness_seconds)
            for settlement, result in zip(settlements, results, strict=True)
            if result.outcome is Outcome.EMBEDDED and result.freshness_seconds is not None
        ]
        self._state.telemetry.batch_settled(
            BatchSettled(
                pipeline=self._state.pipeline.name,
                documents=len(results),
                outcomes=Counter(result.outcome for result in results),
                freshness=fresh,
                settle_seconds=seconds,
                pending=len(self._state.in_flight.jobs),
                attempts=[max(lease.attempt for lease in one.leases) for one in settlements if one.leases],
            )
        )
