"""What an operator asks of the database: attach, look, search, sweep, pause, mend. One call each, no logic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pgvector import Vector as SqlVector

from sidecar_daemon.adapters.postgres.indexing import PipelineIndex, indexes
from sidecar_daemon.adapters.postgres.queue import PostgresCatalog
from sidecar_daemon.adapters.postgres.tracing import document_facts
from sidecar_daemon.domain.errors import Fatal, SidecarError
from sidecar_daemon.domain.indexing import DeferIndex, IndexState
from sidecar_daemon.domain.messages import LaneDepth, SweepWindow

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    import asyncpg

    from sidecar_daemon.adapters.postgres.indexing import IndexStatus
    from sidecar_daemon.adapters.postgres.pool import Database
    from sidecar_daemon.domain.messages import LongDocuments, ModelId, Pipeline, Vector
    from sidecar_daemon.domain.tracing import DocumentFacts

STANDARD_TABLE = "public.source_documents"
"""The table that ``attach --create`` makes."""

_RESOLVE = """
SELECT pg_catalog.format('%I.%I', n.nspname, c.relname) AS source,
       pg_catalog.regexp_replace(pg_catalog.left(pg_catalog.lower(c.relname), 41), '[^a-z0-9_]', '_', 'g') AS name
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.oid = pg_catalog.to_regclass($1)
"""
_NO_NAME = frozenset({"invalid_name", "postgres_syntax", "stale_catalog"})
"""What the server says to a text that is no table's name; the last one to the name of another database."""
_ALIKE = """
SELECT pg_catalog.format('%I.%I', n.nspname, c.relname) FROM pg_catalog.pg_class c
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p') AND pg_catalog.lower(c.relname) = pg_catalog.lower($1)
ORDER BY n.nspname = 'public' DESC, 1 LIMIT 1
"""
_ATTACH = """
SELECT sidecar.attach($1::text::regclass, $2, p_name => $3, p_key => $4, p_embeddings => $5, p_embeddings_key => $6,
    p_queue => $7, p_model => $8, p_model_id => $9, p_dimensions => $10, p_long_documents => $11,
    p_store_text => $12, p_index => $13, p_defer_index => $14)
"""
_DEAD_LETTERS = """
SELECT d.*, greatest(0, extract(epoch FROM pg_catalog.clock_timestamp() - d.dead_at))::float8 AS age_seconds
FROM sidecar.list_dead_letters($1) AS d
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attachment:
    """What to keep vectors of, with which model, and under which names. None: the database's default."""

    source: str
    content: tuple[str, ...]
    model: str
    model_id: ModelId
    dimensions: int
    long_documents: LongDocuments
    name: str | None = None
    key: str | None = None
    embeddings: str | None = None
    embeddings_key: str | None = None
    queue: str | None = None
    store_text: bool = True
    index: bool = True
    defer_index: DeferIndex = DeferIndex.AUTO


@dataclass(frozen=True, slots=True)
class Attached:
    """What ``attach`` did."""

    name: str
    source: str
    embeddings: str
    queue: str
    model: str
    change: str
    """``created``, ``changed: <what>`` or ``unchanged``."""
    index: IndexState


@dataclass(frozen=True, slots=True)
class PipelineStatus:
    """One row of ``sidecar.status``."""

    name: str
    source: str
    embeddings: str
    model: str
    enabled: bool
    live: LaneDepth
    bulk: LaneDepth
    dead: int
    documents: int
    embedded: int
    stale: int
    missing: int
    coverage: float
    """``embedded / documents``; 1 when there are none."""
    index: IndexState


@dataclass(frozen=True, slots=True)
class Match:
    """One chunk that a search found."""

    key: str
    chunk_no: int
    similarity: float
    """Cosine similarity, in [-1, 1]."""
    source_text: str


@dataclass(frozen=True, slots=True)
class SweepProgress:
    """Totals of one walk over a source."""

    finished: bool
    scanned: int
    missing: int
    outdated: int
    wrong_model: int
    surplus: int
    """Blank documents that still have vectors."""
    enqueued: int


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A document that could not be embedded, and why."""

    id: int
    document_id: str | None
    reason: str
    detail: str | None
    attempts: int | None
    content_hash: str | None
    lane: str
    enqueued_at: datetime
    dead_at: datetime
    resolved: bool
    """The document is gone, blank, changed since, or embedded: nothing is left to mend."""
    message: str
    """The message as the writer sent it, JSON."""
    age_seconds: float
    """Since it was given up, by the database's clock."""


@dataclass(frozen=True, slots=True)
class NewestDeadLetter:
    """A dead letter as a status page shows it: nothing of the document, nothing of the error's text."""

    document_id: str | None
    reason: str | None
    age_seconds: float
    attempts: int | None


