"""Log lines and metrics, as an operator and Prometheus read them."""

from __future__ import annotations

import io
import json
import logging
import math
import time
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
import structlog
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from sidecar_daemon.domain.errors import Fatal, Poison, Transient
from sidecar_daemon.domain.log_lines import LogFormat, redact
from sidecar_daemon.domain.messages import (
    DocumentKey,
    Lane,
    LaneDepth,
    ModelId,
    Observation,
    PipelineName,
    PipelineObservation,
    SweepWindow,
)
from sidecar_daemon.domain.outcomes import Outcome
from sidecar_daemon.telemetry import CIRCUIT_STATES, BatchSettled, Telemetry, configure_logging

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DOCS = PipelineName("docs")


@pytest.fixture(autouse=True)
def loggers_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


class Seen:
    """A telemetry with what it wrote and counted."""

    def __init__(self, level: str = "info", clock: Callable[[], float] = time.monotonic) -> None:
        self.stream = io.StringIO()
        self.registry = CollectorRegistry()
        self.telemetry = Telemetry(self.registry, configure_logging(LogFormat.JSON, level, self.stream), clock=clock)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]

    def events(self) -> list[str]:
        return [line["event"] for line in self.lines()]

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)


def observation(**keys: Any) -> PipelineObservation:
    """A pipeline's observation; what is not said is idle."""
    idle = LaneDepth(0, 0, 0.0)
    usual = {"enabled": True, "live": idle, "bulk": idle, "dead": 0, "documents": 200, "wanting": 20}
    walk = {"walking": True, "scanned": 40, "sweep_age_seconds": 30.0}
    return PipelineObservation(pipeline=DOCS, **{**usual, **walk, **keys})


def test_a_settled_batch_is_one_line_and_its_metrics() -> None:
    seen = Seen()
    outcomes = {Outcome.EMBEDDED: 5, Outcome.SUPERSEDED: 1, Outcome.GONE: 0}
    fresh = [(Lane.LIVE, 0.02), (Lane.LIVE, 0.5), (Lane.BULK, 0.3)]
    seen.telemetry.batch_settled(BatchSettled(DOCS, 6, outcomes, fresh, 0.0042, 9, [1, 1, 3]))
    (line,) = seen.lines()
    timestamp = line.pop("timestamp")
    assert timestamp.endswith("Z")
    assert "T" in timestamp
    assert line == {
        "event": "batch_settled",
        "level": "info",
        "pipeline": "docs",
        "documents": 6,
        "embedded": 5,
        "superseded": 1,
        "settle_ms": 4.2,
        "freshness_max_ms": 500.0,
        "pending": 9,
    }
    assert seen.value("sidecar_documents_total", pipeline="docs", outcome="embedded") == 5
    assert seen.value("sidecar_documents_total", pipeline="docs", outcome="superseded") == 1
    assert seen.value("sidecar_freshness_seconds_count", pipeline="docs", lane="live") == 2
    assert seen.value("sidecar_freshness_seconds_count", pipeline="docs", lane="bulk") == 1
    assert seen.value("sidecar_freshness_seconds_bucket", pipeline="docs", lane="live", le="0.025") == 1
    assert seen.value("sidecar_settle_seconds_sum", pipeline="docs") == 0.0042
    assert seen.value("sidecar_document_attempts_bucket", pipeline="docs", le="1.0") == 2
    assert seen.value("sidecar_document_attempts_count", pipeline="docs") == 3


def test_a_batch_without_a_vector_says_zero_embedded() -> None:
    seen = Seen()
    seen.telemetry.batch_settled(BatchSettled(DOCS, 1, {Outcome.GONE: 1}, [], 0.001, 0))
    (line,) = seen.lines()
    assert (line["embedded"], line["gone"], line["freshness_max_ms"]) == (0, 1, None)


