"""Blame by SQLSTATE, and the bounds of every wait."""

from __future__ import annotations

import math
import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sidecar_daemon.domain.retry import Blame, backoff, blame, ceiling, full_jitter

WORLD = [
    "08000",
    "08001",
    "08003",
    "08004",
    "08006",
    "08P01",
    "57P01",
    "57P02",
    "57P03",
    "57P05",
    "40001",
    "40003",
    "40P01",
    "53000",
    "53100",
    "53200",
    "53300",
    "55P03",
    "55000",
    "55006",
    "57014",
    "23502",
    "25006",
    "25P03",
    "42501",
    "42P01",
    "42883",
    "42703",
    "42704",
    "3F000",
    "3D000",
    "0A000",
    "28P01",
    "28000",
    "58030",
    "XX001",
    "XX002",
]
MESSAGE = [
    "22001",
    "22021",
    "22P02",
    "22P05",
    "22000",
    "23503",
    "23505",
    "23514",
    "44000",
    "54000",
    "54001",
    "P0001",
]
OURS = ["42601", "42725", "42P13", "25P02", "26000", "XX000", "00000", "0Z000", "SC001"]

seconds = st.floats(min_value=1e-3, max_value=1e6)
attempts = st.integers(min_value=1, max_value=10**9)


@pytest.mark.parametrize(("states", "culprit"), [(WORLD, Blame.WORLD), (MESSAGE, Blame.MESSAGE), (OURS, Blame.OURS)])
def test_every_named_state_has_its_culprit(states: list[str], culprit: Blame) -> None:
    assert {state: blame(state) for state in states} == dict.fromkeys(states, culprit)


@given(
    st.sampled_from(["08", "40", "53", "55", "57"]),
    st.text(alphabet=string.digits + string.ascii_uppercase, min_size=3, max_size=3),
)
def test_an_outage_is_never_blamed_on_a_message(prefix: str, rest: str) -> None:
    assert blame(prefix + rest) is Blame.WORLD


@example("P0000")
@given(st.text(alphabet=string.digits + string.ascii_uppercase, min_size=5, max_size=5))
def test_only_states_about_data_are_blamed_on_a_message(state: str) -> None:
    assert (blame(state) is Blame.MESSAGE) == (state[:2] in {"22", "23", "44", "54", "P0"})


@given(attempts, seconds, seconds)
def test_a_backoff_is_drawn_between_base_and_ceiling(attempt: int, base: float, cap: float) -> None:
    shortest = backoff(attempt, base=base, cap=cap, uniform=lambda low, _: low)
    longest = backoff(attempt, base=base, cap=cap, uniform=lambda _, high: high)
    assert shortest == min(base, cap)
    assert shortest <= longest <= cap
    assert math.isfinite(longest)
    assert full_jitter(attempt, base=base, cap=cap, uniform=lambda low, _: low) == 0
    assert full_jitter(attempt, base=base, cap=cap, uniform=lambda _, high: high) == longest


@given(st.integers(min_value=1, max_value=200), seconds, seconds)
def test_the_ceiling_doubles_until_the_cap(attempt: int, base: float, cap: float) -> None:
    now, then = (ceiling(number, base=base, cap=cap) for number in (attempt, attempt + 1))
    assert now <= then
    assert then == min(cap, max(now * 2, then)) or then == cap


def test_the_formula_by_hand() -> None:
    longest = [ceiling(attempt, base=2, cap=900) for attempt in (1, 2, 3, 4, 9, 10, 10**6)]
    assert longest == [2, 4, 8, 16, 512, 900, 900]
