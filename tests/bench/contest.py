"""The near end of a contestant: a process that is asked one thing at a time."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sidecar_daemon.domain.messages import Vectors

ROOT = Path(__file__).resolve().parents[2]
_LINE_BYTES = 1 << 28
_TAIL = 15


class ContestantError(Exception):
    """A contestant refused, or ended. One line, or the end of what it wrote."""


@dataclass
class Contestant:
    """A process that speaks ``contestants.wire``. Leave it through ``async with``."""

    name: str
    module: str
    arguments: Sequence[str] = ()
    python: Path = Path(sys.executable)
    environment: Mapping[str, str] = field(default_factory=dict)
    """Beside this process's own, without its ``SIDECAR_*``."""
    folder: Path | None = None
    """Where its standard error goes; None: nowhere."""
    _process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SIDECAR_")}
        log = (self.folder / f"{self.name}.log").open("ab") if self.folder else None
        try:
            self._process = await asyncio.create_subprocess_exec(
                *(str(self.python), "-m", self.module, *self.arguments),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log or asyncio.subprocess.DEVNULL,
                cwd=ROOT,
                env=kept | {"PYTHONPATH": str(ROOT)} | dict(self.environment),
                limit=_LINE_BYTES,
            )
        finally:
            if log:
                log.close()
        return self

    async def __aexit__(self, *_: object) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), 5)
        except TimeoutError:
            process.kill()
            await process.wait()

    @property
    def pid(self) -> int:
        """Of the running process."""
        assert self._process is not None
        return self._process.pid

    async def ask(self, operation: str, **arguments: object) -> Any:
        """Ask one thing and wait for its answer. Raises ``ContestantError``."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps({"op": operation, **arguments}).encode() + b"\n")
            await process.stdin.drain()
        except (BrokenPipeError, ConnectionResetError):
            raise ContestantError(f"{self.name} has ended: {self._tail()}") from None
        line = await process.stdout.readline()
        if not line:
            raise ContestantError(f"{self.name} ended while it was asked for {operation}: {self._tail()}")
        answer = json.loads(line)
        if "error" in answer:
            raise ContestantError(f"{self.name}, asked for {operation}: {answer['error']}")
        return answer["answer"]

    async def vectors(self, batches: Sequence[Sequence[str]]) -> list[Vectors]:
        """The vectors of batches of texts, each batch embedded in one run."""
        answer = await self.ask("batches", batches=[list(batch) for batch in batches])
        return [np.stack([unpacked(row) for row in batch]) for batch in answer]

    def _tail(self) -> str:
        log = self.folder / f"{self.name}.log" if self.folder else None
        lines = log.read_text(errors="replace").splitlines() if log and log.exists() else []
        return " | ".join(line for line in lines[-_TAIL:] if line.strip())[-800:]


def unpacked(row: str) -> Vectors:
    """A vector out of ``wire.packed``."""
    return np.frombuffer(base64.b64decode(row), dtype="<f4")
