"""Migrations on real databases: fresh, twice, two at once, changed, too new, and with little privilege."""

from __future__ import annotations

import asyncio
import shutil
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import asyncpg
import pytest

from sidecar_daemon.adapters.postgres.migrate import applied_version, check_version, expected_version, migrate
from sidecar_daemon.adapters.postgres.pool import Database
from sidecar_daemon.domain.errors import Fatal, SidecarError, Transient
from tests import legacy_pgmq
from tests.conftest import SQL, admin, in_thread, migrate_at

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from sidecar_daemon.adapters.postgres.embedded import EmbeddedServer
    from sidecar_daemon.adapters.postgres.migrate import MigrationReport

VERSION_FUNCTION = (
    "CREATE OR REPLACE FUNCTION sidecar.schema_version() RETURNS int LANGUAGE sql SECURITY DEFINER "
    "RETURN (SELECT max(version) FROM sidecar.schema_migrations)"
)


@pytest.fixture
def sql_dir(tmp_path: Path) -> Path:
    """A small SQL folder of the test's own."""
    (tmp_path / "migrations").mkdir()
    (tmp_path / "functions").mkdir()
    (tmp_path / "migrations/0001_first.sql").write_text(
        "CREATE TABLE sidecar.things (n int, v @extschema:vector@.vector(3))"
    )
    (tmp_path / "functions/version.sql").write_text(VERSION_FUNCTION)
    return tmp_path


@asynccontextmanager
async def opened(dsn: str) -> AsyncIterator[Database]:
    database = await Database.open(dsn)
    try:
        yield database
    finally:
        await database.close()


async def run(dsn: str, sql_dir: Path) -> MigrationReport:
    async with opened(dsn) as database:
        return await migrate(database, sql_dir)


async def refusal(dsn: str, sql_dir: Path, kind: type[SidecarError] = Fatal) -> str:
    with pytest.raises(kind) as caught:
        await run(dsn, sql_dir)
    assert "\n" not in str(caught.value)
    return str(caught.value)


async def ask(dsn: str, question: str, *args: object) -> object:
    connection = await asyncpg.connect(dsn)
    try:
        return await connection.fetchval(question, *args)
    finally:
        await connection.close()


async def test_the_second_run_finds_nothing_to_do(empty_url: str) -> None:
    first = await run(empty_url, SQL)
    second = await run(empty_url, SQL)
    assert any(line.startswith("applied 0001_") for line in first.lines)
    assert f"schema version {second.version}: nothing to do" in second.lines
    assert not any(line.startswith(("applied", "created", "installed")) for line in second.lines)
    assert first.warnings == second.warnings == []


async def test_versions_before_and_after(empty_url: str, sql_dir: Path) -> None:
    assert expected_version(sql_dir) == 1
    async with opened(empty_url) as database:
        assert await applied_version(database) is None
        with pytest.raises(Fatal, match="run sidecar-daemon migrate"):
            await check_version(database, sql_dir)
        await migrate(database, sql_dir)
        assert await applied_version(database) == 1
        await check_version(database, sql_dir)
        (sql_dir / "migrations/0002_second.sql").write_text("CREATE TABLE sidecar.more ()")
        with pytest.raises(Fatal, match=r"is at schema version 1, this release needs 2: run sidecar-daemon migrate"):
            await check_version(database, sql_dir)
        report = await migrate(database, sql_dir)
        assert "applied 0002_second" in report.lines
        assert "applied 0001_first" not in report.lines
        (sql_dir / "migrations/0002_second.sql").unlink()
        with pytest.raises(Fatal, match=r"is at schema version 2, this release knows 1: upgrade the daemon"):
            await check_version(database, sql_dir)
    assert "upgrade the daemon" in await refusal(empty_url, sql_dir)


async def test_the_runtime_role_may_ask_for_the_version(runtime_url: str) -> None:
    async with opened(runtime_url) as database:
        await check_version(database, SQL)


