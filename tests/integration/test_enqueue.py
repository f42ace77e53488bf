"""What the triggers send: one set a statement, and nothing where the rendered content stays the same."""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING

import asyncpg
import pytest

from tests.integration.attaching import attach
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

MERGE = (
    "MERGE INTO notes AS n USING (VALUES (1, 'merged'), (6, 'new')) AS v (id, body) ON n.id = v.id "
    "WHEN MATCHED THEN UPDATE SET body = v.body WHEN NOT MATCHED THEN INSERT VALUES (v.id, v.body, 0)"
)
QUADRATIC = 40
"""Ten times the rows may take this many times as long, not a hundred."""


async def sent(connection: asyncpg.Connection, queue: str) -> list[tuple[str, str]]:
    """Take all messages of a live lane: document and action, in order."""
    rows = await connection.fetch(f"WITH d AS (DELETE FROM pgmq.q_{queue} RETURNING *) SELECT * FROM d ORDER BY msg_id")
    messages = [json.loads(row["message"]) for row in rows]
    assert all(message.keys() == {"document_id", "action"} for message in messages), "a reference, never the text"
    return [(message["document_id"], message["action"]) for message in messages]


@pytest.fixture
async def heard(database_url: str) -> AsyncIterator[list[str]]:
    """Every notification of the channel, as it comes."""
    payloads: list[str] = []
    listener = await asyncpg.connect(database_url)
    await listener.add_listener("sidecar", lambda *args: payloads.append(args[3]))
    yield payloads
    await listener.close()


@pytest.fixture
async def notes(connection: asyncpg.Connection) -> asyncpg.Connection:
    """An attached table of five rows with nothing in its lane."""
    await connection.execute("CREATE TABLE notes (id int PRIMARY KEY, body text, other int)")
    await attach(connection, "notes", "body")
    await connection.execute("INSERT INTO notes SELECT i, 'body ' || i, 0 FROM generate_series(1, 5) AS i")
    await connection.execute("DELETE FROM pgmq.q_notes")
    return connection


async def test_a_copy_of_100_000_rows_is_one_call_and_one_notification(
    connection: asyncpg.Connection, heard: list[str]
) -> None:
    await connection.execute("SELECT sidecar.create_source_documents()")
    await attach(connection, "source_documents", "content", queue="embedding_queue")
    await eventually(lambda: "catalog:source_documents" in heard)
    heard.clear()
    await connection.execute("SET track_functions = 'all'")
    await connection.copy_records_to_table(
        "source_documents", records=((f"document {n}",) for n in range(100_000)), columns=["content"]
    )
    await connection.execute("SELECT pg_stat_force_next_flush()")
    calls = "SELECT calls FROM pg_stat_user_functions WHERE funcname = 'enqueue_source_documents'"
    assert await connection.fetchval(calls) == 1
    assert await connection.fetchval("SELECT count(*) FROM pgmq.q_embedding_queue") == 100_000
    assert (
        await connection.fetchval(
            "SELECT count(DISTINCT message ->> 'document_id') FROM pgmq.q_embedding_queue AS q "
            "JOIN source_documents AS s ON s.id::text = q.message ->> 'document_id'"
        )
        == 100_000
    )
    await connection.execute("NOTIFY sidecar, 'last'")
    await eventually(lambda: "last" in heard)
    assert heard == ["live:source_documents", "last"]


async def test_inserts_and_edits_name_their_documents(notes: asyncpg.Connection) -> None:
    await notes.execute("INSERT INTO notes VALUES (7, 'seven'), (8, '')")
    await notes.execute("UPDATE notes SET body = 'changed' WHERE id IN (1, 3)")
    await notes.execute("DELETE FROM notes WHERE id = 2")
    assert await sent(notes, "notes") == [("7", "insert"), ("8", "insert"), ("1", "update"), ("3", "update")]


@pytest.mark.parametrize(
    ("statement", "documents"),
    [
        ("UPDATE notes SET body = body WHERE id = 1", []),
        ("UPDATE notes SET body = body || ''", []),
        ("UPDATE notes SET other = other + 1", []),
        ("UPDATE notes SET body = 'x' WHERE id = 99", []),
        ("UPDATE notes SET other = 1, body = CASE id WHEN 4 THEN 'new' ELSE body END", ["4"]),
        ("UPDATE notes SET body = body || ' '", ["1", "2", "3", "4", "5"]),
        ("UPDATE notes SET id = id + 10 WHERE id = 2", ["12"]),
        ("UPDATE notes SET body = NULL WHERE id = 3", ["3"]),
        ("INSERT INTO notes VALUES (1, 'body 1', 9) ON CONFLICT (id) DO UPDATE SET other = 9", []),
        ("INSERT INTO notes VALUES (1, 'upsert', 9) ON CONFLICT (id) DO UPDATE SET body = excluded.body", ["1"]),
        ("INSERT INTO notes VALUES (1, 'ignored', 9) ON CONFLICT DO NOTHING", []),
        (
            MERGE,
            ["1", "6"],
        ),
    ],
)
async def test_only_what_changes_the_rendered_content_is_sent(
    notes: asyncpg.Connection, heard: list[str], statement: str, documents: list[str]
) -> None:
    await notes.execute("NOTIFY sidecar, 'first'")
    await eventually(lambda: "first" in heard)
    heard.clear()
    await notes.execute(statement)
    assert sorted(document for document, _ in await sent(notes, "notes")) == documents
    await notes.execute("NOTIFY sidecar, 'last'")
    await eventually(lambda: "last" in heard)
    assert heard == ["live:notes"] * bool(documents) + ["last"], "nobody is woken for nothing"


