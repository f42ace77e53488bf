"""What a scene stands on: one arena, sessions that step through the real queue, and a worker that finishes the rest."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import asyncpg
from pgvector.asyncpg import register_vector

from sidecar_daemon.adapters.postgres.errors import translated
from sidecar_daemon.adapters.postgres.queue import PostgresQueue
from sidecar_daemon.domain.messages import Chunk, Lane, LongDocuments, PipelineName, Settlement
from sidecar_daemon.domain.outcomes import Verdict
from tests.torture.bench import CANARY, CHUNKS, SOURCE
from tests.torture.embedder import MODEL, REFERENCE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sidecar_daemon.domain.messages import DocumentKey, Lease, Settled
    from tests.torture.bench import Arena
    from tests.torture.report import FaultReport

MODEL_ID = REFERENCE.model_id(LongDocuments.CHUNKS)
MAX_BYTES = 100_000


class Session:
    """One connection that stands in for the pool: steps of a scene choose when its transaction ends."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        """Take over a connection."""
        self.connection = connection
        self.queue = PostgresQueue(self, PipelineName(CHUNKS), MODEL_ID, max_document_bytes=MAX_BYTES)  # type: ignore[arg-type]  # the two calls that the queue makes

    async def call(self, function_sql: str, *args: object, retry: bool = True) -> list[asyncpg.Record]:
        """As the pool's, without a retry."""
        del retry
        with translated("scene"):
            return await self.connection.fetch(function_sql, *args)

    async def fetch_value(self, function_sql: str, *args: object, retry: bool = True) -> Any:
        """As the pool's, without a retry."""
        rows = await self.call(function_sql, *args, retry=retry)
        return rows[0][0] if rows else None

    async def lease(self, *, seconds: float = 0, lane: Lane = Lane.LIVE) -> list[Lease]:
        """Lease everything visible; for 0 seconds: it expires at once, and others may lease it too."""
        return await self.queue.lease(lane, seconds=seconds, limit=100)

    async def settle(self, key: DocumentKey, content: str, content_hash: str, leases: Sequence[Lease]) -> Settled:
        """Embed and settle one document."""
        windows = REFERENCE.tokenize(content) if content.strip() else []
        vectors = REFERENCE.embed([window.ids for window in windows])
        chunks = tuple(Chunk(n, content[w.start : w.end], vectors[n]) for n, w in enumerate(windows))
        (settled,) = await self.queue.settle([Settlement(key, content_hash, chunks, tuple(leases))])  # type: ignore[arg-type]  # a hash that a reading brought
        return settled


class Ground:
    """One arena for many scenes; each document of each scene has a key of its own, so nothing is ever reset."""

    def __init__(self, arena: Arena, report: FaultReport, *, stride: int = 1) -> None:
        """Bind an arena; ``open`` connects. ``stride``: play every n-th order only, for mutants."""
        self.stride = stride
        self.arena = arena
        self.report = report
        self.sessions: list[Session] = []
        self.poison: dict[str, str] = {}
        self.maybe_dead: set[str] = set()
        """Keys that a scene itself dead-letters in some of its orders."""
        self._keys = itertools.count(1)

    async def open(self) -> None:
        """Three sessions of a runtime role; register the model."""
        for slot in (1, 2, 3):
            connection = await asyncpg.connect(self.arena.daemon_url(slot))
            await register_vector(connection)
            self.sessions.append(Session(connection))
        await self.sessions[0].call("SELECT sidecar.register_model($1, $2, $3)", CHUNKS, MODEL, MODEL_ID)
        self.admin, self.writer = await self.arena.connect(), await self.arena.connect()
        await self.admin.execute("SELECT sidecar.request_sweep($1)", CHUNKS)
        await self.sessions[0].queue.sweep(rows=1000, interval=0)

    async def close(self) -> None:
        """Leave the database, whatever state the sessions are in."""
        for session in self.sessions:
            session.connection.terminate()
        self.admin.terminate()
        self.writer.terminate()

    def claim(self, holds: bool, message: str) -> None:
        """Record a violation unless ``holds``."""
        self.report.claim(holds, "T12", message)

    async def document(self, words: int = 5) -> int:
        """Insert a document of ``words`` words; returns its key."""
        key = next(self._keys)
        await self.write(key, words, "first")
        return key

    async def write(self, key: int, words: int, version: str, writer: asyncpg.Connection | None = None) -> None:
        """Insert or edit a document; each version has a text of its own."""
        text = f"{CANARY} {key} {version} " + " ".join(["word"] * words)
        statement = f"INSERT INTO {SOURCE} VALUES ($1, $2) ON CONFLICT (id) DO UPDATE SET content = excluded.content"
        await (writer or self.admin).execute(statement, key, text)

    async def finish(self, session: Session | None = None) -> int:
        """Be the worker that does what is left, one message after the other. Returns how many rounds it took."""
        session = session or self.sessions[2]
        for n in range(50):
            leases = [*await session.lease(seconds=30), *await session.lease(seconds=30, lane=Lane.BULK)]
            if not leases:
                return n
            by_key: dict[DocumentKey, list[Lease]] = {}
            for lease in leases:
                assert lease.key is not None
                by_key.setdefault(lease.key, []).append(lease)
            for reading in await session.queue.read(list(by_key)):
                held = by_key[reading.key]
                if reading.verdict in (Verdict.EMBED, Verdict.BLANK):
                    assert reading.content_hash is not None
                    await session.settle(reading.key, reading.content or "", reading.content_hash, held)
                else:
                    await session.queue.acknowledge(held)
        raise AssertionError("the queue does not become empty")
