"""The listener: it hears, it comes back after every outage, and it says so once."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import pytest

from sidecar_daemon.adapters.postgres.listener import Listener
from sidecar_daemon.domain.errors import Fatal
from tests.conftest import admin
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sidecar_daemon.adapters.postgres.embedded import EmbeddedServer


@dataclass
class Ear:
    """What a listener told: the notes, how often it connected, what it logged."""

    notes: list[str] = field(default_factory=list)
    connects: int = 0
    log: list[tuple[str, str]] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)

    def connected(self) -> None:
        self.connects += 1

    def has_connected(self, times: int) -> bool:
        return self.connects == times

    def has_heard(self, notes: int) -> bool:
        return len(self.notes) == notes

    def info(self, event: str, **fields: object) -> None:
        self.log.append((event, str(fields)))

    def warning(self, event: str, **fields: object) -> None:
        self.log.append((event, str(fields)))

    def uniform(self, low: float, high: float) -> float:
        assert low == 0
        self.waits.append(high)
        return high

    @property
    def events(self) -> list[str]:
        return [event for event, _ in self.log]


@asynccontextmanager
async def listening(dsn: str, *, keepalive: float = 15.0, connect_timeout: float = 5.0) -> AsyncIterator[Ear]:
    ear = Ear()
    stop = asyncio.Event()
    listener = Listener(
        dsn,
        on_notify=ear.notes.append,
        on_connected=ear.connected,
        logger=ear,
        uniform=ear.uniform,
        backoff_base=0.02,
        backoff_cap=0.2,
        keepalive=keepalive,
        connect_timeout=connect_timeout,
    )
    running = asyncio.create_task(listener.run(stop))
    await eventually(lambda: ear.connects or running.done() or ear.log, what="a first try")
    try:
        yield ear
    finally:
        stop.set()
        await asyncio.wait_for(running, 20)


async def test_it_hears_every_notification(empty_url: str) -> None:
    async with listening(empty_url) as ear:
        admin(empty_url, "NOTIFY sidecar, 'a'", "NOTIFY other, 'no'", "NOTIFY sidecar, 'b'", "NOTIFY sidecar")
        await eventually(lambda: len(ear.notes) == 3, what="three notes")
    assert ear.notes == ["a", "b", ""]
    assert (ear.connects, ear.log) == (1, [])


async def test_a_killed_connection_comes_back_and_the_workers_are_told_to_look(empty_url: str) -> None:
    async with listening(empty_url) as ear:
        for number in (1, 2):
            admin(
                empty_url,
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
                "AND application_name = 'sidecar_daemon listener'",
            )
            await eventually(partial(ear.has_connected, number + 1), what="the next connect")
            admin(empty_url, "NOTIFY sidecar, 'again'")
            await eventually(partial(ear.has_heard, number), what="the note")
    assert ear.events == ["listen_lost", "listen_restored"] * 2


async def test_an_outage_is_logged_once_however_long(server: EmbeddedServer) -> None:
    async with listening(server.dsn()) as ear:
        await asyncio.to_thread(server.stop, "immediate")
        await eventually(lambda: len(ear.waits) >= 6, what="six tries")
        assert ear.events == ["listen_lost"]
        await asyncio.to_thread(server.start)
        await eventually(lambda: ear.connects == 2, what="the second connect")
        admin(server.dsn(), "NOTIFY sidecar, 'again'")
        await eventually(lambda: ear.notes == ["again"], what="the note")
    assert ear.events == ["listen_lost", "listen_restored"]
    assert ear.waits[:5] == [0.02, 0.04, 0.08, 0.16, 0.2]


async def test_a_silent_connection_is_tried_and_given_up(empty_url: str) -> None:
    """A network that swallows everything: no reset, no answer."""
    host = empty_url.partition("host=")[2].partition("&")[0]
    swallowing = asyncio.Event()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while part := await reader.read(65536):
            if not swallowing.is_set():
                writer.write(part)
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_unix_connection(f"{host}/.s.PGSQL.5432")
        await asyncio.gather(pump(reader, up_writer), pump(up_reader, writer), return_exceptions=True)

    proxy = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = proxy.sockets[0].getsockname()[1]
    name = empty_url.split("/")[3].partition("?")[0]
    url = f"postgresql://postgres@127.0.0.1:{port}/{name}?sslmode=disable"
    async with listening(url, keepalive=0.05, connect_timeout=0.5) as ear:
        swallowing.set()
        await eventually(lambda: ear.events == ["listen_lost"], what="the loss")
        swallowing.clear()
        await eventually(lambda: ear.connects == 2, what="the second connect")
    proxy.close()


async def test_it_stops_in_the_middle_of_an_outage(server: EmbeddedServer) -> None:
    await asyncio.to_thread(server.stop)
    async with listening(server.dsn()) as ear:
        pass
    assert ear.connects == 0


def test_a_url_of_another_kind_is_refused() -> None:
    with pytest.raises(Fatal, match="postgresql://"):
        Listener("mysql://h/db", on_notify=print, on_connected=print, logger=Ear())