def test_stages_are_measured_and_told_only_at_debug() -> None:
    for level, events in (("info", []), ("debug", ["leased", "batch_embedded"])):
        seen = Seen(level)
        seen.telemetry.leased(DOCS, Lane.BULK, 8, 7, 0.003)
        seen.telemetry.tokenized(DOCS, 0.001, windows=5, kept=3)
        seen.telemetry.batch_embedded(
            DOCS, Lane.LIVE, documents=2, windows=3, tokens=100, padded_tokens=120, seconds=0.05
        )
        assert seen.events() == events
        assert seen.value("sidecar_leased_messages_total", pipeline="docs", lane="bulk") == 8
        assert seen.value("sidecar_lease_seconds_count", pipeline="docs", lane="bulk") == 1
        assert seen.value("sidecar_tokenize_seconds_count", pipeline="docs") == 1
        assert seen.value("sidecar_windows_total", pipeline="docs") == 3
        assert seen.value("sidecar_documents_windowed_total", pipeline="docs") == 1
        assert seen.value("sidecar_documents_truncated_total", pipeline="docs") == 1
        for name, total in {"documents": 2, "windows": 3, "tokens": 100, "padded_tokens": 120}.items():
            assert seen.value(f"sidecar_batch_{name}_sum", pipeline="docs", lane="live") == total
        assert seen.value("sidecar_inference_seconds_sum", pipeline="docs", lane="live") == 0.05


def test_an_outage_is_told_once_a_cause_and_summed_up() -> None:
    seen = Seen()
    away = Transient("connection_lost", "the server closed the connection")
    for _ in range(3):
        seen.telemetry.fault("docs", away, waiting=0.51234)
    seen.telemetry.fault("docs", Transient("starting_up", "the server is starting"), waiting=1)
    seen.telemetry.fault("docs", away, waiting=1)
    seen.telemetry.recovered("docs", 12.34567)
    seen.telemetry.recovered("docs", 0)
    first, second, last = seen.lines()
    assert (first["event"], first["level"], first["scope"]) == ("fault", "warning", "docs")
    assert (first["code"], first["cause"]) == ("connection_lost", "the server closed the connection")
    assert first["retry_in_seconds"] == 0.512
    assert "remedy" in first
    assert second["code"] == "starting_up"
    assert (last["event"], last["away_seconds"], last["failed_tries"]) == ("recovered", 12.346, 5)
    assert last["codes"] == ["connection_lost", "starting_up"]
    assert seen.value("sidecar_faults_total", scope="docs", code="connection_lost") == 4
    seen.telemetry.fault("docs", away, waiting=1)
    assert seen.events()[3:] == ["fault"]


def test_a_circuit_is_in_one_state_at_a_time() -> None:
    seen = Seen()
    for state in ("open", "half_open", "closed"):
        seen.telemetry.circuit("docs", state)
        shown = {each: seen.value("sidecar_circuit_state", scope="docs", state=each) for each in CIRCUIT_STATES}
        assert shown == {each: float(each == state) for each in CIRCUIT_STATES}


def test_outages_of_different_scopes_do_not_hide_one_another() -> None:
    seen = Seen()
    seen.telemetry.fault("docs", Transient("x", "one"), waiting=1)
    seen.telemetry.fault("titles", Fatal("x", "two"), waiting=1)
    assert [(line["scope"], line["level"]) for line in seen.lines()] == [("docs", "warning"), ("titles", "error")]


def test_one_cause_that_several_scopes_meet_is_told_by_the_first_of_them() -> None:
    seen = Seen()
    away = Transient("connection_lost", "the server closed the connection")
    for scope in ("docs", "titles", "database"):
        for _ in range(2):
            seen.telemetry.fault(scope, away, waiting=1)
    assert seen.value("sidecar_faults_total", scope="titles", code="connection_lost") == 2
    seen.telemetry.recovered("titles", 3)
    seen.telemetry.recovered("docs", 4)
    assert [(line["event"], line["scope"]) for line in seen.lines()] == [("fault", "docs"), ("recovered", "docs")]
    seen.telemetry.fault("database", away, waiting=1)  # which is still away
    seen.telemetry.recovered("database", 9)
    told = [(line["event"], line["scope"]) for line in seen.lines()[2:]]
    assert told == [("fault", "database"), ("recovered", "database")]
    assert seen.lines()[3]["failed_tries"] == 3


