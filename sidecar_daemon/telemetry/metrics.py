"""Every metric of the daemon, by Prometheus' naming conventions, with bounded labels."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prometheus_client import Counter, Gauge, Histogram, disable_created_metrics

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

_CODE = re.compile(r"^[a-z0-9_:.-]{1,64}$")
_LABELS = 64
"""Distinct values of one label of reason codes or scopes; the rest count as ``other``."""


def _buckets(*bounds: float) -> tuple[float, ...]:
    return bounds


_FRESHNESS = _buckets(
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900, 1800, 3600
)  # fmt: skip
_SECONDS = _buckets(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_ATTEMPTS = _buckets(1, 2, 3, 4, 5, 7, 10)
_COUNTS = _buckets(1, 2, 4, 8, 16, 32, 64, 128, 256)
_TOKENS = _buckets(16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True, slots=True)
class Bounded:
    """Keeps a label's values few and well formed, whatever the caller hands in."""

    seen: set[str] = field(default_factory=set)

    def __call__(self, label: str) -> str:
        """The label itself, or ``other`` when it is malformed or one too many."""
        if label in self.seen:
            return label
        if not _CODE.match(label) or len(self.seen) >= _LABELS:
            return "other"
        self.seen.add(label)
        return label

    def forget(self, label: str) -> None:
        """Make room for another."""
        self.seen.discard(label)


class Metrics:
    """Every metric, by Prometheus' naming conventions, on the registry that was handed in."""

    def __init__(self, registry: CollectorRegistry) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # untyped there; "_created" doubles a scrape for nothing

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"sidecar_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"sidecar_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"sidecar_{name}", text, labels, buckets=buckets, registry=registry)

        self.documents = counter("documents", "Documents that left the worker, by outcome.", "pipeline", "outcome")
        self.deferred = counter("deferrals", "Attempts that were put off, by reason.", "pipeline", "reason")
        # Not sidecar_dead_letters_total: a counter of that name would clash with the gauge in OpenMetrics.
        self.dead_lettered = counter("dead_lettered", "Documents dead-lettered, by reason.", "pipeline", "reason")
        self.faults = counter("faults", "Failed tries while something outside was away.", "scope", "code")
        self.circuit = gauge("circuit_state", "1 for the state that the breaker of a pipeline is in.", "scope", "state")
        self.depth = gauge("queue_depth", "Messages waiting, in flight included.", "pipeline", "lane")
        self.in_flight = gauge("queue_in_flight", "Messages under a lease.", "pipeline", "lane")
        self.oldest = gauge("queue_oldest_age_seconds", "Age of the oldest message.", "pipeline", "lane")
        self.dead = gauge("dead_letters", "Dead letters that wait for an operator.", "pipeline")
        self.paused = gauge("pipeline_paused", "1 while an operator has paused the pipeline.", "pipeline")
        self.source_documents = gauge("source_documents", "Documents that the last walk counted.", "pipeline")
        self.coverage = gauge("coverage_ratio", "Documents with a current vector, of all documents.", "pipeline")
        self.sweep_age = gauge("sweep_age_seconds", "Since the last walk of the sweep finished.", "pipeline")
        self.walk_scanned = gauge("sweep_walk_scanned", "Documents that the walk under way has seen.", "pipeline")
        self.oldest_transaction = gauge(
            "oldest_transaction_age_seconds", "Age of the database's oldest transaction, whoever's."
        )
        self.oldest_xmin = gauge(
            "oldest_xmin_age_transactions", "Transactions begun since the oldest snapshot that holds vacuum back."
        )
        self.snapshot_age = gauge("snapshot_age_seconds", "Age of the snapshot that the queue gauges come from.")
        self.ready = gauge("ready", "1 while this daemon is doing all of its work.")
        self.loop_lag = gauge("event_loop_lag_seconds", "Longest delay of the event loop within the last 15 seconds.")
        self.attempts = histogram("document_attempts", "Attempts that a document needed.", _ATTEMPTS, "pipeline")
        self.windowed = counter("documents_windowed", "Documents longer than one window.", "pipeline")
        self.truncated = counter("documents_truncated", "Documents of which only the first window counts.", "pipeline")
        self.batch_documents = histogram("batch_documents", "Documents a batch.", _COUNTS, "pipeline", "lane")
        self.batch_windows = histogram("batch_windows", "Windows a batch.", _COUNTS, "pipeline", "lane")
        self.batch_tokens = histogram("batch_tokens", "Tokens a batch.", _TOKENS, "pipeline", "lane")
        self.padded_tokens = histogram("batch_padded_tokens", "Tokens with padding.", _TOKENS, "pipeline", "lane")
        self.lease = histogram("lease_seconds", "Leasing and reading.", _SECONDS, "pipeline", "lane")
        self.leased = counter("leased_messages", "Messages leased.", "pipeline", "lane")
        self.tokenize = histogram("tokenize_seconds", "Text to windows.", _SECONDS, "pipeline")
        self.windows = counter("windows", "Windows tokenized.", "pipeline")
        self.inference = histogram("inference_seconds", "One run of the model.", _SECONDS, "pipeline", "lane")
        self.settle = histogram("settle_seconds", "One settle transaction.", _SECONDS, "pipeline")
        self.freshness = histogram(
            "freshness_seconds", "Enqueueing to committed vector.", _FRESHNESS, "pipeline", "lane"
        )
        self.up = gauge("up", "1 while this daemon works on the pipeline.", "pipeline")
        self.model = gauge("model_info", "The model that is loaded for a pipeline.", "pipeline", "model_id")
        self.runtime = gauge("runtime_info", "1, with what computes the vectors.", "runtime", "precision")
        self.swept = counter("sweep_scanned", "Documents compared by the sweep.", "pipeline")
        self.found = counter("sweep_found", "Documents the sweep found wanting.", "pipeline", "kind")
        self.enqueued = counter("sweep_enqueued", "Messages the sweep sent.", "pipeline")
        self.sweep = histogram("sweep_seconds", "One window of the sweep.", _SECONDS, "pipeline")
        self.build = gauge("build_info", "1, with the version of the daemon.", "version")
