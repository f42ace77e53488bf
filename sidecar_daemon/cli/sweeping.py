"""``sweep``."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from sidecar_daemon.app import operations
from sidecar_daemon.cli.output import NO_PIPELINES, JsonFlag, note, print_json, say
from sidecar_daemon.domain.wording import counted
from sidecar_daemon.settings import Settings

if TYPE_CHECKING:
    from sidecar_daemon.adapters.postgres.operations import SweepProgress


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("sweep", epilog="Examples: sidecar-daemon sweep articles · sidecar-daemon sweep --now")(sweep)


def sweep(
    pipeline: Annotated[
        str | None, typer.Argument(metavar="PIPELINE", help="Default: every one that is not paused.")
    ] = None,
    *,
    now: Annotated[
        bool, typer.Option("--now", help="Begin it and return: running daemons walk the rest. Default: watch it.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Walk the source from the start, find what is missing, outdated or of another model, and enqueue it.

    The walk needs no daemon; Ctrl-C leaves the rest of it to the running ones.
    """
    settings = Settings.read()
    names = [pipeline] if pipeline else _sweepable(settings)
    swept: list[_Sweep] = []
    try:
        for name in names:
            walk = _Sweep(settings, name)
            walk.run(watch=not now)
            swept.append(walk)
    finally:  # what was found is enqueued, though the next pipeline refuses
        found = [{"pipeline": each.pipeline, **asdict(each.totals)} for each in swept]
        if not as_json:
            say(*(each.line() for each in swept))
        elif not pipeline:
            print_json(found)
        elif found:
            print_json(found[0])
        sys.stdout.flush()  # before the refusal


def _sweepable(settings: Settings) -> list[str]:
    found = asyncio.run(operations.ask(settings, lambda database: database.pipelines()))
    for each in found:
        if not each.enabled:
            note(f"{each.name} is paused: not swept")
    if not found:
        note(NO_PIPELINES)
    return [each.name for each in found if each.enabled]


class _Sweep:
    """One walk that was asked for, and what is told of it."""

    def __init__(self, settings: Settings, pipeline: str) -> None:
        self.pipeline = pipeline
        self.totals: SweepProgress
        self._settings = settings
        self._told: set[str] = set()

    def run(self, *, watch: bool) -> None:
        tell = self._tell if watch else lambda *_: None
        walk = operations.sweep(self._settings, self.pipeline, tell=tell, watch=watch)
        self.totals = asyncio.run(walk)

    def line(self) -> str:
        totals = self.totals
        found = (
            f"{self.pipeline}: {counted(totals.scanned, 'row')} scanned, {totals.enqueued:,} enqueued "
            f"(missing {totals.missing:,}, outdated {totals.outdated:,}, wrong model {totals.wrong_model:,}, "
            f"surplus {totals.surplus:,})"
        )
        return found if totals.finished else f"{found} so far; running daemons walk the rest"

    def _tell(self, state: str, totals: SweepProgress) -> None:
        hints = {
            "waiting": f"{self.pipeline}: waiting after {totals.scanned:,} rows: the lanes are deep, "
            "a daemon must work them off",
            "busy": f"{self.pipeline}: another replica walks it; waiting for it",
        }
        if state in hints and state not in self._told:
            note(hints[state])
            self._told.add(state)
