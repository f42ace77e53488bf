"""Real daemons, real signals, a real server that goes away: every document ends true, nobody is blamed."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import asyncpg
import pytest

from tests.conftest import admin, migrate_at
from tests.daemon import Daemon
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from sidecar_daemon.adapters.postgres.embedded import EmbeddedServer

pytestmark = pytest.mark.long

DOCUMENTS = 500
SLOW = {"THREADS": "1", "BATCH_WINDOWS": "1", "LEASE_SECONDS": "5", "LEASE_MESSAGES": "32", "POLL_MAX": "0.5"}
"""One window a run, so that a fault lands mid-way; the shortest lease, so that a lost one is back soon."""


async def prepare(url: str, documents: int = DOCUMENTS) -> None:
    """A table that was there before, each document some windows long, and its pipeline: a backfill waits."""
    connection = await asyncpg.connect(url)
    await connection.execute("CREATE TABLE docs (id bigint PRIMARY KEY, body text NOT NULL)")
    await connection.execute(
        "INSERT INTO docs SELECT n, (SELECT string_agg('word' || n || 'x' || w, ' ') FROM generate_series(1, 15) AS w) "
        "FROM generate_series(1, $1::int) AS n",
        documents,
    )
    await connection.execute(
        "SELECT sidecar.attach('docs', ARRAY['body'], p_model => 'tiny', p_dimensions => 32, p_index => false)"
    )
    await connection.close()


class Watcher:
    """A connection of the test's own to the daemon's database."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self.connection = connection

    async def embedded(self) -> int:
        """Documents with a vector of their current text."""
        return int(
            await self.connection.fetchval(
                "SELECT count(*) FROM docs AS d JOIN docs_embeddings AS e USING (id) WHERE source_text_hash = md5(body)"
            )
        )

    async def depth(self) -> int:
        """Messages in both lanes."""
        return int(
            await self.connection.fetchval(
                "SELECT (SELECT count(*) FROM pgmq.q_docs) + (SELECT count(*) FROM pgmq.q_docs_bulk)"
            )
        )

    async def partly(self) -> bool:
        """Whether a backfill is under way: begun and not nearly done."""
        done = await self.embedded()
        assert done < DOCUMENTS - 50, "the fault would come too late"
        return done >= 30

    async def finished(self) -> bool:
        """Whether everything is embedded and the lanes are empty."""
        return await self.embedded() == DOCUMENTS and await self.depth() == 0

    async def assert_right(self) -> None:
        """Every document has one vector, of its current text, and none is dead."""
        assert await self.embedded() == DOCUMENTS
        assert await self.connection.fetchval("SELECT count(*) FROM docs_embeddings") == DOCUMENTS
        assert await self.connection.fetchval("SELECT count(*) FROM pgmq.q_docs_dlq") == 0


@asynccontextmanager
async def watching(url: str) -> AsyncIterator[Watcher]:
    connection = await asyncpg.connect(url)
    try:
        yield Watcher(connection)
    finally:
        await connection.close()


@pytest.fixture
async def backfill(database_url: str) -> AsyncIterator[Watcher]:
    """Five hundred documents that wait for their first vector."""
    await prepare(database_url)
    async with watching(database_url) as watcher:
        yield watcher


async def test_kill_in_a_backfill_loses_and_doubles_nothing(
    backfill: Watcher, database_url: str, tiny_models: Path
) -> None:
    async with Daemon(database_url, tiny_models, SLOW) as daemon:
        await daemon.wait_for(backfill.partly, what="a part of the backfill")
        await daemon.kill()
        assert 30 <= await backfill.embedded() < DOCUMENTS
        await daemon.start()
        await daemon.wait_for(backfill.finished, timeout=120, what="the whole backfill")
    await backfill.assert_right()


async def test_a_server_that_crashes_in_a_backfill_is_waited_for(server: EmbeddedServer, tiny_models: Path) -> None:
    url = server.dsn("work")
    admin(server.dsn(), "CREATE DATABASE work")
    await migrate_at(url)
    await prepare(url)
    async with Daemon(url, tiny_models, SLOW) as daemon:
        async with watching(url) as before:
            await daemon.wait_for(before.partly, what="a part of the backfill")
        pid = daemon.pid
        await asyncio.to_thread(server.stop, "immediate")
        await daemon.wait_for(lambda: any(e["event"] == "fault" for e in daemon.events), what="the fault's line")
        await daemon.wait_for(lambda: not_ready(daemon), what="unreadiness")
        await asyncio.to_thread(server.start)
        async with watching(url) as after:
            await daemon.wait_for(after.finished, timeout=120, what="the whole backfill")
            await after.assert_right()
        await daemon.wait_for(daemon.is_ready, what="readiness")
        assert daemon.pid == pid
        assert daemon.process is not None
        assert daemon.process.returncode is None
        told = [e for e in daemon.events if e["event"] in {"fault", "recovered"}]
        assert [e for e in told if e["event"] == "recovered"]
        assert len(told) <= 12, "an outage is told once a cause, not once a try"
        assert await daemon.terminate() == 0