@pytest.mark.parametrize(("reason", "words"), [("too_large", "SIDECAR_MAX_DOCUMENT_BYTES"), ("new", "mend the cause")])
def test_a_dead_letter_is_told_with_the_remedy_of_its_reason(reason: str, words: str) -> None:
    seen = Seen()
    seen.telemetry.dead_lettered(DOCS, DocumentKey("42"), reason, attempts=1)
    (line,) = seen.lines()
    assert words in line["remedy"]
    assert line["remedy"].endswith("again: dead-letters replay docs --all")


def test_set_aside_and_put_off_documents() -> None:
    seen = Seen()
    seen.telemetry.deferred(DOCS, DocumentKey("7"), "model_error", attempt=2, delay=3.5)
    seen.telemetry.dead_lettered(DOCS, DocumentKey("42"), "bad_vector", attempts=5)
    seen.telemetry.dead_lettered(DOCS, None, "malformed", attempts=1)
    seen.telemetry.documents(DOCS, Outcome.DEAD_LETTERED, 2)
    deferred, dead, malformed = seen.lines()
    assert (deferred["event"], deferred["attempt"], deferred["retry_in_seconds"]) == ("deferred", 2, 3.5)
    assert (dead["event"], dead["key"], dead["reason"], dead["attempts"]) == ("dead_lettered", "42", "bad_vector", 5)
    assert "dead-letters list docs" in dead["remedy"]
    assert malformed["key"] is None
    assert seen.value("sidecar_deferrals_total", pipeline="docs", reason="model_error") == 1
    assert seen.value("sidecar_dead_lettered_total", pipeline="docs", reason="bad_vector") == 1
    assert seen.value("sidecar_documents_total", pipeline="docs", outcome="dead_lettered") == 2


def test_labels_stay_few_and_well_formed() -> None:
    seen = Seen()
    for number in range(200):
        seen.telemetry.deferred(DOCS, None, f"reason_{number}", attempt=1, delay=1)
    seen.telemetry.dead_lettered(DOCS, None, "the text of a document", attempts=1)
    samples = [
        sample.labels["reason"]
        for family in seen.registry.collect()
        for sample in family.samples
        if sample.name == "sidecar_deferrals_total"
    ]
    assert len(samples) == 65
    assert seen.value("sidecar_deferrals_total", pipeline="docs", reason="other") == 136
    assert seen.value("sidecar_dead_lettered_total", pipeline="docs", reason="other") == 1


def test_gauges_follow_the_snapshot_and_forget_what_is_detached() -> None:
    now = [100.0]
    seen = Seen(clock=lambda: now[0])
    deep = observation(live=LaneDepth(5, 2, 1.5), bulk=LaneDepth(100, 0, 60), dead=3, enabled=False)
    seen.telemetry.observed(Observation((deep,), 7.5, 12))
    now[0] = 103.0
    assert seen.value("sidecar_queue_depth", pipeline="docs", lane="live") == 5
    assert seen.value("sidecar_queue_in_flight", pipeline="docs", lane="live") == 2
    assert seen.value("sidecar_queue_oldest_age_seconds", pipeline="docs", lane="bulk") == 60
    assert seen.value("sidecar_dead_letters", pipeline="docs") == 3
    assert seen.value("sidecar_pipeline_paused", pipeline="docs") == 1
    assert seen.value("sidecar_source_documents", pipeline="docs") == 200
    assert seen.value("sidecar_coverage_ratio", pipeline="docs") == 0.9
    assert seen.value("sidecar_sweep_age_seconds", pipeline="docs") == 30
    assert seen.value("sidecar_sweep_walk_scanned", pipeline="docs") == 40
    assert seen.value("sidecar_oldest_transaction_age_seconds") == 7.5
    assert seen.value("sidecar_oldest_xmin_age_transactions") == 12
    assert seen.value("sidecar_snapshot_age_seconds") == 3
    seen.telemetry.observed(Observation((), None, None))
    assert seen.value("sidecar_queue_depth", pipeline="docs", lane="live") is None
    assert seen.value("sidecar_queue_oldest_age_seconds", pipeline="docs", lane="bulk") is None
    assert seen.value("sidecar_dead_letters", pipeline="docs") is None
    assert seen.value("sidecar_coverage_ratio", pipeline="docs") is None
    assert math.isnan(seen.value("sidecar_oldest_xmin_age_transactions") or 0)


