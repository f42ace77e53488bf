"""What the demo shows: lines, and one line of progress that moves on a terminal."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import TextIO

    from sidecar_daemon.adapters.onnx.progress import PullStep

_PLAIN_SECONDS = 5.0
"""Without a terminal, a line of progress at most this often."""


class Screen:
    """Lines for people on one stream."""

    def __init__(self, stream: TextIO) -> None:
        """Write to a stream."""
        self._stream = stream
        self._terminal = stream.isatty()
        self._moving = False
        self._last = -_PLAIN_SECONDS

    def heading(self, text: str) -> None:
        """Begin a chapter."""
        self.line()
        self.line(f"\x1b[1m{text}\x1b[0m" if self._terminal else f"== {text}")

    def line(self, text: str = "") -> None:
        """Write a line that stays."""
        self.settle()
        self._stream.write(f"{text}\n")
        self._stream.flush()

    def progress(self, text: str) -> None:
        """Write over the last line of progress; without a terminal, add a line now and then."""
        if self._terminal:
            self._stream.write(f"\r\x1b[K{text}")
            self._moving = True
        elif time.monotonic() - self._last >= _PLAIN_SECONDS:
            self._last = time.monotonic()
            self._stream.write(f"{text}\n")
        self._stream.flush()

    def pull(self, step: PullStep) -> None:
        """Show one moment of a model pull."""
        total = f" of {step.total / 1e6:.0f}" if step.total else ""
        size = f" {step.done / 1e6:.0f}{total} MB" if step.done else ""
        self.progress(f"  {step.doing} {step.what}{size}")

    def settle(self) -> None:
        """Leave no moving line behind."""
        if self._moving:
            self._stream.write("\r\x1b[K")
            self._moving = False


def screen(*, as_json: bool) -> Screen:
    """On stdout, or on stderr where stdout is kept for JSON."""
    return Screen(sys.stderr if as_json else sys.stdout)
