"""Progress of a model pull and of an index build: a bar on a terminal, lines elsewhere. Always on stderr."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.progress import BarColumn, DownloadColumn, Progress, TaskProgressColumn, TextColumn, TransferSpeedColumn

from sidecar_daemon.cli.output import console, note

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.progress import TaskID

    from sidecar_daemon.adapters.onnx.progress import PullStep
    from sidecar_daemon.app.indexing import IndexStep


@contextmanager
def pull_progress() -> Iterator[Callable[[PullStep], None]]:
    """What to tell the steps of a pull."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console(stderr=True), transient=True) as bars:
        yield _Bars(bars)


class _Lines:
    """One line whenever another thing is being done."""

    def __init__(self) -> None:
        self._last: tuple[str, str] | None = None

    def __call__(self, step: PullStep) -> None:
        if self._last != (step.doing, step.what):
            self._last = (step.doing, step.what)
            note(f"{step.model}: {step.doing} {step.what}")


class _Bars:
    """One bar a thing being done."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[tuple[str, str], TaskID] = {}

    def __call__(self, step: PullStep) -> None:
        known = (step.doing, step.what)
        if known not in self._tasks:
            self._tasks[known] = self._bars.add_task(f"{step.model}: {step.doing} {step.what}", total=step.total)
        self._bars.update(self._tasks[known], completed=step.done, total=step.total)


@contextmanager
def index_progress(pipeline: str) -> Iterator[Callable[[IndexStep], None]]:
    """What to tell the steps of an index build."""
    if not sys.stderr.isatty():
        yield _IndexLines(pipeline)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, console=console(stderr=True), transient=True) as bars:
        yield _IndexBar(pipeline, bars)


class _IndexLines:
    """One line a phase, and one whenever a tenth of it is done."""

    def __init__(self, pipeline: str) -> None:
        self._pipeline = pipeline
        self._last: tuple[str, int] | None = None

    def __call__(self, step: IndexStep) -> None:
        tenths = 10 * step.done // step.total if step.total and step.done is not None else 0
        if self._last != (step.phase, tenths):
            self._last = (step.phase, tenths)
            percent = f" {10 * tenths} %" if tenths else ""
            note(f"{self._pipeline}: {step.phase}{percent}{step.detail}")


class _IndexBar:
    """One bar for what is being done now."""

    def __init__(self, pipeline: str, bars: Progress) -> None:
        self._pipeline = pipeline
        self._bars = bars
        self._task = bars.add_task(pipeline, total=None)

    def __call__(self, step: IndexStep) -> None:
        line = f"{self._pipeline}: {step.phase}{step.detail}"
        if step.lasting:
            self._bars.console.print(line)
        self._bars.update(self._task, description=line, completed=step.done or 0, total=step.total)
