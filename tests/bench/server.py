"""The database server of the benchmark, and one database a contestant."""

from __future__ import annotations

import asyncio
import itertools
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import asyncpg
from pgvector.asyncpg import register_vector

from sidecar_daemon.adapters.postgres.embedded import EmbeddedServer
from tests.command_line import sidecar
from tests.daemon import Daemon

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

SETTINGS = {
    "track_commit_timestamp": "on",  # freshness is the difference of two of them
    "max_wal_size": "8GB",  # else a checkpoint falls on one block by chance
    "checkpoint_timeout": "1h",
}
"""Everything else is PostgreSQL's default: durable, 128 MB of shared buffers."""
SHOWN = (
    *("server_version", "shared_buffers", "work_mem", "maintenance_work_mem", "max_wal_size", "checkpoint_timeout"),
    *("fsync", "synchronous_commit", "full_page_writes", "autovacuum", "jit", "track_commit_timestamp"),
    *("max_parallel_maintenance_workers", "max_worker_processes"),
)
TABLE = "documents"
NULL_MODEL, NULL_DIMENSIONS = "tiny", 384
"""The manifest that pipelines of the null model name, and the length of its vectors."""
DAEMON = {"SWEEP_INTERVAL": "86400"}
"""No routine walk falls into a block; everything else is the daemon's default."""
_TEMPLATE = "bench_template"


@dataclass(frozen=True)
class Arena:
    """One contestant's database, with table ``documents (id bigint, content text)``."""

    url: str

    @asynccontextmanager
    async def session(self) -> AsyncIterator[asyncpg.Connection]:
        """A plain connection that knows vectors."""
        connection = await asyncpg.connect(self.url, command_timeout=3600)
        await register_vector(connection)
        try:
            yield connection
        finally:
            await connection.close()

    async def attach(self, model: str, models: Path, *, index: bool = True) -> None:
        """Attach the table with the public command."""
        options = () if index else ("--no-index",)
        done = await sidecar(
            *("attach", TABLE, "content", "--model", model, "--json", *options),
            database_url=self.url,
            MODELS_DIR=str(models),
        )
        assert done.code == 0, done.err

    async def attach_null(self, connection: asyncpg.Connection, *, index: bool) -> None:
        """Attach the table for the null model, whose vectors have another length than its manifest's."""
        await connection.execute(
            f"SELECT sidecar.attach('{TABLE}', ARRAY['content'], p_model => $1, p_dimensions => $2, p_index => $3, "
            "p_defer_index => 'never')",
            *(NULL_MODEL, NULL_DIMENSIONS, index),
        )

    def daemon(self, models: Path, *, null: bool = False, **settings: str) -> Daemon:
        """The real daemon on this database, or the same with the null model."""
        module = "tests.bench.null_daemon" if null else "sidecar_daemon"
        return Daemon(self.url, models, {**DAEMON, **settings}, module=module)


class Server:
    """The embedded server with a migrated template database. Leave it through ``async with``."""

    def __init__(self, folder: Path) -> None:
        """Describe it."""
        self._server = EmbeddedServer(folder, settings=SETTINGS)
        self._numbers = itertools.count(1)

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self._server.start)
        await self._execute("postgres", f"CREATE DATABASE {_TEMPLATE}")
        done = await sidecar("migrate", database_url=self._server.dsn(_TEMPLATE))
        assert done.code == 0, done.err
        await self._execute(_TEMPLATE, f"CREATE TABLE {TABLE} (id bigint PRIMARY KEY, content text NOT NULL)")
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self._server.stop, "immediate")

    @asynccontextmanager
    async def arena(self) -> AsyncIterator[Arena]:
        """A fresh database; dropped at the end."""
        name = f"bench_{next(self._numbers)}"
        await self._execute("postgres", f"CREATE DATABASE {name} TEMPLATE {_TEMPLATE}")
        try:
            yield Arena(self._server.dsn(name))
        finally:
            await self._execute("postgres", f"DROP DATABASE {name} WITH (FORCE)", "CHECKPOINT")

    async def described(self) -> dict[str, str]:
        """Its settings, for the JSON."""
        connection = await asyncpg.connect(self._server.dsn())
        try:
            rows = await connection.fetch("SELECT name, current_setting(name) AS value FROM pg_settings")
            vector = await connection.fetchval(
                "SELECT default_version FROM pg_available_extensions WHERE name = 'vector'"
            )
        finally:
            await connection.close()
        found = {row["name"]: row["value"] for row in rows if row["name"] in SHOWN}
        return {**found, "pgvector": str(vector)}

    async def _execute(self, database: str, *statements: str) -> None:
        connection = await asyncpg.connect(self._server.dsn(database), command_timeout=600)
        try:
            for statement in statements:
                await connection.execute(statement)
        finally:
            await connection.close()


