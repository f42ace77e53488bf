"""A small real HTTP server that answers ``/overview`` in the shape that a daemon answers it."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


def lane(depth: int = 0, in_flight: int = 0, oldest: float = 0.0) -> dict[str, Any]:
    """How full one lane is."""
    return {"depth": depth, "in_flight": in_flight, "oldest_seconds": oldest}


def pipeline(name: str = "articles", **known: Any) -> dict[str, Any]:
    """One pipeline that works, and whatever else is said of it."""
    return {
        "name": name,
        "source": f"public.{name}",
        "model": "tiny@000000000000",
        "state": "working",
        "reason": None,
        "circuit": "closed",
        "queue": {"live": lane(12, 4, 3.2), "bulk": lane(1204, 16, 61.0), "dead": 2},
        "documents": 5123,
        "coverage": 0.98765,
        "sweep": {"walking": False, "scanned": 5123, "age_seconds": 130.0},
        "rate": 69.4,
        "freshness": {"p50": 0.027, "p99": 1.2, "count": 300},
        "outcomes": {"embedded": 4000, "dead_lettered": 2},
        "dead_letters": [
            {"key": "42", "reason": "too_large", "age_seconds": 200.0, "attempts": 1},
            {"key": "7", "reason": "bad_vector", "age_seconds": 9000.0, "attempts": 5},
        ],
        "of_a_newer_release": {"unknown": True},
        **known,
    }


def overview(*pipelines: dict[str, Any], **known: Any) -> dict[str, Any]:
    """One daemon that is ready, with these pipelines, and whatever else is said of it."""
    shown = pipelines or (pipeline(),)
    return {
        "version": "0.1.0",
        "uptime_seconds": 11_000.0,
        "ready": True,
        "reasons": [],
        "database": "embedder@db:5432/shop",
        "observed_seconds_ago": 1.5,
        "pipelines": list(shown),
        "history": {
            "step_seconds": 5,
            "series": {
                each["name"]: {
                    "embedded": [n % 30 for n in range(90)],
                    "depth": [5] * 90,
                    "freshness_p50": [0.02] * 90,
                    "freshness_p99": [None] * 90,
                }
                for each in shown
            },
        },
        **known,
    }


@dataclass
class OverviewServer:
    """What is answered; change it while it runs."""

    body: Any = field(default_factory=overview)
    """A string is sent as it is."""
    status: int = 200
    asked: int = 0
    stalled: bool = False
    """Takes the question and never answers."""
    url: str = ""
    _end: Event = field(default_factory=Event)

    @contextmanager
    def running(self) -> Iterator[OverviewServer]:
        """Serve on a free port until the end of the block."""
        ours = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                ours.asked += 1
                if ours.stalled:
                    ours._end.wait(30)
                    return
                found = self.path == "/overview"
                body = (ours.body if isinstance(ours.body, str) else json.dumps(ours.body)).encode()
                self.send_response(ours.status if found else 404)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            self.url = f"http://127.0.0.1:{server.server_address[1]}"
            thread = Thread(target=lambda: server.serve_forever(poll_interval=0.02))
            thread.start()
            try:
                yield self
            finally:
                self._end.set()
                server.shutdown()
                thread.join()
