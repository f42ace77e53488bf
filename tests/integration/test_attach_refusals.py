"""What ``sidecar.attach`` refuses, each in one line, leaving nothing behind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import asyncpg
import pytest

from tests.integration.attaching import attach, queued, refusal, sweep

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

NO_KEY = (
    "table public.t has no primary key of one column; add one, or name a NOT NULL column with a unique index as the key"
)
NO_KEY_COLUMN = "of table public.notes is no key: it must exist, be NOT NULL and have a unique index of its own"
NO_TABLE = "is no permanent table; only those can be attached"
QUEUE_TAKEN = (
    "queue taken exists already and belongs to no pipeline; name another queue, or drop it with pgmq.drop_queue"
)
RLS = (
    "table public.notes has row level security that would hide rows from role sidecar_owner; as a superuser run: "
    "ALTER ROLE sidecar_owner BYPASSRLS"
)


@pytest.fixture
async def notes(connection: asyncpg.Connection) -> asyncpg.Connection:
    await connection.execute("CREATE TABLE notes (id int PRIMARY KEY, title text, body text)")
    await connection.execute("INSERT INTO notes VALUES (1, 'one', 'first'), (2, NULL, 'second'), (3, 'three', ' ')")
    return connection


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "Notes"}, "pipeline name 'Notes' is not allowed; it must match [a-z_][a-z0-9_]{0,40}"),
        ({"name": "x'; --"}, "pipeline name 'x''; --' is not allowed; it must match [a-z_][a-z0-9_]{0,40}"),
        ({"name": "n" * 42}, f"pipeline name '{'n' * 42}' is not allowed; it must match [a-z_][a-z0-9_]{{0,40}}"),
        ({"name": ""}, "pipeline name '' is not allowed; it must match [a-z_][a-z0-9_]{0,40}"),
        ({"queue": "a-b"}, "queue name 'a-b' is not allowed; it must match [a-z_][a-z0-9_]{0,40}"),
        ({"long_documents": "sum"}, "long_documents is 'sum'; allowed are mean, chunks, truncate"),
        ({"key": "title"}, f"column title {NO_KEY_COLUMN}"),
        ({"key": "No Such"}, f'column "No Such" {NO_KEY_COLUMN}'),
        ({"embeddings": "taken"}, "table public.taken exists already; name another table for the vectors, or drop it"),
        ({"queue": "taken"}, QUEUE_TAKEN),
    ],
)  # fmt: skip
async def test_a_bad_option_is_refused_in_one_line(
    notes: asyncpg.Connection, options: dict[str, Any], said: str
) -> None:
    await notes.execute("CREATE TABLE taken (id int)")
    await notes.execute("SELECT pgmq.create('taken')")
    assert await refusal(notes, **options) == said


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ("CREATE TABLE t (id int, body text)", NO_KEY),
        ("CREATE TABLE t (a int, b int, body text, PRIMARY KEY (a, b))", NO_KEY),
        ("CREATE VIEW t AS SELECT 1 AS id, '' AS body", f"public.t {NO_TABLE}"),
        ("CREATE MATERIALIZED VIEW t AS SELECT 1 AS id, '' AS body", f"public.t {NO_TABLE}"),
        ("CREATE TEMP TABLE t (id int PRIMARY KEY, body text)", f"t {NO_TABLE}"),
        ('CREATE TABLE t (id int PRIMARY KEY, "B" text)', 'table public.t has no column body; its columns: id, "B"'),
    ],
)  # fmt: skip
async def test_a_bad_source_is_refused_in_one_line(connection: asyncpg.Connection, made: str, said: str) -> None:
    await connection.execute(made)
    assert await refusal(connection, "t") == said


async def test_no_content_is_refused(notes: asyncpg.Connection) -> None:
    with pytest.raises(
        asyncpg.PostgresError, match=r"^no content column of table public\.notes is named; name at least one$"
    ):
        await notes.execute("SELECT sidecar.attach('notes', '{}', p_model => 'tiny', p_dimensions => 32)")


async def test_what_another_pipeline_has_is_refused(notes: asyncpg.Connection) -> None:
    await attach(notes)
    await notes.execute("CREATE TABLE others (id int PRIMARY KEY, body text)")
    assert await refusal(notes, "others", name="notes") == (
        "pipeline notes is attached to public.notes already; give the pipeline for public.others another name"
    )
    assert (
        await refusal(notes, "others", queue="notes") == "queue notes belongs to another pipeline; name another queue"
    )
    assert await refusal(notes, dimensions=384, model="gte-small") == (
        "pipeline notes has vectors of 32 dimensions, model gte-small makes 384; detach it first, or give the new "
        "pipeline another name"
    )
    assert (await refusal(notes, "others", queue="notes_bulk")).startswith("queue notes_bulk exists already")


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


async def test_the_owner_of_the_source_reads_the_vectors_of_a_table_that_another_attached(
    notes: asyncpg.Connection, owner: str
) -> None:
    await notes.execute(f"ALTER TABLE notes OWNER TO {owner}")
    await attach(notes)
    await notes.execute(f"SET ROLE {owner}")
    assert await notes.fetchval("SELECT count(*) FROM notes_embeddings") == 0
    await notes.execute("RESET ROLE")


async def test_row_level_security_that_hides_rows_from_us_is_refused(notes: asyncpg.Connection) -> None:
    await notes.execute("ALTER TABLE notes ENABLE ROW LEVEL SECURITY")
    await notes.execute("ALTER ROLE sidecar_owner NOBYPASSRLS")  # as where a role without superuser migrated
    try:
        assert await refusal(notes) == RLS
    finally:
        await notes.execute("ALTER ROLE sidecar_owner BYPASSRLS")
    assert await attach(notes) == "created"
    assert await sweep(notes) == "finished"
    assert len(await queued(notes)) == 2
