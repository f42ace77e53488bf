"""Tells systemd how the service is doing: the notify protocol of sd_notify(3), one datagram a message."""

from __future__ import annotations

import re
import socket


class ServiceNotifier:
    """Sends to the socket that systemd named. Without one, or on an unreachable one, nothing happens.

    No notification ever raises or blocks: a daemon does not die of its own good news. Each returns whether it was sent.
    """

    def __init__(self, address: str | None) -> None:
        """Take ``NOTIFY_SOCKET``: a path, ``@name`` for the abstract namespace, or None."""
        self._address: str | None = None
        if address and address.startswith(("/", "@")):
            self._address = re.sub("^@", "\0", address)

    @property
    def usable(self) -> bool:
        """Whether there is a socket to talk to."""
        return self._address is not None

    def ready(self, status: str = "") -> bool:
        """Start-up is over: units that wait for this one may start."""
        return self._send("READY=1", *_status(status))

    def extend_timeout(self, seconds: float) -> bool:
        """Whatever is under way, a start or a stop, goes on: give it this long until the next word, at least."""
        return self._send(f"EXTEND_TIMEOUT_USEC={round(seconds * 1e6)}")

    def status(self, text: str) -> bool:
        """The line that ``systemctl status`` shows."""
        return self._send(*_status(text))

    def watchdog(self) -> bool:
        """Still alive; to be sent at least every half of the watchdog's time."""
        return self._send("WATCHDOG=1")

    def stopping(self, status: str = "") -> bool:
        """The drain has begun."""
        return self._send("STOPPING=1", *_status(status))

    def _send(self, *lines: str) -> bool:
        if self._address is None or not lines:
            return False
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender:
                sender.connect(self._address)
                sender.sendall("\n".join(lines).encode(errors="replace"))
        except OSError:
            return False
        return True


def _status(text: str) -> list[str]:
    line = " ".join(text.split())
    return [f"STATUS={line}"] if line else []
