"""Wires the crew of one pipeline: its queue, its model, its worker and its sweeper."""

from __future__ import annotations

import asyncio
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sidecar_daemon.adapters.onnx.manifest import find_manifest
from sidecar_daemon.adapters.postgres.queue import PostgresCatalog, PostgresQueue
from sidecar_daemon.app.clock import elapsed
from sidecar_daemon.app.model_files import known_manifests
from sidecar_daemon.app.runtimes import load_onnx
from sidecar_daemon.domain.errors import Fatal
from sidecar_daemon.domain.pulse import STILL_SECONDS
from sidecar_daemon.patience import Patience
from sidecar_daemon.supervisor import Crew
from sidecar_daemon.sweeper import Sweeper, SweepLimits
from sidecar_daemon.worker import Worker, WorkerLimits

if TYPE_CHECKING:
    from collections.abc import Callable

    from sidecar_daemon.adapters.onnx.manifest import Manifest
    from sidecar_daemon.adapters.postgres.pool import Database
    from sidecar_daemon.domain.messages import Pipeline
    from sidecar_daemon.domain.pulse import Beat, Pulse
    from sidecar_daemon.ports import Embedder, Queue
    from sidecar_daemon.settings import ModelSettings, Settings
    from sidecar_daemon.telemetry import Telemetry


@dataclass(frozen=True, slots=True)
class Parts:
    """The one seam for tests of a whole process: what the two ports are made of, when a loop counts as stuck."""

    load_embedder: Callable[[Manifest, ModelSettings], Embedder] = load_onnx
    wrap_queue: Callable[[Queue], Queue] = lambda queue: queue
    still_seconds: float = STILL_SECONDS


class Hiring:
    """Hires crews. Pipelines with one model share its weights; all share the inference threads."""

    def __init__(
        self, settings: Settings, database: Database, telemetry: Telemetry, parts: Parts, pulse: Pulse
    ) -> None:
        """Read the manifests; load no model yet. Raises ``Fatal`` for a manifest that cannot be read."""
        self._settings = settings
        self._parts = parts
        self._database = database
        self._telemetry = telemetry
        self._pulse = pulse
        self._manifests = known_manifests(settings)
        self._embedders: dict[str, Embedder] = {}
        self._executor = ThreadPoolExecutor(settings.model.threads, thread_name_prefix="inference")

    async def hire(self, pipeline: Pipeline, beat: Beat) -> Crew:
        """Load the pipeline's model and wire its crew. ``beat`` is excused while the model is being loaded.

        Raises:
            Fatal: the model is unknown, missing, damaged, or makes vectors of another length.
            Refused: the pipeline wants another version of the model.
        """
        embedder = await self._embedder(pipeline.model, beat)
        if embedder.dimensions != pipeline.dimensions:
            raise Fatal(
                "wrong_dimensions",
                f"model {pipeline.model} makes vectors of {embedder.dimensions} dimensions, pipeline {pipeline.name} "
                f"has {pipeline.dimensions}: detach it and attach it again",
            )
        model_id = embedder.model_id(pipeline.long_documents)
        await PostgresCatalog(self._database).register_model(pipeline, model_id)
        worker = self._settings.worker
        queue = self._parts.wrap_queue(
            PostgresQueue(self._database, pipeline.name, model_id, max_document_bytes=worker.max_document_bytes)
        )
        return Crew(
            model_id=model_id,
            worker=Worker(
                pipeline,
                model_id,
                queue=queue,
                embedder=embedder,
                executor=self._executor,
                limits=self._limits(),
                telemetry=self._telemetry,
                uniform=random.uniform,
                clock=elapsed,
                pulse=self._pulse,
            ),
            sweeper=Sweeper(
                pipeline.name,
                queue=queue,
                limits=SweepLimits(
                    interval=self._settings.sweep.interval,
                    rows=self._settings.sweep.rows,
                    duty=self._settings.sweep.duty,
                ),
                telemetry=self._telemetry,
                patience=Patience(pipeline.name, self._telemetry, uniform=random.uniform, clock=elapsed),
                uniform=random.uniform,
                pulse=self._pulse,
            ),
        )

    def close(self) -> None:
        """Let the inference threads end."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _embedder(self, model: str, beat: Beat) -> Embedder:
        if model not in self._embedders:
            manifest = find_manifest(self._manifests, model)
            settings = self._settings.model
            loading = asyncio.create_task(asyncio.to_thread(self._parts.load_embedder, manifest, settings))
            with beat.computing(loading.done):
                self._embedders[model] = await loading
        return self._embedders[model]

    def _limits(self) -> WorkerLimits:
        worker = self._settings.worker
        return WorkerLimits(
            threads=self._settings.model.threads,
            batch_tokens=worker.batch_tokens,
            batch_windows=worker.batch_windows,
            lease_seconds=worker.lease_seconds,
            lease_messages=worker.lease_messages,
            max_attempts=worker.max_attempts,
            backoff_base=worker.backoff_base,
            backoff_cap=worker.backoff_cap,
            poll_min=worker.poll_min,
            poll_max=worker.poll_max,
            drain_seconds=worker.drain_seconds,
        )
