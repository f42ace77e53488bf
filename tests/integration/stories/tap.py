"""A wire-tap between a daemon and its server: what the server sent, byte for byte."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Self
from urllib.parse import parse_qs, quote, urlsplit

from tests.daemon import free_port

if TYPE_CHECKING:
    from asyncio import StreamReader, StreamWriter


class Tap:
    """Listens on a TCP port and passes everything to the server behind a socket URL."""

    def __init__(self, url: str) -> None:
        """Stand before the server of ``url``, ``postgresql://user@/database?host=folder&port=n``."""
        parts = urlsplit(url)
        query = parse_qs(parts.query)
        self._socket = f"{query['host'][0]}/.s.PGSQL.{query['port'][0]}"
        self._port = free_port()
        self.url = f"postgresql://{quote(parts.username or '')}@127.0.0.1:{self._port}{parts.path}?sslmode=disable"
        self.received = bytearray()
        """Everything that the server sent, over all connections."""
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self._port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _connected(self, reader: StreamReader, writer: StreamWriter) -> None:
        from_server, to_server = await asyncio.open_unix_connection(self._socket)
        for source, target, kept in ((reader, to_server, None), (from_server, writer, self.received)):
            task = asyncio.create_task(_pass_on(source, target, kept))
            self._tasks.add(task)


async def _pass_on(source: StreamReader, target: StreamWriter, kept: bytearray | None) -> None:
    try:
        with suppress(ConnectionError):
            while piece := await source.read(1 << 16):
                if kept is not None:
                    kept += piece
                target.write(piece)
                await target.drain()
    finally:
        target.close()
