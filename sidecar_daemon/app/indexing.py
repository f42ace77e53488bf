"""Building and dropping the index on a pipeline's vectors, without making a writer wait."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sidecar_daemon.adapters.postgres.indexing import PipelineIndex, index_session
from sidecar_daemon.adapters.postgres.operations import PostgresOperations
from sidecar_daemon.app.operations import checked_database
from sidecar_daemon.domain.errors import Fatal, Transient
from sidecar_daemon.domain.indexing import IndexState, build_memory, graph_bytes
from sidecar_daemon.domain.wording import amount, counted
from sidecar_daemon.settings import Pooler

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from sidecar_daemon.adapters.postgres.indexing import IndexPlan, IndexSession, IndexStatus
    from sidecar_daemon.settings import Settings

_LOOK_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class IndexStep:
    """What is being done now."""

    phase: str
    detail: str = ""
    """What changes while the phase lasts, with the punctuation that joins it to the phase."""
    done: int | None = None
    """Of ``total``; None where that is not known."""
    total: int | None = None
    lasting: bool = False
    """Worth a line that stays, also where a bar is drawn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexBuild:
    """How to build."""

    most_memory: int
    """Bytes of ``maintenance_work_mem`` at most, unless the server gives more by itself."""
    workers: int | None
    """Parallel workers beside the leader; None: as the server is set."""
    wait: bool
    """Wait until the backfill is through."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexBuilt:
    """What a build did."""

    pipeline: str
    state: IndexState
    built: bool
    """False: it was live already."""
    rows: int | None = None
    needed_bytes: int | None = None
    """What the graph was reckoned to need."""
    memory_bytes: int | None = None
    """What the build was given."""
    workers: int | None = None
    seconds: float | None = None
    bytes: int | None = None
    """Size on disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexDeferred:
    """What putting an index off did."""

    pipeline: str
    state: IndexState
    dropped: list[str]
    """Definitions of the indexes that were there."""


async def build_index(
    settings: Settings, pipeline: str, how: IndexBuild, *, tell: Callable[[IndexStep], None]
) -> IndexBuilt:
    """Build the index of a pipeline, unless it is live. What an interrupted build left behind is dropped first.

    Raises:
        Fatal: the pipeline is unknown, has too many dimensions or another owner, or no session can be had.
    """
    async with _opened(settings, pipeline) as index:
        if how.wait:
            await _backfilled(index, tell)
        async with index_session(_direct_url(settings)) as session:
            work = _Work(pipeline, index, session, tell)
            plan = await work.begin()
            await work.drop(plan, valid=False)
            if not plan.found(valid=True):
                return await work.build(plan, how)
            await index.record(IndexState.LIVE)
            size = (await index.status()).bytes
            return IndexBuilt(pipeline=pipeline, state=IndexState.LIVE, built=False, bytes=size)


async def defer_index(settings: Settings, pipeline: str, *, tell: Callable[[IndexStep], None]) -> IndexDeferred:
    """Drop the index of a pipeline, to be built again after a load. Waits for a build that is under way.

    Raises:
        Fatal: as in ``build_index``.
    """
    async with _opened(settings, pipeline) as index, index_session(_direct_url(settings)) as session:
        work = _Work(pipeline, index, session, tell)
        plan = await work.begin()
        await index.record(IndexState.DEFERRED)
        await work.drop(plan, valid=False)
        await work.drop(plan, valid=True)
        return IndexDeferred(pipeline=pipeline, state=IndexState.DEFERRED, dropped=plan.definitions)


@asynccontextmanager
async def _opened(settings: Settings, pipeline: str) -> AsyncIterator[PipelineIndex]:
    """The index of a pipeline that exists and whose index we may build: refused now, rather than after a backfill."""
    async with checked_database(settings) as database:
        await PostgresOperations(database).pipeline(pipeline)
        index = PipelineIndex(database, pipeline)
        await index.plan()
        yield index


async def _backfilled(index: PipelineIndex, tell: Callable[[IndexStep], None]) -> None:
    """Wait until the backfill is through. A wait of hours outlasts a database that is away for a moment."""
    while True:
        try:
            if not (await index.status()).backfilling:
                return
            queued = counted(await index.queued(), "message")
            tell(IndexStep("waiting for the backfill", f": {queued} queued"))
        except Transient as error:
            tell(IndexStep(f"waiting for the database: {error}"))
        await asyncio.sleep(_LOOK_SECONDS)


