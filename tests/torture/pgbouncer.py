"""A real PgBouncer in transaction mode in front of a cluster."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

from tests.daemon import free_port
from tests.torture.bench import PASSWORD, SLOTS
from tests.waiting import eventually

if TYPE_CHECKING:
    from pathlib import Path

MISSING = (
    "T14 needs PgBouncer: the program pgbouncer is not on PATH; install Debian's package (apt-get install pgbouncer, "
    "which make test-system does), or leave T14 out: --without T14"
)


class PgBouncer:
    """Runs while the block lasts. Raises ``RuntimeError`` with one line where the program is missing."""

    def __init__(self, folder: Path, server_port: int) -> None:
        """Describe one that leads to the server on ``server_port``."""
        self._folder = folder
        self._server_port = server_port
        self._process: asyncio.subprocess.Process | None = None
        self.port = free_port()

    async def __aenter__(self) -> Self:
        program = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin:/usr/local/sbin")
        if program is None:
            raise RuntimeError(MISSING)
        self._program = program
        self._folder.mkdir()
        users = "".join(f'"torture_daemon_{slot}" "{PASSWORD}"\n' for slot in range(1, SLOTS + 1))
        (self._folder / "users.txt").write_text(users)
        (self._folder / "pgbouncer.ini").write_text(
            f"[databases]\n* = host=127.0.0.1 port={self._server_port}\n"
            f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {self.port}\nunix_socket_dir =\n"
            f"auth_type = scram-sha-256\nauth_file = {self._folder}/users.txt\n"
            # Few servers for many clients: a session is rarely served by the same one twice.
            "pool_mode = transaction\ndefault_pool_size = 4\nmax_client_conn = 200\n"
        )
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()

    async def start(self) -> None:
        """Start it and wait until it listens."""
        # It refuses to run as root: as root it runs as whoever owns the server's files.
        nobody = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
        if nobody is not None:
            for path in (self._folder, *self._folder.iterdir()):
                os.chown(path, nobody.pw_uid, nobody.pw_gid)
        account: dict[str, Any] = {}
        if nobody is not None:
            account = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        with (self._folder / "log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(self._program, "pgbouncer.ini"),
                cwd=self._folder,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                **account,
            )
        await eventually(self._listens, 10, what="PgBouncer")

    async def kill(self) -> None:
        """Kill it, with every connection through it."""
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    async def _listens(self) -> bool:
        assert self._process is not None
        if self._process.returncode is not None:
            raise RuntimeError("PgBouncer ended: " + (self._folder / "log").read_text()[-500:])
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            return False
        writer.close()
        return True
