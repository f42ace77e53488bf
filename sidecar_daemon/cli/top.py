"""``top``: every pipeline, live in a terminal."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from sidecar_daemon.cli.keyboard import Keyboard
from sidecar_daemon.cli.output import JsonFlag, console, print_json
from sidecar_daemon.cli.top_frame import frame
from sidecar_daemon.domain.errors import SidecarError
from sidecar_daemon.domain.wording import span
from sidecar_daemon.settings import Settings

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.live import Live

    from sidecar_daemon.app.watching import View, Watcher

_TOP = "Examples: sidecar-daemon top · sidecar-daemon top --url http://one:8088 --url http://two:8088 --interval 5"
_TERMINATED = 128 + signal.SIGTERM


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("top", epilog=_TOP)(top)


def top(
    *,
    url: Annotated[
        list[str] | None, typer.Option(help="A daemon's URL; repeat it for replicas. Default: this machine's.")
    ] = None,
    interval: Annotated[float, typer.Option(min=0.2, max=3600, help="Seconds from one look to the next.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Look once, print, and end; so does a pipe.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Watch every pipeline live: queues, rates, freshness, coverage, dead letters. q or Ctrl-C ends it.

    Asks running daemons; where none answers, the database itself.
    """
    from sidecar_daemon.adapters.replicas import checked_url  # noqa: PLC0415  slow to load, for this command only
    from sidecar_daemon.app.watching import Watcher, view_document  # noqa: PLC0415  likewise

    watcher = Watcher(Settings.read(), [checked_url(each) for each in url or ()], clock=time.monotonic)
    screen = console()
    screen.soft_wrap = False
    live = sys.stdout.isatty() and not screen.is_dumb_terminal
    if as_json:
        print_json(view_document(asyncio.run(watcher.look())))
    elif once or not live:
        screen.print(frame(asyncio.run(watcher.look()), screen.width))
    else:
        code = asyncio.run(_Watching(watcher, screen, interval).run())
        if code:
            raise typer.Exit(code)


class _Watching:
    """A terminal that shows one frame after the other until it is told to stop."""

    def __init__(self, watcher: Watcher, screen: Console, interval: float) -> None:
        self._watcher = watcher
        self._screen = screen
        self._interval = interval
        self._stop = asyncio.Event()
        self._code = 0
        self._view: View | None = None
        self._seen = 0.0
        self._lost: str | None = None

    def __rich_console__(self, screen: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the last look into the window as it is now."""
        if self._view is not None:
            footer = f"q ends · every {self._interval:g} s"
            age = self._view.overview.observed_seconds_ago
            footer += "" if age is None else f" · queues seen {span(age)} ago"
            lost = self._lost and f"{self._lost}; this was seen {span(time.monotonic() - self._seen)} ago"
            yield frame(self._view, screen.width, options.height or screen.height, footer=footer, lost=lost)

    async def run(self) -> int:
        """Watch; return the exit code. Raises ``SidecarError`` when already the first look fails."""
        from rich.live import Live  # noqa: PLC0415  only a terminal needs it

        loop = asyncio.get_running_loop()
        for number, code in ((signal.SIGINT, 0), (signal.SIGTERM, _TERMINATED)):
            loop.add_signal_handler(number, self._end, code)
        await self._unless_stopped(asyncio.create_task(self._look()))
        if self._stop.is_set():
            return self._code
        screen = Live(self, console=self._screen, screen=True, auto_refresh=False)
        keyboard = Keyboard(self._end)
        loop.add_signal_handler(signal.SIGWINCH, screen.refresh)
        loop.add_signal_handler(signal.SIGTSTP, self._suspend, screen, keyboard)
        with keyboard, screen:  # draws the first frame: whoever sees it may press Ctrl-Z
            while not self._stop.is_set():
                screen.refresh()
                await self._unless_stopped(asyncio.create_task(asyncio.sleep(self._interval)))
                await self._unless_stopped(asyncio.create_task(self._look_again()))
        return self._code

    async def _look(self) -> None:
        self._view = await self._watcher.look()
        self._seen, self._lost = time.monotonic(), None

    async def _look_again(self) -> None:
        try:
            await self._look()
        except SidecarError as error:  # what was seen last stays, with why there is nothing newer
            self._lost = str(error)

    async def _unless_stopped(self, task: asyncio.Task[None]) -> None:
        """Wait for a task, or for the end, which nothing may hold up."""
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait([task, stopping], return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
            if not task.done():
                task.cancel()
        if task.done():
            task.result()

    def _end(self, code: int = 0) -> None:
        self._code = code
        self._stop.set()

    def _suspend(self, screen: Live, keyboard: Keyboard) -> None:
        """Give the terminal back until the shell lets us go on."""
        loop = asyncio.get_running_loop()
        screen.stop()
        keyboard.give_back()
        loop.remove_signal_handler(signal.SIGTSTP)
        os.kill(os.getpid(), signal.SIGTSTP)  # stopped here
        loop.add_signal_handler(signal.SIGTSTP, self._suspend, screen, keyboard)
        keyboard.take()
        screen.start(refresh=True)
