"""Asks running daemons how they are: ``GET /overview``, as a client that tolerates what newer releases add."""

from __future__ import annotations

import asyncio
import socket
from contextlib import closing
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, ValidationError

from sidecar_daemon.domain.errors import Fatal, Transient

_MOST_BYTES = 32 * 1024 * 1024


class _Read(BaseModel):
    """Unknown fields are passed over; what may be missing has a default."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class LaneView(_Read):
    """How full one lane is."""

    depth: int = 0
    in_flight: int = 0
    oldest_seconds: float | None = None


class QueueView(_Read):
    """How full a pipeline's queues are."""

    live: LaneView = LaneView()
    bulk: LaneView = LaneView()
    dead: int = 0


class SweepView(_Read):
    """Where the walk over the source stands."""

    walking: bool = False
    scanned: int = 0
    age_seconds: float | None = None
    """Since the last finished walk."""


class FreshnessView(_Read):
    """From enqueue to committed vector, in seconds, over the last 15 minutes."""

    p50: float | None = None
    p99: float | None = None
    count: int = 0


class DeadLetterView(_Read):
    """One of the newest dead letters."""

    key: str | None = None
    reason: str | None = None
    age_seconds: float = 0.0
    attempts: int | None = None


class PipelineView(_Read):
    """How one pipeline is."""

    name: str
    source: str = ""
    model: str = ""
    state: str = "unknown"
    """``working``, ``paused``, ``refused``, ``waiting``; ``unknown`` where no daemon says it."""
    reason: str | None = None
    circuit: str = "closed"
    queue: QueueView = QueueView()
    documents: int | None = None
    coverage: float | None = None
    sweep: SweepView = SweepView()
    rate: float | None = None
    """Documents embedded per second, over the last minute."""
    freshness: FreshnessView = FreshnessView()
    outcomes: dict[str, int] = {}
    dead_letters: tuple[DeadLetterView, ...] = ()


class SeriesView(_Read):
    """One number a step, oldest first; None where nothing is known."""

    embedded: tuple[float | None, ...] = ()
    depth: tuple[float | None, ...] = ()


class HistoryView(_Read):
    """The last 15 minutes by pipeline."""

    step_seconds: float = 5.0
    series: dict[str, SeriesView] = {}


class Overview(_Read):
    """How one daemon is, or several together."""

    version: str = ""
    uptime_seconds: float | None = None
    ready: bool
    reasons: tuple[str, ...] = ()
    database: str = ""
    observed_seconds_ago: float | None = None
    pipelines: tuple[PipelineView, ...] = ()
    history: HistoryView = HistoryView()


def checked_url(url: str) -> str:
    """A daemon's base URL without a trailing slash. Raises ``Fatal`` (``usage``) when it is none."""
    try:
        parts = urlsplit(url)
        valid = parts.scheme in {"http", "https"} and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        valid = False
    if not valid or parts.query or parts.fragment or "@" in parts.netloc:
        shown = url.rpartition("@")[2]
        raise Fatal("usage", f"--url is {shown!r}: must be a daemon's URL like http://127.0.0.1:8088")
    return url.rstrip("/")


async def overview_of(url: str, *, seconds: float) -> Overview:
    """Ask one daemon, past any proxy.

    Args:
        url: its base URL; see ``checked_url``.
        seconds: how long it may take.

    Raises:
        Transient: it does not answer, or what answers is no daemon; the message does not repeat the URL.
    """
    try:
        async with asyncio.timeout(seconds):
            status, body = await asyncio.to_thread(_get, url, seconds)
    except TimeoutError:
        raise Transient("timeout", f"no answer within {seconds:g} s") from None
    except socket.gaierror:
        raise Transient("unreachable", "the host name is unknown") from None
    except ConnectionRefusedError:
        raise Transient("unreachable", "connection refused") from None
    except (OSError, HTTPException):
        raise Transient("unreachable", "the connection broke") from None
    if status != HTTPStatus.OK:
        raise Transient("no_overview", f"HTTP {status} for /overview: no daemon of this release")
    try:
        return Overview.model_validate_json(body)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors(include_input=False, include_url=False)[0]["loc"])
        raise Transient("no_overview", f"its /overview cannot be read{f' ({where})' if where else ''}") from None


def _get(url: str, seconds: float) -> tuple[int, bytes]:
    parts = urlsplit(url)
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    with closing(kind(str(parts.hostname), parts.port, timeout=seconds)) as connection:
        connection.request("GET", f"{parts.path}/overview", headers={"Accept": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read(_MOST_BYTES)
