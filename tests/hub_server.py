"""A local server that speaks the hub's download protocol: HEAD and GET of ``/REPOSITORY/resolve/REVISION/FILE``."""

from __future__ import annotations

import hashlib
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Iterator

PLACE = re.compile(r"/(?P<repository>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


@dataclass(slots=True)
class Hub:
    """What the server serves, what it was asked, and how it misbehaves."""

    repository: str
    revision: str
    files: dict[str, bytes]
    url: str = ""
    ailing: bool = False
    """Answer everything with status 503."""
    cut_after: int = 0
    """Close the connection of the next whole download after this many bytes; 0 for never."""
    requests: list[str] = field(default_factory=list)
    """Method, file and Range of each request, in order."""


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve on a free local port for the length of the block; sets ``hub.url``."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: ClassVar[Hub]
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base class names it so
        """Keep quiet."""

    def _answer(self, *, body: bool) -> None:
        place = PLACE.fullmatch(self.path)
        file = place["file"] if place else self.path
        span = self.headers.get("Range", "")
        self.hub.requests.append(f"{self.command} {file} {span}".strip())
        content = self.hub.files.get(file)
        right = place and (place["repository"], place["revision"]) == (self.hub.repository, self.hub.revision)
        if self.hub.ailing or content is None or not right:
            self._refuse(503 if self.hub.ailing else 404)
            return
        first = int(span.removeprefix("bytes=").rstrip("-")) if span.endswith("-") else 0
        self.send_response(206 if first else 200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.hub.revision)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - first))
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if body:
            self._send(content[first:])

    def _send(self, content: bytes) -> None:
        if 0 < self.hub.cut_after < len(content):
            content, self.hub.cut_after = content[: self.hub.cut_after], 0
            self.close_connection = True
        self.wfile.write(content)
        self.wfile.flush()

    def _refuse(self, status: int) -> None:
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()
