"""A TCP proxy between replicas and Postgres: it reads the protocol, so that it can hurt at a chosen place."""

from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from random import Random

_HEADER = 5
_COMMAND_COMPLETE, _READY, _ERROR = b"C", b"Z", b"E"
_PARSE, _BIND = b"P", b"B"


class Hurt(StrEnum):
    """What happens to the connections."""

    NOTHING = "nothing"
    DELAY = "delay"
    """Every packet waits."""
    DRIBBLE = "dribble"
    """One byte a write."""
    RESET = "reset"
    """RST in the middle of the next answer."""
    TRUNCATE = "truncate"
    """The next answer stops in the middle; then an orderly end of stream."""
    BLACK_HOLE = "black_hole"
    """Nothing passes in either direction, and nobody is told."""
    LOSE_COMMIT = "lose_commit"
    """The server has committed a settlement; its answer never arrives, the connection is reset."""


@dataclass(eq=False)
class _Link:
    """One proxied connection."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    settles: set[bytes] = field(default_factory=set)
    """Names of prepared statements that settle."""
    settling: bool = False
    """The statement under way is a settlement."""
    doomed: bool = False

    def reset(self) -> None:
        """Drop both sides; the replica sees a RST."""
        self.doomed = True
        with suppress(OSError):
            sock = self.client.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.client.transport.abort()
        self.server.transport.abort()


class Proxy:
    """Listens on ``port`` and forwards to the server. Hurts as told, and counts how often it did."""

    def __init__(self, server_port: int, rng: Random) -> None:
        """Bind the server's port on 127.0.0.1; ``rng`` draws delays."""
        self._server_port = server_port
        self._rng = rng
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._open = asyncio.Event()
        self._open.set()
        self._done = asyncio.Event()
        self._hurt = Hurt.NOTHING
        self.port = 0

    async def __aenter__(self) -> Self:
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._listener.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._listener.close()
        self.heal()
        for link in list(self._links):
            link.reset()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def hurt(self, how: Hurt) -> None:
        """Begin to hurt. ``RESET``, ``TRUNCATE`` and ``LOSE_COMMIT`` happen once each time this is called."""
        self._hurt = how
        self._done.clear()
        if how is Hurt.BLACK_HOLE:
            self._open.clear()

    def heal(self) -> None:
        """Forward as if nothing had been; what was held back goes on."""
        self._hurt = Hurt.NOTHING
        self._open.set()

    def cut(self) -> None:
        """Reset every connection, as the end of a partition often does."""
        for link in list(self._links):
            link.reset()

    async def until_hurt(self, seconds: float) -> None:
        """Wait until what was ordered has happened once."""
        async with asyncio.timeout(seconds):
            await self._done.wait()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            upstream, server = await asyncio.open_connection("127.0.0.1", self._server_port)
        except OSError:
            writer.transport.abort()
            return
        link = _Link(writer, server)
        self._links.add(link)
        both = [asyncio.create_task(self._up(reader, link)), asyncio.create_task(self._down(upstream, link))]
        for task in both:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        for task in both:
            task.cancel()
        await asyncio.gather(*both, return_exceptions=True)
        self._links.discard(link)
        for side in (writer, server):
            side.close()

    async def _up(self, reader: asyncio.StreamReader, link: _Link) -> None:
        """From the replica: note which statements settle. The first packet, the start-up, has no type."""
        with suppress(OSError, asyncio.IncompleteReadError):
            length = await reader.readexactly(4)
            await self._send(link.server, length + await reader.readexactly(int.from_bytes(length) - 4))
            while True:
                kind, body = await _message(reader)
                if kind == _PARSE:
                    name, _, rest = body.partition(b"\0")
                    if b"sidecar.settle(" in rest:
                        link.settles.add(name)
                elif kind == _BIND:
                    link.settling = body.split(b"\0", 2)[1] in link.settles
                await self._send(link.server, _packed(kind, body))

    async def _down(self, reader: asyncio.StreamReader, link: _Link) -> None:
        """To the replica: hurt one answer where that is ordered."""
        with suppress(OSError, asyncio.IncompleteReadError):
            while not link.doomed:
                kind, body = await _message(reader)
                packet = _packed(kind, body)
                if kind == _ERROR:
                    link.settling = False  # nothing was committed, so there is no answer to lose
                # Ready comes after the commit of a call outside of a transaction block: the outcome is durable now.
                if kind == _READY and link.settling and self._hurt is Hurt.LOSE_COMMIT and body == b"I":
                    self._happened()
                    link.reset()
                    return
                if kind == _COMMAND_COMPLETE and link.settling and self._hurt is Hurt.LOSE_COMMIT:
                    continue  # the answer itself must not arrive either
                if self._hurt in (Hurt.RESET, Hurt.TRUNCATE) and len(packet) > _HEADER:
                    how = self._hurt
                    self._happened()
                    link.client.write(packet[: len(packet) // 2])
                    await link.client.drain()
                    if how is Hurt.RESET:
                        link.reset()
                    return
                await self._send(link.client, packet)

    async def _send(self, writer: asyncio.StreamWriter, packet: bytes) -> None:
        await self._open.wait()
        if self._hurt is Hurt.DELAY:
            await asyncio.sleep(self._rng.uniform(0.01, 0.08))
            self._done.set()
        if self._hurt is Hurt.DRIBBLE:
            for place in range(len(packet)):
                writer.write(packet[place : place + 1])
                await writer.drain()
                await asyncio.sleep(0)
            self._done.set()
        else:
            writer.write(packet)
            await writer.drain()

    def _happened(self) -> None:
        self._hurt = Hurt.NOTHING
        self._done.set()


async def _message(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    head = await reader.readexactly(_HEADER)
    return head[:1], await reader.readexactly(int.from_bytes(head[1:]) - 4)


def _packed(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("!I", len(body) + 4) + body
