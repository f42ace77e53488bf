"""The pool against a real server: codecs, errors by name, outages, poolers, and nothing that may not be shown."""

from __future__ import annotations

import asyncio
import traceback
from typing import TYPE_CHECKING

import asyncpg
import numpy as np
import pytest
from pgvector import Vector

from sidecar_daemon.adapters.postgres.pool import Database, Limits, place_of
from sidecar_daemon.domain.errors import Fatal, Poison, Refused, SidecarError, Transient
from tests.conftest import admin
from tests.daemon import free_port
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from sidecar_daemon.adapters.postgres.embedded import EmbeddedServer

CANARY = "canary-4711"
QUICK = Limits(statement=5.0, lock=0.2, connect=2.0, retry=0.5)
PATIENT = Limits(retry=30.0)


@pytest.fixture
async def bare(empty_url: str) -> AsyncIterator[Database]:
    """A database with nothing in it, with short limits."""
    database = await Database.open(empty_url, limits=QUICK)
    yield database
    await database.close()


async def failure(database: Database, sql: str, *args: object) -> SidecarError:
    """The error that a call ends with; its traceback must not show what may not be shown."""
    with pytest.raises(SidecarError) as caught:
        await database.call(sql, *args, retry=False)
    shown = "".join(traceback.format_exception(caught.value))
    assert CANARY not in shown
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("pooler_mode", [False, True])
@pytest.mark.parametrize("schema", ["public", "extensions", "Odd Place"])
async def test_vectors_travel_whatever_schema_the_type_lives_in(
    empty_url: str, schema: str, *, pooler_mode: bool
) -> None:
    admin(empty_url, f'CREATE SCHEMA IF NOT EXISTS "{schema}"', f'CREATE EXTENSION vector SCHEMA "{schema}"')
    database = await Database.open(empty_url, pooler_mode=pooler_mode)
    sent = [np.array([1, 2.5, -3], np.float32), np.array([0, 0, 1], np.float32)]
    (row,) = await database.call(
        f'SELECT $1::"{schema}".vector AS one, $2::"{schema}".vector[] AS many', sent[0], [Vector(one) for one in sent]
    )
    assert row["one"].to_list() == [1, 2.5, -3]
    assert [vector.to_list() for vector in row["many"]] == [[1, 2.5, -3], [0, 0, 1]]
    await database.close()


async def test_a_pool_opened_before_the_extension_learns_vectors(bare: Database, empty_url: str) -> None:
    assert await bare.fetch_value("SELECT 1") == 1
    admin(empty_url, "CREATE EXTENSION vector")
    vector = np.array([1, 2], np.float32)
    assert (await bare.fetch_value("SELECT $1::public.vector", vector)).to_list() == [1, 2]


async def test_an_extension_made_anew_is_learnt_again(bare: Database, empty_url: str) -> None:
    admin(empty_url, "CREATE EXTENSION vector")
    vector = np.array([1, 2], np.float32)
    ask = "SELECT $1::public.vector"
    await bare.call(ask, vector)
    admin(empty_url, "DROP EXTENSION vector", "CREATE EXTENSION vector")
    assert (await bare.fetch_value(ask, vector)).to_list() == [1, 2]


@pytest.mark.parametrize(
    ("sql", "kind", "code"),
    [
        ("SELECT * FROM absent", Transient, "schema_missing"),
        ("SELECT sidecar.absent()", Transient, "schema_missing"),
        ("SELECT absent()", Transient, "schema_missing"),
        ("SET default_transaction_read_only = on; CREATE TABLE t ()", Fatal, None),
        ("SELECT 1/0", Poison, "division_by_zero"),
        (f"SELECT '{CANARY}'::int", Poison, "invalid_text_representation"),
        (f"SELEC '{CANARY[:3]}'", Fatal, "postgres_syntax"),
        ("SELECT pg_terminate_backend(pg_backend_pid())", Transient, "connection_lost"),
        ("SELECT refuse('SC001')", Refused, "model_mismatch"),
        ("SELECT refuse('SC002')", Refused, "unknown_pipeline"),
        ("SELECT refuse('SC003')", Refused, "paused"),
        ("SELECT refuse('SC010')", Fatal, "rejected"),
        ("SELECT refuse('40P01')", Transient, "deadlock"),
        ("SELECT refuse('53100')", Transient, "disk_full"),
        ("SELECT refuse('53300')", Transient, "too_many_connections"),
        ("SELECT refuse('25006')", Transient, "read_only"),
        ("SELECT refuse('42501')", Transient, "permission_denied"),
        ("SELECT refuse('XX001')", Transient, "data_corrupted"),
        ("SELECT refuse('XX002')", Transient, "index_corrupted"),
    ],
)
async def test_an_error_has_a_name_and_a_culprit(
    bare: Database, empty_url: str, sql: str, kind: type[SidecarError], code: str | None
) -> None:
    admin(
        empty_url,
        "CREATE FUNCTION refuse(state text) RETURNS void LANGUAGE plpgsql AS "
        f"$$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = state, DETAIL = '{CANARY}', HINT = '{CANARY}'; END $$",
    )
    error = await failure(bare, sql)
    assert type(error) is kind
    assert code is None or error.code == code


