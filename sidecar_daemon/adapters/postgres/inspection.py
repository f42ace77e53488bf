"""What ``doctor`` looks at in a database. Reads catalogues only, which every role may."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass

import asyncpg

from sidecar_daemon.adapters.postgres.errors import translated
from sidecar_daemon.adapters.postgres.pool import Database, place_of

_SERVER = """
SELECT pg_catalog.current_setting('server_version_num')::int AS number, pg_catalog.current_setting('server_version')
    AS version, current_user AS role, pg_catalog.pg_is_in_recovery() AS standby
"""
_EXTENSION = """
SELECT a.name, a.default_version AS available, e.extversion AS installed
FROM pg_catalog.pg_available_extensions a LEFT JOIN pg_catalog.pg_extension e ON e.extname = a.name
WHERE a.name = $1
UNION ALL
SELECT e.extname, NULL, e.extversion FROM pg_catalog.pg_extension e
WHERE e.extname = $1 AND e.extname NOT IN (SELECT name FROM pg_catalog.pg_available_extensions)
"""
_PGMQ_READ = """
SELECT EXISTS (SELECT FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
WHERE n.nspname = 'pgmq' AND p.proname = 'read')
"""
_CALLED = (
    "acknowledge",
    "begin",
    "dead_letter",
    "defer",
    "extend",
    "lease",
    "list_indexes",
    "list_pipelines",
    "newest_dead_letters",
    "observe",
    "oldest_transaction",
    "read_documents",
    "register_model",
    "schema_version",
    "settle",
    "sweep",
)
"""What the daemon calls."""
_FORBIDDEN = """
SELECT p.proname::text AS name FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
WHERE n.nspname = 'sidecar' AND p.proname = ANY ($1)
AND NOT (pg_catalog.has_schema_privilege(n.oid, 'USAGE') AND pg_catalog.has_function_privilege(p.oid, 'EXECUTE'))
ORDER BY 1
"""
_SOURCE = """
SELECT EXISTS (SELECT FROM pg_catalog.pg_class c WHERE c.oid = pg_catalog.to_regclass($1)) AS source,
    EXISTS (SELECT FROM pg_catalog.pg_class c WHERE c.oid = pg_catalog.to_regclass($2)) AS embeddings,
    (SELECT pg_catalog.count(*) FROM pg_catalog.pg_trigger t WHERE t.tgrelid = pg_catalog.to_regclass($1)
     AND t.tgname = ANY ($3)) AS triggers,
    (SELECT pg_catalog.count(*) FROM pg_catalog.pg_trigger t WHERE t.tgrelid = pg_catalog.to_regclass($1)
     AND t.tgname = ANY ($3) AND t.tgenabled IN ('O', 'A')) AS enabled,
    (SELECT pg_catalog.count(*) FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
     WHERE n.nspname = 'pgmq' AND c.relname = ANY ($4)) AS queues
"""


@dataclass(frozen=True, slots=True)
class Server:
    """Which server this is, and as whom we are there."""

    number: int
    """160004 for 16.4."""
    version: str
    role: str
    standby: bool
    """Read-only: a standby."""


@dataclass(frozen=True, slots=True)
class Extension:
    """An extension of the server; both None: neither there nor to be had."""

    installed: str | None
    available: str | None


@dataclass(frozen=True, slots=True)
class Parts:
    """What is there of a pipeline."""

    source: bool
    embeddings: bool
    triggers: int
    """Of two."""
    enabled: int
    """Triggers that fire."""
    queues: int
    """Of three."""


class Inspection:
    """Looks at one database."""

    def __init__(self, database: Database) -> None:
        """Bind a database."""
        self._database = database

    async def server(self) -> Server:
        """Which server this is. Raises ``SidecarError`` when it cannot be asked."""
        (row,) = await self._database.call(_SERVER)
        return Server(row["number"], row["version"], row["role"], row["standby"])

    async def extension(self, name: str) -> Extension:
        """The versions of an extension."""
        rows = await self._database.call(_EXTENSION, name)
        return Extension(rows[0]["installed"], rows[0]["available"]) if rows else Extension(None, None)

    async def has_pgmq(self) -> bool:
        """Whether pgmq's functions are there, as an extension or as plain SQL."""
        return bool(await self._database.fetch_value(_PGMQ_READ))

    async def forbidden_functions(self) -> list[str]:
        """What the daemon calls and our role may not."""
        return sorted({str(row["name"]) for row in await self._database.call(_FORBIDDEN, list(_CALLED))})

    async def parts(self, *, name: str, source: str, embeddings: str, queue: str) -> Parts:
        """What is there of a pipeline.

        Args:
            name: of the pipeline.
            source: its qualified name, as ``list_pipelines`` tells it.
            embeddings: likewise.
            queue: its name.
        """
        triggers = [f"sidecar_{name}_insert", f"sidecar_{name}_update"]
        queues = [f"q_{queue}", f"q_{queue}_bulk", f"q_{queue}_dlq"]
        (row,) = await self._database.call(_SOURCE, source, embeddings, triggers, queues)
        return Parts(row["source"], row["embeddings"], row["triggers"], row["enabled"], row["queues"])


async def notification_arrives(dsn: str, *, seconds: float) -> bool:
    """Whether a NOTIFY reaches a LISTEN through this URL within some seconds.

    Raises:
        SidecarError: the server cannot be reached.
    """
    with translated(place_of(dsn)):
        connection = await asyncpg.connect(dsn, timeout=seconds, command_timeout=seconds, statement_cache_size=0)
        try:
            return await _hears_itself(connection, seconds)
        finally:
            connection.terminate()


async def _hears_itself(connection: asyncpg.Connection, seconds: float) -> bool:
    token = uuid.uuid4().hex
    heard = asyncio.Event()

    def hear(*received: object) -> None:
        if received[-1] == token:
            heard.set()

    # A channel of its own: the daemons listen on "sidecar" and must not wake.
    await connection.add_listener("sidecar_doctor", hear)
    await connection.execute("SELECT pg_catalog.pg_notify('sidecar_doctor', $1)", token)
    try:
        await asyncio.wait_for(heard.wait(), seconds)
    except TimeoutError:
        return False
    return True
