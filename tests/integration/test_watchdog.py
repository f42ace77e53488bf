"""What the service manager hears of a real daemon: ready, what it does, and signs of life only while it moves."""

from __future__ import annotations

import asyncio
import math
import signal
from typing import TYPE_CHECKING

import httpx
import pytest

from sidecar_daemon.app.service import RATE_SECONDS
from tests.conftest import migrate_at
from tests.daemon import Daemon
from tests.rig import attach, second_session, write
from tests.service_manager import WATCHDOG, ServiceManager, service_manager
from tests.waiting import eventually

if TYPE_CHECKING:
    from pathlib import Path

    import asyncpg

    from sidecar_daemon.adapters.postgres.embedded import EmbeddedServer

pytestmark = pytest.mark.long

HALTING = "tests.halting"
STILL = 4.0
"""Seconds that a loop may stand still in these tests: a busy machine's pauses are shorter, and tests wait for it."""
SETTINGS = {"THREADS": "1", "POLL_MAX": "0.5"}


async def pets_again(manager: ServiceManager, daemon: Daemon, count: int = 3) -> None:
    """Wait for further signs of life."""
    before = manager.pets
    await daemon.wait_for(lambda: manager.pets >= before + count, what=f"{count} signs of life")


async def livez(daemon: Daemon) -> tuple[int, str]:
    answer = await daemon.get("/livez")
    return answer.status_code, answer.json()["detail"]


async def test_it_tells_when_it_is_ready_what_it_does_and_that_it_ends(
    connection: asyncpg.Connection, runtime_url: str, tiny_models: Path
) -> None:
    await attach(connection, model="tiny", model_id=None, dimensions=32)
    async with service_manager() as manager:
        daemon = Daemon(runtime_url, tiny_models, SETTINGS, variables=manager.variables)
        async with daemon:
            await daemon.wait_for(lambda: manager.has("READY=1"), what="READY=1")
            assert manager.heard[manager.position("READY=1")].startswith("READY=1\nSTATUS=working: 1 pipeline, ")
            await pets_again(manager, daemon)
            await write(connection, {f"k{n}": f"text {n}" for n in range(50)})
            await daemon.wait_for(
                lambda: manager.status.startswith("working") and not manager.status.endswith(" 0.0 documents/s"),
                timeout=RATE_SECONDS + 30,
                what="a rate in the status",
            )
            assert await livez(daemon) == (200, "every loop moves")
            assert await daemon.terminate() == 0
        assert manager.heard[manager.position("STOPPING=1")] == "STOPPING=1\nSTATUS=draining"
        assert sum("READY=1" in message for message in manager.heard) == 1


async def test_without_a_watchdog_nobody_is_fed(
    connection: asyncpg.Connection, runtime_url: str, tiny_models: Path
) -> None:
    await attach(connection, model="tiny", model_id=None, dimensions=32)
    async with service_manager() as manager:
        variables = {**manager.variables, "WATCHDOG_PID": "1"}  # another process's
        async with Daemon(runtime_url, tiny_models, SETTINGS, variables=variables) as daemon:
            await daemon.wait_for(lambda: manager.has("READY=1"), what="READY=1")
            assert await daemon.terminate() == 0
        assert manager.pets == 0


async def test_an_outage_neither_holds_up_the_start_nor_stops_the_signs_of_life(
    server: EmbeddedServer, tiny_models: Path
) -> None:
    await migrate_at(server.dsn())
    async with second_session(server.dsn()) as connection:
        await attach(connection, model="tiny", model_id=None, dimensions=32)
    server.stop(mode="immediate")
    async with service_manager() as manager:
        daemon = Daemon(server.dsn(), tiny_models, SETTINGS, variables=manager.variables)
        await daemon.start(ready=False)
        try:
            await daemon.wait_for(lambda: manager.has("READY=1"), what="READY=1 without a database")
            assert manager.status.startswith("waiting: ")
            server.start()
            await daemon.wait_for(lambda: manager.status.startswith("working: 1 pipeline"), what="work")
            server.stop(mode="immediate")
            await daemon.wait_for(lambda: manager.status.startswith("waiting: "), what="the outage to be told")
            await pets_again(manager, daemon, 9)  # three whole intervals
            assert await livez(daemon) == (200, "every loop moves")
            assert await daemon.status_of("/readyz") == httpx.codes.SERVICE_UNAVAILABLE
            server.start()
            await daemon.wait_for(lambda: manager.status.startswith("working: 1 pipeline"), what="work again")
            assert await daemon.terminate() == 0
        finally:
            await daemon.stop()


