"""Driver errors become errors of this project here, once, by SQLSTATE.

What Postgres says about a document may quote the document: DETAIL always, the message in the classes 22, 23
and in anything a user's trigger raises. Such text never passes; names of constraints and columns do.
"""

from __future__ import annotations

import re
import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING

import asyncpg

from sidecar_daemon.domain.errors import Fatal, Poison, Refused, SidecarError, Transient
from sidecar_daemon.domain.retry import Blame, blame

if TYPE_CHECKING:
    from collections.abc import Iterator

DRIVER_ERRORS = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError)
"""Everything that asyncpg raises for its own part; ``TimeoutError`` is an ``OSError``."""

STALE_CONNECTIONS = frozenset(
    {"connection_lost", "admin_shutdown", "crash_shutdown", "starting_up", "timeout", "read_only", "stale_catalog"}
)
"""Codes after which every open connection is suspect: the server went away, was demoted, or made its types anew."""

_CODES = {
    "0A000": "stale_catalog",
    "25006": "read_only",
    "25P03": "idle_timeout",
    "25P04": "transaction_timeout",
    "26000": "pooler",
    "28P01": "wrong_password",
    "28000": "login_refused",
    "3D000": "unknown_database",
    "3F000": "schema_missing",
    "40001": "serialization",
    "40P01": "deadlock",
    "42501": "permission_denied",
    "42703": "schema_missing",
    "42704": "schema_missing",
    "42883": "schema_missing",
    "42P01": "schema_missing",
    "42P05": "pooler",
    "53100": "disk_full",
    "53200": "out_of_memory",
    "53300": "too_many_connections",
    "55000": "not_ready",
    "55006": "object_in_use",
    "55P03": "lock_timeout",
    "57014": "statement_timeout",
    "57P01": "admin_shutdown",
    "57P02": "crash_shutdown",
    "57P03": "starting_up",
    "57P04": "unknown_database",
    "XX001": "data_corrupted",
    "XX002": "index_corrupted",
}
_CODES_BY_CLASS = {
    "08": "connection_lost",
    "40": "serialization",
    "53": "out_of_resources",
    "55": "object_in_use",
    "57": "admin_shutdown",
    "58": "server_io",
}
_REFUSALS = {"SC001": "model_mismatch", "SC002": "unknown_pipeline", "SC003": "paused"}
_OWN_STATE = re.compile(r"SC0\d\d")
_QUOTING_CLASSES = frozenset({"22", "23", "44", "54", "P0", "38", "39"})
_LONGEST_MESSAGE = 300
_CLOSED = re.compile(r"\b(closed|closing|released|terminat|connection (was|is|has been) (lost|closed))", re.IGNORECASE)
_DIMENSIONS = re.compile(r"expected \d+ dimensions, not \d+")
_ARGUMENT = re.compile(r"query argument (\$\d+)")


def one_line(text: str) -> str:
    """Make a text safe for one log line: control characters become spaces, the length is capped."""
    words = "".join(character if character.isprintable() else " " for character in text).split()
    line = " ".join(words)
    return line if len(line) <= _LONGEST_MESSAGE else line[: _LONGEST_MESSAGE - 1] + "…"


@contextmanager
def translated(place: str = "", setting: str = "SIDECAR_DATABASE_URL") -> Iterator[None]:
    """Raise what ``translate`` makes of any driver error in the block.

    Args:
        place: the server as ``user@host:port/database``, never with a password.
        setting: where the server's URL comes from.

    Raises:
        SidecarError: instead of the driver's error, whose text may not be shown and is therefore cut off.
    """
    try:
        yield
    except DRIVER_ERRORS as error:
        raise translate(error, place, setting) from None


