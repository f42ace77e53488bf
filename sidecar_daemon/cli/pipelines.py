"""``attach``, ``detach``, ``status``, ``search``, ``pause``, ``resume``."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from sidecar_daemon.app import model_files, operations
from sidecar_daemon.app.documents import status_document
from sidecar_daemon.cli.indexing import deferral
from sidecar_daemon.cli.output import NO_PIPELINES, JsonFlag, PipelineArgument, print_json, print_table, say
from sidecar_daemon.domain.errors import Fatal
from sidecar_daemon.domain.indexing import DeferIndex, IndexState
from sidecar_daemon.domain.messages import LongDocuments
from sidecar_daemon.domain.wording import span
from sidecar_daemon.settings import Settings

if TYPE_CHECKING:
    from sidecar_daemon.adapters.postgres.operations import Attached, Match

_ATTACH = (
    "Examples: sidecar-daemon attach public.articles title body --model gte-small · "
    'sidecar-daemon attach \'public."My Docs"\' "Body" --key "Doc Id" --name docs · sidecar-daemon attach --create'
)
_STATUS_COLUMNS = (
    *("pipeline", "source", "model", "state", "#live", "#live age", "#bulk", "#bulk age", "#dead"),
    *("#documents", "#embedded", "#stale", "#missing", "#coverage"),
)
_STATUS_SHED = ("model", "source", "#embedded", "#stale", "#missing", "#documents", "#bulk age", "#live age")


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("attach", epilog=_ATTACH)(attach)
    app.command("detach", epilog="Example: sidecar-daemon detach articles --keep-embeddings")(detach)
    app.command("status", epilog="Example: sidecar-daemon status --json")(status)
    app.command("search", epilog='Example: sidecar-daemon search articles "how to bake bread" -k 3')(search)
    app.command("pause", epilog="Example: sidecar-daemon pause articles")(pause)
    app.command("resume", epilog="Example: sidecar-daemon resume articles")(resume)


def attach(
    table: Annotated[str | None, typer.Argument(metavar="TABLE", help="The table, quoted as in SQL.")] = None,
    columns: Annotated[list[str] | None, typer.Argument(metavar="COLUMN", help="What to embed.")] = None,
    *,
    create: Annotated[bool, typer.Option("--create", help="Make public.source_documents and attach it.")] = False,
    name: Annotated[str | None, typer.Option(help="Name of the pipeline. Default: the table's.")] = None,
    key: Annotated[str | None, typer.Option(help="Key column. Default: the primary key.")] = None,
    model: Annotated[str, typer.Option(help="The model; see `models list`.")] = "gte-small",
    embeddings: Annotated[str | None, typer.Option(help="Table of vectors. Default: NAME_embeddings.")] = None,
    queue: Annotated[str | None, typer.Option(help="Queue. Default: the pipeline's name.")] = None,
    long_documents: Annotated[
        LongDocuments, typer.Option(help="One mean vector, one a chunk, or the first window only.")
    ] = LongDocuments.MEAN,
    store_text: Annotated[bool, typer.Option(help="Keep the embedded text beside the vector.")] = True,
    index: Annotated[bool, typer.Option(help="Make an HNSW index.")] = True,
    defer_index: Annotated[
        DeferIndex,
        typer.Option(
            help="Leave the index to `index build` after the load. auto: where there are more than 10,000 rows."
        ),
    ] = DeferIndex.AUTO,
    as_json: JsonFlag = False,
) -> None:
    """Keep a vector beside every row of a table, from now on and for what is there. Safe to repeat."""
    if create == bool(table):
        raise Fatal("usage", "name a TABLE and its COLUMNs to attach, or --create alone for the standard table")
    if table and not columns:
        raise Fatal("usage", f"name at least one column of {table} to embed")
    if not index and defer_index is not DeferIndex.AUTO:
        raise Fatal("usage", f"--no-index makes no index: --defer-index {defer_index} says nothing beside it")
    settings = Settings.read()
    request = operations.AttachRequest(
        table=table,
        columns=tuple(columns or ()),
        model=model,
        long_documents=long_documents,
        name=name,
        key=key,
        embeddings=embeddings,
        queue=queue,
        store_text=store_text,
        index=index,
        defer_index=defer_index,
    )
    done = asyncio.run(operations.attach(settings, request))
    if as_json:
        print_json(done)
    else:
        say(*_next_steps(settings, done, model))


def _next_steps(settings: Settings, done: Attached, model: str) -> list[str]:
    lines = [f"{done.name}: {done.change} (source {done.source}, vectors in {done.embeddings}, model {done.model})"]
    if done.index is IndexState.DEFERRED:
        lines.append(f"{done.name}: the index is deferred; {deferral(done.name)}")
    if done.change == "unchanged":
        return lines
    state = model_files.model_file(settings, model_files.manifest_of(settings, model)).state
    pull = [f"  sidecar-daemon models pull {model}"] if state != "pulled" else []
    return [
        *lines,
        "next:",
        *pull,
        "  sidecar-daemon run                      # embeds what is there, and every edit from now on",
        "  sidecar-daemon status",
        f'  sidecar-daemon search {done.name} "what you are looking for"',
    ]


def detach(
    pipeline: PipelineArgument,
    *,
    keep_embeddings: Annotated[bool, typer.Option("--keep-embeddings", help="Keep the table of vectors.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Undo attach: triggers, queues with dead letters, and the table of vectors. The source stays as it is."""
    settings = Settings.read()
    if not yes:
        if not sys.stdin.isatty():
            raise Fatal("usage", "detach removes queues and vectors: say --yes where no terminal can be asked")
        found = asyncio.run(operations.ask(settings, lambda database: database.pipeline(pipeline)))
        loss = "the queues" if keep_embeddings else f"the queues and the vectors in {found.embeddings}"
        typer.confirm(f"Remove {loss} of pipeline {pipeline}?", abort=True, err=True)
    table = asyncio.run(
        operations.ask(settings, lambda database: database.detach(pipeline, keep_embeddings=keep_embeddings))
    )
    if as_json:
        print_json({"pipeline": pipeline, "embeddings": table, "kept": keep_embeddings})
    else:
        say(f"{pipeline} is detached; {table} is {'kept' if keep_embeddings else 'dropped'}")


