"""What ``top`` draws: lines for a window of some columns and rows, made from one look. Pure."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from textwrap import wrap
from typing import TYPE_CHECKING

from rich.text import Text

from sidecar_daemon.cli.output import NO_PIPELINES, printable
from sidecar_daemon.domain.wording import counted, span

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sidecar_daemon.adapters.replicas import Overview, PipelineView
    from sidecar_daemon.app.watching import View

_STYLES = {"working": "green", "paused": "yellow", "waiting": "yellow", "refused": "bold red", "open": "bold red"}
_BLOCKS = "▁▂▃▄▅▆▇█"
_MINUTES = 15
_NARROWEST_NAME = 8
_WIDEST_NAME = 41
_NEWEST = 5
_LONGEST_NOTICE = 4
"""Lines of one sentence."""
_DISPENSABLE = ("flight", "cover", "docs/s", "oldest", "p50", "dead", "p99", "bulk", "live")
"""Which column goes first where the window is narrow."""


@dataclass(frozen=True, slots=True)
class _Column:
    """A number of every pipeline, right-aligned."""

    head: str
    width: int
    cell: Callable[[PipelineView], str]


_COLUMNS = (
    _Column("live", 5, lambda p: short(p.queue.live.depth)),
    _Column("bulk", 5, lambda p: short(p.queue.bulk.depth)),
    _Column("flight", 6, lambda p: short(p.queue.live.in_flight + p.queue.bulk.in_flight)),
    _Column("oldest", 6, lambda p: _compact(_oldest(p))),
    _Column("dead", 5, lambda p: short(p.queue.dead)),
    _Column("cover", 5, lambda p: "-" if p.coverage is None else _percent(p.coverage)),
    _Column("docs/s", 6, lambda p: "-" if p.rate is None else f"{p.rate:.1f}" if p.rate < 1000 else short(int(p.rate))),
    _Column("p50", 5, lambda p: _compact(p.freshness.p50)),
    _Column("p99", 5, lambda p: _compact(p.freshness.p99)),
)
"""The last ones go first where the window is narrow."""


def frame(view: View, width: int, height: int | None = None, *, footer: str = "", lost: str | None = None) -> Text:
    """Everything on one screen.

    Args:
        view: what was seen.
        width: columns; no line is longer.
        height: rows, all of which may be used; None: as many as it takes.
        footer: the last line.
        lost: why there is nothing newer to show.
    """
    head = [*_header(view, width), *_notices(view, lost, width), Text()]
    tail = [Text(), Text(footer, "dim")] if footer else []
    rows = sys.maxsize if height is None else height - len(head) - len(tail) - 1
    letters = _dead_letters(view.overview)
    if not view.overview.pipelines:
        body = [Text(NO_PIPELINES)]
    else:
        blocks, letters = _fitted(view.overview, letters, width, rows)
        body = [_table_head(view.overview, width), *blocks, *letters]
    lines = [*head, *body, *tail]
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    return Text("\n").join(lines[:height])


def short(number: int) -> str:
    """A count of at most five characters: ``9,999``, ``12.3k``, ``4.5M``."""
    if number < 10_000:
        return f"{number:,}"
    for unit, size in (("k", 1_000), ("M", 1_000_000), ("G", 1_000_000_000)):
        scaled = number / size
        if scaled < 999.5 or unit == "G":
            return f"{scaled:.1f}{unit}" if scaled < 99.95 else f"{scaled:.0f}{unit}"
    raise AssertionError


def sparkline(steps: Sequence[float | None], cells: int) -> str:
    """The newest steps as blocks, the newest on the right: a space where nothing is known, the lowest block for none.

    Args:
        steps: one number a step, oldest first.
        cells: how many characters; each holds the sum of as many steps as fit.
    """
    each = -(-len(steps) // cells) if steps else 1
    padded = [*[None] * (cells * each - len(steps)), *steps]
    groups = [[v for v in padded[n : n + each] if v is not None] for n in range(0, len(padded), each)]
    sums = [sum(group) if group else None for group in groups]
    top = max((total for total in sums if total is not None), default=0.0)
    return "".join(" " if total is None else _block(total, top) for total in sums)


def _block(total: float, top: float) -> str:
    """The lowest for nothing only."""
    return _BLOCKS[0] if total <= 0 else _BLOCKS[max(1, round(total / top * (len(_BLOCKS) - 1)))]


def _header(view: View, width: int) -> list[Text]:
    overview, replicas = view.overview, view.replicas
    if view.notice is not None:
        said = "no daemon answers"
    elif len(replicas) > 1:
        answering = sum(replica.overview is not None for replica in replicas)
        ready = sum(replica.overview is not None and replica.overview.ready for replica in replicas)
        said = f"{answering} of {len(replicas)} replicas answer, {ready} ready"
    else:
        said = "ready" if overview.ready else "not ready"
    calm = view.notice is None and overview.ready and all(replica.overview for replica in replicas)
    line = Text("sidecar-daemon", "bold")
    line.append(f" {printable(overview.version)}" if overview.version else "", "")
    line.append(" · ").append(said, "green" if calm else "bold red")
    if overview.uptime_seconds is not None:
        line.append(f" · up {span(overview.uptime_seconds)}")
    place = printable(overview.database)
    if line.cell_len + len(place) + 3 <= width:
        return [line.append(f" · {place}")]
    return [line, Text(place)]


def _notices(view: View, lost: str | None, width: int) -> list[Text]:
    said = [f"not ready: {reason}" for reason in view.overview.reasons]
    if view.notice is not None:
        said += [view.notice, "this is the database's own view: no rates, no freshness, no history"]
    else:
        said += [f"{replica.url} does not answer: {replica.error}" for replica in view.replicas if replica.error]
    if lost is not None:
        said.append(lost)
    return [Text(line, "red") for each in said for line in _wrapped(each, width)]


def _wrapped(text: str, width: int, indent: str = "") -> list[str]:
    """A sentence that somebody must read: whole, on a few lines."""
    lines = wrap(printable(text), max(20, width), initial_indent=indent, subsequent_indent=f"{indent}  ")
    return lines[:_LONGEST_NOTICE]


def _columns(name: int, width: int) -> tuple[int, Sequence[_Column]]:
    """How wide the name may be, and the columns that fit beside it and the state."""
    for dropped in range(len(_DISPENSABLE) + 1):
        shown = [column for column in _COLUMNS if column.head not in _DISPENSABLE[:dropped]]
        left = width - sum(column.width + 1 for column in shown) - len(" working")
        if left >= min(name, _NARROWEST_NAME):
            break
    return max(1, min(name, left)), shown


def _name_width(overview: Overview) -> int:
    longest = max(len(pipeline.name) for pipeline in overview.pipelines)
    return max(len("pipeline"), min(_WIDEST_NAME, longest))


def _table_head(overview: Overview, width: int) -> Text:
    name, columns = _columns(_name_width(overview), width)
    heads = " ".join(f"{column.head:>{column.width}}" for column in columns)
    return Text(f"{'pipeline':<{name}} {'state':<7} {heads}", "bold underline")


def _pipeline(pipeline: PipelineView, overview: Overview, width: int, *, brief: bool) -> list[Text]:
    name, columns = _columns(_name_width(overview), width)
    shown = printable(pipeline.name)
    line = Text(f"{shown if len(shown) <= name else shown[: name - 1] + '…':<{name}} ")
    line.append(f"{pipeline.state:<7.7}", _STYLES.get(pipeline.state, ""))
    for column in columns:
        style = "bold red" if column.head == "dead" and pipeline.queue.dead else ""
        line.append(f" {column.cell(pipeline):>{column.width}}", style)
    trouble = [f"circuit {pipeline.circuit.replace('_', ' ')}"] if pipeline.circuit != "closed" else []
    trouble += [pipeline.reason] if pipeline.reason else []
    if pipeline.state == "paused" and not pipeline.reason:
        trouble.append(f"edits are queued; sidecar-daemon resume {pipeline.name}")
    below = [Text(told, "yellow") for told in _wrapped("; ".join(trouble), width, "  ")]
    return [line, *below] if brief else [line, *below, *_activity(pipeline, overview, width)]


def _activity(pipeline: PipelineView, overview: Overview, width: int) -> list[Text]:
    series = overview.history.series.get(pipeline.name)
    sweep = pipeline.sweep
    if sweep.walking:
        swept = f"sweeping, {short(sweep.scanned)} rows so far"
    else:
        swept = "" if sweep.age_seconds is None else f"swept {span(sweep.age_seconds)} ago"
    if series is None or not series.embedded:
        return [Text(f"  {swept}", "dim")] if swept else []
    steps = round(_MINUTES * 60 / overview.history.step_seconds)
    done = sum(value for value in series.embedded[-steps:] if value is not None)
    label = f"{short(int(done))} in {_MINUTES} min"
    room = width - 2 - 2 - len(label) - (2 + len(swept) if swept else 0)
    cells = next((cells for cells in (90, 60, 45, 36, 30, 20, 15, 10) if cells <= room), 0)
    padded = [*[None] * (steps - len(series.embedded)), *series.embedded[-steps:]]
    line = Text("  ")
    if cells:
        line.append(sparkline(padded, cells), "cyan").append("  ")
    return [line.append(f"{label}{f'  {swept}' if swept else ''}", "dim")]


def _dead_letters(overview: Overview) -> list[Text]:
    found = [(letter, pipeline.name) for pipeline in overview.pipelines for letter in pipeline.dead_letters]
    newest = sorted(found, key=lambda each: each[0].age_seconds)[:_NEWEST]
    lines = [Text("newest dead letters", "bold")] if newest else []
    for letter, name in newest:
        tried = "" if letter.attempts is None else f", {counted(letter.attempts, 'attempt')}"
        key = "a foreign message" if letter.key is None else letter.key
        line = Text(f"  {name} {printable(key if len(key) <= 40 else key[:39] + '…')}: ")
        line.append(printable(letter.reason or "no reason"), "red").append(f"{tried}, {span(letter.age_seconds)} ago")
        lines.append(line)
    return [Text(), *lines] if lines else []


def _fitted(overview: Overview, letters: list[Text], width: int, rows: int) -> tuple[list[Text], list[Text]]:
    """As much as fits: first the charts go, then the dead letters, then what is wrong, then pipelines that are well."""
    for brief, kept in ((False, letters), (True, letters), (True, [])):
        lines = [line for p in overview.pipelines for line in _pipeline(p, overview, width, brief=brief)]
        if len(lines) + len(kept) <= rows:
            return lines, kept
    ranked = sorted(overview.pipelines, key=lambda p: (p.state == "working" and p.circuit == "closed", p.name))
    shown = ranked if len(ranked) <= rows else ranked[: max(0, rows - 1)]
    lines = [_pipeline(pipeline, overview, width, brief=True)[0] for pipeline in shown]
    if hidden := len(ranked) - len(shown):
        lines.append(Text(f"and {hidden:,} more; a taller window shows them", "dim"))
    return lines, []


def _oldest(pipeline: PipelineView) -> float | None:
    known = [lane.oldest_seconds for lane in (pipeline.queue.live, pipeline.queue.bulk) if lane.depth]
    return max((seconds for seconds in known if seconds is not None), default=None)


def _compact(seconds: float | None) -> str:
    return "-" if seconds is None else span(seconds).replace(" ", "")


def _percent(share: float) -> str:
    """Rounded down, so that nearly all is never shown as all."""
    return "100%" if share >= 1 else f"{int(share * 1000) / 10:.1f}%"