async def test_a_broken_constraint_names_the_constraint_and_never_the_row(bare: Database, empty_url: str) -> None:
    admin(empty_url, "CREATE TABLE t (k text CONSTRAINT only_short CHECK (length(k) < 3) PRIMARY KEY)")
    error = await failure(bare, "INSERT INTO t VALUES ($1)", CANARY)
    assert isinstance(error, Poison)
    assert "only_short" in str(error)
    admin(empty_url, f"ALTER TABLE t DROP CONSTRAINT only_short; INSERT INTO t VALUES ('{CANARY}')")
    assert "t_pkey" in str(await failure(bare, "INSERT INTO t VALUES ($1)", CANARY))


async def test_an_argument_of_the_wrong_type_is_ours_and_is_not_shown(bare: Database) -> None:
    error = await failure(bare, "SELECT $1::int", CANARY)
    assert isinstance(error, Fatal)
    assert "$1" in str(error)


async def test_a_user_exception_does_not_show_its_text(bare: Database, empty_url: str) -> None:
    admin(
        empty_url,
        f"CREATE FUNCTION shout() RETURNS void LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION '{CANARY}'; END $$",
    )
    assert isinstance(await failure(bare, "SELECT shout()"), Poison)


async def test_locks_and_statements_have_limits(bare: Database, empty_url: str) -> None:
    admin(empty_url, "CREATE TABLE t ()")
    holder = await asyncpg.connect(empty_url)
    async with holder.transaction():
        await holder.execute("LOCK TABLE t")
        assert (await failure(bare, "SELECT FROM t")).code == "lock_timeout"
    await holder.close()
    short = await Database.open(empty_url, limits=Limits(statement=0.2))
    assert (await failure(short, "SELECT pg_sleep(60)")).code == "statement_timeout"
    await short.close()


async def test_without_session_settings_a_statement_still_has_a_limit(empty_url: str) -> None:
    pooled = await Database.open(empty_url, pooler_mode=True, limits=Limits(statement=0.2, connect=0.5))
    assert (await failure(pooled, "SELECT pg_sleep(60)")).code == "timeout"
    assert await pooled.fetch_value("SELECT current_setting('statement_timeout')") == "0"
    assert await pooled.fetch_value("SELECT count(*) FROM pg_prepared_statements") == 0
    await pooled.close()


async def test_behind_a_pooler_parsing_and_running_are_held_together_by_a_transaction(empty_url: str) -> None:
    pooled = await Database.open(empty_url, pooler_mode=True)
    await pooled.call("SAVEPOINT only_inside_a_transaction", retry=False)
    await pooled.close()


async def test_a_call_is_retried_while_the_world_is_to_blame(empty_url: str) -> None:
    admin(empty_url, "CREATE SEQUENCE tries")
    seen: list[tuple[str, int, float]] = []
    database = await Database.open(
        empty_url, on_retry=lambda error, attempt, wait: seen.append((error.code, attempt, wait)), limits=PATIENT
    )
    admin(
        empty_url,
        "CREATE FUNCTION third_time() RETURNS int LANGUAGE plpgsql AS $$ BEGIN IF nextval('tries') < 3 THEN "
        "RAISE EXCEPTION 'busy' USING ERRCODE = '40001'; END IF; RETURN 3; END $$",
    )
    assert await database.fetch_value("SELECT third_time()") == 3
    assert [(code, attempt) for code, attempt, _ in seen] == [("serialization", 1), ("serialization", 2)]
    await database.close()


@pytest.mark.parametrize("state", ["SC001", "22000", "42601"])
async def test_a_call_is_not_retried_when_waiting_cannot_help(empty_url: str, state: str) -> None:
    seen: list[str] = []
    database = await Database.open(empty_url, on_retry=lambda error, *_: seen.append(error.code))
    with pytest.raises(SidecarError):
        await database.call(f"DO $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '{state}'; END $$")
    assert seen == []
    await database.close()


async def test_the_pool_survives_a_crash_and_a_restart_of_the_server(server: EmbeddedServer) -> None:
    database = await Database.open(server.dsn(), limits=PATIENT)
    await asyncio.gather(*(database.call("SELECT pg_sleep(0.05)") for _ in range(4)))
    await asyncio.to_thread(server.restart, "immediate")
    assert await asyncio.gather(*(database.fetch_value("SELECT 7") for _ in range(8))) == [7] * 8
    await asyncio.to_thread(server.stop, "immediate")
    assert (await failure(database, "SELECT 7")).code == "connection_lost"
    waiting = asyncio.create_task(database.fetch_value("SELECT 7"))
    await asyncio.to_thread(server.start)
    assert await waiting == 7
    await database.close()


async def test_a_pool_opens_while_the_server_is_down_and_works_when_it_is_up(server: EmbeddedServer) -> None:
    await asyncio.to_thread(server.stop)
    database = await Database.open(server.dsn(), limits=QUICK)
    with pytest.raises(Transient):
        await database.check()
    await asyncio.to_thread(server.start)
    await database.check()
    await database.close()


