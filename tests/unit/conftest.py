"""A real pipeline for the core's tests: faults are injected by wrapping, nothing is replaced."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from sidecar_daemon.domain.pulse import Pulse
from tests.faulty import FaultyEmbedder, FaultyQueue
from tests.rig import PLAIN, Told, build_worker

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sidecar_daemon.domain.messages import Pipeline
    from sidecar_daemon.worker import Worker
    from tests.rig import Rig


@dataclass
class Bench:
    """A rig with a replica whose queue and embedder can be made to fail."""

    rig: Rig
    queue: FaultyQueue
    executor: ThreadPoolExecutor
    embedder: FaultyEmbedder = field(default_factory=lambda: FaultyEmbedder(PLAIN))
    told: Told = field(default_factory=Told)
    pulse: Pulse = field(default_factory=lambda: Pulse(time.monotonic))

    async def worker(self, **limits: float) -> Worker:
        """A worker on the pipeline as it is now."""
        return self.worker_of(await self.rig.pipeline(), **limits)

    def worker_of(self, pipeline: Pipeline, **limits: float) -> Worker:
        """A worker on a pipeline."""
        return build_worker(pipeline, self.queue, self.embedder, self.told, self.executor, pulse=self.pulse, **limits)

    async def settled(self) -> bool:
        """Whether both lanes are empty."""
        return await self.rig.depth() == 0


@pytest.fixture
def bench(rig: Rig) -> Iterator[Bench]:
    """A bench whose inference threads end with the test, whatever waits at a gate."""
    executor = ThreadPoolExecutor(2)
    made = Bench(rig, FaultyQueue(rig.queue), executor)
    yield made
    made.embedder.gate.set()
    executor.shutdown()
