"""The demo: a database of its own, real documents, the real daemon, searches by meaning, freshness in milliseconds."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sidecar_daemon.adapters.postgres.embedded import EmbeddedServer
from sidecar_daemon.app import operations
from sidecar_daemon.demo.choice import ready_model
from sidecar_daemon.demo.process import DaemonProcess, usable_port
from sidecar_daemon.demo.screen import Screen, screen
from sidecar_daemon.demo.story import PIPELINE, Story
from sidecar_daemon.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

_MODELS = Path(".sidecar/models")
_SERVER = {"track_commit_timestamp": "on"}
"""So that the time from the writer's commit to the vector's is read off the database's own clock."""


def run_demo(*, documents: int | None, data_dir: Path, as_json: bool) -> None:
    """Run the demo from beginning to end. On a terminal it then serves until Ctrl-C.

    Args:
        documents: how many docstrings; None for all.
        data_dir: where the database lives; a second run finds everything there.
        as_json: print one object on stdout at the end, and everything else on stderr.

    Raises:
        SidecarError: one line that says what is in the way.
        KeyboardInterrupt: after Ctrl-C or SIGTERM before the end; everything that was started is stopped.
    """
    shown = screen(as_json=as_json)
    own = Settings.read()
    models_dir = own.model.dir if own.model.named else _MODELS.resolve()
    with ExitStack() as stack:
        stack.enter_context(_interruptible())
        shown.heading("1. The model")
        model = ready_model(Settings.read(models_dir=str(models_dir)), shown)
        shown.heading("2. A PostgreSQL of our own, with pgvector and pgmq")
        data_dir = data_dir.expanduser().resolve()
        server = stack.enter_context(EmbeddedServer(data_dir / "postgres", settings=_SERVER))
        settings = _settings(server.dsn(), models_dir)
        asyncio.run(_prepare(settings, model, shown))
        process = _daemon(own, server.dsn(), models_dir, data_dir / "daemon.log")
        daemon = stack.enter_context(process)
        stack.callback(_ignore_signals)  # runs first at the end: what we started is stopped whatever is pressed
        report = asyncio.run(Story(settings, daemon, shown, limit=documents).tell())
        _look_around(shown, server.dsn(), daemon, models_dir)
        shown.settle()
        if as_json:
            print(json.dumps(report, ensure_ascii=False))  # noqa: T201  the one thing on stdout
        elif sys.stdin.isatty() and sys.stdout.isatty():
            _serve(daemon, shown)


async def _prepare(settings: Settings, model: str, shown: Screen) -> None:
    migrated = await operations.migrate_database(settings)
    attached = await operations.attach(settings, operations.AttachRequest(table=None, model=model))
    shown.line(f"schema version {migrated.version}; pipeline {attached.name}: {attached.change}")
    shown.line(f"{attached.source} → {attached.embeddings}, queue {attached.queue}, model {attached.model}")


def _settings(dsn: str, models_dir: Path) -> Settings:
    return Settings.read(
        database_url=dsn, listen_url=dsn, pooler="session", pipelines=PIPELINE, models_dir=str(models_dir)
    )


def _daemon(own: Settings, dsn: str, models_dir: Path, log: Path) -> DaemonProcess:
    host = own.http.host
    settings = {
        "DATABASE_URL": dsn,
        "LISTEN_URL": dsn,
        "POOLER": "session",
        "PIPELINES": PIPELINE,
        "MODELS_DIR": str(models_dir),
    }
    return DaemonProcess(settings, log, host=host, port=usable_port(host, own.http.port))


def _look_around(shown: Screen, dsn: str, daemon: DaemonProcess, models_dir: Path) -> None:
    shown.heading("7. Look around" if sys.stdout.isatty() else "7. While it runs, you would look around like this")
    shown.line(f"  export SIDECAR_DATABASE_URL='{dsn}'")
    shown.line(f"  export SIDECAR_MODELS_DIR='{models_dir}'")
    shown.line(f"  {sys.executable} -m sidecar_daemon status")
    shown.line(f"  {sys.executable} -m sidecar_daemon search {PIPELINE} 'read a file line by line'")
    shown.line(f"  psql '{dsn}'")
    shown.line(f"  {daemon.url}/status   {daemon.url}/metrics   {daemon.url}/readyz")
    shown.line(f"  the daemon's log: {daemon.log}")


def _serve(daemon: DaemonProcess, shown: Screen) -> None:
    """Stay until Ctrl-C or SIGTERM, or until the daemon ends, which is an error."""
    shown.line()
    shown.line("serving; Ctrl-C ends the daemon and the database, the data stays")
    try:
        while True:
            daemon.check()
            time.sleep(0.5)
    except KeyboardInterrupt:
        shown.line("stopping …")


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM is treated as Ctrl-C."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ignore_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
