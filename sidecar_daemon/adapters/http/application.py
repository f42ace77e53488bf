"""What each endpoint answers. It knows nothing of the daemon but the callables it is given."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fastapi import FastAPI, Response
from fastapi.responses import HTMLResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, Field
from starlette.datastructures import MutableHeaders

from sidecar_daemon.adapters.http.overview import Overview, QueueStatus
from sidecar_daemon.adapters.http.page import load_page
from sidecar_daemon.domain.errors import SidecarError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send


@dataclass(frozen=True, slots=True)
class HttpState:
    """What the endpoints ask. The plain callables answer at once, from memory; only ``status`` may ask Postgres."""

    alive: Callable[[], tuple[bool, str]]
    """Whether the event loop and the worker's tasks move, and a line that says so. Never asks the database."""
    ready: Callable[[], tuple[bool, list[str]]]
    """Whether work is being done, and if not, why: one clear line a reason."""
    metrics: Callable[[], bytes]
    """The registry in Prometheus' text format."""
    status: Callable[[], Awaitable[dict[str, Any]]]
    """The pipelines, in the shape of ``sidecar-daemon status --json``. Raises ``SidecarError``."""
    overview: Callable[[], Awaitable[Overview]]
    """Everything that the page shows, from memory."""
    version: str = "unknown"
    status_seconds: float = 5.0
    """How long ``status`` may count before the answer is where to look instead."""


class Index(BaseModel):
    """Where to look."""

    name: Literal["sidecar-daemon"] = "sidecar-daemon"
    version: str
    endpoints: dict[str, str]


class Liveness(BaseModel):
    """Whether the process should be left alone."""

    alive: bool
    detail: str


class Ready(BaseModel):
    """It works."""

    ready: Literal[True] = True


class NotReady(BaseModel):
    """It does not work now, and why."""

    ready: Literal[False] = False
    reasons: list[str] = Field(min_length=1)


class PipelineStatus(BaseModel):
    """How far one pipeline is."""

    name: str
    source: str
    embeddings: str
    model: str
    enabled: bool
    queue: QueueStatus
    documents: int
    embedded: int
    stale: int
    missing: int
    coverage: float | None
    index: str


class Status(BaseModel):
    """Every pipeline."""

    pipelines: list[PipelineStatus]


class Unavailable(BaseModel):
    """Why there is no answer."""

    code: str
    reason: str


_INSTEAD = "GET /overview has the queues and the coverage from memory, sidecar-daemon status waits for the count"
_ENDPOINTS = {
    "/": "the status page, for people",
    "/overview": "what the status page shows, from memory",
    "/livez": "200 while the process moves; does not depend on the database",
    "/readyz": "200 while documents can be embedded, else 503 with the reasons",
    "/metrics": "Prometheus' text format",
    "/status": "every pipeline: queue, documents, coverage, counted now; 503 where that takes long",
    "/endpoints": "this list",
    "/openapi.json": "the same for machines",
}


def build_app(state: HttpState) -> FastAPI:
    """Build the application that answers from ``state``."""
    app = FastAPI(title="sidecar-daemon", version=state.version, docs_url=None, redoc_url=None)
    app.add_middleware(_Plain)
    page = load_page()

    @app.get("/", summary="The status page", response_class=HTMLResponse)
    async def index() -> HTMLResponse:
        return HTMLResponse(page.html, headers=page.headers)

    @app.get("/overview", summary="What the status page shows", response_model=Overview)
    async def overview() -> Response:
        return Response((await state.overview()).model_dump_json(), media_type="application/json")

    @app.get("/endpoints", summary="Where to look")
    async def endpoints() -> Index:
        return Index(version=state.version, endpoints=_ENDPOINTS)

    @app.get("/livez", summary="Liveness", response_model=Liveness, responses={503: {"model": Liveness}})
    async def livez() -> JSONResponse:
        alive, detail = state.alive()
        return _answer(200 if alive else 503, Liveness(alive=alive, detail=detail))

    @app.get("/readyz", summary="Readiness", response_model=Ready, responses={503: {"model": NotReady}})
    async def readyz() -> JSONResponse:
        ready, reasons = state.ready()
        return _answer(200, Ready()) if ready else _answer(503, NotReady(reasons=reasons or ["not ready yet"]))

    @app.get("/metrics", summary="Metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        return Response(state.metrics(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/status", summary="Pipelines", response_model=Status, responses={503: {"model": Unavailable}})
    async def status() -> Response:
        try:
            async with asyncio.timeout(state.status_seconds):
                return JSONResponse(await state.status())
        except SidecarError as error:
            return _answer(503, Unavailable(code=error.code, reason=str(error)))
        except TimeoutError:
            reason = f"counting every source took longer than {state.status_seconds:g} seconds: {_INSTEAD}"
            return _answer(503, Unavailable(code="timeout", reason=reason))

    return app


def _answer(code: int, body: BaseModel) -> JSONResponse:
    return JSONResponse(body.model_dump(), status_code=code)


class _Plain:
    """Says that no answer may be stored or taken for another type; answers HEAD, which probes send, like GET."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_unstored(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Cache-Control"] = "no-store"
                headers["X-Content-Type-Options"] = "nosniff"
            await send(message)

        if scope.get("method") == "HEAD":  # the server leaves the body away: its own scope still says HEAD
            scope = {**scope, "method": "GET"}
        await self._app(scope, receive, send_unstored)
