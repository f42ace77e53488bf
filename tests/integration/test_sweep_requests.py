"""A walk that somebody asked for is walked, whatever was under way when they asked."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import pytest

from tests.integration.attaching import attach, queued, sweep
from tests.waiting import eventually


@pytest.fixture
async def notes(connection: asyncpg.Connection) -> asyncpg.Connection:
    await connection.execute("CREATE TABLE notes (id int PRIMARY KEY, title text, body text)")
    await connection.execute("INSERT INTO notes VALUES (1, 'one', 'first'), (2, NULL, 'second'), (3, 'three', ' ')")
    return connection


async def test_a_request_during_a_walk_is_not_lost(notes: asyncpg.Connection, database_url: str) -> None:
    """The walk stands before a lock on the source while somebody asks for another one."""
    await attach(notes)
    await notes.execute("SELECT sidecar.sweep('notes', 1)")  # now a walk is under way
    walker, asker = await asyncpg.connect(database_url), await asyncpg.connect(database_url)
    try:
        blocking = notes.transaction()
        await blocking.start()
        await notes.execute("LOCK TABLE notes IN ACCESS EXCLUSIVE MODE")
        walking = asyncio.create_task(walker.fetchval("SELECT state FROM sidecar.sweep('notes')"))
        await eventually(lambda: _waits(notes, walker), what="the walk before the lock")
        asking = asyncio.create_task(asker.execute("SELECT sidecar.request_sweep('notes')"))
        await eventually(lambda: _answered_or_waits(notes, asker, asking), what="the request")
        await blocking.rollback()
        assert await walking == "finished"
        await asking
        assert await notes.fetchval("SELECT backfill FROM sidecar.sweeps"), "without the limit of routine walks"
        assert await sweep(notes) == "finished", "the walk that was asked for, not a rest"
        assert await sweep(notes) == "resting"
    finally:
        await walker.close()
        await asker.close()


async def test_a_walk_that_ran_before_the_model_was_known_is_walked_again(notes: asyncpg.Connection) -> None:
    await attach(notes)
    await notes.execute("SELECT sidecar.register_model('notes', 'tiny', 'tiny@1')")
    await notes.execute(
        "INSERT INTO notes_embeddings SELECT id, 0, body, md5(body), array_fill(0.5, ARRAY[32])::vector, 'tiny@1' "
        "FROM notes WHERE id < 3"
    )
    assert await attach(notes, long_documents="truncate") == "changed: long documents"
    assert await sweep(notes) == "finished"
    assert await queued(notes) == []
    await notes.execute("SELECT sidecar.register_model('notes', 'tiny', 'tiny@2')")
    assert await sweep(notes) == "finished"
    assert await queued(notes) == [("1", "wrong_model"), ("2", "wrong_model")]


async def _waits(connection: asyncpg.Connection, other: asyncpg.Connection) -> bool:
    return bool(await connection.fetchval("SELECT cardinality(pg_blocking_pids($1)) > 0", other.get_server_pid()))


async def _answered_or_waits(
    connection: asyncpg.Connection, other: asyncpg.Connection, task: asyncio.Task[Any]
) -> bool:
    return task.done() or await _waits(connection, other)
