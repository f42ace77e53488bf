"""A real PostgreSQL for every test: one embedded server a session, one fresh database a test."""

from __future__ import annotations

import asyncio
import itertools
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
from pgvector.asyncpg import register_vector

from sidecar_daemon.adapters.postgres.embedded import EmbeddedServer
from sidecar_daemon.adapters.postgres.migrate import migrate
from sidecar_daemon.adapters.postgres.pool import Database
from tests.daemon import Daemon

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine, Iterator

ROOT = Path(__file__).resolve().parents[1]
SQL = ROOT / "sql"
FAST = {
    "fsync": "off",
    "full_page_writes": "off",
    "shared_buffers": "64MB",
    "max_connections": "100",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "jit": "off",
}
"""Settings of a server whose machine never crashes; its processes may, so commits stay synchronous."""
RUNTIME_ROLE = "daemon_under_test"

_numbers = itertools.count(1)


def in_thread(work: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine on a loop of its own, out of the way of the test's loop."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


def admin(dsn: str, *statements: str) -> None:
    """Run statements one by one, each in a transaction of its own."""

    async def work() -> None:
        connection = await asyncpg.connect(dsn)
        try:
            for statement in statements:
                await connection.execute(statement)
        finally:
            await connection.close()

    in_thread(work())


@contextmanager
def short_folder() -> Iterator[Path]:
    """A temporary folder with a short path: the path of a socket has about a hundred bytes."""
    with tempfile.TemporaryDirectory(prefix="sc", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def cluster() -> Iterator[EmbeddedServer]:
    """The session's server. Shared: a test that stops a server takes ``server``."""
    with short_folder() as folder, EmbeddedServer(folder / "pg", settings=FAST) as running:
        yield running


@pytest.fixture(scope="session")
def pristine() -> Iterator[Path]:
    """A data directory in which nothing was done yet, for copies."""
    with short_folder() as folder:
        with EmbeddedServer(folder / "pg", settings=FAST):
            pass
        yield folder / "pg"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the same tests run with a pooler between the daemon and the server."""
    parser.addoption("--through-pgbouncer", action="store_true", help="lead every daemon through PgBouncer")


@pytest.fixture(scope="session", autouse=True)
def pooler(request: pytest.FixtureRequest) -> Iterator[None]:
    """With ``--through-pgbouncer``, a real PgBouncer in transaction mode in front of the session's server."""
    if not request.config.getoption("--through-pgbouncer"):
        yield
        return
    from tests.system.pgbouncer import pgbouncer

    cluster: EmbeddedServer = request.getfixturevalue("cluster")
    socket = f"host={cluster.dsn().partition('host=')[2].partition('&')[0]}"
    with pgbouncer(cluster.dsn()) as through:
        Daemon.reroute = lambda url: through(url) if socket in url else url
        yield
    Daemon.reroute = None


@pytest.fixture
def server(pristine: Path) -> Iterator[EmbeddedServer]:
    """A server of the test's own, to stop and restart."""
    with short_folder() as folder:
        subprocess.run(["cp", "-a", str(pristine), str(folder / "pg")], check=True)
        with EmbeddedServer(folder / "pg", settings=FAST) as running:
            yield running


async def migrate_at(dsn: str, sql: Path = SQL) -> None:
    """Migrate a database with the real migration."""
    database = await Database.open(dsn)
    try:
        await migrate(database, sql)
    finally:
        await database.close()


@pytest.fixture(scope="session")
def template(cluster: EmbeddedServer) -> str:
    """Name of a migrated database, made once by the real migration."""
    admin(cluster.dsn(), "CREATE DATABASE template_sidecar")
    in_thread(migrate_at(cluster.dsn("template_sidecar")))
    admin(cluster.dsn(), f"CREATE ROLE {RUNTIME_ROLE} LOGIN IN ROLE sidecar_runtime")
    return "template_sidecar"


def fresh_database(cluster: EmbeddedServer, template: str) -> Iterator[str]:
    """A copy of a database, dropped at the end; its URL."""
    name = f"test_{next(_numbers)}"
    admin(cluster.dsn(), f"CREATE DATABASE {name} TEMPLATE {template}")
    yield cluster.dsn(name)
    admin(cluster.dsn(), f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def empty_url(cluster: EmbeddedServer) -> Iterator[str]:
    """URL of a fresh database without anything in it."""
    yield from fresh_database(cluster, "template0")


@pytest.fixture
def database_url(cluster: EmbeddedServer, template: str) -> Iterator[str]:
    """URL of a fresh, migrated database, for a superuser."""
    yield from fresh_database(cluster, template)


@pytest.fixture
def runtime_url(cluster: EmbeddedServer, database_url: str) -> str:
    """URL of the same database for a role that is a member of sidecar_runtime and nothing else."""
    name = database_url.split("/")[3].partition("?")[0]
    return cluster.dsn(name, RUNTIME_ROLE)


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """The migrated database through the daemon's pool, as superuser."""
    opened = await Database.open(database_url)
    yield opened
    await opened.close()


@pytest.fixture
async def connection(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A plain connection to the migrated database, as superuser, that knows vectors."""
    plain = await asyncpg.connect(database_url)
    await register_vector(plain)
    yield plain
    await plain.close()
