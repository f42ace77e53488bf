"""The daemon: start-up, main loop, shutdown."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from collections import deque
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, generate_latest

from sidecar_daemon.adapters.allocator import give_memory_back
from sidecar_daemon.adapters.http import HttpState, build_app, serve
from sidecar_daemon.adapters.postgres.listener import Listener
from sidecar_daemon.adapters.postgres.migrate import check_version
from sidecar_daemon.adapters.postgres.operations import PostgresOperations
from sidecar_daemon.adapters.postgres.pool import Database
from sidecar_daemon.adapters.postgres.queue import PostgresCatalog
from sidecar_daemon.adapters.systemd import ServiceNotifier
from sidecar_daemon.app.clock import elapsed
from sidecar_daemon.app.crews import Hiring, Parts
from sidecar_daemon.app.documents import status_document
from sidecar_daemon.app.overview import Letters, Overviews
from sidecar_daemon.app.runtimes import choose_runtime, this_machine
from sidecar_daemon.app.service import Service
from sidecar_daemon.domain.log_lines import LogFormat
from sidecar_daemon.domain.pulse import Pulse
from sidecar_daemon.patience import Patience
from sidecar_daemon.settings import Pooler, Settings, installed_folder
from sidecar_daemon.supervisor import Supervisor
from sidecar_daemon.telemetry import Telemetry, build_version, configure_logging
from sidecar_daemon.telemetry.remedies import remedy

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from sidecar_daemon.domain.errors import SidecarError

LAG_STEP_SECONDS = 0.25


def run_daemon(settings: Settings, parts: Parts | None = None) -> int:
    """Run until SIGTERM or SIGINT.

    Args:
        settings: everything that can be set.
        parts: other implementations of the ports, for tests of a whole process.

    Returns:
        0 after a drain.

    Raises:
        Fatal: it cannot start, or must not go on; one clear line.
        Exception: a bug. The process ends, its leases expire, whoever supervises it starts it again.
    """
    logger = configure_logging(settings.log.format, settings.log.level, sys.stderr)
    give_memory_back(max(2, settings.model.threads))
    return asyncio.run(_Daemon(settings, parts or Parts(), logger).run())


def tell_fatal(error: SidecarError) -> None:
    """Tell as one JSON line on stderr, at every level, why the daemon does not start or does not go on."""
    logger = configure_logging(LogFormat.JSON, "critical", sys.stderr)
    logger.critical("fatal", code=error.code, cause=str(error), remedy=remedy(error.code))


class _Daemon:
    """Everything that lives as long as the process."""

    def __init__(self, settings: Settings, parts: Parts, logger: FilteringBoundLogger) -> None:
        self._settings = settings
        self._parts = parts
        self._logger = logger
        self._registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self._registry)
        self._telemetry = Telemetry(self._registry, logger, clock=elapsed)
        self._notifier = ServiceNotifier(settings.service.notify_socket)
        # Not the clock of the outages: while the machine is suspended nothing moves, and nothing is stuck.
        self._pulse = Pulse(time.monotonic, parts.still_seconds)
        self._stop = asyncio.Event()
        self._closing = asyncio.Event()
        """Set after the drain: the endpoints answer until then."""

    async def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._ask_to_stop, signal.Signals(number).name)
        settings = self._settings
        choice = choose_runtime(settings.model.runtime, this_machine())
        async with AsyncExitStack() as stack:
            database = await Database.open(
                settings.database.require_url(),
                pooler_mode=settings.database.pooler is Pooler.TRANSACTION,
                application_name="sidecar_daemon",
            )
            stack.push_async_callback(database.close)
            self._telemetry.runtime_chosen(choice.runtime, choice.precision, choice.reason)
            hiring = Hiring(settings, database, self._telemetry, self._parts, self._pulse)
            stack.callback(hiring.close)
            lag = asyncio.create_task(_watch_lag(self._telemetry))
            stack.callback(lag.cancel)
            supervisor = Supervisor(
                PostgresCatalog(database),
                hire=hiring.hire,
                only=settings.pipelines,
                telemetry=self._telemetry,
                patience=self._patience("database"),
                pulse=self._pulse,
            )
            await self._main_loop(database, supervisor)
        self._telemetry.event("daemon_stopped")
        return 0

    async def _main_loop(self, database: Database, supervisor: Supervisor) -> None:
        """Serve the endpoints, listen, and supervise; the first error ends all of them."""
        starting = self._patience("database")

        def on_bound(port: int) -> None:
            self._telemetry.event(
                "daemon_started",
                version=build_version(),
                pid=os.getpid(),
                http=f"http://{self._settings.http.host}:{port}",
                database=database.place,
                threads=self._settings.model.threads,
            )

        def not_ready() -> list[str]:
            if self._stop.is_set():
                return ["draining"]
            reasons = supervisor.not_ready()
            return [starting.reason] if starting.reason is not None and reasons == ["starting"] else reasons

        def ready() -> tuple[bool, list[str]]:
            reasons = not_ready()
            return not reasons, reasons

        self._telemetry.ready_when(lambda: not not_ready())

        async def status() -> dict[str, Any]:
            return status_document(await PostgresOperations(database).status())

        letters = Letters(PostgresOperations(database).newest_dead_letters, clock=elapsed)
        service = Service(
            self._notifier,
            self._pulse,
            watchdog_seconds=self._settings.service.watchdog_seconds,
            not_ready=not_ready,
            registry=self._registry,
            telemetry=self._telemetry,
        )
        app = build_app(
            HttpState(
                alive=service.alive,
                ready=ready,
                metrics=lambda: generate_latest(self._registry),
                status=status,
                overview=Overviews(
                    version=build_version(),
                    database=database.place,
                    ready=ready,
                    staffed=supervisor.staffed,
                    recent=self._telemetry.recent,
                    letters=letters,
                    clock=elapsed,
                ),
                version=build_version(),
            )
        )
        http = self._settings.http
        endpoints = asyncio.create_task(serve(app, http.host, http.port, self._closing, on_bound))
        work = asyncio.create_task(self._work(database, supervisor, starting))
        reporting = asyncio.create_task(service.run())
        await asyncio.wait([endpoints, work, reporting], return_when=asyncio.FIRST_COMPLETED)
        self._closing.set()
        letters.close()
        self._stop.set()
        results = await asyncio.gather(endpoints, work, return_exceptions=True)
        reporting.cancel()
        for result in [*results, *await asyncio.gather(reporting, return_exceptions=True)]:
            if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError):
                raise result

    async def _work(self, database: Database, supervisor: Supervisor, starting: Patience) -> None:
        """Check the schema once the database answers, then supervise until told to stop."""
        checking = asyncio.create_task(starting(lambda: check_version(database, installed_folder("sql"))))
        stopping = asyncio.create_task(self._stop.wait())
        await asyncio.wait([checking, stopping], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not checking.done():
            checking.cancel()
            return
        checking.result()
        listening = asyncio.create_task(self._listen(supervisor))
        try:
            await supervisor.run(self._stop)
        finally:
            self._stop.set()
            await listening

    async def _listen(self, supervisor: Supervisor) -> None:
        url = self._settings.database.notify_url()
        if url is None:
            self._telemetry.event("listening_off", reason="a transaction pooler stands in between: polling instead")
            return
        with self._pulse.watch("listening", excused=self._stop.is_set) as (beat,):
            listener = Listener(
                url,
                on_notify=supervisor.notified,
                on_connected=supervisor.look_everywhere,
                logger=self._logger,
                on_turn=beat.turn,
                asleep=beat.asleep,
                setting=f"SIDECAR_{'LISTEN' if self._settings.database.listen_url else 'DATABASE'}_URL",
            )
            try:
                await listener.run(self._stop)
            except BaseException:
                self._stop.set()  # else nobody would hear of it before the end
                raise

    def _patience(self, scope: str) -> Patience:
        self._telemetry.circuit(scope, "closed")  # there from the start: an alert asks for it before any outage
        return Patience(scope, self._telemetry, uniform=random.uniform, clock=elapsed)

    def _ask_to_stop(self, name: str) -> None:
        if not self._stop.is_set():
            self._telemetry.event("draining", signal=name, seconds=self._settings.worker.drain_seconds)
            self._notifier.stopping("draining")
            self._stop.set()


async def _watch_lag(telemetry: Telemetry) -> None:
    """Tell how late the event loop comes to its turns: the largest delay of the last fifteen seconds."""
    late: deque[float] = deque(maxlen=round(15 / LAG_STEP_SECONDS))
    while True:
        before = elapsed()
        await asyncio.sleep(LAG_STEP_SECONDS)
        late.append(max(0.0, elapsed() - before - LAG_STEP_SECONDS))
        telemetry.loop_lag(max(late))
