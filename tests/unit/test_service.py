"""What the service manager hears of a start, on a real datagram socket."""

from __future__ import annotations

import asyncio
import itertools
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import pytest

from sidecar_daemon.adapters.systemd import ServiceNotifier
from sidecar_daemon.app import service as module
from sidecar_daemon.app.service import Service
from sidecar_daemon.domain.pulse import Pulse
from tests.rig import Told
from tests.service_manager import ServiceManager, service_manager
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

EXTENSION = "EXTEND_TIMEOUT_USEC=150000"
STARTING = ["starting"]


@pytest.fixture(autouse=True)
def short_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """A twentieth of a second between two words."""
    monkeypatch.setattr(module, "EXTENSION_SECONDS", 0.15)


@asynccontextmanager
async def reporting(manager: ServiceManager, reasons: list[str], pulse: Pulse) -> AsyncIterator[None]:
    """A service that reports, without a watchdog."""
    told = Told()
    service = Service(
        ServiceNotifier(manager.address),
        pulse,
        watchdog_seconds=None,
        not_ready=lambda: reasons,
        registry=told.registry,
        telemetry=told.telemetry,
    )
    task = asyncio.create_task(service.run())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def test_a_start_asks_for_more_time_until_it_is_over() -> None:
    reasons = list(STARTING)
    async with service_manager() as manager, reporting(manager, reasons, Pulse(lambda: 0.0)):
        await eventually(lambda: manager.heard.count(EXTENSION) > 5, what="a start that goes on")
        assert not manager.has("READY=1")
        reasons.clear()
        await eventually(lambda: manager.has("READY=1"), what="READY=1")
        asked = manager.heard.count(EXTENSION)
        reasons.append("model tiny is not pulled")
        await eventually(lambda: manager.status.startswith("waiting: "), what="another status line")
        assert manager.heard.count(EXTENSION) == asked


async def test_a_start_that_hangs_is_left_to_its_limit() -> None:
    pulse = Pulse(itertools.count().__next__, still_seconds=0.5)  # it has moved on whenever somebody looks at the clock
    with pulse.watch("supervising"):
        async with service_manager() as manager, reporting(manager, list(STARTING), pulse):
            await eventually(lambda: manager.status.startswith("stuck: supervising"), what="a stuck start to be told")
    assert not manager.has(EXTENSION)


async def test_a_start_that_never_ends_is_helped_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model on a dead network folder loads for ever, and looks like one that loads slowly."""
    monkeypatch.setattr(module, "MOST_STARTING_SECONDS", 0.2)
    reasons = list(STARTING)
    async with service_manager() as manager, reporting(manager, reasons, Pulse(lambda: 0.0)):
        await eventually(lambda: manager.heard.count(EXTENSION) == 4, what="as many words as are allowed")
        await asyncio.sleep(0.3)  # six words long, were there any
        assert manager.heard.count(EXTENSION) == 4
