"""The index on a pipeline's vectors: how it is, and a session of its own that builds or drops it."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import asyncpg

from sidecar_daemon.adapters.postgres.errors import translated
from sidecar_daemon.adapters.postgres.pool import place_of
from sidecar_daemon.domain.errors import Fatal, SidecarError
from sidecar_daemon.domain.indexing import IndexState

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sidecar_daemon.adapters.postgres.pool import Database

_CONNECT_SECONDS = 10.0
_CLOSE_SECONDS = 10.0
_OF_PIPELINE = "SELECT * FROM sidecar.list_indexes() WHERE pipeline = $1"
_QUEUED = "SELECT pg_catalog.sum(depth) FROM sidecar.queue_depths() WHERE pipeline = $1 AND lane <> 'dead'"
_BUSY = """
SELECT EXISTS (
    SELECT FROM pg_catalog.pg_locks
    WHERE locktype = 'relation' AND relation = $1::text::pg_catalog.regclass AND granted
    AND mode = 'ShareUpdateExclusiveLock'
    AND database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())
    AND pid <> pg_catalog.pg_backend_pid())
"""
_NO_LIMITS = {"statement_timeout": "0", "lock_timeout": "0", "idle_session_timeout": "0"}
"""A build takes as long as it takes, and waits for the writers of its moment; nobody waits for it meanwhile."""
_NO_NEWER_LIMIT = """
SELECT pg_catalog.set_config(name, '0', false) FROM pg_catalog.pg_settings WHERE name = 'transaction_timeout'
"""
"""From PostgreSQL 17 on; an older server would refuse a connection that names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexStatus:
    """The index of one pipeline, as the database sees it."""

    pipeline: str
    state: IndexState
    backfilling: bool
    """A backfill walks, its lane still holds messages, or the live lane many: a load goes on."""
    bytes: int | None
    """Size on disk; None unless it is live."""
    phase: str | None
    """What a build is doing now, in PostgreSQL's words; None without one, or where it may not be seen."""
    blocks_done: int | None
    blocks_total: int | None
    tuples_done: int | None
    lockers_done: int | None
    lockers_total: int | None

    @property
    def percent(self) -> float | None:
        """How far the phase is, 0 to 100; None where that is not known."""
        if not self.blocks_total or self.blocks_done is None:
            return None
        return min(100.0, 100.0 * self.blocks_done / self.blocks_total)


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexPlan:
    """What it takes to build or drop the index of one pipeline."""

    embeddings: str
    dimensions: int
    owner: str
    owned: bool
    """Whether our role may act as the owner of the table."""
    lock_key: int
    create_statement: str
    names: list[str]
    definitions: list[str]
    drop_statements: list[str]
    valid: list[bool]

    def found(self, *, valid: bool) -> list[tuple[str, str, str]]:
        """Name, definition and drop statement of what is there and valid, or there and not valid."""
        all_of_them = zip(self.names, self.definitions, self.drop_statements, self.valid, strict=True)
        return [(name, definition, drop) for name, definition, drop, is_valid in all_of_them if is_valid is valid]


async def indexes(database: Database) -> list[IndexStatus]:
    """The index of every pipeline, by name."""
    rows = await database.call("SELECT * FROM sidecar.list_indexes()")
    return [_status(row) for row in rows]


