"""One model folder for all stories; one daemon and one database for those that do not need their own."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import asyncpg
import pytest
import pytest_asyncio

from sidecar_daemon.adapters.onnx.manifest import find_manifest, load_manifests
from sidecar_daemon.adapters.onnx.session import OnnxEmbedder
from tests.conftest import ROOT, RUNTIME_ROLE, admin
from tests.daemon import Daemon
from tests.integration.stories.story import World, know_vectors

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from sidecar_daemon.adapters.postgres.embedded import EmbeddedServer

SETTINGS = {
    "RUNTIME": "onnxruntime",  # as the embedder that every vector is compared with
    "THREADS": "1",
    "SWEEP_INTERVAL": "3600",  # what a trigger or a replay does not bring must not come by itself
    "MAX_DOCUMENT_BYTES": "65536",
    "MAX_ATTEMPTS": "2",
    "BACKOFF_BASE": "0.05",
    "BACKOFF_CAP": "0.1",
    "POLL_MAX": "1",
}


@pytest.fixture(scope="package", autouse=True)
def pooler(request: pytest.FixtureRequest, cluster: EmbeddedServer) -> Iterator[None]:
    """With ``--through-pgbouncer``, a real PgBouncer in transaction mode in front of the session's server."""
    if not request.config.getoption("--through-pgbouncer"):
        yield
        return
    from tests.system.pgbouncer import pgbouncer

    socket = f"host={cluster.dsn().partition('host=')[2].partition('&')[0]}"
    with pgbouncer(cluster.dsn()) as through:
        Daemon.reroute = lambda url: through(url) if socket in url else url
        yield
    Daemon.reroute = None


@pytest.fixture(scope="session")
def embedder(tiny_models: Path) -> OnnxEmbedder:
    """The same model in the test's own process: what every vector is compared with."""
    return OnnxEmbedder.load(find_manifest(load_manifests(ROOT / "models"), "tiny"), tiny_models, threads=1)


@asynccontextmanager
async def opened(url: str, daemon: Daemon, embedder: OnnxEmbedder) -> AsyncIterator[World]:
    """Start a daemon and connect to its database as the application."""
    pool = await asyncpg.create_pool(url, min_size=1, max_size=6, init=know_vectors)
    try:
        async with daemon:
            yield World(daemon, pool, embedder)
    finally:
        await pool.close()


@pytest.fixture(scope="package")
def shared_urls(cluster: EmbeddedServer, template: str) -> Iterator[tuple[str, str]]:
    """URLs of the stories' database: for its owner, and for a daemon with no privilege but sidecar_runtime."""
    admin(cluster.dsn(), f"CREATE DATABASE stories TEMPLATE {template}")
    yield cluster.dsn("stories"), cluster.dsn("stories", RUNTIME_ROLE)
    admin(cluster.dsn(), "DROP DATABASE stories WITH (FORCE)")


@pytest_asyncio.fixture(scope="package", loop_scope="package")
async def world(shared_urls: tuple[str, str], tiny_models: Path, embedder: OnnxEmbedder) -> AsyncIterator[World]:
    """The daemon that most stories share; each has its own table."""
    url, runtime_url = shared_urls
    async with opened(url, Daemon(runtime_url, tiny_models, SETTINGS), embedder) as running:
        yield running
