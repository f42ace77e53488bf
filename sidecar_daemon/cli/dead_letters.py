"""``dead-letters list|show|replay|purge``."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from sidecar_daemon.app import operations
from sidecar_daemon.cli.output import JsonFlag, PipelineArgument, plain, print_json, print_table, printable, say
from sidecar_daemon.domain.errors import Fatal
from sidecar_daemon.domain.wording import span
from sidecar_daemon.settings import Settings

IdsArgument = Annotated[list[int] | None, typer.Argument(metavar="[ID]...", help="Ids; see `dead-letters list`.")]
AllFlag = Annotated[bool, typer.Option("--all", help="Every dead letter of the pipeline.")]


def register(app: typer.Typer) -> None:
    """Add the command group."""
    group = typer.Typer(help="Documents that could not be embedded: look, replay, purge.")
    group.command("list", epilog="Example: sidecar-daemon dead-letters list articles")(list_all)
    group.command("show", epilog="Example: sidecar-daemon dead-letters show articles 7")(show)
    group.command("replay", epilog="Example: sidecar-daemon dead-letters replay articles 7 8")(replay)
    group.command("purge", epilog="Example: sidecar-daemon dead-letters purge articles --all")(purge)
    app.add_typer(group, name="dead-letters")


def list_all(pipeline: PipelineArgument, *, as_json: JsonFlag = False) -> None:
    """List the dead letters of a pipeline, oldest first."""
    letters = asyncio.run(operations.ask(Settings.read(), lambda database: database.dead_letters(pipeline)))
    if as_json:
        print_json(letters)
        return
    print_table(
        ("#id", "document", "reason", "#attempts", "#age", "resolved"),
        (
            (
                str(letter.id),
                letter.document_id,
                letter.reason,
                letter.attempts,
                span(letter.age_seconds),
                letter.resolved,
            )
            for letter in letters
        ),
        empty=f"no dead letters in {pipeline}",
    )


def show(
    pipeline: PipelineArgument,
    number: Annotated[int, typer.Argument(metavar="ID", help="Its id; see `dead-letters list`.")],
    *,
    as_json: JsonFlag = False,
) -> None:
    """Show everything about one dead letter."""
    letters = asyncio.run(operations.ask(Settings.read(), lambda database: database.dead_letters(pipeline)))
    found = next((letter for letter in letters if letter.id == number), None)
    if found is None:
        raise Fatal("unknown_dead_letter", f"pipeline {pipeline} has no dead letter {number}")
    if as_json:
        print_json(found)
        return
    fields = plain(found)
    if isinstance(fields, dict):
        say(*(f"{name:<13} {'-' if value is None else printable(str(value))}" for name, value in fields.items()))


def replay(
    pipeline: PipelineArgument, ids: IdsArgument = None, *, every: AllFlag = False, as_json: JsonFlag = False
) -> None:
    """Try dead letters again, with a clean count of attempts."""
    wanted = _wanted(ids, every=every)
    count = asyncio.run(operations.replay_dead_letters(Settings.read(), pipeline, wanted))
    if as_json:
        print_json({"pipeline": pipeline, "replayed": count})
    else:
        say(f"replayed {count} of {pipeline}")


def purge(
    pipeline: PipelineArgument, ids: IdsArgument = None, *, every: AllFlag = False, as_json: JsonFlag = False
) -> None:
    """Delete dead letters. The documents stay; the next sweep finds them without a vector and tries again."""
    wanted = _wanted(ids, every=every)
    count = asyncio.run(operations.purge_dead_letters(Settings.read(), pipeline, wanted))
    if as_json:
        print_json({"pipeline": pipeline, "purged": count})
    else:
        say(f"purged {count} of {pipeline}")


def _wanted(ids: list[int] | None, *, every: bool) -> list[int] | None:
    """The ids, or None for all. Exactly one of the two must be said."""
    if bool(ids) == every:
        raise Fatal("usage", "name the ids of dead letters, or --all for every one")
    return None if every else ids
