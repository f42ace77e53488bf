"""Serves the application inside the daemon's own event loop and leaves the process's signals alone."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING

import uvicorn

from sidecar_daemon.domain.errors import Fatal

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from fastapi import FastAPI

_CLOSE_SECONDS = 2
"""How long a request that still runs may hold up the end."""


async def serve(app: FastAPI, host: str, port: int, stop: asyncio.Event, on_bound: Callable[[int], None]) -> None:
    """Serve until ``stop`` is set; returns once the port is closed.

    Args:
        app: the application.
        host: an address or a host name; its first address is used.
        port: 0 for any free port.
        stop: ends it.
        on_bound: called once with the port, when connections are being accepted.

    Raises:
        Fatal: ``http_bind``, when the address cannot be listened on.
    """
    listener = await _listen(host, port)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        http="h11",
        timeout_graceful_shutdown=_CLOSE_SECONDS,
    )
    server = _Server(config, lambda: on_bound(listener.getsockname()[1]))
    stopping = asyncio.create_task(_end(server, stop))
    try:
        await server.serve(sockets=[listener])
    except asyncio.CancelledError:
        await server.shutdown(sockets=[listener])
        raise
    finally:
        stopping.cancel()
        listener.close()


async def _end(server: uvicorn.Server, stop: asyncio.Event) -> None:
    await stop.wait()
    server.should_exit = True


async def _listen(host: str, port: int) -> socket.socket:
    """Bind before the server starts, so that a taken port is one clear line instead of an exit in a library."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen()
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise Fatal(
            "http_bind",
            f"cannot listen on SIDECAR_HTTP_HOST {host!r}, SIDECAR_HTTP_PORT {port}: {error.strerror or error}; "
            "must be a free port (0 for any) on an address of this machine",
        ) from None
    return listener


class _Server(uvicorn.Server):
    """A server that says when it accepts connections, and takes no signal: the daemon drains first."""

    def __init__(self, config: uvicorn.Config, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self.servers = []  # set only by startup; a shutdown that comes before must find it
        self._on_started = on_started

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave the signals to the daemon."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start as uvicorn does, then report."""
        await super().startup(sockets=sockets)
        self._on_started()
