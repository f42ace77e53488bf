"""Stage 2: batches through the model on inference threads; a failing batch is tried again document by document."""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import TYPE_CHECKING

from sidecar_daemon.domain.errors import Poison
from sidecar_daemon.domain.messages import Batch
from sidecar_daemon.worker.failing import fail

if TYPE_CHECKING:
    from sidecar_daemon.domain.messages import Vectors
    from sidecar_daemon.worker.state import Job, WorkerState


class EmbeddingLoop:
    """Keeps one inference thread busy."""

    def __init__(self, state: WorkerState) -> None:
        """Bind a worker's state."""
        self._state = state

    async def run(self) -> None:
        """Take batches until the backlog is closed."""
        while (batch := await self._state.backlog.take()) is not None:
            wanted = Batch(tuple(window for window in batch.windows if self._job(batch, window.document.key) is not None))
            await self._embed(batch)

    async def _embed(self, batch: Batch) -> None:
        documents = {id(window.document): window.document for window in batch.windows}
