"""The shape of ``/overview``: everything that the page and ``top`` show, in one answer."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class LaneStatus(BaseModel):
    """How full one lane is; in an overview, at the newest look."""

    depth: int
    in_flight: int
    oldest_seconds: float | None


class QueueStatus(BaseModel):
    """How full a pipeline's queues are."""

    live: LaneStatus
    bulk: LaneStatus
    dead: int


class OverviewSweep(BaseModel):
    """How far the walk over the source is."""

    walking: bool
    scanned: int = Field(description="rows of the walk under way, else of the last one")
    age_seconds: float | None = Field(description="since the last finished walk")


class OverviewFreshness(BaseModel):
    """Seconds from the writer's enqueueing to the committed vector, over the last 15 minutes."""

    p50: float | None
    p99: float | None
    count: int


class OverviewDeadLetter(BaseModel):
    """One of the newest dead letters. Never its text, never its detail."""

    key: str | None
    reason: str | None
    age_seconds: float
    attempts: int | None


class OverviewPipeline(BaseModel):
    """One pipeline that this daemon is to work on."""

    name: str
    source: str
    model: str
    state: Literal["working", "paused", "refused", "waiting"]
    reason: str | None
    circuit: Literal["closed", "half_open", "open"]
    queue: QueueStatus = Field(description="empty before the first look, when observed_seconds_ago is null")
    documents: int | None = Field(description="that are not blank, as the last walk of the sweep saw them")
    coverage: float | None = Field(description="0 to 1; null before the first walk")
    sweep: OverviewSweep
    rate: float = Field(description="documents embedded per second over the last minute")
    freshness: OverviewFreshness
    outcomes: dict[str, int] = Field(description="documents since the daemon started")
    dead_letters: list[OverviewDeadLetter] = Field(description="the newest five")


class OverviewSeries(BaseModel):
    """One value a step, oldest first; the last step is under way."""

    embedded: list[int]
    depth: list[int | None]
    freshness_p50: list[float | None]
    freshness_p99: list[float | None]


class OverviewHistory(BaseModel):
    """The last 15 minutes, or since the daemon started."""

    step_seconds: int
    series: dict[str, OverviewSeries] = Field(description="by pipeline")


class Overview(BaseModel):
    """The whole daemon, from memory."""

    version: str
    uptime_seconds: float
    ready: bool
    reasons: list[str]
    database: str = Field(description="role@host:port/name")
    observed_seconds_ago: float | None = Field(description="age of queue, documents, coverage and sweep")
    pipelines: list[OverviewPipeline]
    history: OverviewHistory
