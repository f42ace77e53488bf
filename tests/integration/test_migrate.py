"""Migrations on real databases: fresh, twice, two at once, changed, too new, and with little privilege."""

from __future__ import annotations

from sidecar_daemon.adapters.postgres.migrate import migrate
from sidecar_daemon.adapters.postgres.pool import Database
from tests.conftest import SQL


async def test_the_second_run_finds_nothing_to_do(empty_url: str) -> None:
    database = await Database.open(empty_url)
    first = await migrate(database, SQL)
    second = await migrate(database, SQL)
    await database.close()
    assert "applied 0001_pipelines" in first.lines
    assert f"schema version {second.version}: nothing to do" in second.lines
    assert second.warnings == []
