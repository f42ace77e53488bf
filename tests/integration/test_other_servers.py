"""Servers that are set up otherwise: an old pgmq, vectors in another schema, a pooler, a role that may only execute."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import asyncpg
import pytest

from tests import legacy_pgmq
from tests.conftest import RUNTIME_ROLE, admin, migrate_at
from tests.daemon import Daemon

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

ATTACH = "SELECT sidecar.attach('docs', ARRAY['body'], p_model => 'tiny', p_dimensions => 32)"
QUICK = {"THREADS": "1", "LEASE_SECONDS": "5", "POLL_MAX": "0.2", "BACKOFF_BASE": "0.05", "BACKOFF_CAP": "0.05"}
TABLE_PRIVILEGES = """
SELECT count(*) FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p', 'v', 'S') AND n.nspname <> 'information_schema' AND n.nspname !~ '^pg_'
AND c.relname NOT IN ('status', 'dead_letters') AND CASE c.relkind
    WHEN 'S' THEN has_sequence_privilege($1, c.oid, 'USAGE, SELECT, UPDATE')
    ELSE has_table_privilege($1, c.oid, 'SELECT, INSERT, UPDATE, DELETE, TRUNCATE, REFERENCES, TRIGGER') END
"""


async def end_to_end(url: str, models: Path, settings: dict[str, str], admin_url: str | None = None) -> Daemon:
    """Embed what was there, an edit and a new one; sweep; bury what cannot be embedded. The daemon has drained."""
    async with connected(admin_url or url) as connection:
        await connection.execute("CREATE TABLE docs (id bigint PRIMARY KEY, body text)")
        await connection.execute("INSERT INTO docs VALUES (1, 'one'), (2, 'two'), (3, ' ')")
        await connection.execute(ATTACH)
        limit = {"MAX_DOCUMENT_BYTES": "1024", "SWEEP_INTERVAL": "1"}
        async with Daemon(url, models, QUICK | limit | settings) as daemon:

            async def current(*keys: int) -> bool:
                rows = await connection.fetch(
                    "SELECT id FROM docs JOIN docs_embeddings AS e USING (id) WHERE e.source_text_hash = md5(body) "
                    "ORDER BY id"
                )
                return [row["id"] for row in rows] == list(keys)

            async def buried(reasons: set[str]) -> bool:
                rows = await connection.fetch("SELECT message ->> 'reason' AS reason FROM pgmq.q_docs_dlq")
                return {row["reason"] for row in rows} == reasons

            await daemon.wait_for(lambda: current(1, 2), what="the backfill")
            await connection.execute("UPDATE docs SET body = 'edited' WHERE id = 1; INSERT INTO docs VALUES (4, 'new')")
            await daemon.wait_for(lambda: current(1, 2, 4), what="the edit and the new one")
            await connection.execute("ALTER TABLE docs DISABLE TRIGGER USER")
            await connection.execute("UPDATE docs SET body = 'unseen' WHERE id = 2")
            await connection.execute("ALTER TABLE docs ENABLE TRIGGER USER")
            await connection.execute("SELECT sidecar.request_sweep('docs')")
            await daemon.wait_for(lambda: current(1, 2, 4), what="the sweep's find")
            await connection.execute("INSERT INTO docs VALUES (5, repeat('x', 2000))")
            await connection.execute("SELECT pgmq.send('docs', '{\"what\": 1}')")
            await daemon.wait_for(lambda: buried({"too_large", "malformed"}), what="two dead letters")
            assert await connection.fetchval("SELECT count(*) FROM pgmq.q_docs") == 0
            assert await daemon.status_of("/status") == 200
            await look(connection, daemon)
            assert await daemon.terminate() == 0
    assert not [e for e in daemon.events if e["event"] in {"fault", "deferred", "pipeline_refused"}]
    return daemon


async def look(connection: asyncpg.Connection, daemon: Daemon) -> None:
    """Whatever the daemon's sessions keep stays within what a pooler allows, where it was told of one."""
    rows = await connection.fetch(
        "SELECT application_name, query FROM pg_stat_activity WHERE application_name LIKE 'sidecar_daemon%' "
        "AND datname = current_database()"
    )
    assert rows
    assert not await connection.fetchval(
        "SELECT count(*) FROM pg_locks AS l JOIN pg_stat_activity AS a USING (pid) WHERE l.locktype = 'advisory' "
        "AND a.xact_start IS NULL AND a.datname = current_database()"
    ), "a lock outlived its transaction"
    listening = any(row["application_name"] == "sidecar_daemon listener" for row in rows)
    assert listening == (daemon.settings.get("POOLER") != "transaction")


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(url)
    try:
        yield connection
    finally:
        await connection.close()