@pytest.mark.parametrize(
    ("documents", "wanting", "queued", "dead", "coverage"),
    [
        (None, None, 0, 0, None),
        (0, 0, 0, 0, 1.0),
        (200, 20, 100, 3, 0.9),  # a queue full of edits of documents that were fine
        (200, 200, 40, 10, 0.75),  # a backfill on its way
        (200, 200, 0, 0, 1.0),
        (10, 30, 40, 0, 0.0),
    ],
)
def test_coverage_between_two_walks(
    documents: int | None, wanting: int | None, queued: int, dead: int, coverage: float | None
) -> None:
    seen = observation(live=LaneDepth(queued, 0, 0), dead=dead, documents=documents, wanting=wanting)
    assert seen.coverage == coverage


def test_a_pipeline_comes_and_goes() -> None:
    seen = Seen()
    seen.telemetry.pipeline_refused(DOCS, "the pipeline has another model")
    seen.telemetry.pipeline_refused(DOCS, "the pipeline has another model")
    assert seen.value("sidecar_up", pipeline="docs") == 0
    seen.telemetry.pipeline_started(DOCS, ModelId("tiny@1"))
    assert seen.value("sidecar_up", pipeline="docs") == 1
    assert seen.value("sidecar_model_info", pipeline="docs", model_id="tiny@1") == 1
    seen.telemetry.pipeline_started(DOCS, ModelId("tiny@2"))
    assert seen.value("sidecar_model_info", pipeline="docs", model_id="tiny@1") is None
    seen.telemetry.pipeline_stopped(DOCS, "paused")
    assert seen.value("sidecar_up", pipeline="docs") == 0
    assert seen.value("sidecar_model_info", pipeline="docs", model_id="tiny@2") is None
    assert seen.events() == ["pipeline_refused", "pipeline_started", "pipeline_started", "pipeline_stopped"]


def test_a_circuit_does_not_stay_open_after_its_pipeline() -> None:
    seen = Seen()
    seen.telemetry.fault("docs", Transient("lock_timeout", "a writer holds its row"), waiting=1)
    seen.telemetry.circuit("docs", "half_open")
    seen.telemetry.pipeline_stopped(DOCS, "paused")
    assert seen.value("sidecar_circuit_state", scope="docs", state="closed") == 1
    assert seen.value("sidecar_circuit_state", scope="docs", state="half_open") == 0


def test_pipelines_that_come_and_go_leave_no_series_and_take_no_ones_place() -> None:
    seen = Seen()
    for number in range(100):
        name = PipelineName(f"docs{number}")
        seen.telemetry.pipeline_started(name, ModelId("tiny@1"))
        for state in ("open", "closed"):
            seen.telemetry.circuit(name, state)
        seen.telemetry.pipeline_stopped(name, "detached")
        assert seen.value("sidecar_circuit_state", scope=name, state="closed") == 1
        seen.telemetry.pipeline_gone(name)
    assert "docs" not in generate_latest(seen.registry).decode()
    seen.telemetry.pipeline_gone(DOCS)  # nobody ever worked on it


def test_a_sweep_is_told_when_it_found_something() -> None:
    seen = Seen()
    quiet = SweepWindow("walked", 100, 0, 0, 0, 0, 0, backfill=False)
    seen.telemetry.swept(DOCS, quiet, 0.01)
    seen.telemetry.swept(DOCS, SweepWindow("walked", 100, 3, 1, 0, 0, 4, backfill=False), 0.02)
    seen.telemetry.swept(DOCS, SweepWindow("finished", 10, 0, 0, 0, 0, 0, backfill=True), 0.02)
    found, finished = seen.lines()
    assert (found["missing"], found["outdated"], found["enqueued"], found["sweep_ms"]) == (3, 1, 4, 20.0)
    assert (finished["state"], finished["backfill"]) == ("finished", True)
    assert seen.value("sidecar_sweep_scanned_total", pipeline="docs") == 210
    assert seen.value("sidecar_sweep_found_total", pipeline="docs", kind="missing") == 3
    assert seen.value("sidecar_sweep_enqueued_total", pipeline="docs") == 4
    assert seen.value("sidecar_sweep_seconds_count", pipeline="docs") == 3


