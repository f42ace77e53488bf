"""``index show|build|defer``."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Annotated

import typer

from sidecar_daemon.app import indexing, operations
from sidecar_daemon.cli.output import NO_PIPELINES, JsonFlag, PipelineArgument, note, print_json, print_table, say
from sidecar_daemon.cli.progress import index_progress
from sidecar_daemon.domain.errors import Fatal
from sidecar_daemon.domain.indexing import IndexState
from sidecar_daemon.domain.wording import amount, counted, span
from sidecar_daemon.settings import Settings

if TYPE_CHECKING:
    from sidecar_daemon.adapters.postgres.indexing import IndexStatus
    from sidecar_daemon.adapters.postgres.operations import PostgresOperations

_BUILD = "Examples: sidecar-daemon index build articles --wait · sidecar-daemon index build articles --memory 4GB"
_MEMORY = re.compile(r"(\d{1,9})\s*(MB|GB)", re.IGNORECASE)
_LARGEST_MEMORY = (1 << 31) * 1024 - 1024
"""What ``maintenance_work_mem`` can be at most."""


def register(app: typer.Typer) -> None:
    """Add the command group."""
    group = typer.Typer(help="The index on the vectors: look, build it after a load, put it off before one.")
    group.command("show", epilog="Example: sidecar-daemon index show")(show)
    group.command("build", epilog=_BUILD)(build)
    group.command("defer", epilog="Example: sidecar-daemon index defer articles")(defer)
    app.add_typer(group, name="index")


def show(
    pipeline: Annotated[str | None, typer.Argument(metavar="PIPELINE", help="Default: every one.")] = None,
    *,
    as_json: JsonFlag = False,
) -> None:
    """Show how the index of each pipeline is, and what to do about it."""

    async def look(database: PostgresOperations) -> list[IndexStatus]:
        if pipeline is not None:
            await database.pipeline(pipeline)
        return [status for status in await database.indexes() if pipeline in (None, status.pipeline)]

    found = asyncio.run(operations.ask(Settings.read(), look))
    if as_json:
        print_json(found[0] if pipeline is not None else found)
        return
    print_table(
        ("pipeline", "index", "#size", "what it means"),
        ((each.pipeline, each.state.value, _size(each), meaning(each)) for each in found),
        empty=NO_PIPELINES,
    )


def build(
    pipeline: PipelineArgument,
    *,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until the backfill is through, then build.")] = False,
    memory: Annotated[
        str, typer.Option(help="Most memory on the server (maintenance_work_mem); less is taken where less is needed.")
    ] = "1GB",
    workers: Annotated[
        int | None, typer.Option(min=0, max=1024, help="Parallel workers at most. Default: as the server is set.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Build the index while reads and writes go on (CREATE INDEX CONCURRENTLY). Safe to repeat after Ctrl-C."""
    how = indexing.IndexBuild(most_memory=_bytes(memory), workers=workers, wait=wait)
    settings = Settings.read()
    try:
        with index_progress(pipeline) as tell:
            built = asyncio.run(indexing.build_index(settings, pipeline, how, tell=tell))
    except KeyboardInterrupt:
        note(f"interrupted: sidecar-daemon index build {pipeline} begins again and drops what is left of this build")
        raise
    if as_json:
        print_json(built)
    elif built.built and built.rows is not None and built.seconds is not None:
        pace = f"{counted(built.rows, 'vector')} in {span(built.seconds)}"
        say(f"{pipeline}: the index is live ({pace}, {amount(built.bytes or 0)})")
    else:
        say(f"{pipeline}: the index is live already ({amount(built.bytes or 0)})")


def defer(pipeline: PipelineArgument, *, as_json: JsonFlag = False) -> None:
    """Drop the index before a large load, to be built again after it. Searches are exact and slow meanwhile."""
    with index_progress(pipeline) as tell:
        deferred = asyncio.run(indexing.defer_index(Settings.read(), pipeline, tell=tell))
    if as_json:
        print_json(deferred)
        return
    say(*(f"{pipeline}: dropped {definition}" for definition in deferred.dropped))
    say(f"{pipeline}: the index is deferred; {deferral(pipeline)}")


def deferral(pipeline: str) -> str:
    """What a deferred index means, and how that ends."""
    return f"searches are exact and slow until: sidecar-daemon index build {pipeline} --wait"


def meaning(status: IndexStatus) -> str:
    """What the state of an index means, and what to do about it."""
    again = f"sidecar-daemon index build {status.pipeline}"
    said = {
        IndexState.LIVE: "serves searches, kept up to date by every write",
        IndexState.DEFERRED: deferral(status.pipeline),
        IndexState.MISSING: f"searches are exact and slow; mend it: {again}",
        IndexState.INVALID: f"an interrupted build or drop costs writes and serves no search; mend it: {again}",
        IndexState.NONE: f"not wanted: searches are exact; to have one: {again}",
    }
    if status.state is not IndexState.BUILDING:
        return said[status.state]
    percent = "" if status.percent is None else f" {status.percent:.0f} %"
    return f"{status.phase or 'is being built'}{percent}"


def _size(status: IndexStatus) -> str:
    return "" if status.bytes is None else amount(status.bytes)


def _bytes(text: str) -> int:
    found = _MEMORY.fullmatch(text.strip())
    size = int(found[1]) << (30 if found[2].upper() == "GB" else 20) if found else 0
    if not 0 < size <= _LARGEST_MEMORY:
        raise Fatal("usage", f"--memory is {text!r}: must be a number of MB or GB up to 2047GB, like 512MB or 4GB")
    return size
