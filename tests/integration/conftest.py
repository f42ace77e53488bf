"""A real pipeline for the tests that work on it step by step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from sidecar_daemon.adapters.onnx.fetch import pull
from sidecar_daemon.adapters.onnx.manifest import load_manifests
from tests.command_line import called
from tests.conftest import ROOT, admin, fresh_database, in_thread
from tests.rig import Rig, attach

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import asyncpg

    from sidecar_daemon.adapters.postgres.embedded import EmbeddedServer
    from sidecar_daemon.adapters.postgres.pool import Database


@pytest.fixture
async def rig(database_url: str, database: Database, connection: asyncpg.Connection) -> Rig:
    """An attached, empty table ``docs`` whose queues are empty."""
    await attach(connection)
    await connection.execute("UPDATE sidecar.sweeps SET started_at = now(), finished_at = now(), backfill = false")
    return Rig(connection, database, database_url)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder that holds ``tiny``."""
    folder = tmp_path_factory.mktemp("models")
    pull(load_manifests(ROOT / "models")["tiny"], folder, progress=lambda _: None)
    return folder


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
def database_url(request: pytest.FixtureRequest, cluster: EmbeddedServer, template: str) -> Iterator[str]:
    """URL of a fresh, migrated database, for a superuser; with ``notes`` in it where the test asks for them."""
    wanted: str = request.getfixturevalue("notes_template") if "notes" in request.fixturenames else template
    yield from fresh_database(cluster, wanted)


@pytest.fixture
def notes(database_url: str) -> str:
    """URL of a fresh database where ``notes`` is attached; see ``notes_template``."""
    return database_url
