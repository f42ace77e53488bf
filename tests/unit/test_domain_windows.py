"""The mean of a long document's windows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar_daemon.domain.windows import combine_windows


def unit_rows(count: int, seed: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    rows = np.random.default_rng(seed).standard_normal((count, 8))
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float32)


def test_one_window_is_its_own_vector_whatever_its_weight() -> None:
    row = unit_rows(1, 1)
    assert np.array_equal(combine_windows(row, [0]), row[0])
    assert np.array_equal(combine_windows(row, [7]), row[0])


def test_windows_count_by_their_content_tokens() -> None:
    rows = np.array([[1, 0], [0, 1]], dtype=np.float32)
    assert combine_windows(rows, [3, 4]) == pytest.approx([0.6, 0.8])
    assert combine_windows(rows, [5, 0]) == pytest.approx([1, 0])


def test_windows_without_content_count_alike() -> None:
    rows = np.array([[1, 0], [0, 1]], dtype=np.float32)
    assert combine_windows(rows, [0, 0]) == pytest.approx([0.5**0.5, 0.5**0.5])


def test_vectors_that_cancel_stay_zero_for_the_caller_to_refuse() -> None:
    rows = np.array([[1, 0], [-1, 0]], dtype=np.float32)
    assert np.array_equal(combine_windows(rows, [1, 1]), [0, 0])


@pytest.mark.parametrize(("count", "weights"), [(0, []), (2, [1]), (1, [1, 1]), (2, [2, -1])])
def test_windows_and_weights_must_match(count: int, weights: list[int]) -> None:
    with pytest.raises(ValueError, match="weights of 0 or more"):
        combine_windows(unit_rows(count, 1), weights)


@given(st.lists(st.integers(1, 510), min_size=2, max_size=40), st.integers(0, 1000), st.randoms())
def test_the_mean_is_of_norm_one_and_knows_no_order(weights: list[int], seed: int, random: object) -> None:
    rows = unit_rows(len(weights), seed)
    combined = combine_windows(rows, weights)
    assert combined.dtype == np.float32
    assert np.linalg.norm(combined) == pytest.approx(1, abs=1e-6)
    order = list(range(len(weights)))
    random.shuffle(order)  # type: ignore[attr-defined]  # hypothesis gives a random.Random
    again = combine_windows(rows[order], [weights[place] for place in order])
    assert again == pytest.approx(combined, abs=1e-6)
