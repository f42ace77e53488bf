"""``doctor`` and ``demo``."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from sidecar_daemon import doctor as diagnosis
from sidecar_daemon.cli.output import JsonFlag, print_json, say
from sidecar_daemon.settings import Settings


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("doctor", epilog="Example: sidecar-daemon doctor")(doctor)
    app.command("demo", epilog="Example: sidecar-daemon demo --documents 500")(demo)


def doctor(*, as_json: JsonFlag = False) -> None:
    """Check the database, the models and this machine, and say how to mend what is wrong. Exit code 1 when it is."""
    checks = asyncio.run(diagnosis.examine(Settings.read()))
    healthy = diagnosis.healthy(checks)
    if as_json:
        print_json({"ok": healthy, "checks": checks})
    else:
        for check in checks:
            say(f"{check.state:<5} {check.name}: {check.found}")
            if check.mend is not None:
                say(f"      → {check.mend}")
    if not healthy:
        raise typer.Exit(1)


def demo(
    *,
    documents: Annotated[int | None, typer.Option(min=1, help="How many documents. Default: all.")] = None,
    data_dir: Annotated[Path, typer.Option(help="Where the demo's database lives.")] = Path(".sidecar/demo"),
    as_json: JsonFlag = False,
) -> None:
    """Embed the docstrings of Python's standard library in a database of its own, and search them by meaning."""
    from sidecar_daemon.demo import run_demo  # noqa: PLC0415  nobody else needs it

    run_demo(documents=documents, data_dir=data_dir, as_json=as_json)
