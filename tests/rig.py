"""A real table with a real pipeline, to work on step by step."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import asyncpg
import numpy as np
import structlog
from pgvector.asyncpg import register_vector
from prometheus_client import CollectorRegistry

from sidecar_daemon.adapters.postgres.queue import PostgresCatalog, PostgresQueue
from sidecar_daemon.domain.messages import (
    Chunk,
    ContentHash,
    DocumentKey,
    Lane,
    LongDocuments,
    ModelId,
    Pipeline,
    PipelineName,
    Settlement,
)
from sidecar_daemon.domain.pulse import Pulse
from sidecar_daemon.patience import Patience
from sidecar_daemon.telemetry import CIRCUIT_STATES, Telemetry
from sidecar_daemon.worker import Worker, WorkerLimits
from tests.deterministic import DeterministicEmbedder

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, MutableMapping
    from concurrent.futures import ThreadPoolExecutor

    from sidecar_daemon.adapters.postgres.pool import Database
    from sidecar_daemon.domain.messages import Lease, Settled
    from sidecar_daemon.ports import Embedder, Queue

NAME = PipelineName("docs")
PLAIN = DeterministicEmbedder()
MODEL = PLAIN.model_id(LongDocuments.MEAN)
MAX_BYTES = 100_000
LIMITS = WorkerLimits(
    threads=2,
    batch_tokens=256,
    batch_windows=8,
    lease_seconds=60,
    lease_messages=16,
    max_attempts=3,
    backoff_base=0.01,
    backoff_cap=0.02,
    poll_min=0.01,
    poll_max=0.05,
    drain_seconds=10,
)


@dataclass
class Rig:
    """Table ``docs(id, body)``, its pipeline, and the queue of one replica. ``connection`` is a superuser's."""

    connection: asyncpg.Connection
    database: Database
    url: str
    embedder: Embedder = PLAIN
    model_id: ModelId = MODEL

    @property
    def queue(self) -> PostgresQueue:
        """The queue as one replica sees it."""
        return PostgresQueue(self.database, NAME, self.model_id, max_document_bytes=MAX_BYTES)

    @property
    def catalog(self) -> PostgresCatalog:
        """The pipelines of the database."""
        return PostgresCatalog(self.database)

    async def pipeline(self) -> Pipeline:
        """The pipeline's row."""
        (found,) = [p for p in await self.catalog.pipelines() if p.name == NAME]
        return found

    async def write(self, **bodies: str | None) -> None:
        """Insert or edit documents, ``k1="text"`` for key 1, all in one statement."""
        await write(self.connection, bodies)

    async def drain_queue(self) -> None:
        """Forget every message, so that a test starts from nothing."""
        await self.connection.execute("DELETE FROM pgmq.q_docs; DELETE FROM pgmq.q_docs_bulk")

    async def lease(self, lane: Lane = Lane.LIVE, seconds: float = 60, limit: int = 100) -> list[Lease]:
        """Lease as a replica does."""
        return await self.queue.lease(lane, seconds=seconds, limit=limit)

    async def lease_one(self, lane: Lane = Lane.LIVE) -> Lease:
        """Lease what must be one message."""
        (lease,) = await self.lease(lane)
        return lease

    async def expire(self, lane: Lane = Lane.LIVE) -> None:
        """Let every lease of a lane run out."""
        await self.connection.execute(f"UPDATE {table(lane)} SET vt = clock_timestamp() - interval '1 s'")

    async def messages(self, lane: Lane = Lane.LIVE) -> list[dict[str, Any]]:
        """A lane's messages, oldest first, with ``hidden`` seconds."""
        rows = await self.connection.fetch(
            f"SELECT msg_id, read_ct, message, extract(epoch FROM vt - clock_timestamp())::float AS hidden "
            f"FROM {table(lane)} ORDER BY msg_id"
        )
        return [{**dict(row), "message": json.loads(row["message"])} for row in rows]

    async def depth(self) -> int:
        """Messages in both lanes."""
        return len(await self.messages()) + len(await self.messages(Lane.BULK))

    async def dead(self) -> list[asyncpg.Record]:
        """The dead letters."""
        return list(await self.connection.fetch("SELECT * FROM sidecar.list_dead_letters('docs') ORDER BY id"))

    async def vectors(self, key: int | None = None) -> list[asyncpg.Record]:
        """Rows of the sidecar table by key and chunk, of one document or of all."""
        return list(
            await self.connection.fetch(
                "SELECT * FROM docs_embeddings WHERE $1::bigint IS NULL OR id = $1 ORDER BY id, chunk_no", key
            )
        )

    async def embedded(self) -> dict[int, str]:
        """The stored text of every document with a vector."""
        return {row["id"]: row["source_text"] for row in await self.vectors()}

    async def assert_true(self) -> None:
        """Every vector is the model's answer to the current text, and every text has one or a dead letter."""
        dead = [row["document_id"] for row in await self.dead()]
        rows = await self.connection.fetch(
            "SELECT d.id, d.body, e.embedding, e.source_text_hash = md5(d.body) AS current FROM docs AS d "
            "FULL JOIN docs_embeddings AS e USING (id) WHERE btrim(coalesce(d.body, 'x')) <> '' "
            "AND (e.id IS NOT NULL OR d.id::text <> ALL (array_remove($1::text[], NULL)))",
            dead,
        )
        for row in rows:
            assert row["current"], f"document {row['id']} has no vector of its current text"
            windows = self.embedder.tokenize(row["body"])
            if len(windows) == 1:
                np.testing.assert_allclose(
                    row["embedding"].to_numpy(), self.embedder.embed([windows[0].ids])[0], atol=1e-5
                )

    def settlement(
        self, key: int | str, text: str, *leases: Lease, chunks: int = 1, of: str | None = None
    ) -> Settlement:
        """What a worker hands to settle for a text that it read; ``of``: the whole text, where it has chunks."""
        return Settlement(
            key=DocumentKey(str(key)),
            content_hash=md5(text if of is None else of),
            chunks=tuple(
                Chunk(number=n, text=text, vector=self._vector(f"{text} {n}" if n else text)) for n in range(chunks)
            ),
            leases=leases,
        )

    async def settle(self, *settlements: Settlement) -> list[Settled]:
        """Settle as a replica does."""
        return await self.queue.settle(settlements)

    def _vector(self, text: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        return np.asarray(self.embedder.embed([self.embedder.tokenize(text)[0].ids])[0], dtype=np.float32)


def table(lane: Lane) -> str:
    """The queue table of a lane."""
    return "pgmq.q_docs" if lane is Lane.LIVE else "pgmq.q_docs_bulk"


def md5(text: str) -> ContentHash:
    """The content hash, as Postgres makes it."""
    return ContentHash(hashlib.md5(text.encode(), usedforsecurity=False).hexdigest())


async def write(connection: asyncpg.Connection, bodies: Mapping[str, str | None]) -> None:
    """Insert or edit documents by name ``k<number>``."""
    await connection.execute(
        "INSERT INTO docs SELECT * FROM unnest($1::bigint[], $2::text[]) "
        "ON CONFLICT (id) DO UPDATE SET body = excluded.body",
        [int(name.removeprefix("k")) for name in bodies],
        list(bodies.values()),
    )


async def attach(
    connection: asyncpg.Connection,
    *,
    key: str = "bigint",
    model: str = "deterministic",
    model_id: str | None = MODEL,
    dimensions: int = 16,
    long_documents: str = "mean",
    store_text: bool = True,
) -> None:
    """Make table ``docs`` and attach it, without an index on the vectors."""
    await connection.execute(f"CREATE TABLE docs (id {key} PRIMARY KEY, body text)")
    await connection.execute(
        "SELECT sidecar.attach('docs', ARRAY['body'], p_model => $1, p_model_id => $2, p_dimensions => $3, "
        "p_long_documents => $4, p_store_text => $5, p_index => false)",
        model,
        model_id,
        dimensions,
        long_documents,
        store_text,
    )


@asynccontextmanager
async def second_session(url: str) -> AsyncIterator[asyncpg.Connection]:
    """Another plain connection; what it leaves open is rolled back."""
    plain = await asyncpg.connect(url)
    await register_vector(plain)
    try:
        yield plain
    finally:
        await plain.close()


async def blocked(connection: asyncpg.Connection, statement: str) -> bool:
    """Whether some session waits for a lock inside a statement."""
    return bool(
        await connection.fetchval(
            "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE $1)",
            f"%{statement}%",
        )
    )


@dataclass
class Told:
    """Real telemetry whose log lines are kept."""

    lines: list[dict[str, Any]] = field(default_factory=list)
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    telemetry: Telemetry = field(init=False)

    def __post_init__(self) -> None:
        logger = structlog.wrap_logger(
            None, processors=[self._keep], wrapper_class=structlog.make_filtering_bound_logger(10)
        )
        self.telemetry = Telemetry(self.registry, logger)

    def events(self, name: str) -> list[dict[str, Any]]:
        """Lines of one event."""
        return [line for line in self.lines if line["event"] == name]

    def _keep(self, _: object, __: str, line: MutableMapping[str, Any]) -> str:
        self.lines.append(dict(line))
        raise structlog.DropEvent

    def circuit(self, scope: str = "database") -> str | None:
        """The state that a breaker's gauge shows."""
        for state in CIRCUIT_STATES:
            if self.registry.get_sample_value("sidecar_circuit_state", {"scope": scope, "state": state}):
                return state
        return None

    def documents(self, outcome: str) -> float:
        """How many documents ended this way."""
        found = self.registry.get_sample_value("sidecar_documents_total", {"pipeline": NAME, "outcome": outcome})
        return found or 0.0

    def patience(self, scope: str = "database") -> Patience:
        """A patience that does not wait long."""
        return Patience(scope, self.telemetry, uniform=lambda low, high: min(high, low + 0.02), clock=time.monotonic)


def build_worker(
    pipeline: Pipeline,
    queue: Queue,
    embedder: Embedder,
    told: Told,
    executor: ThreadPoolExecutor,
    *,
    pulse: Pulse | None = None,
    **limits: float,
) -> Worker:
    """A real worker, with limits of a test."""
    return Worker(
        pipeline,
        embedder.model_id(pipeline.long_documents),
        queue=queue,
        embedder=embedder,
        executor=executor,
        limits=replace(LIMITS, **limits),  # type: ignore[arg-type]  # the names are those of the fields
        telemetry=told.telemetry,
        uniform=lambda low, high: min(high, low + 0.02),
        clock=time.monotonic,
        pulse=pulse or Pulse(time.monotonic),
    )


@asynccontextmanager
async def running(worker: Worker) -> AsyncIterator[asyncio.Task[None]]:
    """A worker at work; stopped, and its errors raised, at the end."""
    task = asyncio.create_task(worker.run())
    try:
        yield task
    finally:
        worker.stop()
        await task
