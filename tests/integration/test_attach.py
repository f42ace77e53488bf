"""``sidecar.attach`` and ``sidecar.detach``: what they make, what they refuse, what they leave behind."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest

from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

QUEUES = ("notes", "notes_bulk", "notes_dlq")


async def attach(connection: asyncpg.Connection, source: str = "notes", *content: str, **options: Any) -> str:
    named = {"model": "tiny", "dimensions": 32, "index": False, **options}
    arguments = "".join(f", p_{name} => ${n}" for n, name in enumerate(named, start=3))
    return str(
        await connection.fetchval(
            f"SELECT sidecar.attach($1::text::regclass, $2{arguments})",
            source,
            list(content) or ["body"],
            *named.values(),
        )
    )


async def refusal(connection: asyncpg.Connection, source: str = "notes", *content: str, **options: Any) -> str:
    """The one line with which an attachment is refused; nothing of it may be left."""
    before = await connection.fetchval("SELECT count(*) FROM pg_class")
    with pytest.raises(asyncpg.PostgresError) as caught:
        await attach(connection, source, *content, **options)
    assert getattr(caught.value, "sqlstate", None) == "SC010"
    assert await connection.fetchval("SELECT count(*) FROM pg_class") == before
    message = str(caught.value)
    assert "\n" not in message
    return message


async def queued(connection: asyncpg.Connection, queue: str = "notes_bulk") -> list[tuple[str, str]]:
    rows = await connection.fetch(
        f"SELECT message ->> 'document_id' AS key, message ->> 'action' AS action FROM pgmq.q_{queue} ORDER BY 1"
    )
    return [(row["key"], row["action"]) for row in rows]


async def sweep(connection: asyncpg.Connection, name: str = "notes") -> str:
    return str(await connection.fetchval("SELECT state FROM sidecar.sweep($1)", name))


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
        "SELECT tgname, tgtype::int & 1 AS per_row FROM pg_trigger WHERE tgrelid = 'notes'::regclass AND NOT tgisinternal"
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
        options = await notes.fetchval("SELECT reloptions FROM pg_class WHERE oid = $1::text::regclass", f"pgmq.q_{queue}")
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
        "INSERT INTO notes_embeddings SELECT id, 0, body, md5(body), array_fill(0.5, ARRAY[32])::vector, 'm' FROM notes WHERE id < 3"
    )
    assert await attach(notes, "notes", "title", "body") == "changed: content columns"
    assert await sweep(notes) == "finished"
    assert await queued(notes) == [("1", "outdated"), ("3", "missing")], "2 has no title and renders as before"
    await notes.execute("UPDATE notes SET title = 'two' WHERE id = 2")
    assert await queued(notes, "notes") == [("2", "update")], "the trigger looks at the new columns too"
    assert await attach(notes, "notes", "title", "body", store_text=False) == "changed: stored text"
    assert await attach(notes, "notes", "title", "body", store_text=False, long_documents="chunks") == "changed: long documents"
    changed = await attach(notes, "notes", "title", "body", store_text=False, long_documents="chunks", model="other")
    assert changed == "changed: model"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "Notes"}, "pipeline name 'Notes' is not allowed; it must match [a-z_][a-z0-9_]{0,40}"),
        ({"name": "x'; --"}, "pipeline name 'x''; --' is not allowed; it must match [a-z_][a-z0-9_]{0,40}"),
        ({"name": "n" * 42}, f"pipeline name '{'n' * 42}' is not allowed; it must match [a-z_][a-z0-9_]{{0,40}}"),
        ({"name": ""}, "pipeline name '' is not allowed; it must match [a-z_][a-z0-9_]{0,40}"),
        ({"queue": "a-b"}, "queue name 'a-b' is not allowed; it must match [a-z_][a-z0-9_]{0,40}"),
        ({"long_documents": "sum"}, "long_documents is 'sum'; allowed are mean, chunks, truncate"),
        ({"key": "title"}, "column title of table notes is no key: it must exist, be NOT NULL and have a unique index of its own"),
        ({"key": "No Such"}, 'column "No Such" of table notes is no key: it must exist, be NOT NULL and have a unique index of its own'),
        ({"embeddings": "taken"}, "table public.taken exists already; name another table for the vectors, or drop it"),
        ({"queue": "taken"}, "queue taken exists already and belongs to no pipeline; name another queue, or drop it with pgmq.drop_queue"),
    ],
)  # fmt: skip
async def test_a_bad_option_is_refused_in_one_line(notes: asyncpg.Connection, options: dict[str, Any], said: str) -> None:
    await notes.execute("CREATE TABLE taken (id int)")
    await notes.execute("SELECT pgmq.create('taken')")
    assert await refusal(notes, **options) == said


@pytest.mark.parametrize(
    ("made", "source", "said"),
    [
        ("CREATE TABLE t (id int, body text)", "t", "table t has no primary key of one column; add one, or name a NOT NULL column with a unique index as the key"),
        ("CREATE TABLE t (a int, b int, body text, PRIMARY KEY (a, b))", "t", "table t has no primary key of one column; add one, or name a NOT NULL column with a unique index as the key"),
        ("CREATE VIEW t AS SELECT 1 AS id, '' AS body", "t", "t is no permanent table; only those can be attached"),
        ("CREATE MATERIALIZED VIEW t AS SELECT 1 AS id, '' AS body", "t", "t is no permanent table; only those can be attached"),
        ("CREATE TEMP TABLE t (id int PRIMARY KEY, body text)", "t", "pg_temp.t is no permanent table; only those can be attached"),
        ('CREATE TABLE t (id int PRIMARY KEY, "Body" text)', "t", 'table t has no column body; its columns: id, "Body"'),
    ],
)  # fmt: skip
async def test_a_bad_source_is_refused_in_one_line(
    connection: asyncpg.Connection, made: str, source: str, said: str
) -> None:
    await connection.execute(made)
    message = await refusal(connection, source)
    assert message.replace("pg_temp_", "pg_temp.", 0) == said or (
        message.startswith("pg_temp") and said.startswith("pg_temp") and message.endswith(said.removeprefix("pg_temp."))
    )


async def test_no_content_is_refused(notes: asyncpg.Connection) -> None:
    with pytest.raises(asyncpg.PostgresError, match="no content column of table notes is named; name at least one"):
        await notes.execute("SELECT sidecar.attach('notes', '{}', p_model => 'tiny', p_dimensions => 32)")


async def test_what_another_pipeline_has_is_refused(notes: asyncpg.Connection) -> None:
    await attach(notes)
    await notes.execute("CREATE TABLE others (id int PRIMARY KEY, body text)")
    assert await refusal(notes, "others", name="notes") == (
        "pipeline notes is attached to notes already; give the pipeline for others another name"
    )
    assert await refusal(notes, "others", queue="notes") == "queue notes belongs to another pipeline; name another queue"
    assert await refusal(notes, dimensions=384, model="gte-small") == (
        "pipeline notes has vectors of 32 dimensions, model gte-small makes 384; detach it first, or give the new "
        "pipeline another name"
    )
    assert (await refusal(notes, "others", queue="notes_bulk")).startswith("queue notes_bulk exists already")


async def test_a_unique_column_may_be_the_key(connection: asyncpg.Connection) -> None:
    await connection.execute("CREATE TABLE pages (a int, b int, slug text NOT NULL UNIQUE, model text, PRIMARY KEY (a, b))")
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
    assert await notes.fetchval("SELECT sidecar.detach('notes')") == "notes_embeddings"
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
        assert await sweep(notes) == "finished", "the walk that was asked for, not a rest"
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


async def _answered_or_waits(connection: asyncpg.Connection, other: asyncpg.Connection, task: asyncio.Task[Any]) -> bool:
    return task.done() or await _waits(connection, other)


# Owners and row level security


@pytest.fixture
async def owner(connection: asyncpg.Connection) -> AsyncIterator[str]:
    """A role that owns its tables, is no superuser, and may attach."""
    await connection.execute("CREATE ROLE app_owner")
    await connection.execute("GRANT sidecar_owner TO app_owner")
    await connection.execute("GRANT CREATE ON SCHEMA public TO app_owner")
    yield "app_owner"
    await connection.execute("RESET ROLE")
    await connection.execute("DROP OWNED BY app_owner CASCADE")
    await connection.execute("DROP ROLE app_owner")


async def test_an_owner_without_superuser_attaches_its_table(connection: asyncpg.Connection, owner: str) -> None:
    await connection.execute(f"SET ROLE {owner}")
    await connection.execute("CREATE TABLE own (id int PRIMARY KEY, body text)")
    assert await attach(connection, "own", index=True) == "created"
    await connection.execute("INSERT INTO own VALUES (1, 'mine')")
    await connection.execute("RESET ROLE")
    assert await queued(connection, "own") == [("1", "insert")]
    assert await sweep(connection, "own") == "finished"
    assert await connection.fetchval("SELECT tableowner FROM pg_tables WHERE tablename = 'own_embeddings'") == owner
    await connection.execute(f"SET ROLE {owner}")
    await connection.execute("SELECT sidecar.detach('own')")
    assert await connection.fetchval("SELECT to_regclass('own_embeddings')") is None


async def test_the_table_of_vectors_belongs_to_the_owner_of_the_source(
    notes: asyncpg.Connection, owner: str
) -> None:
    await notes.execute(f"ALTER TABLE notes OWNER TO {owner}")
    await attach(notes)
    assert await notes.fetchval("SELECT tableowner FROM pg_tables WHERE tablename = 'notes_embeddings'") == owner


async def test_row_level_security_that_hides_rows_from_us_is_refused(notes: asyncpg.Connection) -> None:
    await notes.execute("ALTER TABLE notes ENABLE ROW LEVEL SECURITY")
    assert await refusal(notes) == (
        "table notes has row level security that would hide rows from role sidecar_owner; as a superuser run: "
        "ALTER ROLE sidecar_owner BYPASSRLS"
    )
    await notes.execute("ALTER ROLE sidecar_owner BYPASSRLS")
    try:
        assert await attach(notes) == "created"
        assert await sweep(notes) == "finished"
        assert len(await queued(notes)) == 2
    finally:
        await notes.execute("ALTER ROLE sidecar_owner NOBYPASSRLS")
