"""What systemd is to a service: a datagram socket that hears its notifications."""

from __future__ import annotations

import asyncio
import socket
import uuid
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

WATCHDOG = "WATCHDOG=1"


class ServiceManager(asyncio.DatagramProtocol):
    """Hears one service."""

    def __init__(self, watchdog_seconds: float) -> None:
        """Expect a sign of life at least every ``watchdog_seconds``."""
        self.address = f"@sidecar-{uuid.uuid4()}"
        self.watchdog_seconds = watchdog_seconds
        self.heard: list[str] = []
        """Every datagram, in the order in which they were sent."""

    @property
    def variables(self) -> dict[str, str]:
        """What it puts into the service's environment."""
        return {"NOTIFY_SOCKET": self.address, "WATCHDOG_USEC": str(int(self.watchdog_seconds * 1e6))}

    @property
    def pets(self) -> int:
        """Signs of life so far."""
        return self.heard.count(WATCHDOG)

    @property
    def status(self) -> str:
        """The last status line; empty before the first."""
        lines = [line for message in self.heard for line in message.splitlines() if line.startswith("STATUS=")]
        return lines[-1].removeprefix("STATUS=") if lines else ""

    def position(self, line: str) -> int:
        """How many messages came before the one with this line. Raises ``StopIteration`` where there is none."""
        return next(n for n, message in enumerate(self.heard) if line in message.splitlines())

    def has(self, line: str) -> bool:
        """Whether a message with this line came."""
        return any(line in message.splitlines() for message in self.heard)

    def datagram_received(self, data: bytes, _: object) -> None:
        """One notification."""
        self.heard.append(data.decode())


@asynccontextmanager
async def service_manager(watchdog_seconds: float = 1.5) -> AsyncIterator[ServiceManager]:
    """A service manager that listens."""
    manager = ServiceManager(watchdog_seconds)
    receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    receiver.setblocking(False)
    receiver.bind(manager.address.replace("@", "\0"))
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(lambda: manager, sock=receiver)
    try:
        yield manager
    finally:
        transport.close()
