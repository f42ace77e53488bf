"""What the service manager hears of this daemon: when it is ready, that it moves, what it is doing."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from prometheus_client import CollectorRegistry

    from sidecar_daemon.adapters.systemd import ServiceNotifier
    from sidecar_daemon.domain.pulse import Pulse
    from sidecar_daemon.telemetry import Telemetry

REPORT_SECONDS = 1.0
"""Between two looks at what the daemon is doing."""
EXTENSION_SECONDS = 60.0
"""What a start that goes on is given until its next word, which comes after a third of it."""
MOST_STARTING_SECONDS = 900.0
"""After which a start is not helped any more: a load that hangs moves as little as a slow one."""
RATE_SECONDS = 10.0
"""What the documents per second of a status line are taken over."""
_UP, _DEPTH, _DOCUMENTS = "sidecar_up", "sidecar_queue_depth", "sidecar_documents_total"


class Service:
    """Reports to the service manager for as long as it runs; without one it only judges the loops, for ``/livez``."""

    def __init__(
        self,
        notifier: ServiceNotifier,
        pulse: Pulse,
        *,
        watchdog_seconds: float | None,
        not_ready: Callable[[], list[str]],
        registry: CollectorRegistry,
        telemetry: Telemetry,
    ) -> None:
        """Tell nothing yet.

        Args:
            notifier: the socket of the service manager, where there is one.
            pulse: whether the loops move.
            watchdog_seconds: the service manager ends a process that says nothing for this long; None: it does not.
            not_ready: why work is not being done, one line a reason; ``["starting"]`` at first.
            registry: the daemon's metrics, the source of the numbers in a status line.
            telemetry: told when a loop is stuck.
        """
        self._notifier = notifier
        self._pulse = pulse
        self._watchdog_seconds = watchdog_seconds
        self._not_ready = not_ready
        self._figures = registry.restricted_registry([_UP, _DEPTH, _DOCUMENTS])
        self._telemetry = telemetry
        self._stuck: str | None = None
        self._embedded = (time.monotonic(), 0.0)
        self._rate = 0.0

    async def run(self) -> None:
        """Report until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._report())
            group.create_task(self._ask_for_time())
            if self._watchdog_seconds is not None:
                group.create_task(self._feed(self._watchdog_seconds / 3))

    def alive(self) -> tuple[bool, str]:
        """Whether the process should be left alone, and a line that says why. Never asks the database."""
        stuck = self._pulse.stuck()
        return stuck is None, stuck or "every loop moves"

    async def _feed(self, seconds: float) -> None:
        """Feed the watchdog while the daemon moves. On the event loop, so that a blocked one starves it."""
        while True:
            if self._pulse.stuck() is None:
                self._notifier.watchdog()
            await asyncio.sleep(seconds)

    async def _ask_for_time(self) -> None:
        """While the daemon starts, and moves, no limit of the service manager ends it: many models are slow to load."""
        step = EXTENSION_SECONDS / 3
        for _ in range(int(MOST_STARTING_SECONDS / step)):
            if self._not_ready() != ["starting"]:
                return
            if self._pulse.stuck() is None:
                self._notifier.extend_timeout(EXTENSION_SECONDS)
            await asyncio.sleep(step)

    async def _report(self) -> None:
        """Say that start-up is over, once, and what the daemon is doing, whenever that changes."""
        ready, told = False, ""
        while True:
            stuck = self._pulse.stuck()
            self._tell_stuck(stuck)
            reasons = self._not_ready()
            line = f"stuck: {stuck}" if stuck else self._status(reasons)
            if not ready and reasons != ["starting"]:
                # Staffed, or the world is away: an outage must not hold up the boot, nor end in a failed start.
                self._notifier.ready(line)
                ready = True
            elif line != told:
                self._notifier.status(line)
            told = line
            await asyncio.sleep(REPORT_SECONDS if ready else REPORT_SECONDS / 10)

    def _tell_stuck(self, stuck: str | None) -> None:
        if stuck and not self._stuck:
            self._telemetry.stuck(stuck)
        elif self._stuck and not stuck:
            self._telemetry.moving_again()
        self._stuck = stuck

    def _status(self, reasons: list[str]) -> str:
        """What ``systemctl status`` shows."""
        if reasons in (["starting"], ["draining"]):
            return reasons[0]
        if reasons:
            return f"waiting: {reasons[0]}" + (f" (and {len(reasons) - 1} more)" if reasons[1:] else "")
        totals = self._totals()
        then, before = self._embedded
        if (elapsed := time.monotonic() - then) >= RATE_SECONDS:
            self._rate = (totals[_DOCUMENTS] - before) / elapsed
            self._embedded = (then + elapsed, totals[_DOCUMENTS])
        pipelines = f"{totals[_UP]:.0f} pipeline{'' if totals[_UP] == 1 else 's'}"
        return f"working: {pipelines}, {totals[_DEPTH]:.0f} messages in the queues, {self._rate:.1f} documents/s"

    def _totals(self) -> dict[str, float]:
        totals = {_UP: 0.0, _DEPTH: 0.0, _DOCUMENTS: 0.0}
        for family in self._figures.collect():
            for sample in family.samples:
                if sample.name in totals and sample.labels.get("outcome", "embedded") == "embedded":
                    totals[sample.name] += sample.value
        return totals
