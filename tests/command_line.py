"""The real command line: as a process of its own, or called within this one, which costs a fraction of it."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from sidecar_daemon.cli import run_command_line

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / ".sidecar" / "models"
"""Where every test of this checkout keeps pulled models."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What it printed, parsed; fails with its complaint when it failed."""
        assert self.code == 0, self.err
        return json.loads(self.out)


async def launch(
    arguments: Sequence[str],
    settings: Mapping[str, str],
    *,
    cwd: Path | str | None = None,
    stdin: int | None = None,
    path: Path | None = None,
) -> asyncio.subprocess.Process:
    """Start ``python -m sidecar_daemon`` with nothing of ours in its environment but these settings.

    Args:
        arguments: of the command.
        settings: by name without the prefix, ``{"THREADS": "1"}``.
        cwd: its working directory.
        stdin: a file descriptor; None for none.
        path: a folder whose modules win over all others.
    """
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "sidecar_daemon", *arguments),
        stdin=asyncio.subprocess.DEVNULL if stdin is None else stdin,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=cwd,
        env=_environment(settings)
        | {"PYTHONPATH": os.pathsep.join(str(each) for each in (path, ROOT) if each is not None)},
    )


async def start(
    *arguments: str, database_url: str | None = None, cwd: Path | str | None = None, **settings: str
) -> asyncio.subprocess.Process:
    """Start a command; the settings are named without their prefix, ``THREADS="1"``. See ``launch``."""
    url = {} if database_url is None else {"DATABASE_URL": database_url}
    return await launch(arguments, {**url, **settings}, cwd=cwd)


async def ended(process: asyncio.subprocess.Process) -> Finished:
    """Wait for the end of a command that was started."""
    out, err = await process.communicate()
    assert process.returncode is not None
    return Finished(process.returncode, out.decode(), err.decode())


async def sidecar(
    *arguments: str, database_url: str | None = None, cwd: Path | str | None = None, **settings: str
) -> Finished:
    """Run a command to its end; see ``start``."""
    return await ended(await start(*arguments, database_url=database_url, cwd=cwd, **settings))


async def called(
    *arguments: str, database_url: str | None = None, cwd: Path | str | None = None, **settings: str
) -> Finished:
    """Run a command as ``sidecar`` does, but in a thread of this process: parser, settings, app and output are real.

    What only a process shows is left out: how it starts, signals, streams that are closed or no UTF-8, a terminal.
    """
    url = {} if database_url is None else {"DATABASE_URL": database_url}
    nothing, out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(3))
    with (
        patch.dict(os.environ, _environment({**url, **settings}), clear=True),
        patch.multiple(sys, stdin=nothing, stdout=out, stderr=err),
        contextlib.chdir(cwd or Path.cwd()),
    ):
        code = await asyncio.to_thread(run_command_line, arguments)
    return Finished(code, _written(out), _written(err))


def _environment(settings: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with nothing of ours but these settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SIDECAR_")}
    return kept | {f"SIDECAR_{name}": value for name, value in {"MODELS_DIR": str(MODELS), **settings}.items()}


def _written(stream: io.TextIOWrapper) -> str:
    stream.seek(0)
    return stream.read()
