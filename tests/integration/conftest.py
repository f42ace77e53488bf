"""A real pipeline for the tests that work on it step by step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.rig import Rig, attach

if TYPE_CHECKING:
    import asyncpg

    from sidecar_daemon.adapters.postgres.pool import Database


@pytest.fixture
async def rig(database_url: str, database: Database, connection: asyncpg.Connection) -> Rig:
    """An attached, empty table ``docs`` whose queues are empty."""
    await attach(connection)
    await connection.execute("UPDATE sidecar.sweeps SET started_at = now(), finished_at = now(), backfill = false")
    return Rig(connection, database, database_url)
