"""The log as an operator reads it during a fault: two minutes fit on one screen of 80 columns, with cause and remedy.

The transcripts stand in ``transcripts/``, with times, numbers and ids masked. Lines that a race may leave out begin
with ``? `` there. All faults last their two minutes at the same time, each with a daemon of its own.
"""

from __future__ import annotations

import asyncio
import re
import subprocess
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from sidecar_daemon.adapters.onnx.fetch import pull
from sidecar_daemon.adapters.onnx.manifest import find_manifest, load_manifests
from sidecar_daemon.adapters.postgres.embedded import EmbeddedServer
from tests.conftest import FAST, ROOT, admin, migrate_at, short_folder
from tests.daemon import Daemon, free_port
from tests.disk import fill

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

pytestmark = pytest.mark.long

SECONDS = 120.0
NOTES = 20
ROWS, COLUMNS = 24, 80
"""Of a terminal, which breaks a long line."""
TRANSCRIPTS = Path(__file__).with_name("transcripts")
TABLE = f"""CREATE TABLE notes (id bigint PRIMARY KEY, body text);
INSERT INTO notes SELECT n, 'number ' || n FROM generate_series(1, {NOTES}) AS n;
SELECT sidecar.attach('notes', '{{body}}', p_model => 'tiny', p_dimensions => 32)"""
PASSWORD = "s3cret-of-the-test"  # noqa: S105  a test's own
SETTINGS = {
    "LOG_FORMAT": "console",
    "MAX_ATTEMPTS": "3",
    "SWEEP_INTERVAL": "10",
    "THREADS": "1",
    "RUNTIME": "onnxruntime",  # what auto says depends on the processor
}
_MASKS = (
    (r"^\S+Z ", "<time> "),
    (r"\b(postgres|guarded)@[^\s']*/(\w+)", r"\1@<place>/\2"),
    (
        r"\b(retry_in_seconds|away_seconds|failed_tries|failures|pid|settle_ms|freshness_max_ms|sweep_ms)=[\d.]+",
        r"\1=<n>",
    ),
    (r"\b(documents|embedded|pending|scanned|missing|enqueued)=\d+", r"\1=<n>"),
    (r"codes=\[[^]]*\]", "codes=<codes>"),
    (r"http=\S+", "http=<url>"),
    (r"version=\S+", "version=<version>"),
    (r'"pg_tblspc/[^"]+"', "<file>"),
    (r"/\S+/models", "<models>"),
    (r" +", " "),
)


def masked(line: str) -> str:
    """A log line without what differs from run to run."""
    for pattern, mask in _MASKS:
        line = re.sub(pattern, mask, line)
    return line.strip()


def recovered(log: list[str]) -> bool:
    """Whether the log says that something is back."""
    return any(" recovered " in line for line in log)


def embedded(log: list[str]) -> int:
    """How many documents the log says to have embedded."""
    return sum(int(count) for line in log for count in re.findall(r" embedded=(\d+)", line))


@dataclass
class Scene:
    """One fault: what breaks, what is mended, and what the log said meanwhile."""

    server: EmbeddedServer
    models: Path
    name: str
    url: str
    during: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)

    def admin(self, *statements: str) -> None:
        """Run statements as the owner of the database, from a thread."""
        admin(self.server.dsn(self.name), *statements)

    @asynccontextmanager
    async def working(self) -> AsyncIterator[Daemon]:
        """A daemon that has embedded everything and rests."""
        async with Daemon(self.url, self.models, SETTINGS) as daemon:
            await daemon.wait_for(lambda: embedded(daemon.log) == NOTES, what="every note's vector")
            yield daemon

    async def watch(
        self,
        daemon: Daemon,
        first: int,
        mend: Callable[[], Awaitable[None]] | None = None,
        mended: Callable[[list[str]], bool] = recovered,
    ) -> None:
        """Let two minutes pass, read from line ``first`` on; then mend, and wait until everything has recovered."""
        await asyncio.sleep(SECONDS)
        self.during = daemon.log[first:]
        if mend is not None:
            first = len(daemon.log)
            await mend()
            await daemon.wait_for(daemon.is_ready, timeout=60, what="readiness")
            await daemon.wait_for(lambda: mended(daemon.log[first:]), what="recovery")
            self.after = daemon.log[first:]


