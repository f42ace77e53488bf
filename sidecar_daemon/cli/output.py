"""How commands print: tables for people, JSON for programs, one line for an error."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from io import TextIOWrapper
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sidecar_daemon.domain.errors import SidecarError

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON.")]
PipelineArgument = Annotated[str, typer.Argument(metavar="PIPELINE", help="Name of the pipeline; see `status`.")]
NO_PIPELINES = "no pipelines; attach a table: sidecar-daemon attach TABLE COLUMN..."
FAILED = 1
USAGE = 2
_USAGE_CODES = frozenset({"bad_setting", "bad_database_url", "bad_query", "usage"})
_PIPE_WIDTH = 200
_LEAST_TEXT = 6
"""Characters that a narrow terminal leaves to a column of text, which is then folded."""
_COMMANDS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, overrides of the direction of writing, halves of surrogate pairs."""


def console(*, stderr: bool = False) -> Console:
    """A console on stdout or stderr; wide where it is no terminal, so that nothing is cut."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _PIPE_WIDTH
    return Console(file=stream, width=width, highlight=False, markup=False, emoji=False, soft_wrap=True)


def forgive_encodings() -> None:
    """A terminal that lacks a character gets a question mark instead of a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")


def complain(message: str) -> None:
    """One line on stderr that begins with ``error:``."""
    sys.stderr.write(f"error: {' '.join(message.split())}\n")


def exit_code(error: SidecarError) -> int:
    """How a process ends with this error: 2 where starting it again cannot help, for it was used wrongly; else 1."""
    return USAGE if error.code in _USAGE_CODES else FAILED


def note(message: str) -> None:
    """One line on stderr, for people: progress and hints that are no data."""
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()


def say(*lines: str) -> None:
    """Lines on stdout."""
    for line in lines:
        sys.stdout.write(f"{line}\n")


def print_json(value: object) -> None:
    """JSON on stdout. Dataclasses become objects, times become ISO 8601 text."""
    narrow = not (sys.stdout.encoding or "").lower().startswith("utf")
    json.dump(plain(value), sys.stdout, indent=2, ensure_ascii=narrow, default=_as_text)
    sys.stdout.write("\n")


def plain(value: object) -> object:
    """Dataclasses to dictionaries, also within a list."""
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, empty: str, shed: Sequence[str] = ()
) -> None:
    """A table on stdout, or one line where there are no rows.

    Args:
        columns: heads; one that begins with ``#`` holds numbers.
        rows: one value a column each.
        empty: said where there are no rows.
        shed: columns that a narrow terminal does without, the first one first.
    """
    found = [[_cell(value) for value in row] for row in rows]
    if not found:
        say(empty)
        return
    out = console()
    out.soft_wrap = False
    kept = list(columns)
    table = _table(columns, found, kept)
    for dropped in shed:
        if table.__rich_measure__(out, out.options.update(max_width=_PIPE_WIDTH)).maximum <= out.width:
            break
        kept.remove(dropped)
        table = _table(columns, found, kept)
    out.print(table)


def _table(columns: Sequence[str], rows: Sequence[Sequence[Text]], kept: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in kept:
        number = column.startswith("#")
        justify: Literal["right", "left"] = "right" if number else "left"
        least = None if number else _LEAST_TEXT
        head = Text(column.removeprefix("#"))
        table.add_column(head, justify=justify, no_wrap=number, min_width=least, overflow="fold")
    for row in rows:
        table.add_row(*(cell for column, cell in zip(columns, row, strict=True) if column in kept))
    return table


def printable(text: str) -> str:
    """A text that a terminal shows as it is: keys are the users', and may hold commands to a terminal."""
    return _COMMANDS.sub("\ufffd", text)


def _cell(value: object) -> Text:
    if isinstance(value, bool):
        return Text("yes" if value else "no")
    if isinstance(value, int):
        return Text(f"{value:,}")
    return Text("" if value is None else printable(str(value)))


def _as_text(value: Any) -> str:
    return value.isoformat() if hasattr(value, "isoformat") else str(value)