def _direct_url(settings: Settings) -> str:
    if settings.database.pooler is Pooler.SESSION:
        return settings.database.require_url()
    url = settings.database.notify_url()
    if url is None:
        raise Fatal(
            "pooler",
            "an index is built in a session of its own, which a transaction pooler does not give: set "
            "SIDECAR_LISTEN_URL to a direct URL",
        )
    return url


@dataclass(frozen=True, slots=True)
class _Work:
    """One index being built or dropped."""

    pipeline: str
    index: PipelineIndex
    session: IndexSession
    tell: Callable[[IndexStep], None]

    async def begin(self) -> IndexPlan:
        """Wait until nobody else is at it. Returns what is there then.

        What is not valid may be what somebody builds by hand: it is left over only if it stays so while nobody builds.
        """
        key = (await self.index.plan()).lock_key
        while not await self.session.lock(key):
            await self._tell_progress("another session is at it")
            await asyncio.sleep(_LOOK_SECONDS)
        plan = await self.index.plan()
        while plan.found(valid=False):
            busy = await self.session.busy(plan.embeddings)
            before, plan = plan, await self.index.plan()
            if not busy and plan == before:
                break
            await self._tell_progress("another session is at it")
            await asyncio.sleep(_LOOK_SECONDS)
        return plan

    async def drop(self, plan: IndexPlan, *, valid: bool) -> None:
        """Drop what is there and valid, or there and not valid."""
        what = "" if valid else "what an interrupted build left: "
        for name, _, statement in plan.found(valid=valid):
            self.tell(IndexStep(f"dropping {what}{name}", lasting=True))
            await self.session.run(statement)

    async def build(self, plan: IndexPlan, how: IndexBuild) -> IndexBuilt:
        """Build what is not there."""
        rows = await self.index.rows(plan)
        needed = graph_bytes(rows, plan.dimensions)
        memory = build_memory(needed, least=await self.session.own_memory(), most=how.most_memory)
        workers = await self.session.prepare(memory=memory, workers=how.workers)
        self.tell(IndexStep(_announced(rows, plan.dimensions, needed, memory, workers), lasting=True))
        await self.index.record(IndexState.LIVE)
        started = time.monotonic()
        await self._run(plan.create_statement)
        return IndexBuilt(
            pipeline=self.pipeline,
            state=IndexState.LIVE,
            built=True,
            rows=rows,
            needed_bytes=needed,
            memory_bytes=memory,
            workers=workers,
            seconds=round(time.monotonic() - started, 3),
            bytes=(await self.index.status()).bytes,
        )

    async def _run(self, statement: str) -> None:
        building = asyncio.create_task(self.session.run(statement))
        try:
            while not building.done():
                await self._tell_progress("building")
                await asyncio.wait({building}, timeout=_LOOK_SECONDS)
            await building
        finally:
            building.cancel()  # on the server too: left alone it would go on for nobody
            await asyncio.wait({building})

    async def _tell_progress(self, otherwise: str) -> None:
        """What the server tells of a build; ``otherwise`` where it tells nothing, or cannot be asked now."""
        with suppress(Transient):
            status = await self.index.status()
            self.tell(IndexStep(otherwise) if status.phase is None else _step(status.phase, status))


def _step(phase: str, status: IndexStatus) -> IndexStep:
    if phase.startswith("waiting") and status.lockers_total:
        return IndexStep(phase, f": {status.lockers_done or 0} of {counted(status.lockers_total, 'transaction')} ended")
    rows = f", {counted(status.tuples_done, 'row')}" if status.tuples_done else ""
    return IndexStep(phase, rows, status.blocks_done, status.blocks_total)


def _announced(rows: int, dimensions: int, needed: int, memory: int, workers: int) -> str:
    """What the build is given; and what follows where that is too little."""
    line = (
        f"{rows:,} vectors of {dimensions} dimensions: the graph needs {amount(needed)}, "
        f"maintenance_work_mem is {amount(memory)}, parallel workers at most {workers}"
    )
    if needed <= memory:
        return line
    return f"{line}; the rest is written to disk, which is much slower: allow more with --memory"
