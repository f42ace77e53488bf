"""What a pull tells its caller while it runs, and how a source says that the network said no."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PullStep:
    """One moment of a pull."""

    model: str
    doing: str
    """``downloading``, ``verifying`` or ``exporting``."""
    what: str
    """A file or a wheel."""
    done: int = 0
    """Bytes."""
    total: int | None = None
    """Bytes; None where nobody knows."""


Progress = Callable[[PullStep], None]
"""Called from the pulling thread, often; draws or ignores."""


class Unreachable(Exception):  # noqa: N818  a fact about the network, which the next source may mend
    """A source cannot be reached from here. The message is the reason, without hosts or credentials."""