async def test_a_killed_backend_costs_a_retry_and_nothing_else(bare: Database, empty_url: str) -> None:
    victim = await bare.fetch_value("SELECT pg_backend_pid()")
    admin(empty_url, f"SELECT pg_terminate_backend({victim})")
    successor = await bare.fetch_value("SELECT pg_backend_pid()")
    assert successor != victim


async def test_a_transaction_is_all_or_nothing(bare: Database, empty_url: str) -> None:
    admin(empty_url, "CREATE TABLE t (n int)")
    async with bare.transaction() as connection:
        await connection.execute("INSERT INTO t VALUES (1)")

    async def half() -> None:
        async with bare.transaction() as connection:
            await connection.execute("INSERT INTO t VALUES (2)")
            await connection.execute("SELECT 1/0")

    with pytest.raises(Poison):
        await half()
    assert [row["n"] for row in await bare.call("SELECT n FROM t")] == [1]


async def test_closing_does_not_wait_for_a_long_statement(empty_url: str) -> None:
    database = await Database.open(empty_url)
    endless = asyncio.create_task(database.call("SELECT pg_sleep(600) /* endless */", retry=False))
    watcher = await asyncpg.connect(empty_url)
    ask = "SELECT count(*) FROM pg_stat_activity WHERE query ~ 'endless' AND pid <> pg_backend_pid()"
    await eventually(lambda: watcher.fetchval(ask), what="the statement")
    await watcher.close()
    await asyncio.wait_for(database.close(), 20)
    with pytest.raises(Transient):
        await endless


@pytest.mark.parametrize("dsn", ["", "nonsense", "mysql://h/db", "host=localhost dbname=x", "postgresql//x"])
async def test_a_url_of_another_kind_is_refused(dsn: str) -> None:
    with pytest.raises(Fatal, match="postgresql://"):
        await Database.open(dsn)


@pytest.mark.parametrize("dsn", ["postgresql://h:notaport/db", "postgresql://h/db?sslmode=sometimes"])
async def test_a_url_that_the_driver_does_not_understand_is_one_line(dsn: str) -> None:

    async def use() -> None:
        database = await Database.open(dsn)
        await database.check()

    with pytest.raises(Fatal) as caught:
        await use()
    assert caught.value.code == "bad_database_url"


@pytest.mark.parametrize(
    ("dsn", "place"),
    [
        ("postgresql://me:s3cret@db.example:6432/shop", "me@db.example:6432/shop"),
        ("postgres://me:p%40ss@a:1,b:2/shop?target_session_attrs=read-write", "me@a:1,b:2/shop"),
        ("postgresql:///shop?host=/run/pg&user=me&password=s3cret", "me@/run/pg/shop"),
        ("postgresql://db/shop", "db/shop"),
        ("postgresql://me:s3@cret@db/shop", "me@db/shop"),
    ],
)
def test_a_place_has_no_password(dsn: str, place: str) -> None:
    assert place_of(dsn) == place


async def test_nobody_listens_there(tmp_path: Path) -> None:
    port = free_port()
    for dsn, line in (
        (f"postgresql://me:s3cret@127.0.0.1:{port}/shop", f"me@127.0.0.1:{port}/shop: connection refused"),
        (f"postgresql://me:s3cret@/shop?host={tmp_path}", "no server listens on that socket"),
        ("postgresql://me:s3cret@no-such-host.invalid/shop", "the host name is unknown"),
    ):
        database = await Database.open(dsn)
        with pytest.raises(Transient) as caught:
            await database.check()
        assert str(caught.value).endswith(line)
        assert "s3cret" not in "".join(traceback.format_exception(caught.value))
        await database.close()


async def test_wrong_password_and_unknown_database_are_one_line(server: EmbeddedServer) -> None:
    hba = server.data_dir / "strict_hba.conf"
    hba.write_text("local all all trust\nhost all all 127.0.0.1/32 scram-sha-256\n")
    hba.chmod(0o644)
    port = free_port()
    await asyncio.to_thread(server.stop)
    strict = type(server)(server.data_dir, settings={"hba_file": str(hba), "fsync": "off"}, tcp_port=port)
    await asyncio.to_thread(strict.start)
    admin(strict.dsn(), "CREATE ROLE shopkeeper LOGIN PASSWORD 'r1ght'")
    try:
        for database, password, code, line in (
            ("postgres", "wr0ng", "wrong_password", f"shopkeeper@127.0.0.1:{port}/postgres"),
            ("absent", "r1ght", "unknown_database", f"shopkeeper@127.0.0.1:{port}/absent"),
        ):
            pool = await Database.open(strict.dsn(database, "shopkeeper", password))
            with pytest.raises(Transient) as caught:
                await pool.check()
            assert caught.value.code == code
            assert line in str(caught.value)
            assert password not in "".join(traceback.format_exception(caught.value))
            await pool.close()
        right = await Database.open(strict.dsn("postgres", "shopkeeper", "r1ght"))
        await right.check()
        await right.close()
    finally:
        await asyncio.to_thread(strict.stop)
