"""What people see of the daemon: log lines and metrics. The one place that writes either.

Labels are bounded: pipelines, lanes, outcomes and reason codes; never a key, a text or an address. Log lines may
carry keys, which are ids. Durations are handed in; the clock of a log line decides nothing.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any

from sidecar_daemon.domain.errors import Fatal, SidecarError
from sidecar_daemon.domain.indexing import IndexState
from sidecar_daemon.domain.messages import Lane
from sidecar_daemon.domain.outcomes import Outcome
from sidecar_daemon.telemetry.logs import configure_logging, safe_message
from sidecar_daemon.telemetry.metrics import Bounded, Metrics
from sidecar_daemon.telemetry.recent import Recent
from sidecar_daemon.telemetry.remedies import poison_remedy, remedy

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from prometheus_client import CollectorRegistry
    from structlog.typing import FilteringBoundLogger

    from sidecar_daemon.domain.messages import DocumentKey, ModelId, Observation, PipelineName, SweepWindow

__all__ = ["BatchSettled", "Telemetry", "build_version", "configure_logging", "safe_message"]


CIRCUIT_STATES = ("closed", "half_open", "open")


def build_version() -> str:
    """The installed version of this package, or ``0+checkout`` when it runs uninstalled."""
    try:
        return metadata.version("sidecar-daemon")
    except metadata.PackageNotFoundError:
        return "0+checkout"


@dataclass(frozen=True, slots=True)
class BatchSettled:
    """One transaction of settle, as it is told: the canonical log line."""

    pipeline: PipelineName
    documents: int
    outcomes: Mapping[Outcome, int]
    freshness: Sequence[tuple[Lane, float]]
    """Seconds from the enqueueing to the committed vector, one for each document that has one, by its lane."""
    settle_seconds: float
    pending: int
    """Documents of this pipeline that the worker still holds."""
    attempts: Sequence[int] = ()
    """That each of the documents needed."""


@dataclass(slots=True)
class _Outage:
    tries: int = 0
    codes: list[str] = field(default_factory=list)
    told: dict[str, str] = field(default_factory=dict)
    """Causes that this scope told, by code; another scope may have told the same before."""


class Telemetry:
    """Counts and tells what happens. Called from the event loop; every method returns at once and never raises."""

    def __init__(
        self, registry: CollectorRegistry, logger: FilteringBoundLogger, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Register every metric on ``registry``; log to ``logger``; ``clock`` is monotonic, in seconds."""
        self.recent = Recent(clock)
        self._metrics = Metrics(registry)
        self._log = logger
        self._reason, self._scope = Bounded(), Bounded()
        self._outages: dict[str, _Outage] = {}
        self._models: dict[PipelineName, ModelId] = {}
        self._refused: dict[PipelineName, str] = {}
        self._observed: set[PipelineName] = set()
        self._index_told: set[PipelineName] = set()
        self._clock = clock
        self._observed_at = math.nan
        self._metrics.snapshot_age.set_function(lambda: self._clock() - self._observed_at)
        self._metrics.build.labels(build_version()).set(1)

    def event(self, name: str, **keys: Any) -> None:
        """Log a step of the daemon's life, such as ``daemon_started``, ``draining`` or ``daemon_stopped``."""
        self._log.info(name, **keys)

    def runtime_chosen(self, runtime: str, precision: str, reason: str) -> None:
        """What computes the vectors, in which precision, and why."""
        self._metrics.runtime.labels(runtime, precision).set(1)
        self._log.info("runtime_chosen", runtime=runtime, precision=precision, reason=reason)

    # The path of a document

    def leased(self, pipeline: PipelineName, lane: Lane, messages: int, documents: int, seconds: float) -> None:
        """A lease that found messages."""
        self._metrics.lease.labels(pipeline, lane.value).observe(seconds)
        self._metrics.leased.labels(pipeline, lane.value).inc(messages)
        self._log.debug(
            "leased", pipeline=pipeline, lane=lane.value, messages=messages, documents=documents, lease_ms=_ms(seconds)
        )

    def tokenized(self, pipeline: PipelineName, seconds: float, *, windows: int, kept: int) -> None:
        """One document's text became windows, of which ``kept`` go through the model."""
        self._metrics.tokenize.labels(pipeline).observe(seconds)
        self._metrics.windows.labels(pipeline).inc(kept)
        if windows > 1:
            self._metrics.windowed.labels(pipeline).inc()
        if kept < windows:
            self._metrics.truncated.labels(pipeline).inc()

    def batch_embedded(
        self,
        pipeline: PipelineName,
        lane: Lane,
        *,
        documents: int,
        windows: int,
        tokens: int,
        padded_tokens: int,
        seconds: float,
    ) -> None:
        """One run of the model."""
        labels = (pipeline, lane.value)
        self._metrics.batch_documents.labels(*labels).observe(documents)
        self._metrics.batch_windows.labels(*labels).observe(windows)
        self._metrics.batch_tokens.labels(*labels).observe(tokens)
        self._metrics.padded_tokens.labels(*labels).observe(padded_tokens)
        self._metrics.inference.labels(*labels).observe(seconds)
        self._log.debug(
            "batch_embedded",
            pipeline=pipeline,
            lane=lane.value,
            documents=documents,
            windows=windows,
            tokens=tokens,
            padded_tokens=padded_tokens,
            infer_ms=_ms(seconds),
        )

    def batch_settled(self, event: BatchSettled) -> None:
        """One settle: counts its outcomes and freshness (do not count them again) and logs the canonical line."""
        self._metrics.settle.labels(event.pipeline).observe(event.settle_seconds)
        for outcome, count in event.outcomes.items():
            self.documents(event.pipeline, outcome, count)
        for lane, seconds in event.freshness:
            self.freshness(event.pipeline, lane, seconds)
        for attempts in event.attempts:
            self._metrics.attempts.labels(event.pipeline).observe(attempts)
        counts = {outcome.value: count for outcome, count in event.outcomes.items() if count}
        self._log.info(
            "batch_settled",
            pipeline=event.pipeline,
            documents=event.documents,
            **{Outcome.EMBEDDED.value: 0, **counts},
            settle_ms=_ms(event.settle_seconds),
            freshness_max_ms=_ms(max(seconds for _, seconds in event.freshness)) if event.freshness else None,
            pending=event.pending,
        )

    def documents(self, pipeline: PipelineName, outcome: Outcome, count: int) -> None:
        """Documents that ended outside a settle: unchanged, gone, deferred, released or dead-lettered."""
        self._metrics.documents.labels(pipeline, outcome.value).inc(count)
        self.recent.documents(pipeline, outcome, count)

    def freshness(self, pipeline: PipelineName, lane: Lane, seconds: float) -> None:
        """How long one document waited, from its enqueueing, by a writer or by the sweep, to its committed vector."""
        self._metrics.freshness.labels(pipeline, lane.value).observe(seconds)
        self.recent.freshness(pipeline, seconds)

    def deferred(
        self, pipeline: PipelineName, key: DocumentKey | None, reason: str, *, attempt: int, delay: float
    ) -> None:
        """One document's attempt failed and comes again. The document is counted with ``documents``."""
        self._metrics.deferred.labels(pipeline, self._reason(reason)).inc()
        self._log.warning(
            "deferred",
            pipeline=pipeline,
            key=key,
            reason=reason,
            attempt=attempt,
            retry_in_seconds=round(delay, 3),
        )

    def dead_lettered(self, pipeline: PipelineName, key: DocumentKey | None, reason: str, *, attempts: int) -> None:
        """One document is set aside for an operator. The document is counted with ``documents``."""
        self._metrics.dead_lettered.labels(pipeline, self._reason(reason)).inc()
        self._log.error(
            "dead_lettered",
            pipeline=pipeline,
            key=key,
            reason=reason,
            attempts=attempts,
            remedy=poison_remedy(reason, pipeline),
        )

    # The world

    def fault(self, scope: str, error: SidecarError, *, waiting: float) -> None:
        """A try failed; the next comes in ``waiting`` seconds.

        Logged once for each cause of an outage: where several scopes meet one cause, by the first of them.
        """
        self._metrics.faults.labels(self._scope(scope), self._reason(error.code)).inc()
        outage = self._outages.setdefault(scope, _Outage())
        outage.tries += 1
        if error.code not in outage.codes:
            outage.codes.append(error.code)
        cause = str(error)
        if error.code in outage.told or any(o.told.get(error.code) == cause for o in self._outages.values()):
            return
        outage.told[error.code] = cause
        log = self._log.error if isinstance(error, Fatal) else self._log.warning
        log(
            "fault",
            scope=scope,
            code=error.code,
            cause=cause,
            retry_in_seconds=round(waiting, 3),
            remedy=remedy(error.code),
        )

    def circuit(self, scope: str, state: str) -> None:
        """The breaker of a pipeline or of the catalog is ``closed``, ``half_open`` or ``open``."""
        for known in CIRCUIT_STATES:
            self._metrics.circuit.labels(self._scope(scope), known).set(known == state)
        self.recent.circuit(scope, state)

    def recovered(self, scope: str, seconds: float) -> None:
        """What was away is back, after ``seconds``. Silent when nothing was away, or another scope told of it."""
        outage = self._outages.pop(scope, None)
        if outage is None or not outage.told:
            return
        self._log.info(
            "recovered", scope=scope, away_seconds=round(seconds, 3), failed_tries=outage.tries, codes=outage.codes
        )

    # The daemon itself

    def stuck(self, cause: str) -> None:
        """A loop of the daemon stands still: nothing but a restart is known to help."""
        remedy = "the watchdog is not fed and /livez answers 503, so that whoever supervises it starts it again"
        self._log.error("stuck", cause=cause, remedy=remedy)

    def moving_again(self) -> None:
        """What was ``stuck`` went on by itself."""
        self._log.info("moving_again")

    # Pipelines and their queues

    def pipeline_started(self, pipeline: PipelineName, model_id: ModelId) -> None:
        """This daemon works on the pipeline, with this model."""
        self._forget_model(pipeline)
        self._refused.pop(pipeline, None)
        self._models[pipeline] = model_id
        self._metrics.model.labels(pipeline, model_id).set(1)
        self._metrics.up.labels(pipeline).set(1)
        self._log.info("pipeline_started", pipeline=pipeline, model_id=model_id)

    def pipeline_stopped(self, pipeline: PipelineName, reason: str) -> None:
        """This daemon no longer works on the pipeline: paused, detached or draining."""
        self._forget_model(pipeline)
        self._refused.pop(pipeline, None)
        self._metrics.up.labels(pipeline).set(0)
        if self._outages.pop(pipeline, None) is not None:  # whoever comes next has a circuit of its own, closed
            self.circuit(pipeline, "closed")
        self._log.info("pipeline_stopped", pipeline=pipeline, reason=reason)

    def pipeline_refused(self, pipeline: PipelineName, reason: str) -> None:
        """This daemon cannot work on the pipeline; ``reason`` is one clear line. Logged once a reason."""
        self._forget_model(pipeline)
        self._metrics.up.labels(pipeline).set(0)
        if self._refused.get(pipeline) == reason:
            return
        self._refused[pipeline] = reason
        self._log.error("pipeline_refused", pipeline=pipeline, reason=reason)

    def pipeline_gone(self, pipeline: PipelineName) -> None:
        """The pipeline was detached: nothing is left to say of it, not even that nobody works on it."""
        self._forget_model(pipeline)
        self._refused.pop(pipeline, None)
        self._outages.pop(pipeline, None)
        self.recent.circuit(pipeline, "closed")
        self._metrics.up.remove(pipeline)
        if self._scope(pipeline) == pipeline:  # else its circuit was counted with others'
            for state in CIRCUIT_STATES:
                self._metrics.circuit.remove(pipeline, state)
            self._scope.forget(pipeline)

    def _forget_model(self, pipeline: PipelineName) -> None:
        model_id = self._models.pop(pipeline, None)
        if model_id is not None:
            self._metrics.model.remove(pipeline, model_id)

    def observed(self, snapshot: Observation) -> None:
        """How the pipelines are. One that is no longer in the snapshot leaves the metrics."""
        metrics = self._metrics
        self.recent.observed(snapshot)
        self._observed_at = self._clock()
        for seen in snapshot.pipelines:
            name = seen.pipeline
            for lane, depth in ((Lane.LIVE, seen.live), (Lane.BULK, seen.bulk)):
                metrics.depth.labels(name, lane.value).set(depth.depth)
                metrics.in_flight.labels(name, lane.value).set(depth.in_flight)
                metrics.oldest.labels(name, lane.value).set(depth.oldest_seconds)
            metrics.dead.labels(name).set(seen.dead)
            metrics.paused.labels(name).set(not seen.enabled)
            metrics.walk_scanned.labels(name).set(seen.scanned if seen.walking else 0)
            for gauge, value in (
                (metrics.source_documents, seen.documents),
                (metrics.coverage, seen.coverage),
                (metrics.sweep_age, seen.sweep_age_seconds),
            ):
                gauge.labels(name).set(_or_nan(value))
        metrics.oldest_transaction.set(_or_nan(snapshot.oldest_transaction_seconds))
        metrics.oldest_xmin.set(_or_nan(snapshot.oldest_xmin_age))
        present = {seen.pipeline for seen in snapshot.pipelines}
        for pipeline in self._observed - present:
            for family in (metrics.depth, metrics.in_flight, metrics.oldest):
                for lane in Lane:
                    family.remove(pipeline, lane.value)
            for family in (
                *(metrics.dead, metrics.paused, metrics.walk_scanned),
                *(metrics.source_documents, metrics.coverage, metrics.sweep_age),
            ):
                family.remove(pipeline)
        self._observed = present
        self._tell_of_indexes(snapshot)

    def _tell_of_indexes(self, snapshot: Observation) -> None:
        """An index that was left for after the load, once when the load is over; again after the next load."""
        deferred = {seen.pipeline: seen for seen in snapshot.pipelines if seen.index is IndexState.DEFERRED}
        self._index_told &= {pipeline for pipeline, seen in deferred.items() if not seen.backfilling}
        for pipeline, seen in deferred.items():
            if not seen.backfilling and pipeline not in self._index_told:
                self._index_told.add(pipeline)
                remedy = f"searches are exact and slow until: sidecar-daemon index build {pipeline}"
                self._log.warning("index_deferred", pipeline=pipeline, remedy=remedy)

    # The process

    def ready_when(self, ready: Callable[[], bool]) -> None:
        """Let ``sidecar_ready`` follow an answer, asked at every scrape."""
        self._metrics.ready.set_function(lambda: float(ready()))

    def loop_lag(self, seconds: float) -> None:
        """The event loop came to its turn this much too late."""
        self._metrics.loop_lag.set(seconds)

    def swept(self, pipeline: PipelineName, window: SweepWindow, seconds: float) -> None:
        """One window of the sweep. Told at ``info`` only when it found something or a backfill ended."""
        found = {
            "missing": window.missing,
            "outdated": window.outdated,
            "wrong_model": window.wrong_model,
            "surplus": window.surplus,
        }
        self._metrics.sweep.labels(pipeline).observe(seconds)
        self._metrics.swept.labels(pipeline).inc(window.scanned)
        self._metrics.enqueued.labels(pipeline).inc(window.enqueued)
        for kind, count in found.items():
            self._metrics.found.labels(pipeline, kind).inc(count)
        worth_telling = window.enqueued or (window.backfill and window.state == "finished")
        log = self._log.info if worth_telling else self._log.debug
        log(
            "swept",
            pipeline=pipeline,
            state=window.state,
            scanned=window.scanned,
            **{kind: count for kind, count in found.items() if count},
            enqueued=window.enqueued,
            backfill=window.backfill,
            sweep_ms=_ms(seconds),
        )


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1)
