"""The servers and databases that faults work on."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import itertools
import random
import tempfile
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import asyncpg
from pgvector.asyncpg import register_vector

from sidecar_daemon.adapters.postgres.embedded import EmbeddedServer
from sidecar_daemon.adapters.postgres.migrate import migrate
from sidecar_daemon.adapters.postgres.pool import Database
from tests.daemon import free_port
from tests.torture.embedder import MODEL, REFERENCE, pulled

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from sidecar_daemon.ports import Embedder

HERE = Path(__file__).resolve().parent
SQL = HERE.parents[1] / "sql"
PASSWORD = "pw-canary-7f3a91"  # noqa: S105  planted, so that a leak of it is found (I10)
CANARY = "textcanary5d2e"
"""A word of every document: no log line and no metric may hold it (I10)."""
SLOTS = 10
"""Roles ``torture_daemon_1`` …: one a replica, so that a backend tells whose it is."""
SETTINGS = {
    # The machine under the server never crashes, only processes do, and what a process has handed to the kernel
    # outlives it. So without fsync a commit still survives every fault of this suite, as long as it is written to
    # the log before it is acknowledged: synchronous_commit stays on. Full page writes stay on too: a killed process
    # may leave half a page behind.
    "fsync": "off",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    "shared_buffers": "64MB",
    "max_connections": "300",
    "jit": "off",
    "log_min_messages": "fatal",
}
SOURCE = "public.documents"
CHUNKS, MEAN = "chunky", "meany"
"""The usual pipelines, both on one source: one row a window, and one row a document."""
BOTH = {CHUNKS: "chunks", MEAN: "mean"}
_TEMPLATE = "torture_template"


@dataclass(frozen=True)
class Arena:
    """One fault's database."""

    cluster: Cluster
    name: str
    pipelines: Mapping[str, str]
    """Policy for long documents by pipeline name."""
    seed: int
    embedder: Embedder = REFERENCE
    """What the vectors must be, computed in this process."""
    models: Path | None = None
    """Folder of the real model that replicas load; None: they load the test embedder."""
    index: bool = False
    """Whether its vectors have an index."""

    @property
    def admin_url(self) -> str:
        """For the rig: a superuser, through the socket."""
        return self.cluster.server.dsn(self.name)

    def daemon_url(self, slot: int, port: int | None = None) -> str:
        """For replica ``slot`` from 1: a runtime role with a password over TCP, through a proxy where one is."""
        host = f"127.0.0.1:{port or self.cluster.port}"
        return f"postgresql://torture_daemon_{slot}:{PASSWORD}@{host}/{self.name}?sslmode=disable"

    def rng(self, purpose: str) -> random.Random:
        """A stream of its own for each purpose, so that one more draw here changes nothing there."""
        return random.Random(f"{self.seed}/{self.name}/{purpose}")  # noqa: S311  a seeded test, no secret

    async def connect(self) -> asyncpg.Connection:
        """A connection of the rig, which knows vectors."""
        connection = await asyncpg.connect(self.admin_url, server_settings={"application_name": "torture_rig"})
        await register_vector(connection)
        return connection

    @asynccontextmanager
    async def session(self) -> AsyncIterator[asyncpg.Connection]:
        """A connection of the rig for a block."""
        connection = await self.connect()
        try:
            yield connection
        finally:
            with contextlib.suppress(Exception):
                await connection.close(timeout=5)

    async def attach(self, connection: asyncpg.Connection, name: str, policy: str) -> None:
        """Attach a pipeline to the source, and watch it."""
        await connection.execute(
            "SELECT sidecar.attach($1::regclass, ARRAY['content'], p_name => $2, p_embeddings => $2 || '_vectors', "
            "p_model => $3, p_dimensions => $4, p_long_documents => $5, p_index => $6)",
            *(SOURCE, name, MODEL, self.embedder.dimensions, policy, self.index),
        )
        await connection.execute("SELECT audit.watch($1)", name)


