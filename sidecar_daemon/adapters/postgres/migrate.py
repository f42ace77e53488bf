"""Bring a database to the state that this release needs: extensions, roles, migrations, functions. One transaction."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import asyncpg

from sidecar_daemon.adapters.postgres.errors import one_line, translate
from sidecar_daemon.adapters.postgres.prerequisites import (
    choose_owner,
    ensure_pgmq,
    ensure_roles,
    ensure_vector,
    grant_to_owner,
    quoted,
)
from sidecar_daemon.domain.errors import Fatal, SidecarError

if TYPE_CHECKING:
    from pathlib import Path

    from sidecar_daemon.adapters.postgres.pool import Database

_LOCK = 0x5343_4D49_4752
"""Key of the advisory lock that lets one migration run at a time."""
_LOCK_SECONDS = 120
_FILE_SECONDS = 900
_VECTOR_PLACE = "@extschema:vector@"
_FILE_NAME = re.compile(r"(\d{4})_([a-z0-9_]+)\.sql")


@dataclass(slots=True)
class MigrationReport:
    """What a migration did, in lines for people."""

    version: int
    lines: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Migration:
    version: int
    name: str
    sql: str
    checksum: str


def expected_version(sql_dir: Path) -> int:
    """Number of the newest migration file.

    Raises:
        Fatal: there is none, or the numbers have a gap or a duplicate.
    """
    return _migrations(sql_dir)[-1].version


async def applied_version(database: Database) -> int | None:
    """Number of the newest migration that a database has; None where nothing of ours is installed."""
    try:
        version = await database.fetch_value("SELECT sidecar.schema_version()", retry=False)
    except SidecarError as error:
        if error.code == "schema_missing":
            return None
        raise
    return None if version is None else int(version)


async def check_version(database: Database, sql_dir: Path) -> None:
    """Refuse a database that this release cannot work with.

    Raises:
        Fatal: the schema is missing, older or newer; the line says what to do.
        Transient: the database cannot be asked now.
    """
    expected, applied = expected_version(sql_dir), await applied_version(database)
    if applied is None:
        raise Fatal("schema_missing", f"{database.place} has no schema sidecar: run sidecar-daemon migrate")
    if applied < expected:
        raise Fatal(
            "schema_too_old",
            f"{database.place} is at schema version {applied}, this release needs {expected}: "
            "run sidecar-daemon migrate",
        )
    if applied > expected:
        raise _too_new(database, applied, expected)


async def migrate(database: Database, sql_dir: Path) -> MigrationReport:
    """Bring a database up to date. Everything or nothing; a second run finds nothing to do.

    Args:
        database: its role must be able to create what is missing: extensions, roles, a schema.
        sql_dir: holds ``migrations/NNNN_name.sql`` and ``functions/*.sql``.

    Raises:
        Fatal: one line that names what is in the way and what to do about it.
        Transient: the database cannot be worked with now.
    """
    migrations = _migrations(sql_dir)
    functions = _functions(sql_dir)
    report = MigrationReport(migrations[-1].version)
    async with database.transaction() as connection:
        await connection.execute(
            f"SET LOCAL statement_timeout = '{_FILE_SECONDS}s'; SET LOCAL lock_timeout = '{_LOCK_SECONDS}s'; "
            "SET LOCAL idle_in_transaction_session_timeout = 0"
        )
        await connection.execute("SELECT pg_catalog.pg_advisory_xact_lock($1)", _LOCK, timeout=_LOCK_SECONDS)
        vector_schema = await ensure_vector(connection, report.lines)
        await ensure_pgmq(connection, report.lines)
        await ensure_roles(connection, report.lines, report.warnings)
        owner = await choose_owner(connection, report.warnings)
        await _ensure_schema(connection, owner)
        await grant_to_owner(connection, owner, vector_schema, report.warnings)
        await connection.execute(f"SET LOCAL ROLE {quoted(owner)}; SET LOCAL search_path = pg_catalog, pg_temp")
        await _ensure_table(connection)
        await _apply_migrations(connection, database, migrations, vector_schema, report)
        for name, sql in functions:
            await _run_file(connection, f"functions/{name}", sql, vector_schema)
        report.lines.append(f"functions: {len(functions)} files applied")
        await connection.execute("RESET ROLE")
        if await connection.fetchval("SELECT pg_catalog.to_regprocedure('sidecar.refresh()') IS NOT NULL"):
            await connection.execute("SELECT sidecar.refresh()", timeout=_FILE_SECONDS)
    await database.expire()
    return report


def _migrations(sql_dir: Path) -> list[_Migration]:
    folder = sql_dir / "migrations"
    found: list[_Migration] = []
    for path in sorted(folder.glob("*.sql")):
        named = _FILE_NAME.fullmatch(path.name)
        if named is None:
            raise Fatal("bad_migration", f"{path.name}: a migration is named NNNN_name.sql")
        content = path.read_bytes()
        found.append(_Migration(int(named[1]), named[2], content.decode("utf-8"), hashlib.sha256(content).hexdigest()))
    if not found:
        raise Fatal("bad_migration", f"no migrations in {folder}: the installation is incomplete")
    for position, migration in enumerate(found, start=1):
        if migration.version != position:
            raise Fatal(
                "bad_migration",
                f"{migration.version:04}_{migration.name}.sql: {position:04} comes next, numbers have no gap or double",
            )
    return found


def _functions(sql_dir: Path) -> list[tuple[str, str]]:
    return [(path.name, path.read_text(encoding="utf-8")) for path in sorted((sql_dir / "functions").glob("*.sql"))]


async def _ensure_schema(connection: asyncpg.Connection, owner: str) -> None:
    if await connection.fetchval("SELECT pg_catalog.to_regnamespace('sidecar') IS NULL"):
        await connection.execute(f"CREATE SCHEMA sidecar AUTHORIZATION {quoted(owner)}")


async def _ensure_table(connection: asyncpg.Connection) -> None:
    if await connection.fetchval("SELECT pg_catalog.to_regclass('sidecar.schema_migrations') IS NULL"):
        await connection.execute(
            "CREATE TABLE sidecar.schema_migrations (version int PRIMARY KEY, name text NOT NULL, "
            "checksum text NOT NULL, applied_at timestamptz NOT NULL DEFAULT pg_catalog.now())"
        )


async def _apply_migrations(
    connection: asyncpg.Connection,
    database: Database,
    migrations: list[_Migration],
    vector_schema: str,
    report: MigrationReport,
) -> None:
    rows = await connection.fetch("SELECT version, name, checksum FROM sidecar.schema_migrations ORDER BY version")
    if rows and rows[-1]["version"] > migrations[-1].version:
        raise _too_new(database, rows[-1]["version"], migrations[-1].version)
    applied = {row["version"]: row["checksum"] for row in rows}
    for migration in migrations:
        label = f"{migration.version:04}_{migration.name}"
        if migration.version in applied:
            if applied[migration.version] != migration.checksum:
                raise Fatal(
                    "changed_migration",
                    f"{label}.sql was changed after it was applied to {database.place}: "
                    "restore it, and put the change into a new file",
                )
            continue
        await _run_file(connection, f"migrations/{label}.sql", migration.sql, vector_schema)
        await connection.execute(
            "INSERT INTO sidecar.schema_migrations (version, name, checksum) VALUES ($1, $2, $3)",
            migration.version,
            migration.name,
            migration.checksum,
        )
        report.lines.append(f"applied {label}")
    if len(applied) == len(migrations):
        report.lines.append(f"schema version {report.version}: nothing to do")


async def _run_file(connection: asyncpg.Connection, label: str, sql: str, vector_schema: str) -> None:
    try:
        await connection.execute(sql.replace(_VECTOR_PLACE, quoted(vector_schema)), timeout=_FILE_SECONDS)
    except asyncpg.PostgresError as error:
        named = translate(error)
        raise type(named)(named.code, f"sql/{label}: {one_line(str(named))}") from None


def _too_new(database: Database, applied: int, expected: int) -> Fatal:
    return Fatal(
        "schema_too_new",
        f"{database.place} is at schema version {applied}, this release knows {expected}: upgrade the daemon",
    )
