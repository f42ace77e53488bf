"""One worker and one sweeper per pipeline: started, stopped and replaced as the pipelines of the database change.

Crash-only: an error that nobody named ends ``run`` and with it the process; leases expire, systemd restarts.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

from sidecar_daemon.domain.errors import Fatal, Refused, Transient
from sidecar_daemon.domain.messages import Lane, Pipeline, PipelineName

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection

    from sidecar_daemon.domain.messages import ModelId
    from sidecar_daemon.domain.pulse import Beat, Pulse
    from sidecar_daemon.patience import Patience
    from sidecar_daemon.ports import Catalog
    from sidecar_daemon.sweeper import Sweeper
    from sidecar_daemon.telemetry import Telemetry
    from sidecar_daemon.worker import Worker

RECONCILE_SECONDS = 2.0
"""How long a change of the pipelines may go unnoticed when its notification is lost."""
OBSERVE_SECONDS = 5.0
OBSERVATION = "observation"
"""The scope of a fault that leaves the gauges as they are."""
REFUSALS = {"unknown_pipeline": "detached"}
"""What a refusal of the database means for a crew, where its code does not say."""


@dataclass(slots=True, eq=False)
class Crew:
    """Who works on one pipeline."""

    model_id: ModelId
    worker: Worker
    sweeper: Sweeper


StaffState = Literal["working", "paused", "refused", "waiting"]
"""What this daemon does about a pipeline. Paused is an operator's wish; waiting is for the database or a crew."""


@dataclass(frozen=True, slots=True)
class Staffed:
    """One pipeline, as this daemon is concerned with it."""

    pipeline: Pipeline
    state: StaffState
    reason: str | None
    """Why it does not work, in one line; None while it does, or while it is paused."""


@dataclass(slots=True, eq=False)
class _Post:
    pipeline: Pipeline
    crew: Crew
    task: asyncio.Task[str]
    """Ends with why."""


