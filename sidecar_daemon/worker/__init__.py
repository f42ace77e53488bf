"""The three stages of one pipeline: lease, embed, settle. Bounded hand-offs; nothing is held while the model runs."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING

from sidecar_daemon.domain.errors import Refused
from sidecar_daemon.domain.messages import Lane
from sidecar_daemon.domain.outcomes import Outcome
from sidecar_daemon.domain.pacing import RunBudget
from sidecar_daemon.patience import Patience
from sidecar_daemon.worker.backlog import Backlog
from sidecar_daemon.worker.embedding import EmbeddingLoop
from sidecar_daemon.worker.keeping import Keeper
from sidecar_daemon.worker.leasing import Leaser
from sidecar_daemon.worker.settling import Settler
from sidecar_daemon.worker.state import WorkerLimits, WorkerState

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Executor

    from sidecar_daemon.domain.messages import Lease, ModelId, Pipeline
    from sidecar_daemon.domain.pulse import Beat, Pulse
    from sidecar_daemon.ports import Embedder, Queue
    from sidecar_daemon.telemetry import Telemetry

__all__ = ["Worker", "WorkerLimits"]


class Worker:
    """Works on one pipeline until it is stopped or refused."""

    def __init__(
        self,
        pipeline: Pipeline,
        model_id: ModelId,
        *,
        queue: Queue,
        embedder: Embedder,
        executor: Executor,
        limits: WorkerLimits,
        telemetry: Telemetry,
        uniform: Callable[[float, float], float],
        clock: Callable[[], float],
        pulse: Pulse,
    ) -> None:
        """Wire the stages. ``executor`` runs the model; ``clock`` is monotonic, in seconds."""
        budget = RunBudget(most=limits.batch_tokens)
        self._state = WorkerState(
            pipeline=pipeline,
            model_id=model_id,
            queue=queue,
            embedder=embedder,
            executor=executor,
            limits=limits,
            telemetry=telemetry,
            patience=Patience(pipeline.name, telemetry, uniform=uniform, clock=clock, expiring=limits.expiring_seconds),
            pulse=pulse,
            uniform=uniform,
            budget=budget,
            backlog=Backlog(
                lane_tokens=limits.backlog_tokens,
                lane_windows=limits.backlog_windows,
                budget=budget,
                max_windows=limits.batch_windows,
            ),
            settlements=asyncio.Queue(maxsize=2 * limits.batch_windows * limits.threads),
        )

    @property
    def waiting(self) -> str | None:
        """What of the world this worker is waiting for, in one line; None while it works."""
        return self._state.patience.reason

    def wake(self, lane: Lane | None = None) -> None:
        """Look at once for messages of a lane, or of both."""
        for woken in Lane if lane is None else (lane,):
            self._state.wakes[woken].set()

    def stop(self) -> None:
        """End leasing; ``run`` returns once what was started is settled and the rest is released."""
        self._state.stopping.set()
        self.wake()

    async def run(self) -> None:
        """Work until ``stop``, then drain within ``limits.drain_seconds``.

        Raises:
            Refused: the pipeline is paused, detached or wants another model. What was held is released.
        """
        state = self._state
        names = [*(f"leasing {lane}" for lane in Lane), "settling", "keeping"]
        names += [f"embedding {thread}" for thread in range(1, state.limits.threads + 1)]
        with state.pulse.watch(*(f"{state.pipeline.name}: {name}" for name in names), excused=self._excused) as beats:
            await self._work(beats)

    def _excused(self) -> bool:
        """Loops may stand still while the database is away, and in a drain, which has a limit of its own."""
        return self._state.patience.away or self._state.stopping.is_set()

    async def _work(self, beats: list[Beat]) -> None:
        state = self._state
        live, bulk, settling, keeping, *embedding = beats
        loops = [
            *[Leaser(state, lane, beat).run() for lane, beat in zip(Lane, (live, bulk), strict=True)],
            *[EmbeddingLoop(state, beat).run() for beat in embedding],
        ]
        settler = asyncio.create_task(Settler(state, settling).run())
        keeper = asyncio.create_task(Keeper(state, keeping).run())
        stages = [asyncio.create_task(loop) for loop in loops]
        stopping = asyncio.create_task(state.stopping.wait())
        try:
            await asyncio.wait({*stages, settler, keeper, stopping}, return_when=asyncio.FIRST_COMPLETED)
            self.stop()
            with suppress(TimeoutError):
                async with asyncio.timeout(state.limits.drain_seconds):
                    await self._drain(stages, settler)
        finally:
            everything = [*stages, settler, keeper, stopping]
            for task in everything:
                task.cancel()
            results = await asyncio.gather(*everything, return_exceptions=True)
        errors = [e for e in results if isinstance(e, BaseException) and not isinstance(e, asyncio.CancelledError)]
        if all(isinstance(error, Refused) for error in errors):
            await self._release_rest()
        # Else a stage broke: what had begun must expire and count, or a text that breaks us would do so for ever.
        _raise_worst(errors)

    async def _drain(self, stages: list[asyncio.Task[None]], settler: asyncio.Task[None]) -> None:
        """Release what was never started, finish what was."""
        state = self._state
        waiting = await state.backlog.close()
        jobs = [job for document in waiting if (job := state.in_flight.job_of(document)) is not None]
        for job in jobs:
            state.in_flight.close(job)
        await self._release([lease for job in jobs for lease in job.leases], documents=len(jobs))
        if settler.done():  # refused or broken: nothing that still comes out of the model can be settled
            return
        left = set(stages)
        while left and not settler.done():  # a settler that ends now takes nothing more: stages would wait for ever
            await asyncio.wait({*left, settler}, return_when=asyncio.FIRST_COMPLETED)
            left = {stage for stage in left if not stage.done()}
        if not settler.done():
            await state.settlements.put(None)
            await asyncio.wait([settler])

    async def _release_rest(self) -> None:
        """The drain limit has passed, or the pipeline is not ours to work on: let others have what is still held."""
        state = self._state
        rest = list(state.in_flight.leases)
        with suppress(TimeoutError):
            async with asyncio.timeout(2):
                await self._release(rest, documents=len({lease.key for lease in rest}))

    async def _release(self, leases: list[Lease], *, documents: int) -> None:
        state = self._state
        if not leases:
            return
        with suppress(Refused):  # the queue went with its pipeline
            await state.patience(lambda: state.queue.release(leases))
        state.done(leases)
        state.count(Counter({Outcome.RELEASED: documents}))


def _raise_worst(errors: list[BaseException]) -> None:
    """Raise a bug before a refusal: a refusal is an answer, a bug ends the process."""
    for error in sorted(errors, key=lambda error: isinstance(error, Refused)):
        raise error
