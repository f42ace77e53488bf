"""What once went wrong: each test was red before the guard that it names."""

from __future__ import annotations

import asyncio

import pytest

from sidecar_daemon.adapters.postgres.pool import Database
from sidecar_daemon.adapters.postgres.queue import PostgresQueue
from sidecar_daemon.domain.outcomes import Outcome
from tests.rig import MAX_BYTES, MODEL, NAME, Rig, blocked, second_session
from tests.waiting import eventually


@pytest.mark.parametrize("pooler_mode", [False, True])
async def test_a_stricter_default_isolation_of_the_database_keeps_nothing_stale(rig: Rig, pooler_mode: bool) -> None:
    """With one snapshot for all of settle, its hash check would see the text from before the wait for the lock."""
    name = rig.url.split("/")[3].partition("?")[0]
    await rig.connection.execute(f"ALTER DATABASE {name} SET default_transaction_isolation = 'repeatable read'")
    replica = await Database.open(rig.url, pooler_mode=pooler_mode)
    try:
        queue = PostgresQueue(replica, NAME, MODEL, max_document_bytes=MAX_BYTES)
        await rig.write(k1="v1")
        old = await rig.lease_one()
        async with second_session(rig.url) as other:
            transaction = other.transaction(isolation="read_committed")
            await transaction.start()
            await other.execute("SELECT sidecar._lock_documents('docs', ARRAY['1'])")
            late = asyncio.create_task(queue.settle([rig.settlement(1, "v1", old)]))
            await eventually(lambda: blocked(rig.connection, "sidecar.settle"), what="settle to wait")
            await rig.write(k1="")
            await transaction.commit()
            (settled,) = await late
    finally:
        await replica.close()
    assert settled.outcome is Outcome.SUPERSEDED
    assert await rig.embedded() == {}
