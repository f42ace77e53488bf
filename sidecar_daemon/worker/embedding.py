"""Stage 2: batches through the model on inference threads; a failing batch is tried again document by document."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING

from sidecar_daemon.domain.errors import Poison, Transient
from sidecar_daemon.domain.messages import Batch
from sidecar_daemon.domain.outcomes import Outcome
from sidecar_daemon.worker.failing import fail

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sidecar_daemon.domain.messages import Document, TokenIds, Vectors
    from sidecar_daemon.domain.pulse import Beat
    from sidecar_daemon.ports import Embedder
    from sidecar_daemon.worker.state import Job, WorkerState


RUN_FAILED = "inference_failed"
"""The code of a run that the runtime refused."""
PROBE = "probe"


class EmbeddingLoop:
    """Keeps one inference thread busy."""

    def __init__(self, state: WorkerState, beat: Beat) -> None:
        """Bind a worker's state, and what records this loop's turns."""
        self._state = state
        self._beat = beat

    async def run(self) -> None:
        """Take batches until the backlog is closed."""
        while (batch := await self._take()) is not None:
            await self._embed(batch)

    async def _take(self) -> Batch | None:
        backlog = self._state.backlog
        with self._beat.waiting(lambda: len(backlog) == 0):
            return await backlog.take()

    async def _embed(self, batch: Batch) -> None:
        """Run one batch; where the model refuses it, run each document alone and blame the one that fails again."""
        self._beat.turn()
        jobs = self._jobs(batch)
        wanted = Batch(tuple(window for window in batch.windows if self._state.in_flight.job_of(window.document)))
        if not jobs:
            return
        try:
            vectors = await self._infer(wanted)
        except Poison as error:
            if len(jobs) > 1:
                for job in jobs:
                    await self._embed(Batch(tuple(w for w in wanted.windows if w.document is job.document)))
            elif error.code != RUN_FAILED or await self._runs_at_all():
                await fail(self._state, jobs[0], error)
            else:
                await self._give_back(jobs[0], error)
        else:
            self._state.runtime_failing = False
            await self._collect(wanted, vectors)

    async def _runs_at_all(self) -> bool:
        """Whether the model answers to a text that is nobody's: where it does not, no document is to blame."""
        state = self._state

        def probe() -> None:
            state.embedder.embed([state.embedder.tokenize(PROBE)[0].ids])

        run = asyncio.get_running_loop().run_in_executor(state.executor, probe)
        with suppress(Poison), self._beat.computing(run.done):
            await run
            return True
        return False

    async def _give_back(self, job: Job, error: Poison) -> None:
        """Release a document unblamed for later, and tell the outage; stage 3 says when it is over."""
        state = self._state
        state.in_flight.close(job)
        await state.backlog.remove(job.document)
        state.runtime_failing = True
        state.patience.troubled(Transient("runtime_failed", str(error)), waiting=state.limits.poll_max)
        if job.leases:
            await state.patience(lambda: state.queue.release(job.leases, delay=state.limits.poll_max))
            state.done(job.leases)
            state.count(Counter({Outcome.RELEASED: 1}))

    def _jobs(self, batch: Batch) -> list[Job]:
        """The documents of a batch that are still ours, once each."""
        documents: dict[int, Document] = {id(window.document): window.document for window in batch.windows}
        found = [self._state.in_flight.job_of(document) for document in documents.values()]
        return [job for job in found if job is not None]

    async def _infer(self, batch: Batch) -> Vectors:
        """Run the model on an inference thread. Shape ``(windows, dimensions)``, float32."""
        state = self._state
        ids = [window.tokens.ids for window in batch.windows]
        run = asyncio.get_running_loop().run_in_executor(state.executor, _timed, state.embedder, ids)
        with self._beat.computing(run.done):
            vectors, seconds = await run
        state.budget.learn(batch.padded_tokens, seconds)
        state.telemetry.batch_embedded(
            state.pipeline.name,
            batch.windows[0].document.lane,
            documents=len({id(window.document) for window in batch.windows}),
            windows=len(batch.windows),
            tokens=batch.tokens,
            padded_tokens=batch.padded_tokens,
            seconds=seconds,
        )
        return vectors

    async def _collect(self, batch: Batch, vectors: Vectors) -> None:
        """Give each window's vector to its document, and complete documents to stage 3."""
        for window, vector in zip(batch.windows, vectors, strict=True):
            job = self._state.in_flight.job_of(window.document)
            if job is None:
                continue
            job.vectors[window.ordinal] = vector
            if job.complete:
                with self._beat.waiting(self._state.settlements.full):
                    await self._state.settlements.put(job)


def _timed(embedder: Embedder, ids: Sequence[TokenIds]) -> tuple[Vectors, float]:
    """Vectors, and the seconds of the run alone: threads are shared by all pipelines, and one may wait for its turn."""
    started = time.monotonic()
    return embedder.embed(ids), time.monotonic() - started
