"""The real daemon as a process of its own, for tests that talk to it from outside."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import signal
import socket
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

import httpx

from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from pathlib import Path

_LINE_BYTES = 1 << 20


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Daemon:
    """``python -m sidecar_daemon`` with its settings in the environment. Leave it through ``async with``."""

    database_url: str
    models_dir: Path
    settings: Mapping[str, str] = field(default_factory=dict)
    """Further settings without the prefix, ``{"THREADS": "1"}``; they win."""
    module: str = "sidecar_daemon"
    """What is run instead, for a daemon with test parts."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Further variables of its environment, by their whole name."""
    port: int = field(default_factory=free_port)
    log: list[str] = field(default_factory=list)
    """Every line that the process wrote, both streams."""
    process: asyncio.subprocess.Process | None = None
    _reader: asyncio.Task[None] | None = None
    reroute: ClassVar[Callable[[str], str] | None] = None
    """Leads every daemon's database URL through a transaction pooler; ``--through-pgbouncer`` sets it."""

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.stop()  # nobody else will: the block is never entered
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def url(self) -> str:
        """Base URL of its HTTP endpoints."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Process id; only after ``start``."""
        assert self.process is not None
        return self.process.pid

    @property
    def events(self) -> list[dict[str, Any]]:
        """Its log lines that are JSON objects."""
        found = []
        for line in self.log:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict):
                found.append(event)
        return found

    async def start(self, *, ready: bool = True, timeout: float = 60.0) -> None:  # noqa: ASYNC109  polls
        """Start the process and, unless told otherwise, wait until it is ready."""
        url = self.database_url
        pooled = Daemon.reroute(url) if Daemon.reroute else url
        settings = {
            "DATABASE_URL": pooled,
            "POOLER": "session" if pooled == url else "transaction",
            "MODELS_DIR": str(self.models_dir),
            "HTTP_HOST": "127.0.0.1",
            "HTTP_PORT": str(self.port),
            "LOG_FORMAT": "json",
            **self.settings,
        }
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SIDECAR_")}
        environment |= {f"SIDECAR_{name}": value for name, value in settings.items()}
        environment |= {"PYTHONUNBUFFERED": "1", **self.variables}
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            self.module,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=environment,
            limit=_LINE_BYTES,
        )
        self._reader = asyncio.create_task(self._read())
        if ready:
            await self.wait_for(self.is_ready, timeout=timeout, what="readiness")

    async def is_ready(self) -> bool:
        """Whether ``/readyz`` answers 200."""
        return await self.status_of("/readyz") == httpx.codes.OK

    async def status_of(self, path: str) -> int | None:
        """HTTP status of one of its endpoints; None while nothing listens."""
        try:
            async with httpx.AsyncClient(base_url=self.url, timeout=5.0) as client:
                return (await client.get(path)).status_code
        except httpx.TransportError:
            return None

    async def get(self, path: str) -> httpx.Response:
        """Fetch one of its endpoints."""
        async with httpx.AsyncClient(base_url=self.url, timeout=10.0) as client:
            return await client.get(path)

    async def wait_for(
        self,
        predicate: Callable[[], object | Awaitable[object]],
        *,
        timeout: float = 60.0,  # noqa: ASYNC109  a deadline for polling
        what: str = "",
    ) -> None:
        """Poll until the predicate holds; fail at once, with the log, when the process ends before."""

        async def check() -> bool:
            value = predicate()
            if inspect.isawaitable(value):
                value = await value
            if not value and self.process is not None and self.process.returncode is not None:
                raise ProcessEndedError(self.process.returncode, self.log)
            return bool(value)

        try:
            await eventually(check, timeout=timeout, what=what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n" + "\n".join(self.log[-30:])) from None

    async def wait(self, timeout: float = 60.0) -> int:  # noqa: ASYNC109  the deadline of one wait
        """Wait until the process has ended; return its exit status."""
        assert self.process is not None
        status = await asyncio.wait_for(self.process.wait(), timeout)
        if self._reader is not None:
            await self._reader
        return status

    async def kill(self) -> None:
        """Kill it, as ``kill -9`` does, and wait until it is gone."""
        await self._signal_and_wait(signal.SIGKILL)

    async def terminate(self, timeout: float = 60.0) -> int:  # noqa: ASYNC109  the deadline of one wait
        """Ask it to stop (SIGTERM), wait for it and return its exit status."""
        return await self._signal_and_wait(signal.SIGTERM, timeout)

    async def stop(self) -> None:
        """End it in whatever state it is."""
        if self.process is None or self.process.returncode is not None:
            return
        try:
            await self.terminate(timeout=20.0)
        except TimeoutError:
            await self.kill()

    async def _signal_and_wait(self, number: signal.Signals, timeout: float = 60.0) -> int:  # noqa: ASYNC109  see wait
        assert self.process is not None
        if self.process.returncode is None:
            self.process.send_signal(number)
        return await self.wait(timeout)

    async def _read(self) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.log.append(line.decode(errors="replace").rstrip("\n"))


class ProcessEndedError(Exception):
    """The daemon ended while a test waited for something."""

    def __init__(self, status: int | None, log: list[str]) -> None:
        super().__init__(f"the daemon ended with status {status}:\n" + "\n".join(log[-30:]))
