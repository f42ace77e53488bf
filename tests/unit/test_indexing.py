"""Memory of an index build, and what the log tells of an index that was put off."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar_daemon.domain.indexing import IndexState, build_memory, graph_bytes
from sidecar_daemon.domain.messages import LaneDepth, Observation, PipelineName, PipelineObservation
from sidecar_daemon.domain.wording import amount
from tests.rig import Told

if TYPE_CHECKING:
    from collections.abc import Callable

NOTES, LETTERS = PipelineName("notes"), PipelineName("letters")
SIZES = st.integers(0, 1 << 45)


def seen(*pipelines: tuple[PipelineName, IndexState, bool]) -> Observation:
    idle: dict[str, Any] = {"live": LaneDepth(0, 0, 0.0), "bulk": LaneDepth(0, 0, 0.0), "dead": 0, "enabled": True}
    walk: dict[str, Any] = {"documents": 9, "wanting": 0, "walking": False, "scanned": 9, "sweep_age_seconds": 1.0}
    return Observation(
        tuple(
            PipelineObservation(pipeline=name, **idle, **walk, index=state, backfilling=backfilling)
            for name, state, backfilling in pipelines
        ),
        None,
        None,
    )


@pytest.fixture
def told() -> Callable[[Observation], list[str]]:
    """Observe, and say which pipelines were told of so far."""
    kept = Told()

    def observe(snapshot: Observation) -> list[str]:
        kept.telemetry.observed(snapshot)
        return [line["pipeline"] for line in kept.events("index_deferred")]

    return observe


def test_an_index_that_is_still_deferred_after_the_load_is_told_once(
    told: Callable[[Observation], list[str]],
) -> None:
    assert told(seen((NOTES, IndexState.DEFERRED, True), (LETTERS, IndexState.LIVE, False))) == []
    assert told(seen((NOTES, IndexState.DEFERRED, False), (LETTERS, IndexState.LIVE, False))) == ["notes"]
    assert told(seen((NOTES, IndexState.DEFERRED, False))) == ["notes"]


def test_an_index_that_is_still_deferred_after_the_next_load_is_told_again(
    told: Callable[[Observation], list[str]],
) -> None:
    after = [len(told(seen((NOTES, IndexState.DEFERRED, loads)))) for loads in (False, True, True, False, False)]
    assert after == [1, 1, 1, 2, 2]


@pytest.mark.parametrize("between", [IndexState.LIVE, IndexState.BUILDING, IndexState.INVALID])
def test_an_index_that_is_put_off_again_is_told_again(
    told: Callable[[Observation], list[str]], between: IndexState
) -> None:
    for state in (IndexState.DEFERRED, between, IndexState.DEFERRED):
        after = told(seen((NOTES, state, False)))
    assert after == ["notes", "notes"]


def test_what_is_told_names_the_command() -> None:
    kept = Told()
    kept.telemetry.observed(seen((NOTES, IndexState.DEFERRED, False)))
    (line,) = kept.events("index_deferred")
    assert line["remedy"].endswith("sidecar-daemon index build notes")


@given(SIZES, SIZES, SIZES)
def test_the_memory_of_a_build_is_what_it_needs_within_bounds(needed: int, least: int, most: int) -> None:
    given_memory = build_memory(needed, least=least, most=most)
    assert given_memory >= least
    assert given_memory <= max(least, most)
    if least <= needed <= most:
        assert given_memory == needed


def test_the_graph_of_a_million_documents() -> None:
    assert amount(graph_bytes(1_000_000, 384)) == "2.2 GB"


@pytest.mark.parametrize(
    ("size", "words"),
    [(0, "0 kB"), (8192, "8 kB"), (1 << 20, "1.0 MB"), (64 << 20, "64 MB"), (10 << 30, "10 GB"), (3 << 40, "3,072 GB")],
)
def test_amounts_of_memory(size: int, words: str) -> None:
    assert amount(size) == words