def translate(error: BaseException, place: str = "", setting: str = "SIDECAR_DATABASE_URL") -> SidecarError:
    """Name a driver error and say whose fault it is.

    Args:
        error: anything of ``DRIVER_ERRORS``; an error that is already translated comes back as it is.
        place: the server as ``user@host:port/database``, never with a password.
        setting: where the server's URL comes from.
    """
    if isinstance(error, SidecarError):
        return error
    if isinstance(error, asyncpg.DataError) and error.severity is None:  # never reached the server
        found = _ARGUMENT.search(str(error))
        return Fatal("bad_argument", f"a value of the wrong type for {found.group(1) if found else 'an argument'}")
    if isinstance(error, asyncpg.PostgresError):
        return _from_server(error, place)
    if isinstance(error, asyncpg.InterfaceError | asyncpg.InternalClientError):
        return _from_driver(error, place, setting)
    if isinstance(error, OSError):
        return _from_system(error, place)
    return Fatal("unexpected", f"unexpected {type(error).__name__} from the database driver")


def _from_server(error: asyncpg.PostgresError, place: str) -> SidecarError:
    state = str(getattr(error, "sqlstate", None) or "XX000")
    said = str(getattr(error, "message", None) or (error.args[0] if error.args else ""))
    if _OWN_STATE.fullmatch(state):
        return Refused(_REFUSALS[state], one_line(said)) if state in _REFUSALS else Fatal("rejected", one_line(said))
    if (code := _known_by_its_words(state, said)) is not None:
        return Transient(code, one_line(said))
    culprit = blame(state)
    if culprit is Blame.MESSAGE:
        return Poison(_condition(error), _without_text(error, state))
    code = _CODES.get(state) or _CODES_BY_CLASS.get(state[:2]) or _condition(error)
    if code == "pooler":
        hint = "is a transaction pooler in between? then set SIDECAR_POOLER=transaction"
        return Fatal("pooler", f"the server lost a prepared statement{_at(place)}: {hint}")
    shown = _without_text(error, state) if state[:2] in _QUOTING_CLASSES else one_line(said)
    if culprit is Blame.WORLD:
        where = _at(place) if state[:2] in {"08", "28", "3D", "53", "57"} else ""
        return Transient(code, f"{shown}{where}")
    return Fatal(code, f"{shown} (SQLSTATE {state})")


def _known_by_its_words(state: str, said: str) -> str | None:
    """The code of the world's faults that share their state with somebody else's."""
    if state == "XX000" and "cache lookup failed" in said:
        return "stale_catalog"
    if state == "22000" and _DIMENSIONS.fullmatch(said):  # those of the table of vectors: no text's doing
        return "wrong_dimensions"
    return None


def _from_driver(error: asyncpg.InterfaceError | asyncpg.InternalClientError, place: str, setting: str) -> SidecarError:
    if isinstance(error, asyncpg.TargetServerAttributeNotMatched):
        return Transient("read_only", f"no server of the wanted kind (target_session_attrs){_at(place)}")
    if isinstance(error, asyncpg.ClientConfigurationError):
        return Fatal("bad_database_url", f"{setting} is not a URL that the driver understands")
    if isinstance(error, asyncpg.OutdatedSchemaCacheError):
        return Transient("stale_catalog", "a type of the database changed under an open connection")
    if _CLOSED.search(str(error)) or isinstance(error, asyncpg.InternalClientError):
        return Transient("connection_lost", f"the connection to the database is closed{_at(place)}")
    return Fatal("driver_misuse", one_line(str(error)))


def _from_system(error: OSError, place: str) -> Transient:
    if isinstance(error, TimeoutError):
        return Transient("timeout", f"the database did not answer in time{_at(place)}")
    return Transient("connection_lost", f"cannot reach the database{_at(place)}: {_reason(error)}")


def _condition(error: asyncpg.PostgresError) -> str:
    name = type(error).__name__.removesuffix("Error")
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def _without_text(error: asyncpg.PostgresError, state: str) -> str:
    parts = [f"{_condition(error).replace('_', ' ')} (SQLSTATE {state})"]
    for kind in ("constraint", "column", "table"):
        name = getattr(error, f"{kind}_name", None)
        if name:
            parts.append(f"{kind} {one_line(str(name))}")
    return ", ".join(parts)


def _reason(error: OSError) -> str:
    if isinstance(error, socket.gaierror):
        return "the host name is unknown"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, FileNotFoundError):
        return "no server listens on that socket"
    return one_line(error.strerror or type(error).__name__)


def _at(place: str) -> str:
    return f" at {place}" if place else ""
