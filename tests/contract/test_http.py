"""The endpoints over a real socket, held against the OpenAPI description that they serve."""

from __future__ import annotations

import asyncio
import signal
import socket
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from sidecar_daemon.adapters.http import HttpState, build_app, serve
from sidecar_daemon.adapters.http.overview import Overview
from sidecar_daemon.domain.errors import Fatal, Transient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

LANE = {"depth": 3, "in_flight": 1, "oldest_seconds": 2.5}
STATUS = {
    "pipelines": [
        {
            "name": "docs",
            "source": "public.source_documents",
            "embeddings": "public.document_embeddings",
            "model": "tiny",
            "enabled": True,
            "queue": {"live": LANE, "bulk": {**LANE, "oldest_seconds": None}, "dead": 0},
            "documents": 10,
            "embedded": 7,
            "stale": 1,
            "missing": 2,
            "coverage": 0.7,
            "index": "live",
        }
    ]
}
OVERVIEW = {
    "version": "1.2.3",
    "uptime_seconds": 61.5,
    "ready": False,
    "reasons": ["the database is away"],
    "database": "app@db:5432/shop",
    "observed_seconds_ago": 2.5,
    "pipelines": [
        {
            "name": "docs",
            "source": "public.source_documents",
            "model": "tiny@1",
            "state": "waiting",
            "reason": "the database is away",
            "circuit": "half_open",
            "queue": {"live": LANE, "bulk": {**LANE, "oldest_seconds": None}, "dead": 1},
            "documents": None,
            "coverage": None,
            "sweep": {"walking": True, "scanned": 5, "age_seconds": None},
            "rate": 0.5,
            "freshness": {"p50": 0.02, "p99": None, "count": 1},
            "outcomes": {"embedded": 3},
            "dead_letters": [{"key": None, "reason": "malformed", "age_seconds": 3.5, "attempts": None}],
        }
    ],
    "history": {
        "step_seconds": 5,
        "series": {
            "docs": {
                "embedded": [3, 0],
                "depth": [None, 4],
                "freshness_p50": [0.02, None],
                "freshness_p99": [0.03, None],
            }
        },
    },
}
"""Every field, in the shape that the page and ``top`` read."""


@dataclass
class Daemon:
    """What the daemon would say, changed by the tests."""

    alive: tuple[bool, str] = (True, "the event loop answers")
    ready: tuple[bool, list[str]] = (True, [])
    error: Transient | None = None
    answers: asyncio.Event = field(default_factory=asyncio.Event)
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    async def status(self) -> dict[str, Any]:
        await self.answers.wait()
        if self.error:
            raise self.error
        return STATUS

    def __post_init__(self) -> None:
        self.answers.set()

    async def overview(self) -> Overview:
        return Overview.model_validate(OVERVIEW)

    def state(self) -> HttpState:
        return HttpState(
            alive=lambda: self.alive,
            ready=lambda: self.ready,
            metrics=lambda: generate_latest(self.registry),
            status=self.status,
            overview=self.overview,
            version="1.2.3",
        )


@asynccontextmanager
async def served(state: HttpState) -> AsyncIterator[httpx.AsyncClient]:
    stop, bound = asyncio.Event(), asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(serve(build_app(state), "127.0.0.1", 0, stop, bound.set_result))
    try:
        port = await asyncio.wait_for(bound, 10)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:
            yield client
    finally:
        stop.set()
        await asyncio.wait_for(serving, 10)


def assert_described(description: dict[str, Any], path: str, response: httpx.Response) -> None:
    """The status code is described, and the body has the described shape: nothing missing, nothing more."""
    answers = description["paths"][path]["get"]["responses"]
    content = answers[str(response.status_code)]["content"]
    media = response.headers["content-type"].partition(";")[0]
    assert media in content
    if media == "application/json":
        assert_shape(description, content[media]["schema"], response.json(), path)