def status(*, as_json: JsonFlag = False) -> None:
    """Show every pipeline: queues, dead letters, coverage. Counts exactly, so it reads every source."""
    found = asyncio.run(operations.ask(Settings.read(), lambda database: database.status()))
    if as_json:
        print_json(status_document(found))
        return
    print_table(
        _STATUS_COLUMNS,
        (
            (
                each.name,
                each.source,
                each.model,
                "on" if each.enabled else "paused",
                each.live.depth,
                span(each.live.oldest_seconds),
                each.bulk.depth,
                span(each.bulk.oldest_seconds),
                each.dead,
                each.documents,
                each.embedded,
                each.stale,
                each.missing,
                f"{int(each.coverage * 1000) / 10:.1f} %",
            )
            for each in found
        ),
        empty=NO_PIPELINES,
        shed=_STATUS_SHED,
    )
    for each in found:
        if not each.enabled:
            say(f"{each.name} is paused: edits are queued, nothing is embedded until sidecar-daemon resume {each.name}")
        if each.index not in {IndexState.LIVE, IndexState.NONE}:
            say(f"{each.name}: its index is {each.index}, see sidecar-daemon index show {each.name}")


def search(
    pipeline: PipelineArgument,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What to look for, in words.")],
    *,
    k: Annotated[int, typer.Option("-k", min=1, max=1000, help="How many matches.")] = 5,
    as_json: JsonFlag = False,
) -> None:
    """Search a pipeline by meaning, with the pipeline's own model."""
    from sidecar_daemon.app.searching import searcher  # noqa: PLC0415  numpy is slow to load

    async def find() -> list[Match]:
        async with searcher(Settings.read(), pipeline) as opened:
            return await opened.find(text, k)

    found = asyncio.run(find())
    if as_json:
        print_json(found)
        return
    print_table(
        ("#similarity", "key", "#chunk", "text"),
        ((f"{match.similarity:.3f}", match.key, match.chunk_no, _excerpt(match.source_text)) for match in found),
        empty=f"{pipeline} has no vectors yet",
    )


def _excerpt(text: str, length: int = 100) -> str:
    line = " ".join(text[: 4 * length].split())
    return line if len(line) <= length else line[: length - 1] + "…"


def pause(pipeline: PipelineArgument, *, as_json: JsonFlag = False) -> None:
    """Stop leasing in every replica. Edits are still queued."""
    _switch(pipeline, enabled=False, as_json=as_json)


def resume(pipeline: PipelineArgument, *, as_json: JsonFlag = False) -> None:
    """Lease again in every replica."""
    _switch(pipeline, enabled=True, as_json=as_json)


def _switch(pipeline: str, *, enabled: bool, as_json: bool) -> None:
    changed = asyncio.run(
        operations.ask(Settings.read(), lambda database: database.set_enabled(pipeline, enabled=enabled))
    )
    if as_json:
        print_json({"pipeline": pipeline, "enabled": enabled, "changed": changed})
    else:
        say(f"{pipeline} {'is' if changed else 'was already'} {'on' if enabled else 'paused'}")
