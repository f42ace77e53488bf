"""The real daemon with one way to come to a halt: ``python -m tests.halting``.

It marks what it does on its own service manager's socket, so that marks and signs of life keep their order.

    HALT_RUNS    file that loading the model and each run of it wait for; marks ``LOAD=1`` and ``RUN=1``
    HALT_CALL    method of the queue that never returns
    HALT_LOOP    seconds for which SIGUSR1 blocks the event loop; marks ``BLOCKED=1`` and ``UNBLOCKED=1``
    HALT_STILL   seconds that a loop may stand still, instead of the daemon's own
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidecar_daemon.app.crews import Parts
from sidecar_daemon.app.daemon import run_daemon
from sidecar_daemon.domain.pulse import STILL_SECONDS
from sidecar_daemon.settings import Settings
from tests.deterministic import DeterministicEmbedder

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from sidecar_daemon.domain.messages import TokenIds, Vectors
    from sidecar_daemon.ports import Queue


def mark(text: str) -> None:
    """Tell the service manager."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.connect(os.environ["NOTIFY_SOCKET"].replace("@", "\0"))
        sender.sendall(text.encode())


def wait_for_file(what: str) -> None:
    """Stand still in this thread until the file is there."""
    if file := os.environ.get("HALT_RUNS"):
        mark(what)
        while not Path(file).exists():
            time.sleep(0.02)


class SlowEmbedder(DeterministicEmbedder):
    """Runs as long as the test wants."""

    def embed(self, windows: Sequence[TokenIds]) -> Vectors:
        """As the reference does, in the test's own time."""
        wait_for_file("RUN=1")
        return super().embed(windows)


class HaltingQueue:
    """The real queue, but for one method."""

    def __init__(self, queue: Queue) -> None:
        """Wrap a queue, and let a signal block the loop that it is used on."""
        self._queue = queue
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, _block)

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        """Every other method."""
        method: Callable[..., Awaitable[Any]] = getattr(self._queue, name)
        return _for_ever if name == os.environ.get("HALT_CALL") else method


async def _for_ever(*_: object, **__: object) -> None:
    await asyncio.Event().wait()


def _block() -> None:
    mark("BLOCKED=1")
    time.sleep(float(os.environ["HALT_LOOP"]))
    mark("UNBLOCKED=1")


def _load(*_: object) -> SlowEmbedder:
    wait_for_file("LOAD=1")
    return SlowEmbedder()


if __name__ == "__main__":
    parts = Parts(
        load_embedder=_load,
        wrap_queue=HaltingQueue,  # type: ignore[arg-type]  # through __getattr__
        still_seconds=float(os.environ.get("HALT_STILL", STILL_SECONDS)),
    )
    sys.exit(run_daemon(Settings.read(), parts))