async def test_everything_or_nothing(empty_url: str, sql_dir: Path) -> None:
    (sql_dir / "migrations/0002_broken.sql").write_text("CREATE TABLE sidecar.fine ();\nSELECT 1 FROM absent;")
    line = await refusal(empty_url, sql_dir, Transient)
    assert line.startswith("sql/migrations/0002_broken.sql: ")
    assert "absent" in line
    assert await ask(empty_url, "SELECT to_regnamespace('sidecar') IS NULL AND to_regnamespace('pgmq') IS NULL")


async def test_a_broken_function_is_named(empty_url: str, sql_dir: Path) -> None:
    await run(empty_url, sql_dir)
    (sql_dir / "functions/version.sql").write_text(VERSION_FUNCTION.replace("RETURNS int", "RETURNS bigint"))
    line = await refusal(empty_url, sql_dir)
    assert line.startswith("sql/functions/version.sql: cannot change return type")


async def test_a_changed_migration_is_refused_by_name(empty_url: str, sql_dir: Path) -> None:
    await run(empty_url, sql_dir)
    with (sql_dir / "migrations/0001_first.sql").open("a") as file:
        file.write(" ")
    assert (await refusal(empty_url, sql_dir)).startswith("0001_first.sql was changed after it was applied")


@pytest.mark.parametrize(
    ("names", "named"),
    [
        (["0003_gap.sql"], "0003_gap.sql: 0002 comes next"),
        (["0001_double.sql"], "0001_first.sql: 0002 comes next"),
        (["two.sql"], "two.sql: a migration is named NNNN_name.sql"),
    ],
)
def test_a_folder_with_gaps_or_doubles_is_refused(sql_dir: Path, names: list[str], named: str) -> None:
    for name in names:
        (sql_dir / "migrations" / name).write_text("SELECT 1")
    with pytest.raises(Fatal) as caught:
        expected_version(sql_dir)
    assert str(caught.value).startswith(named)


def test_a_folder_without_migrations_is_an_incomplete_installation(tmp_path: Path) -> None:
    with pytest.raises(Fatal, match="incomplete"):
        expected_version(tmp_path)


async def test_two_at_once_apply_everything_once(empty_url: str, sql_dir: Path) -> None:
    (sql_dir / "migrations/0002_slow.sql").write_text("SELECT pg_sleep(0.2); CREATE TABLE sidecar.slow ()")
    reports = await asyncio.gather(*(run(empty_url, sql_dir) for _ in range(3)))
    lines = [line for report in reports for line in report.lines]
    assert lines.count("applied 0002_slow") == 1
    assert lines.count("schema version 2: nothing to do") == 2


async def test_two_databases_of_one_fresh_server_at_once(server: EmbeddedServer, sql_dir: Path) -> None:
    admin(server.dsn(), *(f"CREATE DATABASE d{number}" for number in range(3)))
    await asyncio.gather(*(run(server.dsn(f"d{number}"), sql_dir) for number in range(3)))
    assert await ask(server.dsn(), "SELECT count(*) FROM pg_roles WHERE rolname ~ '^sidecar_'") == 3
    assert await ask(server.dsn(), "SELECT rolbypassrls FROM pg_roles WHERE rolname = 'sidecar_owner'")


async def test_the_vector_type_may_live_anywhere(empty_url: str, sql_dir: Path) -> None:
    admin(empty_url, 'CREATE SCHEMA "Odd Place"', 'CREATE EXTENSION vector SCHEMA "Odd Place"')
    report = await run(empty_url, sql_dir)
    assert not any("vector" in line for line in report.lines)
    assert await ask(empty_url, "SELECT has_schema_privilege('sidecar_owner', 'Odd Place', 'USAGE')")


async def test_the_real_schema_works_with_vector_in_extensions(empty_url: str) -> None:
    admin(empty_url, "CREATE SCHEMA extensions", "CREATE EXTENSION vector SCHEMA extensions")
    assert (await run(empty_url, SQL)).warnings == []


