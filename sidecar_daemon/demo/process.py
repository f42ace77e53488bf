"""The real daemon as a process of its own, started and stopped by the demo."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Self

from sidecar_daemon.domain.errors import Fatal
from sidecar_daemon.settings import child_environment

if TYPE_CHECKING:
    from pathlib import Path

_STOP_SECONDS = 40.0


class DaemonProcess:
    """``python -m sidecar_daemon`` with settings of its own; its log goes to a file."""

    def __init__(self, settings: dict[str, str], log: Path, *, host: str, port: int) -> None:
        """Describe the process; entering the context starts it, leaving it stops it."""
        self.url = f"http://{host}:{port}"
        self.log = log
        self._host, self._port = host, port
        self._settings = {**settings, "HTTP_HOST": host, "HTTP_PORT": str(port), "LOG_FORMAT": "json"}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with self.log.open("wb") as log:
            # A session of its own: Ctrl-C is ours to handle, and the daemon then drains as with any SIGTERM.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sidecar_daemon", "run"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=child_environment(self._settings),
                start_new_session=True,
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def check(self) -> None:
        """Raise ``Fatal`` with the daemon's last words when it has ended."""
        if self._process is not None and self._process.poll() is not None:
            raise Fatal("daemon_ended", f"the daemon ended by itself ({self._last_words()}); its log: {self.log}")

    def is_ready(self) -> bool:
        """Whether ``/readyz`` answers yes."""
        self.check()
        # Not urllib: it would ask a configured proxy for an address of this machine.
        connection = http.client.HTTPConnection(self._host, self._port, timeout=2.0)
        try:
            connection.request("GET", "/readyz")
            return connection.getresponse().status == http.client.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        if not lines:
            return "without a word"
        try:
            event = json.loads(lines[-1])
        except ValueError:
            return lines[-1]
        return str(event.get("cause") or event.get("event")) if isinstance(event, dict) else lines[-1]


def usable_port(host: str, wanted: int) -> int:
    """The wanted port when it is free on a host, else any free one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in (wanted, 0):
        with contextlib.suppress(OSError), socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    raise Fatal("http_bind", f"SIDECAR_HTTP_HOST is {host}: must be an address of this machine")
