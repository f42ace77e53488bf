"""``sidecar.search``: nearest first, within bounds, and never more than the caller may read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import asyncpg
import numpy as np
import pytest
from pgvector import Vector
from pgvector.asyncpg import register_vector

from tests.conftest import migrate_at

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from numpy.typing import NDArray

DIMENSIONS = 8
ATTACH = f"SELECT sidecar.attach('notes', ARRAY['body'], p_model => 'tiny', p_dimensions => {DIMENSIONS})"
SEARCH = "SELECT * FROM sidecar.search('notes', $1, $2)"
READER = "search_reader"


def direction(degrees: float) -> NDArray[np.float32]:
    """A unit vector this far from the first axis."""
    vector = np.zeros(DIMENSIONS, dtype=np.float32)
    vector[:2] = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return vector


async def fill(connection: asyncpg.Connection, angles: dict[int, float], *, attach: str = ATTACH) -> None:
    """An attached table whose documents point into known directions."""
    await connection.execute("CREATE TABLE notes (id int PRIMARY KEY, body text, tenant text DEFAULT 'a')")
    await connection.execute(attach)
    await connection.executemany("INSERT INTO notes VALUES ($1, $2)", [(key, f"body {key}") for key in angles])
    await connection.executemany(
        "INSERT INTO notes_embeddings (id, source_text, source_text_hash, embedding, model) "
        "VALUES ($1, $2, md5($2), $3, 'tiny@1')",
        [(key, f"body {key}", Vector(direction(angle))) for key, angle in angles.items()],
    )


async def found(connection: asyncpg.Connection, k: int = 10, degrees: float = 0.0) -> list[asyncpg.Record]:
    return await connection.fetch(SEARCH, Vector(direction(degrees)), k)


@pytest.fixture
async def notes(connection: asyncpg.Connection) -> asyncpg.Connection:
    await fill(connection, {1: 80, 2: 10, 3: 180, 4: 30})
    return connection


@pytest.fixture
async def reader(notes: asyncpg.Connection) -> AsyncIterator[str]:
    """A role that may search, and read nothing yet."""
    await notes.execute(f"CREATE ROLE {READER}")
    await notes.execute(f"GRANT sidecar_reader TO {READER}")
    yield READER
    await notes.execute("RESET ROLE")
    await notes.execute(f"DROP OWNED BY {READER}")
    await notes.execute(f"DROP ROLE {READER}")


async def test_the_nearest_comes_first_with_its_similarity(notes: asyncpg.Connection) -> None:
    rows = await found(notes)
    assert [(row["key"], row["chunk_no"], row["source_text"]) for row in rows] == [
        ("2", 0, "body 2"),
        ("4", 0, "body 4"),
        ("1", 0, "body 1"),
        ("3", 0, "body 3"),
    ]
    expected = np.cos(np.radians([10, 30, 80, 180]))
    assert np.allclose([row["similarity"] for row in rows], expected, atol=1e-6)
    assert [row["key"] for row in await found(notes, 2, degrees=90)] == ["1", "4"]


async def test_the_length_of_the_query_does_not_matter(notes: asyncpg.Connection) -> None:
    long = await notes.fetch(SEARCH, Vector(7 * direction(0)), 1)
    assert long[0]["similarity"] == pytest.approx(np.cos(np.radians(10)), abs=1e-6)


@pytest.mark.parametrize("k", [-1, 0, 1001])
async def test_k_out_of_bounds_is_refused(notes: asyncpg.Connection, k: int) -> None:
    with pytest.raises(asyncpg.PostgresError, match=rf"^k is {k}; allowed are 1 to 1000$"):
        await found(notes, k)


async def test_a_query_of_another_length_is_refused(notes: asyncpg.Connection) -> None:
    with pytest.raises(asyncpg.PostgresError, match="different vector dimensions"):
        await notes.fetch(SEARCH, Vector([1.0, 0.0]), 1)


async def test_an_unknown_pipeline_is_refused(notes: asyncpg.Connection) -> None:
    with pytest.raises(asyncpg.PostgresError, match="pipeline 'other' does not exist; known pipelines: notes"):
        await notes.fetch("SELECT * FROM sidecar.search('other', $1)", Vector(direction(0)))


async def test_many_results_through_the_index(connection: asyncpg.Connection) -> None:
    """More than pgvector's 40 candidates, in order, all of them from the index."""
    await fill(connection, {n: n * 0.1 for n in range(1, 1201)})
    await connection.execute("ANALYZE notes")
    await connection.execute("ANALYZE notes_embeddings")
    await connection.execute("SET enable_sort = off")  # the index is the only ordered way
    rows = await found(connection, 1000)
    assert [int(row["key"]) for row in rows][:40] == list(range(1, 41))
    assert len({row["key"] for row in rows}) == 1000


