"""What ``/overview`` answers: the supervisor's, the history's and the newest dead letters' view, put together."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sidecar_daemon.adapters.http.overview import (
    LaneStatus,
    Overview,
    OverviewDeadLetter,
    OverviewFreshness,
    OverviewHistory,
    OverviewPipeline,
    OverviewSeries,
    OverviewSweep,
    QueueStatus,
)
from sidecar_daemon.domain.errors import SidecarError
from sidecar_daemon.telemetry.recent import STEP_SECONDS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from sidecar_daemon.adapters.postgres.operations import NewestDeadLetter
    from sidecar_daemon.domain.messages import LaneDepth, PipelineName, PipelineObservation
    from sidecar_daemon.supervisor import Staffed
    from sidecar_daemon.telemetry.recent import Recent

NEWEST = 5
"""Dead letters of each pipeline that are shown."""
ASK_SECONDS = 4.0
"""The database is asked for a pipeline's dead letters at most this often, and only while somebody looks."""
OLD_SECONDS = 15.0
"""A list that nobody looked at for this long is worth ``PATIENT_SECONDS`` of waiting for a newer one."""
PATIENT_SECONDS = 0.5

_EMPTY = LaneStatus(depth=0, in_flight=0, oldest_seconds=None)
_UNSEEN = QueueStatus(live=_EMPTY, bulk=_EMPTY, dead=0)
_UNSWEPT = OverviewSweep(walking=False, scanned=0, age_seconds=None)


@dataclass(frozen=True, slots=True)
class _Letters:
    """What one look found, and when, by the daemon's own clock."""

    found: list[NewestDeadLetter]
    at: float


class Letters:
    """The newest dead letters, remembered. With the database away, the old ones stay."""

    def __init__(
        self, ask: Callable[[str, int], Awaitable[list[NewestDeadLetter]]], *, clock: Callable[[], float]
    ) -> None:
        """Remember what ``ask(pipeline, limit)`` finds; it raises ``SidecarError``. ``clock`` is in seconds."""
        self._ask = ask
        self._clock = clock
        self._seen: dict[PipelineName, _Letters] = {}
        self._asked: dict[PipelineName, float] = {}
        """When each was asked for last, whatever came of it."""
        self._asking: asyncio.Task[None] | None = None

    async def look(self, pipelines: Sequence[PipelineName]) -> None:
        """Somebody looks: ask again where that is due. Waits only for a list that is missing or was left to age.

        Args:
            pipelines: those that have dead letters; the others are forgotten.
        """
        now = self._clock()
        self._seen = {name: letters for name, letters in self._seen.items() if name in pipelines}
        self._asked = {name: at for name, at in self._asked.items() if name in pipelines}
        if self._asking is not None and not self._asking.done():
            return
        ages = {name: now - self._asked.get(name, -math.inf) for name in pipelines}
        due = [name for name, age in ages.items() if age >= ASK_SECONDS]
        if not due:
            return
        self._asked |= dict.fromkeys(due, now)
        self._asking = asyncio.create_task(self._look(due))
        if max(ages.values()) >= OLD_SECONDS:
            await asyncio.wait([self._asking], timeout=PATIENT_SECONDS)

    def of(self, pipeline: PipelineName) -> list[OverviewDeadLetter]:
        """What is known of one pipeline, newest first, older by the time that has passed since."""
        letters = self._seen.get(pipeline)
        if letters is None:
            return []
        passed = self._clock() - letters.at
        return [
            OverviewDeadLetter(
                key=each.document_id,
                reason=each.reason,
                age_seconds=each.age_seconds + passed,
                attempts=each.attempts,
            )
            for each in letters.found
        ]

    def close(self) -> None:
        """Ask no more."""
        if self._asking is not None:
            self._asking.cancel()

    async def _look(self, pipelines: list[PipelineName]) -> None:
        for name in pipelines:
            try:
                self._seen[name] = _Letters(await self._ask(name, NEWEST), self._clock())
            except SidecarError:  # told by whoever works on the pipeline; what was seen before stays
                continue


class Overviews:
    """Makes the answer. Nothing in it waits for the database, save ``Letters.look`` for half a second."""

    def __init__(
        self,
        *,
        version: str,
        database: str,
        ready: Callable[[], tuple[bool, list[str]]],
        staffed: Callable[[], list[Staffed]],
        recent: Recent,
        letters: Letters,
        clock: Callable[[], float],
    ) -> None:
        """Bind what it asks; ``database`` is a place without a password, ``clock`` in seconds."""
        self._version = version
        self._database = database
        self._ready = ready
        self._staffed = staffed
        self._recent = recent
        self._letters = letters
        self._clock = clock
        self._started = clock()

    async def __call__(self) -> Overview:
        """The whole daemon as it is now."""
        staffed, recent = self._staffed(), self._recent
        seen = {each.pipeline.name: recent.observation(each.pipeline.name) for each in staffed}
        await self._letters.look([name for name, found in seen.items() if found is not None and found.dead])
        ready, reasons = self._ready()
        series = {name: recent.series(name) for name in seen}
        return Overview(
            version=self._version,
            uptime_seconds=self._clock() - self._started,
            ready=ready,
            reasons=reasons,
            database=self._database,
            observed_seconds_ago=recent.observed_seconds_ago(),
            pipelines=[self._pipeline(each, seen[each.pipeline.name]) for each in staffed],
            history=OverviewHistory(
                step_seconds=STEP_SECONDS,
                series={
                    name: OverviewSeries(
                        embedded=each.embedded,
                        depth=each.depth,
                        freshness_p50=each.freshness_p50,
                        freshness_p99=each.freshness_p99,
                    )
                    for name, each in series.items()
                },
            ),
        )

    def _pipeline(self, staffed: Staffed, seen: PipelineObservation | None) -> OverviewPipeline:
        pipeline, recent = staffed.pipeline, self._recent
        freshness = recent.quantiles(pipeline.name)
        return OverviewPipeline(
            name=pipeline.name,
            source=pipeline.source,
            model=pipeline.model_id or pipeline.model,
            state=staffed.state,
            reason=staffed.reason,
            circuit=recent.circuit_of(pipeline.name),
            queue=_UNSEEN if seen is None else _queue(seen),
            documents=None if seen is None else seen.documents,
            coverage=None if seen is None else seen.coverage,
            sweep=_UNSWEPT if seen is None else _sweep(seen),
            rate=recent.rate(pipeline.name),
            freshness=OverviewFreshness(p50=freshness.p50, p99=freshness.p99, count=freshness.count),
            outcomes={outcome.value: count for outcome, count in sorted(recent.outcomes(pipeline.name).items())},
            dead_letters=self._letters.of(pipeline.name),
        )


def _queue(seen: PipelineObservation) -> QueueStatus:
    return QueueStatus(live=_lane(seen.live), bulk=_lane(seen.bulk), dead=seen.dead)


def _sweep(seen: PipelineObservation) -> OverviewSweep:
    return OverviewSweep(walking=seen.walking, scanned=seen.scanned, age_seconds=seen.sweep_age_seconds)


def _lane(lane: LaneDepth) -> LaneStatus:
    return LaneStatus(depth=lane.depth, in_flight=lane.in_flight, oldest_seconds=lane.oldest_seconds)
