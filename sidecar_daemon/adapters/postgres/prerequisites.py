"""What the schema stands on: the extensions vector and pgmq, and three roles that cannot log in."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import asyncpg

from sidecar_daemon.adapters.postgres.errors import one_line, translate
from sidecar_daemon.domain.errors import Fatal

OWNER = "sidecar_owner"
RUNTIME = "sidecar_runtime"
READER = "sidecar_reader"

_OLDEST_VECTOR = (0, 7)
_EXTENSION = """
SELECT n.nspname AS schema, e.extversion AS version FROM pg_catalog.pg_extension e
JOIN pg_catalog.pg_namespace n ON n.oid = e.extnamespace WHERE e.extname = $1
"""
_AVAILABLE = "SELECT EXISTS (SELECT FROM pg_catalog.pg_available_extensions WHERE name = $1)"
_PGMQ_READ = """
SELECT EXISTS (SELECT FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
WHERE n.nspname = 'pgmq' AND p.proname = 'read')
"""
_MYSELF = """
SELECT rolname AS name, rolsuper, rolsuper OR rolcreaterole AS creates_roles, rolsuper OR rolbypassrls AS bypasses
FROM pg_catalog.pg_roles WHERE rolname = current_user
"""
_ROLE = "SELECT rolbypassrls FROM pg_catalog.pg_roles WHERE rolname = $1"
_TAKEN = (asyncpg.DuplicateObjectError, asyncpg.UniqueViolationError)


def quoted(identifier: str) -> str:
    """Quote an identifier for SQL text."""
    return '"' + identifier.replace('"', '""') + '"'


async def ensure_vector(connection: asyncpg.Connection, lines: list[str]) -> str:
    """Create the extension vector where it is missing; return the schema that holds its type.

    Raises:
        Fatal: the server has no such extension, the role may not create it, or it is too old.
    """
    found = await _extension(connection, "vector")
    if found is None:
        if not await connection.fetchval(_AVAILABLE, "vector"):
            raise Fatal("missing_extension", "this server has no extension vector: install pgvector 0.7 or newer on it")
        await _create(connection, "vector")
        found = await _extension(connection, "vector") or ("", "0")
        lines.append(f"created extension vector {found[1]} in schema {found[0]}")
    schema, version = found
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST_VECTOR:
        raise Fatal(
            "old_extension",
            f"extension vector {version} in schema {schema} is too old, 0.7 is the least: "
            "update pgvector on the server, then ALTER EXTENSION vector UPDATE",
        )
    return schema


async def ensure_pgmq(connection: asyncpg.Connection, lines: list[str]) -> None:
    """Install pgmq where it is missing: the server's extension, else the SQL of the ``pgmq`` package.

    Raises:
        Fatal: neither is there.
    """
    if await connection.fetchval(_PGMQ_READ):
        return
    if await connection.fetchval(_AVAILABLE, "pgmq"):
        await _create(connection, "pgmq")
        lines.append("created extension pgmq")
        return
    sql = pgmq_sql()
    if sql is None:
        raise Fatal(
            "missing_extension",
            "this server has no extension pgmq: install it on the server, or pip install pgmq here "
            "and migrate again (it carries the same as plain SQL)",
        )
    try:
        await connection.execute(sql)
    except asyncpg.PostgresError as error:
        named = translate(error)
        raise type(named)(
            named.code, f"pgmq cannot be installed from the pgmq package: {one_line(str(named))}"
        ) from None
    lines.append("installed pgmq from the SQL of the pgmq package")


def pgmq_sql() -> str | None:
    """SQL that the ``pgmq`` package carries, read without importing it; None where it is not installed."""
    spec = find_spec("pgmq")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / "sql" / "pgmq.sql"
        if path.is_file():
            return path.read_text(encoding="utf-8")
    return None


async def ensure_roles(connection: asyncpg.Connection, lines: list[str], warnings: list[str]) -> None:
    """Create the roles that are missing, where the migrating role may; else warn."""
    (myself,) = await connection.fetch(_MYSELF)
    for name in (OWNER, RUNTIME, READER):
        bypass = name == OWNER and myself["bypasses"]
        role = await connection.fetchrow(_ROLE, name)
        if role is None and myself["creates_roles"]:
            try:
                async with connection.transaction():
                    await connection.execute(f"CREATE ROLE {name} NOLOGIN{' BYPASSRLS' if bypass else ''}")
                lines.append(f"created role {name}")
            except _TAKEN:
                pass  # another migration of another database of this server was faster
        elif role is None:
            warnings.append(
                f"role {myself['name']} may not create roles: {name} is missing, {myself['name']} owns everything"
            )
        elif bypass and myself["rolsuper"] and not role["rolbypassrls"]:
            await connection.execute(f"ALTER ROLE {name} BYPASSRLS")


async def choose_owner(connection: asyncpg.Connection, warnings: list[str]) -> str:
    """Say which role owns the schema: ``sidecar_owner`` where the migrating role can become it, else that role.

    Raises:
        Fatal: the schema exists and its owner is a role that the migrating role cannot become.
    """
    myself = str(await connection.fetchval("SELECT current_user"))
    present = await connection.fetchval(
        "SELECT pg_catalog.pg_get_userbyid(nspowner) FROM pg_catalog.pg_namespace WHERE nspname = 'sidecar'"
    )
    wanted = str(present or OWNER)
    if wanted == myself or await _can_become(connection, wanted):
        return wanted
    if present is not None:
        raise Fatal(
            "permission_denied",
            f"schema sidecar belongs to {wanted} and {myself} is not a member of it: migrate as another role, "
            f"or GRANT {quoted(wanted)} TO {quoted(myself)}",
        )
    if await connection.fetchval("SELECT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = $1)", OWNER):
        warnings.append(f"role {myself} cannot become {OWNER}: {myself} owns everything")
    return myself


async def grant_to_owner(connection: asyncpg.Connection, owner: str, vector_schema: str, warnings: list[str]) -> None:
    """Give the owner what its functions use of the extensions: both schemas, and the list of queues.

    Making and dropping queues is part of ``attach`` and ``detach``, which members of the owner run as themselves.
    """
    who = quoted(owner)
    for check, target, statement in (
        ("has_schema_privilege($1, $2, 'USAGE')", vector_schema, f"GRANT USAGE ON SCHEMA {quoted(vector_schema)}"),
        ("has_schema_privilege($1, $2, 'USAGE')", "pgmq", "GRANT USAGE ON SCHEMA pgmq"),
        ("has_schema_privilege($1, $2, 'CREATE')", "pgmq", "GRANT CREATE ON SCHEMA pgmq"),
        ("has_table_privilege($1, $2, 'SELECT')", "pgmq.meta", "GRANT SELECT ON pgmq.meta"),
        ("has_table_privilege($1, $2, 'INSERT')", "pgmq.meta", "GRANT INSERT ON pgmq.meta"),
        ("has_table_privilege($1, $2, 'DELETE')", "pgmq.meta", "GRANT DELETE ON pgmq.meta"),
    ):
        held = f"SELECT pg_catalog.{check}"
        if await connection.fetchval(held, owner, target):
            continue
        await _attempt(connection, f"{statement} TO {who}")
        if not await connection.fetchval(held, owner, target):
            warnings.append(f"{owner} lacks a privilege that this role may not give: {statement} TO {who}")
    sees = "SELECT pg_catalog.pg_has_role($1, 'pg_read_all_stats', 'USAGE')"
    if not await connection.fetchval(sees, owner):
        await _attempt(connection, f"GRANT pg_read_all_stats TO {who}")
        if not await connection.fetchval(sees, owner):
            warnings.append(
                f"{owner} may not see other sessions, so the age of the oldest transaction is not measured: "
                f"GRANT pg_read_all_stats TO {who}"
            )


async def _extension(connection: asyncpg.Connection, name: str) -> tuple[str, str] | None:
    """Schema and version of an extension."""
    row = await connection.fetchrow(_EXTENSION, name)
    return None if row is None else (str(row["schema"]), str(row["version"]))


async def _create(connection: asyncpg.Connection, name: str) -> None:
    try:
        await connection.execute(f"CREATE EXTENSION {name} CASCADE")
    except asyncpg.InsufficientPrivilegeError as error:
        raise Fatal(
            "permission_denied",
            f"extension {name} is missing and this role may not create it ({one_line(error.args[0])}): "
            f"have a superuser run CREATE EXTENSION {name} in this database",
        ) from None


async def _can_become(connection: asyncpg.Connection, role: str) -> bool:
    if not await connection.fetchval("SELECT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = $1)", role):
        return False
    # Since version 16 a member of a role need not be allowed to become it.
    privilege = "SET" if connection.get_server_version().major >= 16 else "MEMBER"
    question = "SELECT pg_catalog.pg_has_role($1, $2)"
    if await connection.fetchval(question, role, privilege):
        return True
    await _attempt(connection, f"GRANT {quoted(role)} TO CURRENT_USER")
    return bool(await connection.fetchval(question, role, privilege))


async def _attempt(connection: asyncpg.Connection, statement: str) -> None:
    """Run a statement that may fail for lack of privilege, or because somebody else just did the same."""
    try:
        async with connection.transaction():
            await connection.execute(statement)
    except asyncpg.PostgresError as error:
        if not isinstance(
            error,
            asyncpg.InsufficientPrivilegeError
            | asyncpg.UniqueViolationError
            | asyncpg.InvalidGrantorError
            | asyncpg.InvalidGrantOperationError,
        ):
            raise