class PostgresOperations:
    """The operator's calls on one database."""

    def __init__(self, database: Database) -> None:
        """Bind a database."""
        self._database = database

    @property
    def place(self) -> str:
        """The database as ``user@host:port/name``, without the password."""
        return self._database.place

    async def attach(self, wanted: Attachment) -> Attached:
        """Keep a vector beside every row of a table. Idempotent; changes an attached pipeline.

        Raises:
            Fatal: ``unknown_table``, or ``rejected`` with what is wrong.
        """
        source, name = await self._resolve(wanted.source)
        name = wanted.name or name
        change = await self._database.fetch_value(
            _ATTACH,
            *(source, list(wanted.content), name, wanted.key, wanted.embeddings, wanted.embeddings_key),
            *(wanted.queue, wanted.model, wanted.model_id, wanted.dimensions, str(wanted.long_documents)),
            *(wanted.store_text, wanted.index, str(wanted.defer_index)),
        )
        made = await self.pipeline(name)
        index = await PipelineIndex(self._database, name).status()
        return Attached(
            *(name, made.source, made.embeddings, made.queue, made.model_id or made.model, str(change)), index.state
        )

    async def create_source_documents(self) -> bool:
        """Create the standard document table where it is missing; return whether it was."""
        return bool(await self._database.fetch_value("SELECT sidecar.create_source_documents()"))

    async def detach(self, name: str, *, keep_embeddings: bool) -> str:
        """Undo ``attach``. Returns the table of vectors. Raises ``Refused`` for an unknown pipeline."""
        return str(await self._database.fetch_value("SELECT sidecar.detach($1, $2)", name, keep_embeddings))

    async def pipelines(self) -> list[Pipeline]:
        """All pipelines, by name."""
        return await PostgresCatalog(self._database).pipelines()

    async def pipeline(self, name: str) -> Pipeline:
        """One pipeline. Raises ``Fatal`` that lists the known names."""
        found = await self.pipelines()
        for pipeline in found:
            if pipeline.name == name:
                return pipeline
        known = ", ".join(pipeline.name for pipeline in found) or "none"
        raise Fatal("unknown_pipeline", f"pipeline {name!r} does not exist; known pipelines: {known}")

    async def status(self) -> list[PipelineStatus]:
        """Depths and exact counts of all pipelines. Reads and hashes every source."""
        return [_status(row) for row in await self._database.call("SELECT * FROM sidecar.list_status()")]

    async def indexes(self) -> list[IndexStatus]:
        """The index of every pipeline, by name."""
        return await indexes(self._database)

    async def search(self, name: str, query: Vector, k: int) -> list[Match]:
        """Find the ``k`` nearest chunks, best first.

        Args:
            name: of the pipeline.
            query: float32 of shape ``(dimensions,)``.
            k: 1 to 1000.
        """
        rows = await self._database.call("SELECT * FROM sidecar.search($1, $2, $3)", name, SqlVector(query), k)
        return [Match(row["key"], row["chunk_no"], row["similarity"], row["source_text"]) for row in rows]

    async def request_sweep(self, name: str) -> None:
        """Make the next walk over the source start at once, from the beginning."""
        await self._database.call("SELECT sidecar.request_sweep($1)", name)

    async def sweep(self, name: str, *, rows: int, interval: float) -> SweepWindow:
        """Walk one window of the source; see ``sidecar.sweep``."""
        (row,) = await self._database.call("SELECT * FROM sidecar.sweep($1, $2, $3)", name, rows, interval)
        return SweepWindow(**dict(row))

    async def sweep_progress(self, name: str) -> SweepProgress:
        """What the walk under way, or the last one, has found so far, by whichever replica."""
        (row,) = await self._database.call("SELECT * FROM sidecar.sweep_progress($1)", name)
        return SweepProgress(**dict(row))

    async def set_enabled(self, name: str, *, enabled: bool) -> bool:
        """Pause or resume leasing in every replica; return whether anything changed."""
        return bool(await self._database.fetch_value("SELECT sidecar.set_enabled($1, $2)", name, enabled))

    async def dead_letters(self, name: str) -> list[DeadLetter]:
        """The dead letters of a pipeline, oldest first."""
        rows = await self._database.call(_DEAD_LETTERS, name)
        return [DeadLetter(**{key: value for key, value in row.items() if key != "pipeline"}) for row in rows]

    async def explain(self, name: str, key: str) -> DocumentFacts:
        """What is known about one document; see ``tracing.document_facts``."""
        return await document_facts(self._database, name, key)

    async def newest_dead_letters(self, name: str, limit: int) -> list[NewestDeadLetter]:
        """The newest dead letters of a pipeline, newest first. Asked once, without retry."""
        rows = await self._database.call("SELECT * FROM sidecar.newest_dead_letters($1, $2)", name, limit, retry=False)
        return [NewestDeadLetter(**dict(row)) for row in rows]

    async def replay(self, name: str, ids: Sequence[int] | None) -> int:
        """Move dead letters back to the live lane with a clean count, all when None. Returns how many."""
        return int(await self._database.fetch_value("SELECT sidecar.replay($1, $2)", name, ids))

    async def purge(self, name: str, ids: Sequence[int] | None) -> int:
        """Delete dead letters, all when None. Returns how many."""
        return int(await self._database.fetch_value("SELECT sidecar.purge($1, $2)", name, ids))

    async def _resolve(self, source: str) -> tuple[str, str]:
        """The table's qualified name and the name that its pipeline gets unless told otherwise."""
        try:
            rows = await self._database.call(_RESOLVE, source)
        except SidecarError as error:
            if error.code not in _NO_NAME:
                raise
            rows = []
        if rows:
            return str(rows[0]["source"]), str(rows[0]["name"])
        alike = await self._database.fetch_value(_ALIKE, source.rpartition(".")[2].strip('"'))
        hint = f"; did you mean {alike!r}?" if alike else ""
        raise Fatal("unknown_table", f"table {source!r} does not exist{hint}")


def _status(row: asyncpg.Record) -> PipelineStatus:
    return PipelineStatus(
        name=row["name"],
        source=row["source"],
        embeddings=row["embeddings"],
        model=row["model"],
        enabled=row["enabled"],
        live=_lane(row, "live"),
        bulk=_lane(row, "bulk"),
        dead=row["dead"],
        documents=row["documents"],
        embedded=row["embedded"],
        stale=row["stale"],
        missing=row["missing"],
        coverage=row["coverage"],
        index=IndexState(row["index_state"]),
    )


def _lane(row: asyncpg.Record, lane: str) -> LaneDepth:
    return LaneDepth(row[f"{lane}_depth"], row[f"{lane}_in_flight"], row[f"{lane}_oldest_seconds"])
