"""Who is to blame for a database error, and how long to wait before the next try. Pure."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_HIGHEST_EXPONENT = 64
"""Two to this power times any sensible base is beyond every cap; larger exponents would only overflow."""


class Blame(Enum):
    """Whose fault an error is: it decides between waiting, dead-lettering and crashing."""

    WORLD = "world"
    MESSAGE = "message"
    OURS = "ours"


_WORLD_CLASSES = frozenset(
    {
        "08",  # connection exceptions
        "28",  # rejected credentials: they are rotated under a running daemon
        "40",  # rolled back: serialization, deadlock, unknown outcome of a commit
        "53",  # out of disk, memory or connections
        "55",  # lock not available, object in use, database not accepting connections
        "57",  # shutdown, crash, cannot connect now, cancelled
        "58",  # the operating system under the server failed to read or write
    }
)
_WORLD_STATES = frozenset(
    {
        "0A000",  # a cached plan whose result type changed; an extension that was made anew
        "23502",  # not null: ours are always filled, so it is a column that somebody else added
        "25006",  # read only: a standby, or a primary that was demoted
        "25P03",  # idle in transaction for too long
        "25P04",  # transaction for too long
        "3D000",  # the database is missing
        "3F000",  # the schema is missing
        "42501",  # no privilege
        "42703",  # a column is missing
        "42704",  # a type, role or other object is missing
        "42883",  # a function is missing
        "42P01",  # a table is missing
        "XX001",  # a row is damaged on the server's disk
        "XX002",  # an index is damaged
    }
)
_MESSAGE_CLASSES = frozenset(
    {
        "22",  # the data cannot be represented
        "23",  # a constraint forbids the data
        "44",  # a view's check forbids the data
        "P0",  # a trigger of the user's refuses the data
        "54",  # the data is beyond a limit of the server, a full-text vector for one
    }
)


def blame(sqlstate: str) -> Blame:
    """Say whose fault an error is.

    Args:
        sqlstate: five characters, as Postgres sends it.
    """
    if sqlstate in _WORLD_STATES or sqlstate[:2] in _WORLD_CLASSES:
        return Blame.WORLD
    if sqlstate[:2] in _MESSAGE_CLASSES:
        return Blame.MESSAGE
    return Blame.OURS


def ceiling(attempt: int, *, base: float, cap: float) -> float:
    """Longest wait after an attempt: ``min(cap, base * 2**(attempt - 1))`` seconds.

    Args:
        attempt: 1 for the first.
        base: seconds, above 0.
        cap: seconds, at least ``base``.
    """
    exponent = max(0, min(attempt - 1, _HIGHEST_EXPONENT))
    return float(min(cap, base * 2.0**exponent))


def backoff(attempt: int, *, base: float, cap: float, uniform: Callable[[float, float], float]) -> float:
    """Seconds until a message is tried again: drawn between ``base`` and the ceiling of the attempt.

    Args:
        attempt: attempts made so far, 1 after the first.
        base: shortest wait in seconds.
        cap: longest wait in seconds.
        uniform: draws a float between its two arguments, ``random.uniform`` for one.
    """
    return uniform(min(base, cap), ceiling(attempt, base=base, cap=cap))


def full_jitter(attempt: int, *, base: float, cap: float, uniform: Callable[[float, float], float]) -> float:
    """Seconds until a connection is tried again: drawn between nothing and the ceiling of the attempt.

    Replicas that lost the same server at the same moment must not come back at the same moment.
    """
    return uniform(0.0, ceiling(attempt, base=base, cap=cap))