async def load(connection: asyncpg.Connection, texts: Sequence[str], first: int = 1) -> None:
    """COPY texts into the table, with keys from ``first`` on, in one transaction."""
    records = list(enumerate(texts, first))
    await connection.copy_records_to_table(TABLE, records=records, columns=["id", "content"])


CALM_SECONDS = 0.2


async def drained(connection: asyncpg.Connection, *, seconds: float, every: float = 0.02, near: int = 0) -> float:
    """Wait until both lanes are empty: everything that was enqueued is committed. Returns the seconds that took.

    Each look takes core time from what is measured: with ``near`` there is one in ``CALM_SECONDS`` only, until fewer
    messages than that are left in the live lane.

    Raises:
        TimeoutError: it took longer than ``seconds``.
    """
    started = time.perf_counter()
    newest = f"SELECT count(*) FROM (SELECT FROM pgmq.q_{TABLE} ORDER BY msg_id DESC LIMIT $1) AS newest"
    while True:
        if near and time.perf_counter() - started < seconds and await connection.fetchval(newest, near) == near:
            await asyncio.sleep(CALM_SECONDS)
            continue
        # From the newest on: the oldest are settled first, and a look from that end would pass by all that is dead.
        empty = await connection.fetchval(
            f"SELECT (SELECT msg_id FROM pgmq.q_{TABLE} ORDER BY msg_id DESC LIMIT 1) IS NULL "
            f"AND (SELECT msg_id FROM pgmq.q_{TABLE}_bulk ORDER BY msg_id DESC LIMIT 1) IS NULL"
        )
        passed = time.perf_counter() - started
        if empty:
            return passed
        if passed > seconds:
            left = await connection.fetchval(f"SELECT count(*) FROM pgmq.q_{TABLE}")
            raise TimeoutError(f"{left} messages are left after {seconds:.0f} s")
        await asyncio.sleep(every)


async def check_vectors(connection: asyncpg.Connection) -> int:
    """Count the vectors. Every document must have one of its current text: who cheats is not measured."""
    wrong = await connection.fetchval(
        f"SELECT count(*) FROM {TABLE} AS d LEFT JOIN {TABLE}_embeddings AS e "
        "ON e.id = d.id AND e.chunk_no = 0 AND e.source_text_hash = md5(d.content) WHERE e.id IS NULL"
    )
    assert wrong == 0, f"{wrong} documents have no vector of their current text"
    return int(await connection.fetchval(f"SELECT count(*) FROM {TABLE}_embeddings"))


async def sizes(connection: asyncpg.Connection) -> dict[str, dict[str, Any]]:
    """Live and dead tuples, MB of table and of indexes, by table: both lanes and the vectors."""
    rows = await connection.fetch(
        "SELECT relname, n_live_tup, n_dead_tup, pg_table_size(relid) AS heap, pg_indexes_size(relid) AS indexes, "
        "autovacuum_count FROM pg_stat_user_tables WHERE relname = ANY ($1)",
        [f"q_{TABLE}", f"q_{TABLE}_bulk", f"{TABLE}_embeddings"],
    )
    return {
        row["relname"]: {
            "live": row["n_live_tup"],
            "dead": row["n_dead_tup"],
            "table_mb": round(row["heap"] / 2**20, 1),
            "indexes_mb": round(row["indexes"] / 2**20, 1),
            "autovacuums": row["autovacuum_count"],
        }
        for row in rows
    }
