"""``sidecar.attach`` and ``sidecar.detach``: what they make, what they change, what they leave behind."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest

from tests.integration.attaching import attach, queued, refusal, sweep

QUEUES = ("notes", "notes_bulk", "notes_dlq")


@pytest.fixture
async def notes(connection: asyncpg.Connection) -> asyncpg.Connection:
    await connection.execute("CREATE TABLE notes (id int PRIMARY KEY, title text, body text)")
    await connection.execute("INSERT INTO notes VALUES (1, 'one', 'first'), (2, NULL, 'second'), (3, 'three', ' ')")
    return connection


async def test_everything_is_made(notes: asyncpg.Connection) -> None:
    assert await attach(notes, index=True) == "created"
    columns = await notes.fetch(
        "SELECT attname, format_type(atttypid, atttypmod) AS type, attstorage FROM pg_attribute "
        "WHERE attrelid = 'notes_embeddings'::regclass AND attnum > 0 ORDER BY attnum"
    )
    assert [(row["attname"], row["type"]) for row in columns] == [
        ("id", "integer"),
        ("chunk_no", "integer"),
        ("source_text", "text"),
        ("source_text_hash", "text"),
        ("embedding", "vector(32)"),
        ("model", "text"),
        ("created_at", "timestamp with time zone"),
        ("updated_at", "timestamp with time zone"),
    ]
    assert {row["attname"]: row["attstorage"] for row in columns}["embedding"] == b"p", "plain: it stays in line"
    definitions = [
        row["definition"]
        for row in await notes.fetch(
            "SELECT pg_get_constraintdef(oid) AS definition FROM pg_constraint "
            "WHERE conrelid = 'notes_embeddings'::regclass"
        )
    ]
    assert "FOREIGN KEY (id) REFERENCES notes(id) ON UPDATE CASCADE ON DELETE CASCADE" in definitions
    assert "PRIMARY KEY (id, chunk_no)" in definitions
    indexes = await notes.fetch("SELECT indexdef FROM pg_indexes WHERE tablename = 'notes_embeddings'")
    assert any("USING hnsw (embedding vector_cosine_ops)" in row["indexdef"] for row in indexes)
    triggers = await notes.fetch(
        "SELECT tgname, tgtype::int & 1 AS per_row FROM pg_trigger "
        "WHERE tgrelid = 'notes'::regclass AND NOT tgisinternal"
    )
    assert {row["tgname"]: row["per_row"] for row in triggers} == {
        "sidecar_notes_insert": 0,
        "sidecar_notes_update": 0,
    }
    assert await sweep(notes) == "finished"
    assert await queued(notes) == [("1", "missing"), ("2", "missing")], "the blank one needs no vector"


async def test_the_queues_are_vacuumed_by_number_not_by_share(notes: asyncpg.Connection) -> None:
    await attach(notes)
    for queue in QUEUES:
        options = await notes.fetchval(
            "SELECT reloptions FROM pg_class WHERE oid = $1::text::regclass", f"pgmq.q_{queue}"
        )
        assert {"autovacuum_vacuum_scale_factor=0", "autovacuum_vacuum_threshold=5000", "fillfactor=70"} <= set(options)
    listed = await notes.fetch("SELECT queue_name FROM pgmq.list_queues()")
    assert {row["queue_name"] for row in listed} >= set(QUEUES)


async def test_dimensions_decide_storage_and_index(notes: asyncpg.Connection) -> None:
    await attach(notes, name="wide", dimensions=1900, index=True)
    await attach(notes, name="widest", dimensions=2100, index=True)
    for table, indexed in (("wide_embeddings", True), ("widest_embeddings", False)):
        storage = await notes.fetchval(
            "SELECT attstorage FROM pg_attribute WHERE attrelid = $1::text::regclass AND attname = 'embedding'", table
        )
        assert storage != b"p", "a vector this long would not fit its page"
        defined = await notes.fetch("SELECT indexdef FROM pg_indexes WHERE tablename = $1", table)
        assert any("hnsw" in row["indexdef"] for row in defined) is indexed


async def test_attaching_again_changes_nothing(notes: asyncpg.Connection) -> None:
    await attach(notes)
    await sweep(notes)
    before = await notes.fetchrow("SELECT * FROM sidecar.pipelines")
    assert await attach(notes) == "unchanged"
    assert await notes.fetchrow("SELECT * FROM sidecar.pipelines") == before
    assert await sweep(notes) == "resting", "and asks for no walk"


async def test_two_at_once_make_one(notes: asyncpg.Connection, database_url: str) -> None:
    other = await asyncpg.connect(database_url)
    try:
        assert sorted(await asyncio.gather(attach(notes), attach(other))) == ["created", "unchanged"]
    finally:
        await other.close()


async def test_what_may_change_changes_and_is_swept_for(notes: asyncpg.Connection) -> None:
    await attach(notes)
    await sweep(notes)
    await notes.execute("DELETE FROM pgmq.q_notes_bulk")
    await notes.execute(
        "INSERT INTO notes_embeddings SELECT id, 0, body, md5(body), array_fill(0.5, ARRAY[32])::vector, 'm' "
        "FROM notes WHERE id < 3"
    )
    assert await attach(notes, "notes", "title", "body") == "changed: content columns"
    assert await sweep(notes) == "finished"
    assert await queued(notes) == [("1", "outdated"), ("3", "missing")], "2 has no title and renders as before"
    await notes.execute("UPDATE notes SET title = 'two' WHERE id = 2")
    assert await queued(notes, "notes") == [("2", "update")], "the trigger looks at the new columns too"
    assert await attach(notes, "notes", "title", "body", store_text=False) == "changed: stored text"
    assert (
        await attach(notes, "notes", "title", "body", store_text=False, long_documents="chunks")
        == "changed: long documents"
    )
    changed = await attach(notes, "notes", "title", "body", store_text=False, long_documents="chunks", model="other")
    assert changed == "changed: model"


async def test_a_unique_column_may_be_the_key(connection: asyncpg.Connection) -> None:
    await connection.execute(
        "CREATE TABLE pages (a int, b int, slug text NOT NULL UNIQUE, model text, PRIMARY KEY (a, b))"
    )
    assert await attach(connection, "pages", "model", key="slug") == "created"
    await connection.execute("INSERT INTO pages VALUES (1, 1, 'about', 'text')")
    assert await queued(connection, "pages") == [("about", "insert")]


async def test_a_key_named_like_a_column_of_ours_gets_another_name_there(connection: asyncpg.Connection) -> None:
    await connection.execute("CREATE TABLE models (model text PRIMARY KEY, body text)")
    await attach(connection, "models")
    assert await connection.fetchval("SELECT embeddings_key FROM sidecar.pipelines") == "document_key"


async def test_detach_leaves_nothing_and_attach_begins_anew(notes: asyncpg.Connection) -> None:
    tables = "SELECT array_agg(relname ORDER BY relname) FROM pg_class WHERE relkind IN ('r', 'i', 'S')"
    functions = "SELECT count(*) FROM pg_proc WHERE pronamespace = 'sidecar'::regnamespace"
    before = (await notes.fetchval(tables), await notes.fetchval(functions))
    await attach(notes, index=True)
    await sweep(notes)
    assert await notes.fetchval("SELECT sidecar.detach('notes')") == "public.notes_embeddings"
    assert (await notes.fetchval(tables), await notes.fetchval(functions)) == before
    assert await notes.fetchval("SELECT count(*) FROM sidecar.sweeps") == 0
    await notes.execute("UPDATE notes SET body = 'goes on'")
    assert await attach(notes) == "created"
    assert await sweep(notes) == "finished"
    assert await queued(notes) == [("1", "missing"), ("2", "missing"), ("3", "missing")]


async def test_vectors_may_be_kept(notes: asyncpg.Connection) -> None:
    await attach(notes)
    await notes.execute("INSERT INTO notes_embeddings VALUES (1, 0, 'x', 'y', array_fill(0.5, ARRAY[32])::vector, 'm')")
    await notes.execute("SELECT sidecar.detach('notes', true)")
    assert await notes.fetchval("SELECT count(*) FROM notes_embeddings") == 1
    await notes.execute("DELETE FROM notes WHERE id = 1")
    assert await notes.fetchval("SELECT count(*) FROM notes_embeddings") == 0, "they still go with their documents"
    assert (await refusal(notes)).startswith("table public.notes_embeddings exists already")


async def test_an_unknown_pipeline_cannot_be_detached(notes: asyncpg.Connection) -> None:
    await attach(notes)
    with pytest.raises(asyncpg.PostgresError, match="pipeline 'note' does not exist; known pipelines: notes"):
        await notes.execute("SELECT sidecar.detach('note')")


async def test_a_source_that_was_dropped_can_still_be_detached(notes: asyncpg.Connection) -> None:
    await attach(notes)
    await notes.execute("DROP TABLE notes CASCADE")
    await notes.execute("SELECT sidecar.detach('notes')")
    assert await notes.fetchval("SELECT count(*) FROM sidecar.pipelines") == 0
    assert await notes.fetchval("SELECT to_regclass('notes_embeddings')") is None