async def test_a_reader_sees_what_the_policies_of_the_source_allow(notes: asyncpg.Connection, reader: str) -> None:
    await notes.execute(f"GRANT SELECT ON notes, notes_embeddings TO {reader}")
    await notes.execute("UPDATE notes SET tenant = 'b' WHERE id IN (2, 3)")
    await notes.execute("ALTER TABLE notes ENABLE ROW LEVEL SECURITY")
    await notes.execute(f"CREATE POLICY own_tenant ON notes TO {reader} USING (tenant = 'a')")
    assert len(await found(notes)) == 4, "the superuser sees all"
    await notes.execute(f"SET ROLE {reader}")
    assert [row["key"] for row in await found(notes)] == ["4", "1"]
    assert [row["key"] for row in await found(notes, 1)] == ["4"], "k rows are found among those it may see"
    await notes.execute("RESET ROLE")
    await notes.execute(f"DROP POLICY own_tenant ON notes; CREATE POLICY none ON notes TO {reader} USING (false)")
    await notes.execute(f"SET ROLE {reader}")
    assert await found(notes) == []


async def test_policies_hold_through_the_index_too(connection: asyncpg.Connection) -> None:
    """The nearest thousand belong to somebody else; the reader still finds its own ten behind them."""
    await fill(connection, {n: n * 0.05 for n in range(1, 1101)})
    await connection.execute(f"CREATE ROLE {READER}")
    try:
        await connection.execute(f"GRANT sidecar_reader TO {READER}")
        await connection.execute(f"GRANT SELECT ON notes, notes_embeddings TO {READER}")
        await connection.execute("UPDATE notes SET tenant = 'b' WHERE id <= 1000")
        await connection.execute("ALTER TABLE notes ENABLE ROW LEVEL SECURITY")
        await connection.execute(f"CREATE POLICY own_tenant ON notes TO {READER} USING (tenant = 'a')")
        await connection.execute("ANALYZE notes")
        await connection.execute("ANALYZE notes_embeddings")
        await connection.execute(f"SET ROLE {READER}")
        await connection.execute("SET enable_sort = off")  # the index is the only ordered way
        assert [int(row["key"]) for row in await found(connection, 5)] == [1001, 1002, 1003, 1004, 1005]
    finally:
        await connection.execute("RESET ROLE")
        await connection.execute(f"DROP OWNED BY {READER}")
        await connection.execute(f"DROP ROLE {READER}")


@pytest.mark.parametrize("granted", ["", "notes", "notes_embeddings"])
async def test_a_reader_without_select_is_refused(notes: asyncpg.Connection, reader: str, granted: str) -> None:
    if granted:
        await notes.execute(f"GRANT SELECT ON {granted} TO {reader}")
    await notes.execute(f"SET ROLE {reader}")
    with pytest.raises(asyncpg.InsufficientPrivilegeError, match="permission denied for table notes"):
        await found(notes)


async def test_a_role_that_is_no_reader_may_not_search(notes: asyncpg.Connection, reader: str) -> None:
    await notes.execute(f"GRANT SELECT ON notes, notes_embeddings TO {reader}")
    await notes.execute(f"REVOKE sidecar_reader FROM {reader}")
    await notes.execute(f"SET ROLE {reader}")
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await found(notes)


async def test_searching_leaves_the_session_as_it_was(notes: asyncpg.Connection) -> None:
    before = await notes.fetchval("SELECT current_setting('hnsw.ef_search')")
    await found(notes, 500)
    assert await notes.fetchval("SELECT current_setting('hnsw.ef_search')") == before


async def test_the_document_itself_is_shown_where_no_text_is_kept(notes: asyncpg.Connection) -> None:
    await notes.execute("UPDATE notes_embeddings SET source_text = NULL WHERE id = 2")
    assert [row["source_text"] for row in await found(notes, 2)] == ["body 2", "body 4"]


async def test_the_type_may_live_in_another_schema(empty_url: str) -> None:
    """As on hosts that keep every extension in ``extensions``, outside the search path."""
    connection = await asyncpg.connect(empty_url)
    try:
        await connection.execute("CREATE SCHEMA extensions")
        await connection.execute("CREATE EXTENSION vector SCHEMA extensions")
        await migrate_at(empty_url)
        await register_vector(connection, schema="extensions")
        await fill(connection, {1: 80, 2: 10})
        assert [row["key"] for row in await found(connection)] == ["2", "1"]
        assert await connection.fetchval("SELECT sidecar.detach('notes')") == "public.notes_embeddings"
    finally:
        await connection.close()
