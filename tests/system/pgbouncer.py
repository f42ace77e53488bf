"""A real PgBouncer in transaction mode in front of the embedded server."""

from __future__ import annotations

import os
import pwd
import socket
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

from tests.conftest import short_folder
from tests.daemon import free_port
from tests.system.tools import tool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

STARTS_WITHIN = 10.0


@contextmanager
def pgbouncer(server_dsn: str, *, server_connections: int = 4) -> Iterator[Callable[[str], str]]:
    """Run PgBouncer; lend a function that leads a URL of the server through it.

    Args:
        server_dsn: URL of the embedded server, over its socket.
        server_connections: to the server for each user and database; few, so that clients must share them.
    """
    behind = parse_qs(urlsplit(server_dsn).query)["host"][0]
    port = free_port()
    with short_folder() as folder:
        users = folder / "users.txt"
        users.write_text('"postgres" ""\n"daemon_under_test" ""\n')
        settings = folder / "pgbouncer.ini"
        settings.write_text(
            f"[databases]\n* = host={behind}\n"
            f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
            f"auth_type = trust\nauth_file = {users}\npool_mode = transaction\n"
            f"default_pool_size = {server_connections}\nmax_client_conn = 200\n"
            f"logfile = {folder / 'log'}\npidfile = {folder / 'pid'}\n"
        )
        command = [tool("pgbouncer"), str(settings)]
        if os.geteuid() == 0:  # it refuses to run as root; the server's user may open the server's socket
            owner = pwd.getpwuid(Path(behind).stat().st_uid)
            for path in (folder, users, settings):
                os.chown(path, owner.pw_uid, owner.pw_gid)
            command[1:1] = ["-u", owner.pw_name]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            _wait_for(port, process)
            yield lambda dsn: _through(dsn, port)
        finally:
            process.terminate()
            process.wait(10)


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + STARTS_WITHIN
    while True:
        assert process.poll() is None, f"pgbouncer ended with {process.returncode}"
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            assert time.monotonic() < deadline, "pgbouncer does not listen"
            time.sleep(0.05)
        else:
            return


def _through(dsn: str, port: int) -> str:
    url = urlsplit(dsn)
    user = url.netloc.partition("@")[0]
    return f"postgresql://{user}@127.0.0.1:{port}{url.path}"
