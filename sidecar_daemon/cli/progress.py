"""Progress of a model pull: a bar on a terminal, a line a step elsewhere. Always on stderr."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from sidecar_daemon.cli.output import console, note

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.progress import TaskID

    from sidecar_daemon.adapters.onnx.progress import PullStep


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
