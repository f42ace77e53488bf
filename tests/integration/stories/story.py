"""What the stories share: a daemon, its database, and what its vectors must be."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from pgvector.asyncpg import register_vector
from prometheus_client.parser import text_string_to_metric_families

from sidecar_daemon.domain.messages import LongDocuments
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import asyncpg
    from numpy.typing import NDArray

    from sidecar_daemon.ports import Embedder
    from tests.daemon import Daemon

TOLERANCE = 1e-5
"""Largest difference of one component between a vector made alone and the same one made in a batch."""


class Row(NamedTuple):
    """One row of a sidecar table that must be."""

    chunk_no: int
    text: str
    vector: NDArray[np.float32]


def rows_of(embedder: Embedder, text: str, policy: LongDocuments) -> list[Row]:
    """The rows that a text must have: each window embedded alone, put together by the policy."""
    windows = embedder.tokenize(text)
    vectors = [embedder.embed([window.ids])[0] for window in windows]
    if policy is LongDocuments.CHUNKS:
        return [
            Row(n, text[window.start : window.end], vector)
            for n, (window, vector) in enumerate(zip(windows, vectors, strict=True))
        ]
    if policy is LongDocuments.TRUNCATE:
        return [Row(0, text[windows[0].start : windows[0].end], vectors[0])]
    weights = [window.content_tokens for window in windows]
    mean = np.average(np.stack(vectors), axis=0, weights=weights)
    return [Row(0, text, np.asarray(mean / np.linalg.norm(mean), dtype=np.float32))]


@dataclass
class World:
    """One running daemon on one database."""

    daemon: Daemon
    pool: asyncpg.Pool
    embedder: Embedder

    async def sql(self, *statements: str) -> None:
        """Run statements as the application, each in a transaction of its own."""
        for statement in statements:
            await self.pool.execute(statement)

    async def attach(self, source: str, *content: str, **options: Any) -> Story:
        """Attach a table to model ``tiny`` and wait until the running daemon has walked what was there.

        From then on only triggers bring messages, because the next walk is minutes away.

        Args:
            source: the table, quoted as SQL wants it.
            content: its content columns.
            options: further arguments of ``sidecar.attach`` without their ``p_``.
        """
        story = await self.declare(source, *content, **options)
        await story.walked()
        return story

    async def declare(self, source: str, *content: str, **options: Any) -> Story:
        """Attach a table and wait for nothing."""
        named = {"model": "tiny", "dimensions": 32, "index": False, **options}
        arguments = "".join(f", p_{name} => ${n}" for n, name in enumerate(named, start=3))
        await self.pool.execute(
            f"SELECT sidecar.attach($1::text::regclass, $2{arguments})", source, list(content), *named.values()
        )
        row = await self.pool.fetchrow(
            "SELECT name, embeddings::text AS embeddings, embeddings_key, key_type, queue, long_documents, store_text "
            "FROM sidecar.pipelines WHERE source = $1::text::regclass AND ($2::text IS NULL OR name = $2)",
            source,
            named.get("name"),
        )
        assert row is not None
        return Story(self, source, **dict(row))


@dataclass
class Story:
    """One attached table, and what must become of its documents."""

    world: World
    source: str
    name: str
    embeddings: str
    embeddings_key: str
    key_type: str
    queue: str
    long_documents: str
    store_text: bool

    async def rows(self, key: object) -> list[asyncpg.Record]:
        """The rows of one document, by chunk."""
        return await self.world.pool.fetch(
            f'SELECT * FROM {self.embeddings} WHERE "{self.embeddings_key}" = $1::text::{self.key_type} '
            "ORDER BY chunk_no",
            str(key),
        )

    async def holds(self, key: object, text: str) -> None:
        """Wait until a document has exactly the rows of a text, by the pipeline's current model."""
        policy = LongDocuments(self.long_documents)
        wanted = rows_of(self.world.embedder, text, policy)
        model_id = self.world.embedder.model_id(policy)

        async def check() -> bool:
            found = await self.rows(key)
            assert [row["chunk_no"] for row in found] == [row.chunk_no for row in wanted]
            for row, expected in zip(found, wanted, strict=True):
                assert row["source_text"] == (expected.text if self.store_text else None)
                assert row["model"] == model_id
                assert np.abs(row["embedding"].to_numpy() - expected.vector).max() <= TOLERANCE
            md5 = await self.world.pool.fetchval("SELECT md5($1)", text)
            return {row["source_text_hash"] for row in found} == {md5}

        await self._eventually(check, f"the vector of {key!r} in {self.name}")

    async def forgets(self, key: object) -> None:
        """Wait until a document has no row, and no message that could bring one back."""

        async def check() -> bool:
            return not await self.rows(key)

        await self._eventually(check, f"no vector of {key!r} in {self.name}")
        await self.quiet()
        assert not await self.rows(key)

    async def quiet(self) -> None:
        """Wait until both lanes are empty."""

        async def check() -> bool:
            return await self.depth() == 0

        await self._eventually(check, f"empty lanes of {self.name}")

    async def walked(self) -> None:
        """Wait until the walk that ``attach`` asked for is over and all that it found is worked off."""

        async def check() -> object:
            return await self.world.pool.fetchval(
                "SELECT finished_at IS NOT NULL FROM sidecar.sweeps WHERE pipeline = $1", self.name
            )

        await self._eventually(check, f"the end of the walk of {self.name}")
        await self.quiet()

    async def depth(self) -> int:
        """Messages in both lanes, in flight included."""
        return int(
            await self.world.pool.fetchval(
                f"SELECT (SELECT count(*) FROM pgmq.q_{self.queue}) + (SELECT count(*) FROM pgmq.q_{self.queue}_bulk)"
            )
        )

    async def dead(self, count: int) -> list[asyncpg.Record]:
        """Wait for that many dead letters; return them, oldest first."""

        async def check() -> list[asyncpg.Record] | None:
            found = await self.world.pool.fetch("SELECT * FROM sidecar.list_dead_letters($1)", self.name)
            return found if len(found) == count else None

        if count == 0:
            assert await self.world.pool.fetch("SELECT * FROM sidecar.list_dead_letters($1)", self.name) == []
            return []
        found = await self._eventually(check, f"{count} dead letters of {self.name}")
        assert isinstance(found, list)
        return found

    async def send(self, *messages: str) -> None:
        """Put messages, JSON texts, into the live lane past the trigger."""
        for message in messages:
            await self.world.pool.execute("SELECT pgmq.send($1::text, $2::text::jsonb)", self.queue, message)
        await self.world.pool.execute("SELECT pg_notify('sidecar', 'live:' || $1::text)", self.name)

    async def metric(self, name: str, **labels: str) -> float:
        """The sum of this pipeline's samples of a metric."""
        text = (await self.world.daemon.get("/metrics")).text
        wanted = {"pipeline": self.name, **labels}
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and wanted.items() <= sample.labels.items()
        )

    async def outcomes(self, outcome: str) -> int:
        """How many documents ended this way."""
        return int(await self.metric("sidecar_documents_total", outcome=outcome))

    async def embeds(self) -> int:
        """How many documents went through the model, also those whose vectors were not written."""
        return int(await self.metric("sidecar_batch_documents_sum"))

    @asynccontextmanager
    async def held(self, key: str) -> AsyncIterator[None]:
        """Hold a document's lock, so that the daemon cannot settle it."""
        async with self.world.pool.acquire() as connection, connection.transaction():
            await connection.execute("SELECT sidecar._lock_documents($1, ARRAY[$2::text])", self.name, key)
            yield

    async def settling(self) -> None:
        """Wait until the daemon stands before a lock with a finished vector in its hands."""

        async def check() -> object:
            return await self.world.pool.fetchval(
                "SELECT EXISTS (SELECT FROM pg_locks AS l JOIN pg_stat_activity AS a USING (pid) "
                "WHERE NOT l.granted AND a.application_name = 'sidecar_daemon' AND a.datname = current_database())"
            )

        await self._eventually(check, f"a settlement of {self.name} that waits")

    async def _eventually(self, check: Any, what: str) -> object:
        found: object = None

        async def noted() -> bool:
            nonlocal found
            found = await check()
            return bool(found)

        try:
            await eventually(noted, what=what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n" + "\n".join(self.world.daemon.log[-20:])) from None
        return found


async def know_vectors(connection: asyncpg.Connection) -> None:
    """Prepare a pooled connection."""
    await register_vector(connection)