def test_the_registry_is_what_prometheus_parses() -> None:
    seen = Seen()
    seen.telemetry.event("daemon_started", threads=2)
    text = generate_latest(seen.registry).decode()
    families = {family.name for family in text_string_to_metric_families(text)}
    assert "sidecar_build_info" in families
    assert not any(name.endswith("_created") for name in families)
    assert seen.lines()[0]["threads"] == 2


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("cannot reach postgresql://me:s3cret@db/app?x=1", "cannot reach postgresql://me:***@db/app?x=1"),
        ("postgres://:s3cret@db and redis://u:s3@cret@h/0", "postgres://:***@db and redis://u:***@h/0"),
        ("host=db password=s3cret dbname=x", "host=db password=*** dbname=x"),
        (r"password='s3\'cret 2' dbname=x", "password=*** dbname=x"),
        ("postgresql://?user=me&password=s3cret&host=h", "postgresql://?user=me&password=***&host=h"),
        ("http://localhost:8088/status is up", "http://localhost:8088/status is up"),
        ("postgresql://me@db:5432/app", "postgresql://me@db:5432/app"),
    ],
)
def test_passwords_are_redacted(text: str, safe: str) -> None:
    assert redact(text) == safe
    seen = Seen()
    seen.telemetry.event("odd", cause=text, nested={"list": [text]}, thing=Transient("x", text))
    (line,) = seen.lines()
    assert line["cause"] == safe
    assert line["nested"] == {"list": [safe]}
    assert line["thing"] == safe


def test_libraries_speak_through_the_same_pipeline() -> None:
    seen = Seen()
    logging.getLogger("uvicorn.error").info("Started server process")
    logging.getLogger("asyncpg").warning("lost %s", "postgres://me:s3cret@db")
    (line,) = seen.lines()
    assert (line["event"], line["library"], line["message"]) == ("library", "asyncpg", "lost postgres://me:***@db")
    assert line["level"] == "warning"


def fail(error: Exception, cause: Exception | None = None) -> None:
    raise error from cause


def test_an_exception_is_told_without_what_a_driver_quotes() -> None:
    seen = Seen()
    quoting = asyncpg.InvalidTextRepresentationError("invalid input syntax: 'secret document'")
    logger = structlog.get_logger("sidecar_daemon")
    try:
        fail(Poison("bad_value", "the document cannot be stored"), quoting)
    except Poison:
        logger.exception("crashed")
        logging.getLogger("asyncio").exception("Task failed\nfuture: %r", quoting)
    for line in seen.lines():
        assert "secret document" not in json.dumps(line)
        assert "InvalidTextRepresentationError (SQLSTATE 22P02)" in line["exception"]
        assert "Poison[bad_value]: the document cannot be stored" in line["exception"]
        assert "test_an_exception_is_told" in line["exception"]


def test_pythons_own_errors_keep_their_words_short() -> None:
    seen = Seen()
    try:
        fail(ValueError("why " + "x" * 5000))
    except ValueError:
        structlog.get_logger("sidecar_daemon").exception("crashed")
    (line,) = seen.lines()
    assert "ValueError: why xxx" in line["exception"]
    assert len(line["exception"]) < 600


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_auto_is_console_on_a_terminal_and_json_elsewhere() -> None:
    for stream, is_json in ((io.StringIO(), True), (Terminal(), False)):
        configure_logging(LogFormat.AUTO, "info", stream).info("hello", cause="postgres://me:s3cret@db")
        assert stream.getvalue().startswith("{") is is_json
        assert "hello" in stream.getvalue()
        assert "s3cret" not in stream.getvalue()


def test_configuring_twice_writes_once() -> None:
    first = io.StringIO()
    configure_logging(LogFormat.JSON, "info", first)
    second = io.StringIO()
    configure_logging(LogFormat.CONSOLE, "warning", second).warning("hello")
    assert first.getvalue() == ""
    assert second.getvalue().count("hello") == 1