def assert_shape(description: dict[str, Any], schema: dict[str, Any], value: Any, where: str) -> None:
    if "$ref" in schema:
        schema = description["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    if "anyOf" in schema:
        kinds = [option for option in schema["anyOf"] if fits(option["type"], value)]
        assert kinds, f"{where} is {value!r}"
        return
    assert fits(schema["type"], value), f"{where} is {value!r}"
    assert schema.get("const", value) == value
    assert value in schema.get("enum", [value]), f"{where} is {value!r}"
    if schema["type"] == "array":
        assert len(value) >= schema.get("minItems", 0)
        for item in value:
            assert_shape(description, schema["items"], item, f"{where}[]")
    if schema["type"] == "object" and "properties" in schema:
        assert set(schema.get("required", [])) <= set(value) <= set(schema["properties"]), where
        for key, item in value.items():
            assert_shape(description, schema["properties"][key], item, f"{where}.{key}")
    elif schema["type"] == "object" and isinstance(schema.get("additionalProperties"), dict):
        for key, item in value.items():
            assert_shape(description, schema["additionalProperties"], item, f"{where}.{key}")


def fits(kind: str, value: Any) -> bool:
    python = {
        "string": str,
        "integer": int,
        "number": (int, float),
        "boolean": bool,
        "object": dict,
        "array": list,
        "null": type(None),
    }[kind]
    return isinstance(value, python) and (kind == "boolean" or not isinstance(value, bool))  # type: ignore[arg-type]  # a tuple of types is fine


async def test_every_described_endpoint_answers_as_described() -> None:
    daemon = Daemon()
    async with served(daemon.state()) as client:
        description = (await client.get("/openapi.json")).json()
        assert set(description["paths"]) == {"/", "/overview", "/endpoints", "/livez", "/readyz", "/metrics", "/status"}
        listed = (await client.get("/endpoints")).json()["endpoints"]
        assert set(listed) == {*description["paths"], "/openapi.json"}
        for path in description["paths"]:
            response = await client.get(path)
            assert response.status_code == 200, path
            assert response.headers["cache-control"] == "no-store"
            assert response.headers["x-content-type-options"] == "nosniff"
            assert "server" not in response.headers
            assert_described(description, path, response)
        daemon.alive, daemon.ready = (False, "the worker has not moved for 60 s"), (False, ["the database is away"])
        daemon.error = Transient("connection_lost", "the server closed the connection")
        for path in ("/livez", "/readyz", "/status"):
            response = await client.get(path)
            assert response.status_code == 503, path
            assert response.headers["cache-control"] == "no-store"
            assert_described(description, path, response)


async def test_the_overview_has_the_shape_that_its_readers_expect() -> None:
    async with served(Daemon().state()) as client:
        assert (await client.get("/overview")).json() == OVERVIEW


async def test_livez_and_readyz_say_why() -> None:
    daemon = Daemon()
    async with served(daemon.state()) as client:
        assert (await client.get("/livez")).json() == {"alive": True, "detail": "the event loop answers"}
        assert (await client.get("/readyz")).json() == {"ready": True}
        daemon.ready = (False, ["the database is away", "the model is loading"])
        assert (await client.get("/readyz")).json() == {"ready": False, "reasons": daemon.ready[1]}
        daemon.ready = (False, [])
        assert (await client.get("/readyz")).json() == {"ready": False, "reasons": ["not ready yet"]}


async def test_status_has_the_shape_of_the_command_and_one_clear_reason_without_a_database() -> None:
    daemon = Daemon()
    async with served(replace(daemon.state(), status_seconds=0.05)) as client:
        assert (await client.get("/status")).json() == STATUS
        daemon.error = Transient("connection_lost", "the server closed the connection")
        assert (await client.get("/status")).json() == {
            "code": "connection_lost",
            "reason": "the server closed the connection",
        }
        daemon.answers.clear()
        response = await client.get("/status")
        assert response.status_code == 503
        assert response.json()["code"] == "timeout"
        reason = response.json()["reason"]
        assert reason.startswith("counting every source took longer than 0.05 seconds: ")
        assert "/overview" in reason
        assert "sidecar-daemon status" in reason


async def test_livez_answers_while_status_waits_for_the_database() -> None:
    daemon = Daemon()
    daemon.answers.clear()
    async with served(replace(daemon.state(), status_seconds=60)) as client:
        waiting = asyncio.create_task(client.get("/status"))
        assert (await client.get("/livez")).status_code == 200
        assert not waiting.done()
        daemon.answers.set()
        assert (await waiting).status_code == 200


async def test_metrics_are_what_prometheus_parses() -> None:
    daemon = Daemon()
    Counter("sidecar_documents", "Documents.", ["pipeline"], registry=daemon.registry).labels("docs").inc(3)
    async with served(daemon.state()) as client:
        response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    assert [s.value for s in families["sidecar_documents"].samples if s.name.endswith("_total")] == [3]


async def test_head_answers_like_get_without_a_body_and_other_paths_do_not_exist() -> None:
    async with served(Daemon().state()) as client:
        head = await client.head("/livez")
        assert (head.status_code, head.content) == (200, b"")
        assert (await client.get("/docs")).status_code == 404
        assert (await client.post("/status")).status_code == 405


async def test_a_taken_port_is_one_clear_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            Fatal, match=rf"^cannot listen on SIDECAR_HTTP_HOST '127.0.0.1', SIDECAR_HTTP_PORT {port}: "
        ):
            await serve(build_app(Daemon().state()), "127.0.0.1", port, asyncio.Event(), lambda _: None)


async def test_serving_leaves_signals_alone_and_gives_the_port_back() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    async with served(Daemon().state()) as client:
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
        assert (await client.get("/livez")).status_code == 200  # leaves a connection open: it must not hold up the end
        port = client.base_url.port
    with socket.socket() as free:
        assert free.connect_ex(("127.0.0.1", port or 0)) != 0


async def test_a_cancelled_server_gives_the_port_back() -> None:
    bound: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(serve(build_app(Daemon().state()), "localhost", 0, asyncio.Event(), bound.set_result))
    port = await asyncio.wait_for(bound, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with socket.socket() as free:
        assert free.connect_ex(("127.0.0.1", port)) != 0