async def test_pgmq_that_is_there_is_left_as_it_is(empty_url: str) -> None:
    admin(empty_url, legacy_pgmq.SQL)
    report = await run(empty_url, SQL)
    assert not any("pgmq" in line for line in report.lines)
    assert await ask(empty_url, "SELECT count(*) FROM pg_attribute WHERE attname = 'headers'") == 0
    assert await ask(empty_url, "SELECT has_table_privilege('sidecar_owner', 'pgmq.meta', 'SELECT')")


async def test_without_pgmq_anywhere_both_remedies_are_named(
    empty_url: str, sql_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pgmq", None)
    line = await refusal(empty_url, sql_dir)
    assert "install it on the server" in line
    assert "pip install pgmq" in line


@pytest.fixture
def plain_role(server: EmbeddedServer) -> str:
    """A login role that is neither superuser nor may create roles, and owns its database ``plain``."""
    admin(server.dsn(), "CREATE ROLE plain LOGIN", "CREATE DATABASE plain OWNER plain")
    admin(server.dsn("plain"), "CREATE EXTENSION vector")
    return "plain"


async def test_a_role_without_privileges_owns_everything_and_is_told_so(
    server: EmbeddedServer, plain_role: str, sql_dir: Path
) -> None:
    dsn = server.dsn("plain", plain_role)
    report = await run(dsn, sql_dir)
    assert [warning.split(": ")[1].split(" ")[0] for warning in report.warnings] == [
        "sidecar_owner",
        "sidecar_runtime",
        "sidecar_reader",
        "GRANT",  # to see other sessions' transactions
    ]
    owner = "SELECT nspowner::regrole::text FROM pg_namespace WHERE nspname = 'sidecar'"
    assert await ask(dsn, owner) == plain_role
    again = await run(dsn, sql_dir)
    assert "schema version 1: nothing to do" in again.lines
    admin(server.dsn(), "CREATE ROLE sidecar_owner NOLOGIN")
    await run(dsn, sql_dir)
    assert await ask(dsn, owner) == plain_role


async def test_the_real_schema_migrates_without_roles(server: EmbeddedServer, plain_role: str) -> None:
    dsn = server.dsn("plain", plain_role)
    first = await run(dsn, SQL)
    assert len(first.warnings) == 4
    async with opened(dsn) as database:
        await check_version(database, SQL)


async def test_a_role_that_may_create_roles_hands_over_to_the_owner(server: EmbeddedServer, plain_role: str) -> None:
    admin(server.dsn(), "ALTER ROLE plain CREATEROLE")
    dsn = server.dsn("plain", plain_role)
    report = await run(dsn, SQL)
    (warning,) = report.warnings
    assert warning.endswith('is not measured: GRANT pg_read_all_stats TO "sidecar_owner"')
    assert await ask(dsn, "SELECT nspowner::regrole::text FROM pg_namespace WHERE nspname = 'sidecar'") == (
        "sidecar_owner"
    )
    assert await ask(dsn, "SELECT NOT rolbypassrls FROM pg_roles WHERE rolname = 'sidecar_owner'")
    assert f"schema version {report.version}: nothing to do" in (await run(dsn, SQL)).lines


async def test_a_schema_of_somebody_else_is_not_touched(server: EmbeddedServer, plain_role: str, sql_dir: Path) -> None:
    in_thread(migrate_at(server.dsn("plain"), sql_dir))
    line = await refusal(server.dsn("plain", plain_role), sql_dir)
    assert line.startswith("schema sidecar belongs to sidecar_owner and plain is not a member of it")


async def test_an_extension_that_may_not_be_created_is_named(
    server: EmbeddedServer, plain_role: str, sql_dir: Path
) -> None:
    admin(server.dsn("plain"), "DROP EXTENSION vector", "ALTER DATABASE plain OWNER TO postgres")
    assert "CREATE EXTENSION vector" in await refusal(server.dsn("plain", plain_role), sql_dir)


async def test_an_old_vector_is_refused(empty_url: str, sql_dir: Path) -> None:
    admin(empty_url, "CREATE EXTENSION vector", "UPDATE pg_extension SET extversion = '0.6.2' WHERE extname = 'vector'")
    assert "extension vector 0.6.2 in schema public is too old" in await refusal(empty_url, sql_dir)


async def test_the_owner_can_do_nothing_beyond_its_own_schema_and_the_queues(database_url: str) -> None:
    question = (
        "SELECT has_schema_privilege('sidecar_owner', 'public', 'CREATE') "
        "OR has_database_privilege('sidecar_owner', current_database(), 'CREATE')"
    )
    assert await ask(database_url, question) is False


async def test_the_legacy_pgmq_of_these_tests_behaves_like_a_queue(empty_url: str) -> None:
    admin(empty_url, legacy_pgmq.SQL, "SELECT pgmq.create('Jobs')", "SELECT pgmq.create('Jobs')")
    sent = "SELECT array_agg(s) FROM pgmq.send_batch('Jobs', ARRAY['{}', '{}', '{}']::jsonb[]) s"
    assert await ask(empty_url, sent) == [1, 2, 3]
    assert await ask(empty_url, "SELECT pgmq.send('Jobs', '{\"a\": 1}', 60)") == 4
    leased = "SELECT array_agg(msg_id || ':' || read_ct) FROM pgmq.read('Jobs', 60, 2)"
    assert await ask(empty_url, leased) == ["1:1", "2:1"]
    assert await ask(empty_url, "SELECT msg_id FROM pgmq.set_vt('Jobs', 1, 0)") == 1
    assert await ask(empty_url, leased) == ["1:2", "3:1"]
    assert await ask(empty_url, "SELECT pgmq.delete('Jobs', 1), pgmq.delete('Jobs', 99)")
    assert await ask(empty_url, "SELECT pgmq.archive('Jobs', 2)")
    assert await ask(empty_url, "SELECT queue_length FROM pgmq.metrics('Jobs')") == 2
    assert await ask(empty_url, "SELECT pgmq.purge_queue('Jobs')") == 2
    assert await ask(empty_url, "SELECT pgmq.drop_queue('Jobs')")
    assert await ask(empty_url, "SELECT count(*) FROM pgmq.list_queues()") == 0


async def test_functions_that_gained_arguments_replace_the_older_ones(empty_url: str, tmp_path: Path) -> None:
    """Beside an older signature with fewer arguments, every call of it would be ambiguous."""
    older = tmp_path / "older"
    shutil.copytree(SQL, older)
    migrations = ("migrations/0002_claims.sql", "migrations/0003_observation.sql", "migrations/0004_index.sql")
    for added in (*migrations, "functions/claims.sql", "functions/telemetry.sql"):
        (older / added).unlink()
    await run(empty_url, older)
    gained = {
        "read_documents": "text, text, text[], bigint, bigint",
        "extend": "text, text, bigint[], integer[], double precision",
        "defer": "text, text, bigint[], integer[], double precision[], text, boolean",
        "acknowledge": "text, text, bigint[], integer[]",
        "attach": "regclass, text[], text, text, text, text, text, text, text, integer, text, boolean, boolean",
    }
    admin(empty_url, *(f"CREATE FUNCTION sidecar.{n}({a}) RETURNS int RETURN 1" for n, a in gained.items()))
    await run(empty_url, SQL)
    count = "SELECT array_agg(count ORDER BY count DESC) FROM (SELECT count(*) FROM pg_proc WHERE pronamespace = "
    count += "'sidecar'::regnamespace GROUP BY proname) AS c"
    assert (await ask(empty_url, count))[0] == 1  # type: ignore[index]  # an array