async def test_a_blocked_event_loop_starves_the_watchdog(
    connection: asyncpg.Connection, runtime_url: str, tiny_models: Path
) -> None:
    await attach(connection, model="tiny", model_id=None)
    async with service_manager() as manager:
        variables = {**manager.variables, "HALT_LOOP": str(manager.watchdog_seconds)}
        async with Daemon(runtime_url, tiny_models, SETTINGS, module=HALTING, variables=variables) as daemon:
            await pets_again(manager, daemon)
            assert daemon.process is not None
            daemon.process.send_signal(signal.SIGUSR1)
            await daemon.wait_for(lambda: manager.has("UNBLOCKED=1"), what="the end of the block")
            blocked = manager.heard[manager.position("BLOCKED=1") : manager.position("UNBLOCKED=1")]
            assert WATCHDOG not in blocked
            await pets_again(manager, daemon)


async def test_a_slow_model_does_not_stop_the_signs_of_life(
    connection: asyncpg.Connection, runtime_url: str, tiny_models: Path, tmp_path: Path
) -> None:
    """Neither its load nor its run, each of several intervals and longer than a loop may stand still."""
    await attach(connection, model="tiny", model_id=None)
    await write(connection, {"k1": "text"})
    go = tmp_path / "go"
    async with service_manager() as manager:
        pets = 3 * math.ceil(1.5 * STILL / manager.watchdog_seconds)  # three an interval
        variables = {**manager.variables, "HALT_RUNS": str(go), "HALT_STILL": str(STILL)}
        daemon = Daemon(runtime_url, tiny_models, SETTINGS, module=HALTING, variables=variables)
        await daemon.start(ready=False)
        try:
            await daemon.wait_for(lambda: manager.has("LOAD=1"), what="the model's load")
            await pets_again(manager, daemon, pets)
            assert not manager.has("READY=1")
            assert manager.has("EXTEND_TIMEOUT_USEC=60000000")
            go.touch()
            await daemon.wait_for(daemon.is_ready, what="readiness")
            await eventually(lambda: connection.fetchval("SELECT count(*) = 1 FROM docs_embeddings"))
            go.unlink()
            await write(connection, {"k2": "text"})
            runs = manager.heard.count("RUN=1")
            await daemon.wait_for(lambda: manager.heard.count("RUN=1") > runs, what="a run of the model")
            await pets_again(manager, daemon, pets)
            assert await livez(daemon) == (200, "every loop moves")
        finally:
            go.touch()
            await daemon.stop()


@pytest.mark.parametrize(("call", "loop"), [("settle", "docs: settling"), ("sweep", "docs: sweeping")])
async def test_a_stuck_loop_stops_the_signs_of_life_and_is_named(
    connection: asyncpg.Connection, runtime_url: str, tiny_models: Path, call: str, loop: str
) -> None:
    await attach(connection, model="tiny", model_id=None)
    async with service_manager() as manager:
        variables = {**manager.variables, "HALT_CALL": call, "HALT_STILL": str(STILL)}
        settings = {**SETTINGS, "DRAIN_SECONDS": "1"}
        async with Daemon(runtime_url, tiny_models, settings, module=HALTING, variables=variables) as daemon:
            await write(connection, {"k1": "text"})
            await daemon.wait_for(lambda: manager.status.startswith(f"stuck: {loop} has not moved for "))
            status, detail = await livez(daemon)
            assert status == httpx.codes.SERVICE_UNAVAILABLE
            assert detail.startswith(f"{loop} has not moved for ")
            before = manager.pets
            await asyncio.sleep(2 * manager.watchdog_seconds)  # nothing to wait for: six of them would come
            assert manager.pets == before
            assert [event["level"] for event in daemon.events if event["event"] == "stuck"] == ["error"]


async def test_a_listener_that_cannot_listen_ends_the_daemon(
    connection: asyncpg.Connection, runtime_url: str, tiny_models: Path
) -> None:
    """It was forgotten: the daemon polled on, and nobody heard of the bad setting before its end."""
    await attach(connection, model="tiny", model_id=None, dimensions=32)
    settings = {**SETTINGS, "LISTEN_URL": "postgresql://127.0.0.1/db?sslmode=nonsense"}
    daemon = Daemon(runtime_url, tiny_models, settings)
    await daemon.start(ready=False)
    try:
        assert await daemon.wait(60) == 2, "a usage error, which systemd does not start again"
        last = daemon.events[-1]
        assert last["event"] == "fatal"
        assert last["cause"].startswith("SIDECAR_LISTEN_URL is not a URL ")
    finally:
        await daemon.stop()