class Supervisor:
    """Keeps every pipeline staffed."""

    def __init__(
        self,
        catalog: Catalog,
        *,
        hire: Callable[[Pipeline, Beat], Awaitable[Crew]],
        only: Collection[str],
        telemetry: Telemetry,
        patience: Patience,
        pulse: Pulse,
    ) -> None:
        """Bind the catalog.

        Args:
            catalog: the pipelines that exist.
            hire: loads a pipeline's model and wires its crew; raises ``Fatal`` (no model) or ``Refused`` (another). Its
                beat is to be excused while a model is being loaded.
            only: names of the pipelines to work on; empty for all.
            telemetry: told what happens.
            patience: waits out the database's outages.
            pulse: judges whether the supervisor's own loops move.
        """
        self._catalog = catalog
        self._hire = hire
        self._only = frozenset(only)
        self._telemetry = telemetry
        self._patience = patience
        self._pulse = pulse
        self._posts: dict[PipelineName, _Post] = {}
        self._refusals: dict[PipelineName, str] = {}
        self._known: dict[PipelineName, Pipeline] = {}
        """What the catalog said last, by name."""
        self._wake = asyncio.Event()
        self._reconciled = False
        self._draining = False

    def notified(self, payload: str) -> None:
        """Wake whom a notification names: ``live:``, ``bulk:``, ``sweep:`` or ``catalog:`` and a pipeline."""
        kind, _, name = payload.partition(":")
        post = self._posts.get(PipelineName(name))
        if kind == "catalog" or post is None:
            self._wake.set()
        elif kind == "sweep":
            post.crew.sweeper.wake()
        else:
            post.crew.worker.wake(next((lane for lane in Lane if lane.value == kind), None))

    def look_everywhere(self) -> None:
        """Wake everybody: notifications may have been lost."""
        self._wake.set()
        for post in self._posts.values():
            post.crew.worker.wake()
            post.crew.sweeper.wake()

    def not_ready(self) -> list[str]:
        """Why this daemon is not doing all of its work, one line a reason; empty when it is."""
        if self._draining:
            return ["draining"]
        reasons = [self._patience.reason] if self._patience.reason else []
        if not self._reconciled:
            return reasons or ["starting"]
        reasons += [
            f"{name}: {post.crew.worker.waiting}" for name, post in self._posts.items() if post.crew.worker.waiting
        ]
        return reasons + [f"{name}: {reason}" for name, reason in sorted(self._refusals.items())]

    def staffed(self) -> list[Staffed]:
        """Every pipeline that is this daemon's to work on, paused ones too, by name."""
        return [self._staffed(p) for n, p in self._known.items() if not self._only or n in self._only]

    def _staffed(self, pipeline: Pipeline) -> Staffed:
        if not pipeline.enabled:
            return Staffed(pipeline, "paused", None)
        if pipeline.name in self._refusals:
            return Staffed(pipeline, "refused", self._refusals[pipeline.name])
        post = self._posts.get(pipeline.name)
        waiting = "starting" if post is None else "stopping" if post.task.done() else post.crew.worker.waiting
        waiting = "draining" if self._draining else waiting
        return Staffed(pipeline, "waiting" if waiting else "working", waiting)

    async def run(self, stop: asyncio.Event) -> None:
        """Staff the pipelines until ``stop`` is set, then drain.

        A pipeline whose model cannot be loaded is refused, at the start as later, and tried again at every look.

        Raises:
            Exception: a bug in a stage.
        """
        with self._pulse.watch("supervising", "observing", excused=self._excused) as (supervising, observing):
            await self._supervise(stop, supervising, observing)

    def _excused(self) -> bool:
        """Its loops may stand still while the database is away, and in a drain, which has a limit of its own."""
        return self._patience.away or self._draining

    async def _supervise(self, stop: asyncio.Event, supervising: Beat, observing: Beat) -> None:
        watchers = [
            asyncio.create_task(stop.wait()),
            asyncio.create_task(self._reconcile_forever(supervising)),
            asyncio.create_task(self._observe_forever(observing)),
        ]
        try:
            while not stop.is_set():
                posts = [post.task for post in self._posts.values() if not post.task.done()]
                await asyncio.wait([*watchers, *posts], return_when=asyncio.FIRST_COMPLETED, timeout=RECONCILE_SECONDS)
                for task in [*watchers, *posts]:
                    if task.done():
                        task.result()
                if any(task.done() for task in posts):
                    self._wake.set()
        finally:
            self._draining = True
            for task in watchers:
                task.cancel()
            await asyncio.gather(*watchers, return_exceptions=True)
            await self._dismiss(list(self._posts.values()), "draining")

    async def _reconcile_forever(self, beat: Beat) -> None:
        while True:
            beat.turn()
            self._wake.clear()
            await self._reconcile(await self._patience(self._catalog.pipelines), beat)
            self._reconciled = True
            with suppress(TimeoutError):
                async with asyncio.timeout(RECONCILE_SECONDS):
                    await self._wake.wait()

    async def _reconcile(self, pipelines: list[Pipeline], beat: Beat) -> None:
        """Dismiss who works on what changed; hire for what is not staffed."""
        known = {pipeline.name: pipeline for pipeline in pipelines}
        gone = self._known.keys() - known.keys() - self._only
        self._known = known
        wanted = {n: p for n, p in known.items() if p.enabled and (not self._only or n in self._only)}
        self._refusals = {n: reason for n, reason in self._refusals.items() if n in wanted}
        for name in self._only - known.keys():
            self._refuse(PipelineName(name), "no such pipeline; known: " + (", ".join(sorted(known)) or "none"))
        finished = [post for post in self._posts.values() if post.task.done()]
        changed = [
            p for p in self._posts.values() if not p.task.done() and not _same(p.pipeline, wanted.get(p.pipeline.name))
        ]
        for post in finished:
            del self._posts[post.pipeline.name]
            self._telemetry.pipeline_stopped(post.pipeline.name, post.task.result())
        for post in changed:
            found = known.get(post.pipeline.name)
            why = "detached" if found is None else "changed" if found.enabled else "paused"
            with beat.waiting(partial(_at_work, post)):
                await self._dismiss([post], why)
        for name in gone:
            self._telemetry.pipeline_gone(name)
        for name, pipeline in wanted.items():
            if name not in self._posts:
                await self._staff(pipeline, beat)

    async def _staff(self, pipeline: Pipeline, beat: Beat) -> None:
        beat.turn()  # a call of the database for each pipeline, and each may be slow
        try:
            crew = await self._patience(lambda: self._hire(pipeline, beat))
        except (Refused, Fatal) as error:  # its own misfortune, not its neighbours'; the next look tries again
            self._refuse(pipeline.name, str(error))
            return
        self._refusals.pop(pipeline.name, None)
        self._telemetry.pipeline_started(pipeline.name, crew.model_id)
        self._posts[pipeline.name] = _Post(pipeline, crew, asyncio.create_task(_work(crew), name=pipeline.name))

    async def _dismiss(self, posts: list[_Post], reason: str) -> None:
        """Drain crews, all at once."""
        for post in posts:
            post.crew.worker.stop()
        if posts:  # wait, not gather: when this call is cancelled because the daemon stops, the crews drain on
            await asyncio.wait([post.task for post in posts])
        for post in posts:
            self._posts.pop(post.pipeline.name, None)
            self._telemetry.pipeline_stopped(post.pipeline.name, reason)
        for post in posts:
            post.task.result()

    def _refuse(self, name: PipelineName, reason: str) -> None:
        self._refusals[name] = reason
        self._telemetry.pipeline_refused(name, reason)

    async def _observe_forever(self, beat: Beat) -> None:
        """Keep the gauges a few seconds old. One look that fails is no news: of an outage the others tell first."""
        clock = asyncio.get_running_loop().time
        since: float | None = None
        while True:
            beat.turn()
            try:
                self._telemetry.observed(await self._catalog.observe())
            except Transient as error:
                if since is None:
                    since = clock()
                else:
                    self._telemetry.fault(OBSERVATION, error, waiting=OBSERVE_SECONDS)
            else:
                if since is not None:
                    self._telemetry.recovered(OBSERVATION, clock() - since)
                since = None
            await asyncio.sleep(OBSERVE_SECONDS)


async def _work(crew: Crew) -> str:
    """Work until the worker is stopped; a refusal ends quietly, the next reconcile looks again. Returns why."""
    sweeping = asyncio.create_task(crew.sweeper.run())
    working = asyncio.create_task(crew.worker.run())
    try:
        await asyncio.wait([sweeping, working], return_when=asyncio.FIRST_COMPLETED)
    finally:
        crew.worker.stop()
        sweeping.cancel()
        results = await asyncio.gather(working, sweeping, return_exceptions=True)
    why = "stopped"
    for result in results:
        if isinstance(result, Refused):
            why = REFUSALS.get(result.code, result.code)
        elif isinstance(result, Exception):
            raise result
    return why


def _at_work(post: _Post) -> bool:
    return not post.task.done()


def _same(mine: Pipeline, theirs: Pipeline | None) -> bool:
    """Whether a pipeline is what the crew was hired for; its model id may have been registered since."""
    return theirs is not None and replace(mine, model_id=None) == replace(theirs, model_id=None)