class Cluster:
    """One embedded server, listening on TCP with passwords, with a migrated template database."""

    def __init__(self, folder: Path) -> None:
        """Describe it; ``start`` starts it."""
        self.port = free_port()
        self.server = EmbeddedServer(folder / "pg", settings=SETTINGS, tcp_port=self.port)
        self._numbers = itertools.count(1)
        self._making = asyncio.Lock()

    async def start(self) -> None:
        """Start the server, make the roles and the template."""
        await asyncio.to_thread(self.server.start)
        (self.server.data_dir / "pg_hba.conf").write_text(
            "local all all trust\nhost all all 127.0.0.1/32 scram-sha-256\n"
        )
        await self._execute("postgres", "SELECT pg_reload_conf()", f"CREATE DATABASE {_TEMPLATE}")
        database = await Database.open(self.server.dsn(_TEMPLATE))
        try:
            await migrate(database, SQL)
        finally:
            await database.close()
        roles = [
            f"CREATE ROLE torture_daemon_{slot} LOGIN PASSWORD '{PASSWORD}' IN ROLE sidecar_runtime"
            for slot in range(1, SLOTS + 1)
        ]
        source = f"CREATE TABLE {SOURCE} (id bigint PRIMARY KEY, content text NOT NULL)"
        await self._execute(_TEMPLATE, *roles, source, (HERE / "audit.sql").read_text())

    async def stop(self) -> None:
        """Stop the server."""
        await asyncio.to_thread(self.server.stop, "immediate")

    @asynccontextmanager
    async def arena(
        self,
        label: str,
        *,
        seed: int,
        pipelines: Mapping[str, str] | None = None,
        models: Path | None = None,
        index: bool = False,
    ) -> AsyncIterator[Arena]:
        """A fresh database with its pipelines attached; dropped at the end. ``models``: use the real model there."""
        embedder = REFERENCE if models is None else await asyncio.to_thread(pulled, models)
        name = f"{label}_{next(self._numbers)}".lower()
        arena = Arena(self, name, pipelines or {CHUNKS: "chunks"}, seed, embedder, models, index)
        async with self._making:  # a template is copied by one at a time
            await self._execute("postgres", f"CREATE DATABASE {arena.name} TEMPLATE {_TEMPLATE}")
        async with arena.session() as connection:
            for name, policy in arena.pipelines.items():
                await arena.attach(connection, name, policy)
        try:
            yield arena
        finally:
            await self._execute("postgres", f"DROP DATABASE {arena.name} WITH (FORCE)")

    async def _execute(self, database: str, *statements: str) -> None:
        connection = await asyncpg.connect(self.server.dsn(database))
        try:
            for statement in statements:
                await connection.execute(statement)
        finally:
            await connection.close()


class Bench:
    """Everything of one run: a folder, and servers that are started when first needed."""

    def __init__(self, *, seed: int) -> None:
        """Bind the seed; ``async with`` does the rest."""
        self.seed = seed
        self.mutant = ""
        """Name of the mutant that replicas are to be, for T17."""
        self.stack = contextlib.AsyncExitStack()
        self._clusters: dict[str, Cluster] = {}
        self._starting = asyncio.Lock()

    async def __aenter__(self) -> Self:
        folder = tempfile.TemporaryDirectory(prefix="tt", dir="/tmp", ignore_cleanup_errors=True)
        self.folder = Path(self.stack.enter_context(folder))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stack.aclose()

    def rng(self, purpose: str) -> random.Random:
        """A seeded stream of its own for each purpose."""
        return random.Random(f"{self.seed}/{purpose}")  # noqa: S311  a seeded test, no secret

    def mutated(self, name: str) -> Bench:
        """The same bench, servers and all, whose replicas are mutants."""
        twin = copy.copy(self)
        twin.mutant = name
        return twin

    async def cluster(self, name: str = "shared") -> Cluster:
        """A server by name: faults that stop theirs take one of their own."""
        async with self._starting:
            if name not in self._clusters:
                place = self.folder / f"s{len(self._clusters)}"
                cluster = Cluster(place)
                await cluster.start()
                self.stack.push_async_callback(cluster.stop)
                self._clusters[name] = cluster
            return self._clusters[name]
