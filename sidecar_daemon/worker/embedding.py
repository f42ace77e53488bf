"""Stage 2: batches through the model on inference threads; a failing batch is tried again document by document."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import TYPE_CHECKING

from sidecar_daemon.domain.errors import Poison
from sidecar_daemon.domain.messages import Batch
from sidecar_daemon.worker.failing import fail

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sidecar_daemon.domain.messages import Document, TokenIds, Vectors
    from sidecar_daemon.domain.pulse import Beat
    from sidecar_daemon.ports import Embedder
    from sidecar_daemon.worker.state import Job, WorkerState


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
            first = batch.windows[0].document
            # Whoever waits for a suspect's turn must not hold the thread that its other windows need.
            while first.suspect and (rest := await self._state.backlog.take_rest(first)) is not None:
                await self._embed(rest)

    async def _take(self) -> Batch | None:
        backlog = self._state.backlog
        with self._beat.waiting(lambda: len(backlog) == 0):
            return await backlog.take()

    async def _embed(self, batch: Batch) -> None:
        """Run one batch; where the model refuses it, run each document alone and blame the one that fails again."""
        self._beat.turn()
        await self._announce(self._jobs(batch))
        jobs = self._jobs(batch)  # once more: leases may have been lost while a suspect waited for its turn
        wanted = Batch(tuple(window for window in batch.windows if self._state.in_flight.job_of(window.document)))
        if not jobs:
            return
        try:
            vectors = await self._infer(wanted)
        except Poison as error:
            if len(jobs) == 1:
                await fail(self._state, jobs[0], error)
                return
            for job in jobs:
                await self._embed(Batch(tuple(w for w in wanted.windows if w.document is job.document)))
        else:
            await self._collect(wanted, vectors)

    def _jobs(self, batch: Batch) -> list[Job]:
        """The documents of a batch that are still ours, once each."""
        documents: dict[int, Document] = {id(window.document): window.document for window in batch.windows}
        found = [self._state.in_flight.job_of(document) for document in documents.values()]
        return [job for job in found if job is not None]

    async def _announce(self, jobs: list[Job]) -> None:
        """Before a suspect runs, record it: if the process dies now, the blame is its own."""
        for job in jobs:
            if not job.document.suspect:
                continue
            with self._beat.waiting(partial(self._state.others_turn, job)):
                await self._state.turn(job)
            if not job.begun:
                job.begun = True
                leases = tuple(job.leases)
                await self._state.patience(partial(self._state.queue.begin, leases))

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