async def test_null_and_empty_are_one_blank_in_a_single_column(notes: asyncpg.Connection) -> None:
    await notes.execute("UPDATE notes SET body = '' WHERE id = 1")
    assert await sent(notes, "notes") == [("1", "update")]
    await notes.execute("UPDATE notes SET body = NULL WHERE id = 1")
    await notes.execute("UPDATE notes SET body = '' WHERE id = 1")
    assert await sent(notes, "notes") == []


async def test_moving_text_between_two_columns_is_a_change(connection: asyncpg.Connection) -> None:
    await connection.execute("CREATE TABLE pages (id int PRIMARY KEY, title text, body text)")
    await attach(connection, "pages", "title", "body")
    await connection.execute("INSERT INTO pages VALUES (1, 'a', 'b'), (2, NULL, 'c'), (3, 'd', '')")
    await sent(connection, "pages")
    await connection.execute("UPDATE pages SET title = body, body = title WHERE id = 1")
    await connection.execute("UPDATE pages SET title = body, body = title WHERE id = 2")  # renders as before: 'c'
    await connection.execute("UPDATE pages SET body = NULL WHERE id = 3")  # no blank line behind the title any more
    assert await sent(connection, "pages") == [("1", "update"), ("3", "update")]


async def test_a_key_that_swaps_places_is_sent_for_both(notes: asyncpg.Connection) -> None:
    await notes.execute("ALTER TABLE notes DROP CONSTRAINT notes_pkey CASCADE")
    await notes.execute("UPDATE notes SET id = 3 - id WHERE id IN (1, 2)")
    assert sorted(await sent(notes, "notes")) == [("1", "update"), ("2", "update")]


async def test_a_rolled_back_statement_sends_nothing(notes: asyncpg.Connection, heard: list[str]) -> None:
    heard.clear()
    transaction = notes.transaction()
    await transaction.start()
    await notes.execute("UPDATE notes SET body = 'never'")
    await transaction.rollback()
    await notes.execute("NOTIFY sidecar, 'last'")
    await eventually(lambda: "last" in heard)
    assert "live:notes" not in heard[heard.index("last") :]
    assert await sent(notes, "notes") == []


async def test_a_writer_with_no_privilege_on_the_queue_still_sends(notes: asyncpg.Connection) -> None:
    await notes.execute("DROP ROLE IF EXISTS plain_writer")
    await notes.execute("CREATE ROLE plain_writer")
    await notes.execute("GRANT INSERT, SELECT, UPDATE ON notes TO plain_writer")
    try:
        await notes.execute("SET ROLE plain_writer")
        await notes.execute("UPDATE notes SET body = 'mine' WHERE id = 5")
        await notes.execute("RESET ROLE")
        assert await sent(notes, "notes") == [("5", "update")]
    finally:
        await notes.execute("RESET ROLE")
        await notes.execute("DROP OWNED BY plain_writer")
        await notes.execute("DROP ROLE plain_writer")


async def test_an_update_of_many_rows_is_not_quadratic(connection: asyncpg.Connection) -> None:
    await connection.execute("CREATE TABLE many (id int PRIMARY KEY, body text)")
    await attach(connection, "many", "body")
    await connection.execute("INSERT INTO many SELECT i, 'body ' || i FROM generate_series(1, 50000) AS i")
    for key in range(1, 8):  # the plan that is cached now was made for one row
        await connection.execute("UPDATE many SET body = body || '.' WHERE id = $1", key)
    await sent(connection, "many")
    started = time.monotonic()
    await connection.execute("UPDATE many SET body = body || '!' WHERE id <= 5000")
    limit = QUADRATIC * max(time.monotonic() - started, 0.05)
    assert len(await sent(connection, "many")) == 5000
    async with asyncio.timeout(limit):
        await connection.execute("UPDATE many SET body = body || '?'")
    assert len(await sent(connection, "many")) == 50_000
