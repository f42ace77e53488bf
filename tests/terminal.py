"""A command on a real pseudo-terminal: what it draws, the keys that it gets, the size of its window."""

from __future__ import annotations

import asyncio
import fcntl
import os
import pty
import re
import struct
import sys
import termios
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.command_line import MODELS, ROOT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

ENTERED, LEFT = "\x1b[?1049h", "\x1b[?1049l"
"""The alternate screen."""
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


@dataclass
class Terminal:
    """One process on a terminal of its own."""

    process: asyncio.subprocess.Process
    ours: int
    theirs: int
    raw: str = ""
    """Everything that was written so far."""

    @property
    def frames(self) -> list[list[str]]:
        """The lines of every frame that was drawn, without colours."""
        return [_CONTROL.sub("", part).splitlines() for part in re.split(r"\x1b\[H", self.raw)[1:]]

    @property
    def last(self) -> str:
        """The newest frame."""
        return "\n".join(self.frames[-1]) if self.frames else ""

    def since(self, mark: str) -> str:
        """What was drawn after the last time that this was written, without colours."""
        return _CONTROL.sub("", self.raw.rpartition(mark)[2])

    def cooked(self) -> bool:
        """Whether the terminal is as a shell leaves it: it echoes, and collects lines."""
        return bool(termios.tcgetattr(self.theirs)[3] & termios.ECHO)

    def press(self, keys: str) -> None:
        """Type."""
        os.write(self.ours, keys.encode())

    def resize(self, columns: int, rows: int) -> None:
        """Make the window another size; the kernel tells the process."""
        fcntl.ioctl(self.ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def _read(self) -> None:
        try:
            self.raw += os.read(self.ours, 1 << 16).decode(errors="replace")
        except OSError:  # the other side is closed
            asyncio.get_running_loop().remove_reader(self.ours)


@asynccontextmanager
async def terminal(
    *arguments: str,
    settings: Mapping[str, str],
    environment: Mapping[str, str] | None = None,
    columns: int = 80,
    rows: int = 24,
) -> AsyncIterator[Terminal]:
    """Run a command on a terminal; it is killed at the end of the block if it still runs."""
    ours, theirs = pty.openpty()
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("SIDECAR_") and name not in {"COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"}
    }
    given = {f"SIDECAR_{name}": value for name, value in {"MODELS_DIR": str(MODELS), **settings}.items()}
    try:
        fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _CONTROLLED, *arguments),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env=kept | given | {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color", **(environment or {})},
        )
        opened = Terminal(process, ours, theirs)
        asyncio.get_running_loop().add_reader(ours, opened._read)
        try:
            yield opened
        finally:
            asyncio.get_running_loop().remove_reader(ours)
            if process.returncode is None:
                process.kill()
            await process.wait()
    finally:
        os.close(ours)
        os.close(theirs)


_CONTROLLED = (
    "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "from sidecar_daemon.__main__ import main; sys.exit(main())"
)
"""The command with its terminal as the controlling one, so that Ctrl-C and a resize reach it as signals."""