async def database_down(scene: Scene) -> None:
    """The server is gone; the application and the daemon find out at the same time."""
    async with scene.working() as daemon:
        first = len(daemon.log)
        await asyncio.to_thread(scene.server.stop, "immediate")
        await scene.watch(daemon, first, lambda: asyncio.to_thread(scene.server.start))


async def database_down_under_three(scene: Scene) -> None:
    """The server is gone under three pipelines that all have work."""
    for name in ("essays", "letters"):
        await asyncio.to_thread(scene.admin, *TABLE.replace("notes", name).split(";"))
    async with Daemon(scene.url, scene.models, SETTINGS) as daemon:
        await daemon.wait_for(lambda: embedded(daemon.log) == 3 * NOTES, what="every vector")
        first = len(daemon.log)
        await asyncio.to_thread(scene.server.stop, "immediate")
        await scene.watch(daemon, first, lambda: asyncio.to_thread(scene.server.start))


async def wrong_password(scene: Scene) -> None:
    """The daemon is started with a password that the server does not take."""
    url = scene.server.dsn(scene.name, "guarded", password=PASSWORD).replace(PASSWORD, "mistyped")
    daemon = Daemon(url, scene.models, SETTINGS)
    try:
        await daemon.start(ready=False)
        await scene.watch(daemon, 0)
    finally:
        await daemon.stop()
    assert not any("mistyped" in line for line in daemon.log)


async def disk_full(scene: Scene) -> None:
    """The disk under the table of vectors is full when an edit comes."""
    disk = scene.server.data_dir.parent / "disk"
    ballast = disk / "ballast"
    async with scene.working() as daemon:
        place = disk / "space"
        await asyncio.to_thread(place.mkdir)
        subprocess.run(["chown", "-R", f"--reference={scene.server.data_dir}", str(disk)], check=True)  # noqa: ASYNC221  takes milliseconds
        await asyncio.to_thread(scene.admin, f"CREATE TABLESPACE small LOCATION '{place}'")
        await asyncio.to_thread(scene.admin, "ALTER TABLE notes_embeddings SET TABLESPACE small")
        await asyncio.to_thread(fill, ballast)
        first = len(daemon.log)
        await asyncio.to_thread(
            scene.admin, "INSERT INTO notes SELECT n, 'more ' || n FROM generate_series(50, 400) AS n"
        )
        await scene.watch(daemon, first, lambda: asyncio.to_thread(ballast.unlink))
    await asyncio.to_thread(scene.admin, "ALTER TABLE notes_embeddings SET TABLESPACE pg_default")
    await asyncio.to_thread(scene.admin, "DROP TABLESPACE small")


async def poison_document(scene: Scene) -> None:
    """One document that the table refuses, and one that is too large."""
    async with scene.working() as daemon:
        refuse = "ALTER TABLE notes_embeddings ADD CONSTRAINT short CHECK (length(source_text) < 1000)"
        await asyncio.to_thread(scene.admin, refuse)
        poison = "INSERT INTO notes VALUES (100, repeat('x ', 1000)), (101, repeat('y', 2000000))"
        first = len(daemon.log)
        await asyncio.to_thread(scene.admin, poison)
        await scene.watch(daemon, first)


async def model_missing(scene: Scene) -> None:
    """A daemon starts that has no model; then somebody pulls it."""
    models = scene.models.parent / "empty" / "models"
    models.mkdir(parents=True)
    daemon = Daemon(scene.url, models, SETTINGS)
    try:
        await daemon.start(ready=False)
        await scene.watch(daemon, 0, lambda: asyncio.to_thread(pull_tiny, models), lambda log: embedded(log) == NOTES)
    finally:
        await daemon.stop()


async def model_missing_later(scene: Scene) -> None:
    """A pipeline is attached whose model nobody has pulled, beside one that works."""
    async with scene.working() as daemon:
        attach = (
            "SELECT sidecar.attach('notes', '{body}', p_name => 'other', p_model => 'gte-small', p_dimensions => 384)"
        )
        first = len(daemon.log)
        await asyncio.to_thread(scene.admin, attach)
        await scene.watch(daemon, first)


FAULTS = {
    function.__name__: function
    for function in (
        *(database_down, database_down_under_three, wrong_password, disk_full),
        *(poison_document, model_missing, model_missing_later),
    )
}