class PipelineIndex:
    """The index of one pipeline."""

    def __init__(self, database: Database, pipeline: str) -> None:
        """Bind a pipeline that exists."""
        self._database = database
        self._pipeline = pipeline

    async def status(self) -> IndexStatus:
        """How it is now.

        Raises:
            Fatal: ``unknown_pipeline``, it was detached meanwhile.
        """
        for row in await self._database.call(_OF_PIPELINE, self._pipeline):
            return _status(row)
        raise Fatal("unknown_pipeline", f"pipeline {self._pipeline!r} does not exist: it was detached meanwhile")

    async def queued(self) -> int:
        """Messages of both lanes."""
        return int(await self._database.fetch_value(_QUEUED, self._pipeline) or 0)

    async def plan(self) -> IndexPlan:
        """What it takes to build or drop it.

        Raises:
            Fatal: ``rejected``, pgvector has no index for so many dimensions; ``not_owner``, our role may not.
        """
        (row,) = await self._database.call("SELECT * FROM sidecar.index_plan($1)", self._pipeline)
        plan = IndexPlan(**dict(row))
        if not plan.owned:
            raise Fatal(
                "not_owner",
                f"table {plan.embeddings} belongs to {plan.owner}: only its owner may build or drop its index",
            )
        return plan

    async def rows(self, plan: IndexPlan) -> int:
        """How many vectors there are, counted."""
        return int(await self._database.fetch_value(f"SELECT pg_catalog.count(*) FROM {plan.embeddings}"))  # noqa: S608  quoted by the server

    async def record(self, wanted: IndexState) -> None:
        """Record what is wanted of it: ``LIVE`` or ``DEFERRED``."""
        await self._database.call("SELECT sidecar.record_index($1, $2)", self._pipeline, wanted.value)


class IndexSession:
    """One connection on which statements run that take minutes and stand outside any transaction."""

    def __init__(self, connection: asyncpg.Connection, place: str) -> None:
        self._connection = connection
        self._place = place

    async def lock(self, key: int) -> bool:
        """Take the session's advisory lock under which indexes are built and dropped; False: somebody else has it."""
        with translated(self._place):
            return bool(await self._connection.fetchval("SELECT pg_catalog.pg_try_advisory_lock($1)", key))

    async def busy(self, table: str) -> bool:
        """Whether another session holds the lock on a table under which an index is built beside writers."""
        with translated(self._place):
            return bool(await self._connection.fetchval(_BUSY, table))

    async def own_memory(self) -> int:
        """Bytes of ``maintenance_work_mem`` that the server gives by itself."""
        with translated(self._place):
            return int(
                await self._connection.fetchval(
                    "SELECT pg_catalog.pg_size_bytes(pg_catalog.current_setting('maintenance_work_mem'))"
                )
            )

    async def prepare(self, *, memory: int, workers: int | None) -> int:
        """Set the memory of a build in bytes and its parallel workers (None: the server's own). Returns the workers."""
        with translated(self._place):
            await self._set("maintenance_work_mem", f"{memory // 1024}kB")
            if workers is not None:
                await self._set("max_parallel_maintenance_workers", str(workers))
            return int(
                await self._connection.fetchval(
                    "SELECT pg_catalog.current_setting('max_parallel_maintenance_workers')::integer"
                )
            )

    async def run(self, statement: str) -> None:
        """Run one statement, for as long as it takes. A cancelled call cancels it on the server too.

        Raises:
            Fatal: ``shared_memory``, parallel workers did not get the memory that they share.
        """
        try:
            with translated(self._place):
                await self._connection.execute(statement)
        except SidecarError as error:
            if "shared memory" not in str(error):
                raise
            hint = "give the server's container more (--shm-size), lower --memory, or build with --workers 0"
            raise Fatal("shared_memory", f"parallel workers share the memory of a build: {error}; {hint}") from None

    async def _set(self, name: str, value: str) -> None:
        await self._connection.execute("SELECT pg_catalog.set_config($1, $2, false)", name, value)


@asynccontextmanager
async def index_session(dsn: str) -> AsyncIterator[IndexSession]:
    """A session of its own, without the limits of a pool's.

    Args:
        dsn: leads to the server directly: behind a transaction pooler there is no session to keep settings and a lock.

    Raises:
        SidecarError: the server cannot be reached.
    """
    place = place_of(dsn)
    with translated(place):
        connection = await asyncpg.connect(
            dsn,
            timeout=_CONNECT_SECONDS,
            statement_cache_size=0,
            server_settings={"application_name": "sidecar_daemon index", **_NO_LIMITS},
        )
    try:
        with translated(place):
            await connection.execute(_NO_NEWER_LIMIT)
        yield IndexSession(connection, place)
    finally:
        with translated(place):
            await connection.close(timeout=_CLOSE_SECONDS)


def _status(row: asyncpg.Record) -> IndexStatus:
    return IndexStatus(**{**dict(row), "state": IndexState(row["state"])})