async def not_ready(daemon: Daemon) -> bool:
    return await daemon.status_of("/readyz") == 503


async def test_a_drain_finishes_what_began_and_burns_no_attempt(
    backfill: Watcher, database_url: str, tiny_models: Path
) -> None:
    async with Daemon(database_url, tiny_models, SLOW | {"DRAIN_SECONDS": "20"}) as daemon:
        await daemon.wait_for(backfill.partly, what="a part of the backfill")
        assert await daemon.terminate(timeout=40) == 0
        left = await backfill.connection.fetch(
            "SELECT read_ct, coalesce((message #>> '{sidecar,excused}')::int, 0) AS excused, "
            "vt <= clock_timestamp() + interval '1 s' AS visible FROM pgmq.q_docs_bulk"
        )
        assert 0 < len(left) == DOCUMENTS - await backfill.embedded()
        assert all(row["visible"] for row in left)
        assert all(row["read_ct"] == row["excused"] for row in left)
        assert any(row["read_ct"] > 0 for row in left), "some were leased and given back"
        assert [e["event"] for e in daemon.events][-1] == "daemon_stopped"


async def test_two_replicas_share_one_queue(backfill: Watcher, database_url: str, tiny_models: Path) -> None:
    async with Daemon(database_url, tiny_models, SLOW) as one, Daemon(database_url, tiny_models, SLOW) as two:
        await one.wait_for(backfill.finished, timeout=120, what="the whole backfill")
        shares = [
            sum(e.get("embedded", 0) for e in daemon.events if e["event"] == "batch_settled") for daemon in (one, two)
        ]
    await backfill.assert_right()
    assert sum(shares) == DOCUMENTS, "no document was embedded twice"


async def test_a_replica_that_froze_past_its_lease_does_no_harm(
    backfill: Watcher, database_url: str, tiny_models: Path
) -> None:
    async with Daemon(database_url, tiny_models, SLOW) as frozen:
        await frozen.wait_for(backfill.partly, what="a part of the backfill")
        os.kill(frozen.pid, signal.SIGSTOP)
        try:
            async with Daemon(database_url, tiny_models, SLOW) as other:
                await other.wait_for(backfill.finished, timeout=120, what="the frozen replica's share")
        finally:
            os.kill(frozen.pid, signal.SIGCONT)
        await backfill.connection.execute("UPDATE docs SET body = 'edited' WHERE id <= 20")
        await frozen.wait_for(backfill.finished, what="the edits")
        await backfill.assert_right()
        assert await frozen.terminate() == 0


async def test_an_error_that_nobody_named_ends_the_process(
    backfill: Watcher, database_url: str, tiny_models: Path
) -> None:
    """Crash-only: a non-zero status, no document text in the log, and all is well once it is mended."""
    broken = (
        "CREATE FUNCTION break() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'x' USING ERRCODE = 'XX000'; END $$"
    )
    await backfill.connection.execute(broken)
    await backfill.connection.execute("CREATE TRIGGER break BEFORE INSERT ON docs_embeddings EXECUTE FUNCTION break()")
    async with Daemon(database_url, tiny_models, SLOW) as daemon:
        assert await daemon.wait() not in {0, None}
        assert not any("word1x1" in line for line in daemon.log)
        await backfill.connection.execute("DROP TRIGGER break ON docs_embeddings")
        await daemon.start()
        await daemon.wait_for(backfill.finished, timeout=120, what="the whole backfill")
    await backfill.assert_right()


async def test_it_starts_before_its_server(server: EmbeddedServer, tiny_models: Path) -> None:
    url = server.dsn("work")
    admin(server.dsn(), "CREATE DATABASE work")
    await migrate_at(url)
    await prepare(url, documents=5)
    await asyncio.to_thread(server.stop)
    daemon = Daemon(url, tiny_models, SLOW)
    await daemon.start(ready=False)
    try:
        await daemon.wait_for(lambda: not_ready(daemon), what="unreadiness")
        await asyncio.to_thread(server.start)
        await daemon.wait_for(daemon.is_ready, what="readiness")
        async with watching(url) as watcher:
            await eventually(lambda: five(watcher))
    finally:
        await daemon.stop()


async def five(watcher: Watcher) -> bool:
    return await watcher.embedded() == 5
