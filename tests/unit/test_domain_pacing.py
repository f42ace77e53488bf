"""Counts turned into time: how many messages a lease takes, how many tokens a run."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sidecar_daemon.domain.pacing import MIN_RUN_TOKENS, LeaseHorizon, RunBudget

MOST = 256


@given(
    st.integers(0, 1 << 20),
    st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 1 << 20)), max_size=20),
)
def test_a_lease_is_never_empty_and_never_above_its_limit(room: int, seen: list[tuple[int, int]]) -> None:
    horizon = LeaseHorizon(most=MOST)
    for messages, tokens in seen:
        horizon.learn(messages, tokens)
        assert 1 <= horizon.messages(room) <= MOST


@pytest.mark.parametrize(("tokens", "wanted"), [(10, MOST), (100, 164), (4000, 5), (100_000, 1)])
def test_a_lease_brings_what_there_is_room_for(tokens: int, wanted: int) -> None:
    """Whatever the documents are like, after a few leases the work that they bring fits."""
    horizon = LeaseHorizon(most=MOST)
    for _ in range(60):
        messages = horizon.messages(16_384)
        horizon.learn(messages, messages * tokens)
    assert horizon.messages(16_384) == pytest.approx(wanted, abs=1)


def test_messages_that_bring_nothing_are_leased_by_the_limit() -> None:
    horizon = LeaseHorizon(most=MOST)
    for _ in range(10):
        horizon.learn(horizon.messages(1024), 0)
    assert horizon.messages(1024) == MOST


def test_one_large_document_does_not_make_the_next_lease_small() -> None:
    """A single message weighs less than a lease full of them."""
    horizon = LeaseHorizon(most=MOST)
    for _ in range(10):
        horizon.learn(MOST, MOST * 50)
    horizon.learn(1, 4000)
    assert horizon.messages(16_384) > 10


@pytest.mark.parametrize(("tokens_a_second", "wanted"), [(100.0, 64), (2000.0, 500), (1e6, 1024)])
def test_the_budget_is_fitted_to_the_duration_of_a_run(tokens_a_second: float, wanted: int) -> None:
    budget = RunBudget(most=1024, target_seconds=0.25)
    assert budget.tokens == 1024
    for _ in range(50):
        budget.learn(budget.tokens, budget.tokens / tokens_a_second)
    assert budget.tokens == pytest.approx(wanted, rel=0.01)


def test_the_budget_follows_a_machine_that_becomes_slower_and_faster() -> None:
    budget = RunBudget(most=1024, target_seconds=0.25)
    for speed in (4000.0, 1000.0, 3000.0):
        for _ in range(60):
            budget.learn(budget.tokens, budget.tokens / speed)
        assert budget.tokens == pytest.approx(speed * 0.25, rel=0.05)


def test_short_runs_say_little() -> None:
    """Titles on an idle machine must not make the budget of the next backfill small."""
    budget = RunBudget(most=1024, target_seconds=0.25)
    budget.learn(1024, 0.25)
    for _ in range(5):
        budget.learn(10, 0.02)
    assert budget.tokens > 900


@example(1, [(1, 1e-320), (1, 1.0)])  # no time at all, by the clock
@given(
    st.integers(1, 4096),
    st.lists(
        st.tuples(st.integers(-1, 1 << 20), st.floats(-1.0, 1e4, allow_nan=False, allow_subnormal=False)), max_size=30
    ),
)
def test_a_budget_stays_between_its_bounds(most: int, runs: list[tuple[int, float]]) -> None:
    budget = RunBudget(most=most)
    for padded_tokens, seconds in runs:
        budget.learn(padded_tokens, seconds)
        assert min(most, MIN_RUN_TOKENS) <= budget.tokens <= most
