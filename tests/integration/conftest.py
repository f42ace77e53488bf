"""A real pipeline for the tests that work on it step by step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from sidecar_daemon.adapters.onnx.fetch import pull
from sidecar_daemon.adapters.onnx.manifest import load_manifests
from tests.conftest import ROOT
from tests.rig import Rig, attach

if TYPE_CHECKING:
    from pathlib import Path

    import asyncpg

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
