"""Single keys from a terminal, without waiting for a line."""

from __future__ import annotations

import asyncio
import os
import sys
import termios
import tty
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable

_ENDING = frozenset(b"qQ")


class Keyboard:
    """Listens for ``q`` on stdin, where that is a terminal; the terminal is given back as it was."""

    def __init__(self, end: Callable[[], object]) -> None:
        """Listen to nothing yet; ``end`` is called when somebody wants to leave."""
        self._end = end
        self._file = sys.stdin.fileno() if sys.stdin is not None and sys.stdin.isatty() else None
        self._before: list[Any] | None = None

    def take(self) -> None:
        """Listen from now on."""
        if self._file is not None and self._before is None:
            self._before = termios.tcgetattr(self._file)
            tty.setcbreak(self._file)
            asyncio.get_running_loop().add_reader(self._file, self._read, self._file)

    def give_back(self) -> None:
        """Listen no longer."""
        if self._file is not None and self._before is not None:
            asyncio.get_running_loop().remove_reader(self._file)
            termios.tcsetattr(self._file, termios.TCSADRAIN, self._before)
            self._before = None

    def _read(self, file: int) -> None:
        try:
            typed = os.read(file, 1024)
        except OSError:
            typed = b""
        if not typed or _ENDING & set(typed):  # nothing: the terminal is gone
            self._end()

    def __enter__(self) -> Self:
        self.take()
        return self

    def __exit__(self, *_: object) -> None:
        self.give_back()
