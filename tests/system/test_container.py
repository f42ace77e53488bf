"""The container without an engine: built as the Dockerfile says, run as its user on a root that it cannot write."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import stat
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
import yaml

from sidecar_daemon.adapters.postgres.embedded import EmbeddedServer
from sidecar_daemon.adapters.postgres.prerequisites import pgmq_sql
from tests.conftest import FAST, admin, short_folder
from tests.daemon import free_port
from tests.monitoring import DEPLOY
from tests.system.image import OURS, Image
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.long

PASSWORD = "not-in-any-log"  # noqa: S105  of a throw-away server
PROBE = """
import os, sys
for top in sys.argv[1:]:
    for folder, _, files in os.walk(top):
        try:
            os.close(os.open(f"{folder}/probe", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            os.unlink(f"{folder}/probe")
            print(folder)
        except OSError:
            pass
        for file in files:
            try:
                os.close(os.open(f"{folder}/{file}", os.O_WRONLY | os.O_NOFOLLOW))
                print(f"{folder}/{file}")
            except OSError:
                pass
"""
"""Prints the folders in which a file can be made, and the files that can be opened to write."""


@pytest.fixture(scope="module")
def image() -> Iterator[Image]:
    """The image with model ``tiny`` baked in. Takes minutes: it installs everything from the package index."""
    with short_folder() as folder:
        folder.chmod(0o755)
        built = Image(folder, {"MODEL": "tiny"})
        built.build()
        yield built


@pytest.fixture(scope="module")
def database_url() -> Iterator[str]:
    """A server that listens on TCP, as another container would, and a database with pgmq, as compose's has."""
    with short_folder() as folder, EmbeddedServer(folder / "pg", settings=FAST, tcp_port=free_port()) as server:
        admin(server.dsn(), f"ALTER ROLE postgres PASSWORD '{PASSWORD}'", "CREATE DATABASE app")
        pgmq = pgmq_sql()
        assert pgmq
        admin(server.dsn("app"), pgmq)
        yield server.dsn("app", password=PASSWORD)


@pytest.fixture
def volume() -> Iterator[Path]:
    """A folder that the image's user may write, as a volume is mounted at /models."""
    with short_folder() as folder:
        folder.chmod(0o777)
        yield folder


@pytest.fixture
def sealed(image: Image) -> Iterator[Image]:
    """The image on a root that cannot be written."""
    with image.read_only():
        yield image


@pytest.fixture
def secret(image: Image, database_url: str) -> Iterator[Path]:
    """The database's URL in a file that the image's user may read, as a secret is mounted."""
    with short_folder() as folder:
        folder.chmod(0o755)
        file = folder / "database_url"
        file.write_text(database_url + "\n")
        file.chmod(0o440)
        if os.geteuid() == 0:
            os.chown(file, 0, int(image.final.only("USER").value.partition(":")[2]))
        yield file


def service(name: str) -> dict[str, Any]:
    """One service of the compose file."""
    found: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"][name]
    return found


def test_the_image_holds_the_model_and_nothing_to_build_with(image: Image) -> None:
    assert image.inside("/models/tiny/model.onnx").is_file()
    assert not image.inside("/src").exists()
    listed = image.run(["python", "-m", "pip", "list", "--format=freeze"]).stdout
    assert "sidecar-daemon==" in listed
    done = image.run(["python", "-c", "import sidecar_daemon; print(sidecar_daemon.__file__)"])
    assert done.stdout.startswith(str(image.inside("/opt/sidecar-daemon"))), done.stderr
    verified = image.run(["sidecar-daemon", "models", "verify", "tiny"])
    assert verified.returncode == 0, verified.stderr


def writable(image: Image) -> set[Path]:
    """Where the image's user can write, found by trying everywhere."""
    tops = [image.root / name for name in OURS]
    done = image.run(["python", "-c", PROBE, *map(str, tops)])
    assert done.returncode == 0, done.stderr
    return {Path(line) for line in done.stdout.splitlines()}


def test_its_user_can_write_to_its_models_and_its_home_only(image: Image) -> None:
    models, home = image.inside("/models"), image.inside("/var/lib/sidecar")
    assert image.owned == [models, home]
    others = [path for path in image.paths() if not any(path.is_relative_to(folder) for folder in image.owned)]
    assert len(others) > 1000
    assert [path for path in others if not path.is_symlink() and path.stat().st_mode & stat.S_IWOTH] == []
    if os.geteuid() == 0:  # else whoever runs this test owns all of it, and only the modes can be asked
        assert image.run(["id", "-u"]).stdout.strip() == str(image.user["user"])
        found = writable(image)
        assert {models, home} <= found
        assert sorted(found.intersection(others)) == []


def test_its_user_can_write_nowhere_in_it_when_it_is_read_only(sealed: Image) -> None:
    assert writable(sealed) == set()


async def test_the_setup_of_compose_and_the_daemon_work_on_a_root_that_cannot_be_written(
    sealed: Image, secret: Path, volume: Path, database_url: str
) -> None:
    settings = {
        "SIDECAR_DATABASE_URL_FILE": str(secret),
        "SIDECAR_MODELS_DIR": str(volume),
        "SIDECAR_HTTP_PORT": str(free_port()),
        "SIDECAR_THREADS": "1",
    }
    before = sealed.files()
    words = [word.replace("$$", "$") for word in service("setup")["command"]]
    for _ in range(2):  # compose runs it at every start
        setup = await asyncio.to_thread(sealed.run, words, MODEL="tiny", **settings)
        assert setup.returncode == 0, setup.stderr
    assert (volume / "tiny" / "model.onnx").is_file()
    health = sealed.final.only("HEALTHCHECK").value.partition("CMD ")[2]
    check = [str(word) for word in yaml.safe_load(health)]
    assert sealed.run(check, **settings).returncode != 0, "nothing listens yet"

    command = sealed.final.only("CMD").exec_form
    process = subprocess.Popen(  # type: ignore[call-overload]  # the user's arguments are of three types  # noqa: ASYNC220
        command,
        executable=sealed.inside("/opt/sidecar-daemon/bin") / command[0],
        cwd=sealed.inside(sealed.final.only("WORKDIR").value),
        env=sealed.environment(**settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **sealed.user,
    )
    try:
        await eventually(lambda: alive(process, sealed, check, settings), 60, "a healthy container")
        await embeds(database_url)
        process.send_signal(getattr(signal, sealed.final.only("STOPSIGNAL").value))
        log, _ = await asyncio.to_thread(process.communicate, timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, log
    assert re.search(r'"event": "daemon_stopped"', log)
    assert PASSWORD not in log
    assert sealed.files() == before, "the daemon wrote into its own image"


def alive(process: subprocess.Popen[str], image: Image, check: list[str], settings: dict[str, str]) -> bool:
    """Whether the image's health check says so."""
    if process.poll() is not None:
        raise RuntimeError(f"the daemon ended with {process.returncode}: {process.communicate()[0]}")
    return image.run(check, **settings).returncode == 0


async def embeds(url: str) -> None:
    """Write a document into the standard table and wait for its vector."""
    connection = await asyncpg.connect(url)
    try:
        await connection.execute("INSERT INTO source_documents (content) VALUES ('in a container')")

        async def embedded() -> bool:
            return bool(await connection.fetchval("SELECT count(*) FROM document_embeddings"))

        await eventually(embedded, 60, "the vector")
    finally:
        await connection.close()
