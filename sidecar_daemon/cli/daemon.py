"""``run`` and ``migrate``."""

from __future__ import annotations

import asyncio

import typer

from sidecar_daemon.app import operations
from sidecar_daemon.cli.output import JsonFlag, exit_code, note, print_json, say
from sidecar_daemon.domain.errors import SidecarError
from sidecar_daemon.domain.log_lines import LogFormat
from sidecar_daemon.settings import Settings, wanted_log_format


def register(app: typer.Typer) -> None:
    """Add the commands, and ``run`` as what happens without one."""
    app.callback()(without_command)
    app.command("run", epilog="Example: SIDECAR_DATABASE_URL=postgresql://me@db/app sidecar-daemon run")(run)
    app.command("migrate", epilog="Example: sidecar-daemon migrate")(migrate)


def without_command(context: typer.Context) -> None:
    """Keeps embeddings true and fresh inside Postgres. Without a command: run the daemon."""
    if context.invoked_subcommand is None:
        run()


def run() -> None:
    """Run the daemon until it is told to stop."""
    from sidecar_daemon.app.daemon import run_daemon, tell_fatal  # noqa: PLC0415  onnxruntime is slow to load

    try:
        raise typer.Exit(run_daemon(Settings.read()))
    except SidecarError as error:
        if wanted_log_format() is not LogFormat.JSON:
            raise
        tell_fatal(error)  # who collects JSON lines gets nothing else
        raise typer.Exit(exit_code(error)) from None


def migrate(*, as_json: JsonFlag = False) -> None:
    """Bring the database up to date: extensions, roles, schema, functions. Safe to repeat."""
    report = asyncio.run(operations.migrate_database(Settings.read()))
    if as_json:
        print_json(report)
        return
    say(*report.lines)
    for warning in report.warnings:
        note(f"warning: {warning}")
    say(f"the database is at schema version {report.version}")
