"""What ``top`` sees: the overviews of running daemons put together, or the database's own view without one."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sidecar_daemon.adapters.replicas import (
    DeadLetterView,
    LaneView,
    Overview,
    PipelineView,
    QueueView,
    overview_of,
)
from sidecar_daemon.app.merging import merged
from sidecar_daemon.app.operations import operations
from sidecar_daemon.domain.errors import SidecarError, Transient

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sidecar_daemon.adapters.postgres.operations import PipelineStatus, PostgresOperations
    from sidecar_daemon.domain.messages import LaneDepth
    from sidecar_daemon.settings import HttpSettings, Settings

ANSWER_SECONDS = 2.0
NEWEST = 5
"""Dead letters shown of a pipeline."""
_REST = 20
"""The database counts every source for us: it then rests this many times as long as that took."""
_OWN = {"version", "uptime_seconds", "ready", "reasons"}
"""What is a replica's own, and does not add up."""


@dataclass(frozen=True, slots=True)
class Replica:
    """One daemon that was asked."""

    url: str
    overview: Overview | None
    error: str | None


@dataclass(frozen=True, slots=True)
class View:
    """One look at everything."""

    overview: Overview
    replicas: tuple[Replica, ...]
    """Those that were asked, in order."""
    notice: str | None = None
    """Why this is the database's own view; None where daemons answered."""


class Watcher:
    """Looks again and again, at daemons first, at the database where none answers."""

    def __init__(self, settings: Settings, urls: Sequence[str], *, clock: Callable[[], float]) -> None:
        """Ask nothing yet.

        Args:
            settings: name the database, and the daemon where no URL is given.
            urls: base URLs of daemons; empty: the one that the settings name.
            clock: seconds, monotonic.
        """
        self._settings = settings
        self._urls = tuple(dict.fromkeys(urls)) or default_urls(settings.http)
        self._clock = clock
        self._own: tuple[float, float, Overview] | None = None
        """When the database was asked, how long it took, and what it said."""

    async def look(self) -> View:
        """Look once.

        Raises:
            Transient: neither a daemon nor the database answers.
            Fatal: no daemon answers, and the settings name no database that this release can read.
        """
        replicas = tuple(await asyncio.gather(*(_asked(url) for url in self._urls)))
        answers = [replica.overview for replica in replicas if replica.overview is not None]
        if answers:
            return View(merged(answers), replicas)
        silence = "; ".join(f"no daemon answers at {replica.url} ({replica.error})" for replica in replicas)
        silence = silence or "SIDECAR_HTTP_PORT is 0, so no daemon can be asked without --url"
        try:
            overview = await self._from_database()
        except SidecarError as error:
            raise type(error)(error.code, f"{silence}, and the database does not help: {error}") from None
        return View(overview, replicas, notice=silence)

    async def _from_database(self) -> Overview:
        now = self._clock()
        if self._own is not None:
            asked, took, overview = self._own
            if now - asked < _REST * took:
                return overview.model_copy(update={"observed_seconds_ago": now - asked})
        async with operations(self._settings) as database:
            overview = await database_overview(database)
        self._own = (now, self._clock() - now, overview)
        return overview


async def _asked(url: str) -> Replica:
    try:
        return Replica(url, await overview_of(url, seconds=ANSWER_SECONDS), None)
    except Transient as error:
        return Replica(url, None, str(error))


def view_document(view: View) -> dict[str, Any]:
    """One look as JSON: who was asked, then the overview as a daemon tells it."""
    return {
        "from": "daemons" if view.notice is None else "database",
        "notice": view.notice,
        "replicas": [
            {
                "url": replica.url,
                "error": replica.error,
                **({} if replica.overview is None else replica.overview.model_dump(include=_OWN)),
            }
            for replica in view.replicas
        ],
        **view.overview.model_dump(mode="json"),
    }


def default_urls(http: HttpSettings) -> tuple[str, ...]:
    """Where the daemon of these settings listens, seen from its own machine; none when its port is any free one."""
    if http.port == 0:
        return ()
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(http.host, http.host)  # noqa: S104  compared, not bound
    return (f"http://{f'[{host}]' if ':' in host else host}:{http.port}",)


async def database_overview(database: PostgresOperations) -> Overview:
    """What the database knows by itself: queues, coverage and dead letters, but no rates and no history."""
    pipelines = []
    for status in await database.status():
        letters = await database.dead_letters(status.name) if status.dead else []
        newest = sorted(letters, key=lambda letter: letter.age_seconds)[:NEWEST]
        shown = [
            DeadLetterView(
                key=letter.document_id,
                reason=letter.reason,
                age_seconds=letter.age_seconds,
                attempts=letter.attempts,
            )
            for letter in newest
        ]
        pipelines.append(_pipeline(status, tuple(shown)))
    return Overview(ready=False, database=database.place, observed_seconds_ago=0.0, pipelines=tuple(pipelines))


def _pipeline(status: PipelineStatus, letters: tuple[DeadLetterView, ...]) -> PipelineView:
    return PipelineView(
        name=status.name,
        source=status.source,
        model=status.model,
        state="unknown" if status.enabled else "paused",
        queue=QueueView(live=_lane(status.live), bulk=_lane(status.bulk), dead=status.dead),
        documents=status.documents,
        coverage=status.coverage,
        dead_letters=letters,
    )


def _lane(lane: LaneDepth) -> LaneView:
    return LaneView(depth=lane.depth, in_flight=lane.in_flight, oldest_seconds=lane.oldest_seconds)
