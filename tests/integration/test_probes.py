"""The probes of a real daemon: ``/livez`` never depends on the database, ``/readyz`` says why not."""

from __future__ import annotations

import asyncio
import shutil
from typing import TYPE_CHECKING

import httpx

from sidecar_daemon.adapters.onnx.fetch import pull
from sidecar_daemon.adapters.onnx.manifest import load_manifests
from tests.conftest import ROOT, admin, migrate_at
from tests.daemon import Daemon

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sidecar_daemon.adapters.postgres.embedded import EmbeddedServer

OK, UNAVAILABLE = httpx.codes.OK, httpx.codes.SERVICE_UNAVAILABLE


async def alive_while(daemon: Daemon, wanted: httpx.codes) -> list[str]:
    """Wait until ``/readyz`` answers with a status, with a ``/livez`` of 200 all the while; return its reasons."""
    reasons: list[str] = []

    async def answers() -> bool:
        alive = await daemon.status_of("/livez")
        assert alive in {None, OK}
        if alive is None:
            return False  # it does not listen yet
        ready = await daemon.get("/readyz")
        reasons[:] = ready.json().get("reasons", [])
        return ready.status_code == wanted and (wanted == OK or reasons != ["starting"])

    await daemon.wait_for(answers, what=f"/readyz {wanted}")
    return reasons


async def test_an_outage_of_the_database_makes_it_unready_with_a_reason_and_never_dead(
    server: EmbeddedServer, tiny_models: Path
) -> None:
    url = server.dsn("work")
    admin(server.dsn(), "CREATE DATABASE work")
    await migrate_at(url)
    admin(
        url,
        "CREATE TABLE docs (id bigint PRIMARY KEY, body text NOT NULL)",
        "SELECT sidecar.attach('docs', ARRAY['body'], p_model => 'tiny', p_dimensions => 32, p_index => false)",
    )
    await asyncio.to_thread(server.stop)
    daemon = Daemon(url, tiny_models, {"THREADS": "1", "POLL_MAX": "0.2"})
    await daemon.start(ready=False)
    try:
        pid = daemon.pid
        (before,) = await alive_while(daemon, UNAVAILABLE)
        assert "database" in before
        await asyncio.to_thread(server.start)
        assert await alive_while(daemon, OK) == []
        await asyncio.to_thread(server.stop, "immediate")
        during = await alive_while(daemon, UNAVAILABLE)
        assert any("database" in reason for reason in during)
        assert (await daemon.get("/livez")).json()["alive"] is True
        assert (await daemon.get("/metrics")).status_code == OK
        await asyncio.to_thread(server.start)
        assert await alive_while(daemon, OK) == []
        assert daemon.pid == pid
        assert await daemon.terminate() == 0
    finally:
        await daemon.stop()


async def test_a_model_that_is_missing_is_named(database_url: str, tiny_models: Path) -> None:
    attach = "SELECT sidecar.attach('{0}', ARRAY['body'], p_model => '{1}', p_dimensions => {2}, p_index => false)"
    tables = [f"CREATE TABLE {name} (id bigint PRIMARY KEY, body text NOT NULL)" for name in ("docs", "notes")]
    admin(database_url, *tables, attach.format("docs", "tiny", 32))
    async with Daemon(database_url, tiny_models, {"THREADS": "1", "POLL_MAX": "0.2"}) as daemon:
        admin(database_url, attach.format("notes", "gte-small", 384))
        reasons = await alive_while(daemon, UNAVAILABLE)
        assert any("notes" in reason and "sidecar-daemon models pull gte-small" in reason for reason in reasons)


async def test_a_model_that_is_missing_at_the_start_stops_no_neighbour_and_is_taken_when_it_is_pulled(
    database_url: str, tiny_models: Path, tmp_path: Path
) -> None:
    attach = "SELECT sidecar.attach('{0}', ARRAY['body'], p_model => '{0}', p_dimensions => 32, p_index => false)"
    names = ("other", "tiny")
    tables = [f"CREATE TABLE {name} (id bigint PRIMARY KEY, body text NOT NULL)" for name in names]
    admin(database_url, *tables, *[attach.format(name) for name in names])
    admin(database_url, *[f"INSERT INTO {name} VALUES (1, 'text')" for name in names])
    models = tmp_path / "models"
    shutil.copytree(tiny_models / "tiny", models / "tiny")
    manifest = (ROOT / "models" / "tiny.toml").read_text(encoding="utf-8")
    (models / "other.toml").write_text(manifest.replace('name = "tiny"', 'name = "other"'))

    def embedded(pipeline: str) -> Callable[[], bool]:
        keys = {"event": "batch_settled", "pipeline": pipeline, "embedded": 1}
        return lambda: any(keys.items() <= line.items() for line in daemon.events)

    daemon = Daemon(database_url, models, {"THREADS": "1", "POLL_MAX": "0.2"})
    try:
        await daemon.start(ready=False)
        await daemon.wait_for(embedded("tiny"), what="the healthy pipeline's vector")
        (reason,) = await alive_while(daemon, UNAVAILABLE)
        assert reason.startswith("other: ")
        assert reason.endswith("run: sidecar-daemon models pull other.")
        await asyncio.to_thread(pull, load_manifests(ROOT / "models", models)["other"], models, progress=lambda _: None)
        await daemon.wait_for(embedded("other"), what="the mended pipeline's vector")
        assert await alive_while(daemon, OK) == []
        assert len([line for line in daemon.events if line["event"] == "pipeline_refused"]) == 1
    finally:
        await daemon.stop()