OUTAGES = {"database_down", "database_down_under_three", "wrong_password", "disk_full"}
"""Faults of the world, which the log calls a fault."""
SHARED = {"database_down", "database_down_under_three"}
"""Faults that several scopes meet: whichever is the first tells."""


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model ``tiny``."""
    folder = tmp_path_factory.mktemp("reading") / "models"
    folder.mkdir()
    pull_tiny(folder)
    return folder


def pull_tiny(folder: Path) -> None:
    """What ``models pull tiny`` does."""
    pull(find_manifest(load_manifests(ROOT / "models"), "tiny"), folder, progress=lambda _: None)


async def _scene(name: str, server: EmbeddedServer, models: Path) -> Scene:
    await asyncio.to_thread(admin, server.dsn(), f"CREATE DATABASE {name}")
    await migrate_at(server.dsn(name))
    scene = Scene(server, models, name, server.dsn(name))
    await asyncio.to_thread(scene.admin, *TABLE.split(";"))
    return scene


@asynccontextmanager
async def _servers() -> AsyncIterator[tuple[EmbeddedServer, EmbeddedServer, EmbeddedServer]]:
    """Two servers to stop, and one with passwords and a small disk."""
    async with AsyncExitStack() as stack:
        folders = [stack.enter_context(short_folder()) for _ in range(3)]
        disk = folders[1] / "disk"
        disk.mkdir()
        mounting = ["mount", "-t", "tmpfs", "-o", "size=24m", "reading", str(disk)]
        done = subprocess.run(mounting, check=False, capture_output=True)  # noqa: ASYNC221  takes milliseconds
        assert done.returncode == 0, "this test fills a disk and therefore mounts a tmpfs: run it as root"
        stack.callback(lambda: subprocess.run(["umount", "--lazy", str(disk)], check=True))
        doomed = EmbeddedServer(folders[0] / "pg", settings=FAST)
        steady = EmbeddedServer(folders[1] / "pg", settings=FAST, tcp_port=free_port())
        another = EmbeddedServer(folders[2] / "pg", settings=FAST)
        for server in (doomed, another, steady):
            await asyncio.to_thread(server.start)
            stack.push_async_callback(asyncio.to_thread, server.stop, "immediate")
        (steady.data_dir / "pg_hba.conf").write_text("local all all trust\nhost all all 127.0.0.1/32 scram-sha-256\n")
        password = f"CREATE ROLE guarded LOGIN PASSWORD '{PASSWORD}'"
        await asyncio.to_thread(admin, steady.dsn(), "SELECT pg_reload_conf()", password)
        yield doomed, another, steady


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def scenes(models_dir: Path) -> dict[str, Scene]:
    """Every fault, played."""
    async with _servers() as (doomed, another, steady):
        servers = {"database_down": doomed, "database_down_under_three": another}
        found = {name: await _scene(name, servers.get(name, steady), models_dir) for name in FAULTS}
        await asyncio.gather(*[FAULTS[name](scene) for name, scene in found.items()])
    return found


@pytest.mark.parametrize("fault", FAULTS)
async def test_two_minutes_of_a_fault_fit_on_a_screen_and_say_what_to_do(scenes: dict[str, Scene], fault: str) -> None:
    scene = scenes[fault]
    assert 1 <= sum(-(-len(line) // COLUMNS) for line in scene.during) <= ROWS, "\n".join(scene.during)
    said = [masked(line) for line in scene.during]
    said += ["--- then", *(masked(line) for line in scene.after)] if scene.after else []
    faults = [line for line in said if " fault " in line]
    assert len(faults) == len(set(faults)), "a cause is told once in its scope"
    causes = [re.sub(r" scope=\w+", "", masked(line)) for line in scene.during if " fault " in line]
    assert len(causes) == len(set(causes)), "a cause is told once, whichever scopes meet it"
    if fault in OUTAGES:
        assert any("cause=" in line and "remedy=" in line for line in faults), "the cause and its remedy are not told"
    if fault in SHARED:
        said = [re.sub(r"\bscope=\w+", "scope=<scope>", line) for line in said]
    golden = (TRANSCRIPTS / f"{fault}.log").read_text(encoding="utf-8").splitlines()
    required = {line for line in golden if not line.startswith("? ")}
    allowed = required | {line.removeprefix("? ") for line in golden}
    transcript = "\n".join(dict.fromkeys(said))
    assert required <= set(said), f"a line is missing:\n{transcript}"
    assert set(said) <= allowed, f"a line is new:\n{transcript}"