async def test_pgmq_as_it_was_before_headers(empty_url: str, tiny_models: Path) -> None:
    admin(empty_url, legacy_pgmq.SQL)
    await migrate_at(empty_url)
    await end_to_end(empty_url, tiny_models, {})
    async with connected(empty_url) as connection:
        assert not await connection.fetchval(
            "SELECT EXISTS (SELECT FROM information_schema.columns WHERE table_schema = 'pgmq' "
            "AND column_name = 'headers')"
        )


async def test_vectors_in_another_schema(empty_url: str, tiny_models: Path) -> None:
    admin(empty_url, "CREATE SCHEMA extensions", "CREATE EXTENSION vector SCHEMA extensions")
    await migrate_at(empty_url)
    await end_to_end(empty_url, tiny_models, {})
    async with connected(empty_url) as connection:
        found = await connection.fetchval(
            "SELECT format_type(atttypid, atttypmod) FROM pg_attribute "
            "WHERE attrelid = 'docs_embeddings'::regclass AND attname = 'embedding'"
        )
        assert found == "extensions.vector(32)"


SPY = """
CREATE TABLE public.spied (prepared bigint, listening bigint, settings text);
CREATE FUNCTION public.spy() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO public.spied SELECT
        (SELECT count(*) FROM pg_prepared_statements WHERE name <> ''),
        (SELECT count(*) FROM pg_listening_channels()),
        (SELECT string_agg(name, ', ') FROM pg_settings WHERE source = 'session' AND setting <> reset_val
            AND name NOT IN
                ('search_path', 'lock_timeout', 'DateStyle', 'IntervalStyle', 'TimeZone', 'extra_float_digits'));
    RETURN NULL;
END $$;
CREATE TRIGGER spy AFTER INSERT OR UPDATE ON docs_embeddings FOR EACH STATEMENT EXECUTE FUNCTION public.spy();
"""
"""What the daemon's own session keeps, seen from inside it; settings of our functions end with each call."""


@pytest.mark.parametrize(("pooler", "prepared"), [("transaction", False), ("session", True)])
async def test_nothing_stays_in_the_session_behind_a_pooler(
    database_url: str, tiny_models: Path, pooler: str, *, prepared: bool
) -> None:
    """R20. In session mode the same spy finds prepared statements: it does look."""
    async with connected(database_url) as connection:
        await connection.execute("CREATE TABLE docs (id bigint PRIMARY KEY, body text)")
        await connection.execute(ATTACH)
        await connection.execute(SPY)
        await connection.execute("GRANT INSERT ON public.spied TO PUBLIC")
        async with Daemon(database_url, tiny_models, QUICK | {"POOLER": pooler}) as daemon:
            for n in range(4):
                await connection.execute("INSERT INTO docs VALUES ($1, 'text')", n)

                async def spied(count: int = n + 1) -> bool:
                    return int(await connection.fetchval("SELECT count(*) FROM docs_embeddings")) == count

                await daemon.wait_for(spied)
            await look(connection, daemon)
        row = await connection.fetchrow("SELECT max(prepared), max(listening), max(settings) FROM public.spied")
        assert row is not None
        assert (row[0] > 0) == prepared
        assert tuple(row)[1:] == (0, None)


async def test_a_pooler_is_polled_instead_of_listened_to(database_url: str, tiny_models: Path) -> None:
    daemon = await end_to_end(database_url, tiny_models, {"POOLER": "transaction"})
    assert any(e["event"] == "listening_off" for e in daemon.events)


async def test_a_role_that_may_only_execute(database_url: str, runtime_url: str, tiny_models: Path) -> None:
    await end_to_end(runtime_url, tiny_models, {}, admin_url=database_url)
    async with connected(database_url) as connection:
        assert await connection.fetchval(TABLE_PRIVILEGES, RUNTIME_ROLE) == 0
        assert await connection.fetchval(TABLE_PRIVILEGES, "postgres") > 0, "the question does find privileges"
