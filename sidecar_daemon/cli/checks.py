"""``doctor``, ``doctor document`` and ``demo``."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from sidecar_daemon.app import operations
from sidecar_daemon.cli.output import JsonFlag, PipelineArgument, print_json, say
from sidecar_daemon.cli.tracing import explanation_document, explanation_lines
from sidecar_daemon.settings import Settings

_DOCTOR = "Examples: sidecar-daemon doctor · sidecar-daemon doctor document articles 42"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(epilog=_DOCTOR)
    group.callback(invoke_without_command=True)(doctor)
    group.command("document", epilog="Example: sidecar-daemon doctor document articles 42")(document)
    app.add_typer(group, name="doctor")
    app.command("demo", epilog="Example: sidecar-daemon demo --documents 500")(demo)


def doctor(context: typer.Context, *, as_json: JsonFlag = False) -> None:
    """Check the database, the models and this machine, and say how to mend what is wrong. Exit code 1 when it is."""
    if context.invoked_subcommand is not None:
        context.obj = as_json
        return
    from sidecar_daemon import doctor as diagnosis  # noqa: PLC0415  nobody else needs it

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


def document(
    context: typer.Context,
    pipeline: PipelineArgument,
    key: Annotated[str, typer.Argument(metavar="KEY", help="The document's key; one that begins with - behind --.")],
    *,
    as_json: JsonFlag = False,
) -> None:
    """Trace one document: its state, its messages and attempts, and what would happen next."""
    facts, explanation = asyncio.run(operations.explain_document(Settings.read(), pipeline, key))
    if as_json or context.obj:
        print_json(explanation_document(facts, explanation))
    else:
        say(*explanation_lines(facts, explanation))


def demo(
    *,
    documents: Annotated[int | None, typer.Option(min=1, help="How many documents. Default: all.")] = None,
    data_dir: Annotated[Path, typer.Option(help="Where the demo's database lives.")] = Path(".sidecar/demo"),
    as_json: JsonFlag = False,
) -> None:
    """Embed the docstrings of Python's standard library in a database of its own, and search them by meaning."""
    from sidecar_daemon.demo import run_demo  # noqa: PLC0415  nobody else needs it

    run_demo(documents=documents, data_dir=data_dir, as_json=as_json)
