"""A connection that only listens: a NOTIFY wakes the workers, a lost connection comes back by itself."""

from __future__ import annotations

import asyncio
import random
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Protocol

import asyncpg

from sidecar_daemon.adapters.postgres.errors import DRIVER_ERRORS, translated
from sidecar_daemon.adapters.postgres.pool import place_of
from sidecar_daemon.domain.errors import Transient
from sidecar_daemon.domain.retry import full_jitter

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from asyncpg.pool import PoolConnectionProxy


class Logger(Protocol):
    """The part of a structlog logger that is used here."""

    def info(self, event: str, **fields: object) -> object:
        """Log something that is well."""

    def warning(self, event: str, **fields: object) -> object:
        """Log something that is not."""


class Listener:
    """Listens on a channel for as long as it runs. Needs a direct connection: a transaction pooler loses LISTEN."""

    def __init__(
        self,
        dsn: str,
        *,
        on_notify: Callable[[str], None],
        on_connected: Callable[[], None],
        logger: Logger,
        channel: str = "sidecar",
        keepalive: float = 15.0,
        connect_timeout: float = 5.0,
        backoff_base: float = 0.2,
        backoff_cap: float = 10.0,
        uniform: Callable[[float, float], float] = random.uniform,
        on_turn: Callable[[], None] = lambda: None,
        asleep: Callable[[float], AbstractContextManager[None]] = lambda _: nullcontext(),
        setting: str = "SIDECAR_LISTEN_URL",
    ) -> None:
        """Connect nothing; ``run`` does.

        Args:
            dsn: ``postgresql://`` URL that leads to the server itself.
            on_notify: called with the payload of every notification.
            on_connected: called after every connect: what was notified in between is lost, so look.
            logger: told once when an outage begins and once when it ends.
            channel: the channel's name.
            keepalive: seconds of silence after which the connection is tried with a query.
            connect_timeout: seconds, of a connect and of that query.
            backoff_base: seconds, ceiling of the first wait before a reconnect.
            backoff_cap: seconds, ceiling of every wait.
            uniform: draws a float between its two arguments.
            on_turn: called between sleeps, at least every few ``connect_timeout``: the listener moves.
            asleep: entered for a sleep of at most so many seconds.
            setting: where ``dsn`` comes from, for a complaint.

        Raises:
            Fatal: the URL is not a PostgreSQL URL.
        """
        self._place = place_of(dsn)
        self._dsn = dsn
        self._setting = setting
        self._on_notify = on_notify
        self._on_connected = on_connected
        self._logger = logger
        self._channel = channel
        self._keepalive = keepalive
        self._connect_timeout = connect_timeout
        self._backoff = (backoff_base, backoff_cap)
        self._uniform = uniform
        self._on_turn = on_turn
        self._asleep = asleep
        self._failures = 0

    async def run(self, stop: asyncio.Event) -> None:
        """Listen until ``stop`` is set; survive every outage.

        Raises:
            Fatal: the connection is misconfigured in a way that waiting cannot mend.
        """
        while not stop.is_set():
            self._on_turn()
            try:
                with translated(self._place, self._setting):
                    async with self._connected() as (connection, lost):
                        self._greet()
                        await self._watch(connection, lost, stop)
            except Transient as error:
                self._failures += 1
                if self._failures == 1:
                    self._logger.warning(
                        "listen_lost",
                        code=error.code,
                        cause=str(error),
                        effect="new work is found by polling until the listening connection is back",
                    )
                base, cap = self._backoff
                seconds = full_jitter(self._failures, base=base, cap=cap, uniform=self._uniform)
                with self._asleep(seconds):
                    await _first_of(stop, seconds=seconds)

    def _greet(self) -> None:
        if self._failures:
            self._logger.info("listen_restored", failures=self._failures)
        self._failures = 0
        self._on_connected()

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[tuple[asyncpg.Connection, asyncio.Event]]:
        connection = await asyncpg.connect(
            self._dsn,
            timeout=self._connect_timeout,
            command_timeout=self._connect_timeout,
            statement_cache_size=0,
            server_settings={"application_name": "sidecar_daemon listener"},
        )
        lost = asyncio.Event()
        try:
            connection.add_termination_listener(lambda _: lost.set())
            await connection.add_listener(self._channel, self._hear)
            yield connection, lost
        finally:
            with suppress(*DRIVER_ERRORS):
                await connection.close(timeout=1.0)

    def _hear(self, _: asyncpg.Connection | PoolConnectionProxy, __: int, ___: str, payload: object) -> None:
        self._on_notify(str(payload))

    async def _watch(self, connection: asyncpg.Connection, lost: asyncio.Event, stop: asyncio.Event) -> None:
        while not stop.is_set():
            self._on_turn()
            with self._asleep(self._keepalive):
                await _first_of(stop, lost, seconds=self._keepalive)
            if lost.is_set():
                raise Transient("connection_lost", f"the listening connection was closed at {self._place}")
            if not stop.is_set():
                await connection.fetchval("SELECT 1")


async def _first_of(*events: asyncio.Event, seconds: float) -> None:
    """Return when one of the events is set, or after some seconds."""
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
