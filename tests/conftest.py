"""A real PostgreSQL for every test: one embedded server a session, one fresh database a test."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg
import hypothesis
import pytest
from pgvector.asyncpg import register_vector

from sidecar_daemon.adapters.onnx.fetch import pull
from sidecar_daemon.adapters.onnx.manifest import load_manifests
from sidecar_daemon.adapters.postgres.embedded import EmbeddedServer
from sidecar_daemon.adapters.postgres.migrate import migrate
from sidecar_daemon.adapters.postgres.pool import Database
from sidecar_daemon.settings import usable_cores
from tests.command_line import called
from tests.rig import Rig, attach, second_session

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
DISK, MEMORY = Path("/tmp"), Path("/dev/shm")  # noqa: S108  short, and the folders made there are private
ROOMY = 2 << 30
"""Bytes that must be free where servers lie in memory; one takes a tenth of it."""

_numbers = itertools.count(1)

hypothesis.settings.register_profile("here", deadline=None)  # no time of one example holds on a busy machine
hypothesis.settings.load_profile("here")


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
def short_folder(parent: Path = DISK) -> Iterator[Path]:
    """A temporary folder with a short path: the path of a socket has about a hundred bytes."""
    with tempfile.TemporaryDirectory(prefix="sc", dir=parent, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def memory() -> Path:
    """Where a throw-away server lies best: a copy of a database is hundreds of files, dear on most disks."""
    return MEMORY if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ROOMY else DISK


@pytest.fixture(scope="session")
def cluster() -> Iterator[EmbeddedServer]:
    """The session's server. Shared: a test that stops a server takes ``server``."""
    with short_folder(memory()) as folder, EmbeddedServer(folder / "pg", settings=FAST) as running:
        yield running


@pytest.fixture(scope="session")
def pristine() -> Iterator[Path]:
    """A data directory in which nothing was done yet, for copies."""
    with short_folder(memory()) as folder:
        with EmbeddedServer(folder / "pg", settings=FAST):
            pass
        yield folder / "pg"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the same stories run with a pooler between the daemon and the server."""
    parser.addoption("--through-pgbouncer", action="store_true", help="lead the stories' daemons through PgBouncer")


def pytest_xdist_auto_num_workers() -> int:
    """More workers than cores: half of their time they wait, for a lease to run out or a process to start."""
    cores = usable_cores()
    return cores + min(cores, 4)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what lasts longest: nobody shall wait for one file alone at the end."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture
def server(pristine: Path) -> Iterator[EmbeddedServer]:
    """A server of the test's own, to stop and restart."""
    with short_folder(memory()) as folder:
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
    admin(cluster.dsn(), f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy")  # a third of the log's way
    yield cluster.dsn(name)
    admin(cluster.dsn(), f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def empty_url(cluster: EmbeddedServer) -> Iterator[str]:
    """URL of a fresh database without anything in it."""
    yield from fresh_database(cluster, "template0")


@pytest.fixture
def database_url(request: pytest.FixtureRequest, cluster: EmbeddedServer, template: str) -> Iterator[str]:
    """URL of a fresh, migrated database, for a superuser; it holds what the test's ``rig`` or ``notes`` stands on."""
    wanted = next((name for name in ("rig_template", "notes_template") if name in request.fixturenames), None)
    yield from fresh_database(cluster, request.getfixturevalue(wanted) if wanted else template)


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


@pytest.fixture(scope="session")
def rig_template(cluster: EmbeddedServer, template: str) -> str:
    """Name of a database with an attached, empty table ``docs``."""

    async def prepare() -> None:
        async with second_session(cluster.dsn("template_rig")) as connection:
            await attach(connection)

    admin(cluster.dsn(), f"CREATE DATABASE template_rig TEMPLATE {template}")
    in_thread(prepare())
    return "template_rig"


@pytest.fixture
async def rig(rig_template: str, database_url: str, database: Database, connection: asyncpg.Connection) -> Rig:
    """An attached, empty table ``docs`` whose queues are empty."""
    del rig_template  # what the database is a copy of
    await connection.execute("UPDATE sidecar.sweeps SET started_at = now(), finished_at = now(), backfill = false")
    return Rig(connection, database, database_url)


@pytest.fixture(scope="session")
def notes_template(cluster: EmbeddedServer, template: str) -> str:
    """Name of a database with three rows of ``notes`` (one blank), attached with the tiny model, which is pulled."""
    name = "template_notes"
    admin(cluster.dsn(), f"CREATE DATABASE {name} TEMPLATE {template}")
    admin(
        cluster.dsn(name),
        "CREATE TABLE notes (id int PRIMARY KEY, body text)",
        "INSERT INTO notes VALUES (1, 'one fish'), (2, 'two fish'), (3, '  ')",
    )
    for command in (("models", "pull", "tiny"), ("attach", "notes", "body", "--model", "tiny")):
        assert in_thread(called(*command, database_url=cluster.dsn(name))).code == 0
    return name


@pytest.fixture
def notes(notes_template: str, database_url: str) -> str:
    """URL of a fresh database where ``notes`` is attached."""
    del notes_template  # what the database is a copy of
    return database_url


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder that holds ``tiny``."""
    folder = tmp_path_factory.mktemp("models")
    pull(load_manifests(ROOT / "models")["tiny"], folder, progress=lambda _: None)
    return folder
