"""The last quarter of an hour in memory: what is kept, for how long, and how exact the quantiles are."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from sidecar_daemon.domain.messages import Lane, LaneDepth, Observation, PipelineName, PipelineObservation
from sidecar_daemon.domain.outcomes import Outcome
from sidecar_daemon.telemetry import BatchSettled, Telemetry
from sidecar_daemon.telemetry.recent import (
    CARRIED_STEPS,
    LONGEST,
    QUANTILE_ERROR,
    SHORTEST,
    STEP_SECONDS,
    STEPS,
    Freshness,
    Recent,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

DOCS, TITLES = PipelineName("docs"), PipelineName("titles")
MINUTE = 60.0


@dataclass
class Clocked:
    """A history whose time the test turns."""

    seconds: float = 1000.0
    recent: Recent = field(init=False)

    def __post_init__(self) -> None:
        self.recent = Recent(lambda: self.seconds)

    def embed(self, count: int = 1) -> None:
        self.recent.documents(DOCS, Outcome.EMBEDDED, count)

    def look(self, depth: int, *, names: Iterable[PipelineName] = (DOCS,)) -> None:
        self.recent.observed(Observation(tuple(observation(name, depth) for name in names), None, None))


def observation(name: PipelineName, depth: int) -> PipelineObservation:
    """One message in the bulk lane beside these in the live one."""
    return PipelineObservation(
        pipeline=name,
        enabled=True,
        live=LaneDepth(depth, 0, 0),
        bulk=LaneDepth(1, 0, 0),
        dead=0,
        documents=None,
        wanting=None,
        walking=False,
        scanned=0,
        sweep_age_seconds=None,
    )


def nearest_rank(values: list[float], q: float) -> float:
    return sorted(values)[math.ceil(q * len(values)) - 1]


@given(st.lists(st.floats(SHORTEST, LONGEST), min_size=1, max_size=300))
def test_quantiles_are_within_the_promised_error(values: list[float]) -> None:
    clocked = Clocked()
    for value in values:
        clocked.recent.freshness(DOCS, value)
    found = clocked.recent.quantiles(DOCS)
    assert found.count == len(values)
    for quantile, q in ((found.p50, 0.5), (found.p99, 0.99)):
        assert quantile == pytest.approx(nearest_rank(values, q), rel=QUANTILE_ERROR * 1.0001)


def test_the_error_is_below_five_percent() -> None:
    assert QUANTILE_ERROR < 0.05


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf, -1.0, 0.0, 1e300])
def test_an_odd_duration_counts_and_never_raises(odd: float) -> None:
    clocked = Clocked()
    clocked.recent.freshness(DOCS, odd)
    found = clocked.recent.quantiles(DOCS)
    assert found.count == 1
    assert found.p50 is not None
    assert SHORTEST <= found.p50 <= LONGEST * (1 + 2 * QUANTILE_ERROR)


def test_nothing_told_is_nothing_known() -> None:
    recent = Clocked().recent
    assert recent.quantiles(DOCS) == Freshness(None, None, 0)
    assert recent.outcomes(DOCS) == {}
    assert recent.rate(DOCS) == 0
    assert recent.observation(DOCS) is None
    assert recent.observed_seconds_ago() is None
    assert recent.circuit_of("docs") == "closed"
    assert recent.series(DOCS).embedded == [0]


def test_a_series_has_one_value_a_step_oldest_first() -> None:
    clocked = Clocked()
    for count in (3, 0, 5):
        clocked.embed(count)
        clocked.look(count)
        clocked.recent.freshness(DOCS, 0.1 * (count + 1))
        clocked.seconds += STEP_SECONDS
    series = clocked.recent.series(DOCS)
    assert series.embedded == [3, 0, 5, 0]
    assert series.depth == [4, 1, 6, 6]
    for quantile in (series.freshness_p50, series.freshness_p99):
        assert quantile == [
            pytest.approx(0.4, rel=0.05),
            pytest.approx(0.1, rel=0.05),
            pytest.approx(0.6, rel=0.05),
            None,
        ]


def test_a_quarter_of_an_hour_is_kept_and_not_a_step_more() -> None:
    clocked = Clocked()
    clocked.embed(7)
    clocked.recent.freshness(DOCS, 1)
    clocked.seconds += (STEPS - 1) * STEP_SECONDS
    series = clocked.recent.series(DOCS)
    assert (len(series.embedded), series.embedded[0]) == (STEPS, 7)
    assert clocked.recent.quantiles(DOCS).count == 1
    clocked.seconds += STEP_SECONDS
    series = clocked.recent.series(DOCS)
    assert (len(series.embedded), sum(series.embedded)) == (STEPS, 0)
    assert clocked.recent.quantiles(DOCS).count == 0
    assert clocked.recent.outcomes(DOCS) == {Outcome.EMBEDDED: 7}, "outcomes count from the start"


def test_a_slot_is_emptied_before_it_is_used_again() -> None:
    clocked = Clocked()
    for _ in range(3):
        clocked.embed(2)
        clocked.look(9)
        clocked.recent.freshness(DOCS, 1)
        clocked.seconds += STEPS * STEP_SECONDS
        clocked.embed(1)
        assert clocked.recent.series(DOCS).embedded[-1] == 1
        assert clocked.recent.quantiles(DOCS).count == 0
        assert clocked.recent.series(DOCS).depth == [None] * STEPS
        clocked.seconds += STEPS * STEP_SECONDS


def test_a_step_is_drawn_anew_for_every_document() -> None:
    clocked = Clocked()
    for seconds in (1.0, 10.0, 100.0):
        clocked.recent.freshness(DOCS, seconds)
        (p99,) = clocked.recent.series(DOCS).freshness_p99
        assert p99 == pytest.approx(seconds, rel=0.05)


def test_only_what_was_embedded_is_throughput() -> None:
    clocked = Clocked()
    for outcome in Outcome:
        clocked.recent.documents(DOCS, outcome, 2)
    assert clocked.recent.series(DOCS).embedded == [2]
    assert clocked.recent.outcomes(DOCS) == dict.fromkeys(Outcome, 2)


def test_a_rate_is_taken_over_the_last_minute() -> None:
    clocked = Clocked()
    clocked.embed(600)
    assert clocked.recent.rate(DOCS) == 600 / STEP_SECONDS, "a start is no division by nothing"
    clocked.seconds += MINUTE / 2
    assert clocked.recent.rate(DOCS) == 600 / (MINUTE / 2), "since the start"
    clocked.seconds += MINUTE / 2 - STEP_SECONDS
    assert clocked.recent.rate(DOCS) == 600 / (MINUTE - STEP_SECONDS)
    clocked.seconds += STEP_SECONDS
    assert clocked.recent.rate(DOCS) == 0


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(1, 50)), max_size=80))
def test_a_rate_counts_whole_steps_and_no_document_twice(told: list[tuple[float, int]]) -> None:
    clocked = Clocked()
    times: list[tuple[float, int]] = []
    for pause, count in told:
        clocked.seconds += pause
        clocked.embed(count)
        times.append((clocked.seconds, count))
    low = sum(count for at, count in times if at > clocked.seconds - (MINUTE - STEP_SECONDS))
    high = sum(count for at, count in times if at > clocked.seconds - MINUTE)
    assert low / MINUTE <= clocked.recent.rate(DOCS) <= high / STEP_SECONDS
    assert sum(clocked.recent.series(DOCS).embedded) == sum(
        count for at, count in times if at // STEP_SECONDS > clocked.seconds // STEP_SECONDS - STEPS
    )


def test_a_step_without_a_look_shows_the_last_depth_and_an_outage_a_gap() -> None:
    clocked = Clocked()
    clocked.look(4)
    clocked.seconds += (CARRIED_STEPS + 1) * STEP_SECONDS
    assert clocked.recent.series(DOCS).depth == [5] * (CARRIED_STEPS + 1) + [None]
    assert clocked.recent.observed_seconds_ago() == (CARRIED_STEPS + 1) * STEP_SECONDS
    clocked.seconds += STEP_SECONDS
    clocked.look(0)
    assert clocked.recent.series(DOCS).depth == [5] * (CARRIED_STEPS + 1) + [None, 1]
    assert clocked.recent.observed_seconds_ago() == 0


def test_a_pipeline_that_is_gone_is_forgotten_and_the_others_are_not() -> None:
    clocked = Clocked()
    clocked.look(1, names=(DOCS, TITLES))
    clocked.embed(3)
    clocked.recent.documents(TITLES, Outcome.EMBEDDED, 1)
    clocked.look(1, names=(TITLES,))
    assert clocked.recent.observation(DOCS) is None
    assert clocked.recent.outcomes(DOCS) == {}
    assert clocked.recent.outcomes(TITLES) == {Outcome.EMBEDDED: 1}
    assert clocked.recent.rate(DOCS) == 0, "what is read of nobody is never written"


def test_a_circuit_has_the_state_last_told() -> None:
    recent = Clocked().recent
    for state in ("open", "half_open", "open", "closed", "open"):
        recent.circuit("docs", state)
        assert recent.circuit_of("docs") == state
    assert recent.circuit_of("titles") == "closed"


@given(st.lists(st.tuples(st.floats(0, 2000), st.floats(0.001, 1e5)), min_size=1, max_size=200))
def test_memory_does_not_grow_with_what_is_told(told: list[tuple[float, float]]) -> None:
    clocked = Clocked()
    for pause, seconds in told:
        clocked.seconds += pause
        clocked.embed()
        clocked.recent.freshness(DOCS, seconds)
    (past,) = clocked.recent._pasts.values()
    assert len(past.ring) == STEPS
    widest = math.log2(LONGEST / SHORTEST) / math.log2(1 + QUANTILE_ERROR) + 1
    assert max(len(step.freshness) for step in past.ring) <= widest


def test_telemetry_feeds_it() -> None:
    clocked = Clocked()
    telemetry = Telemetry(CollectorRegistry(), structlog.get_logger(), clock=lambda: clocked.seconds)
    telemetry.observed(Observation((observation(DOCS, 4),), None, None))
    fresh = [(Lane.LIVE, 0.2), (Lane.BULK, 0.3)]
    telemetry.batch_settled(BatchSettled(DOCS, 3, {Outcome.EMBEDDED: 2, Outcome.GONE: 1}, fresh, 0.01, 0))
    telemetry.documents(DOCS, Outcome.DEFERRED, 1)
    telemetry.circuit("docs", "open")
    clocked.seconds += STEP_SECONDS
    recent = telemetry.recent
    assert recent.outcomes(DOCS) == {Outcome.EMBEDDED: 2, Outcome.GONE: 1, Outcome.DEFERRED: 1}
    assert recent.series(DOCS).embedded == [2, 0]
    assert recent.series(DOCS).depth == [5, 5]
    assert recent.quantiles(DOCS).count == 2
    assert recent.circuit_of("docs") == "open"
    assert recent.observation(DOCS) == observation(DOCS, 4)
    assert recent.observed_seconds_ago() == STEP_SECONDS, "by the clock that telemetry was given"
