"""How batches form: every window once, budget kept, near-equal lengths, live first, oldest first, suspects alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sidecar_daemon.domain.batching import MIN_EFFICIENCY, next_batch, remaining
from sidecar_daemon.domain.messages import (
    Batch,
    ContentHash,
    Document,
    DocumentKey,
    Lane,
    Lease,
    MessageId,
    TokenWindow,
    Window,
)

BUDGET = 1024
COUNT = 64


def windows_of(
    number: int, *lengths: int, lane: Lane = Lane.BULK, suspect: bool = False, key: str | None = None
) -> list[Window]:
    """The windows of one document that has one message."""
    name = DocumentKey(key or str(number))
    lease = Lease(lane, MessageId(number), 1, 2 if suspect else 1, name, 0.0)
    document = Document(name, "", ContentHash(""), (lease,))
    return [
        Window(document, i, len(lengths), TokenWindow(np.zeros(n, np.int64), n, 0, n)) for i, n in enumerate(lengths)
    ]


def drain(pending: list[Window], *, max_padded_tokens: int, max_windows: int) -> list[tuple[list[Window], Batch]]:
    """Every batch, with what waited when it was picked."""
    steps = []
    while pending:
        batch = next_batch(pending, max_padded_tokens=max_padded_tokens, max_windows=max_windows)
        steps.append((pending, batch))
        left = remaining(pending, batch.windows)
        assert len(left) < len(pending), "a batch that takes nothing would loop for ever"
        pending = left
    return steps


def efficiency(batches: list[Batch]) -> float:
    """Real over padded tokens."""
    return sum(batch.tokens for batch in batches) / sum(batch.padded_tokens for batch in batches)


documents = st.lists(
    st.tuples(
        st.sampled_from(Lane), st.booleans(), st.lists(st.integers(1, 40) | st.integers(1, 600), min_size=1, max_size=5)
    ),
    max_size=12,
)


@st.composite
def queues(draw: st.DrawFn) -> list[Window]:
    """Windows of several documents, in any order of arrival."""
    shapes = draw(documents)
    pending = [w for n, (lane, bad, sizes) in enumerate(shapes) for w in windows_of(n, *sizes, lane=lane, suspect=bad)]
    return draw(st.permutations(pending))


@given(
    pending=queues(),
    budget=st.integers(1, 200) | st.integers(1, 2000),
    count=st.integers(1, 12) | st.integers(1, 70),
)
def test_every_batch_keeps_every_rule_until_each_window_went_once(
    pending: list[Window], budget: int, count: int
) -> None:
    steps = drain(pending, max_padded_tokens=budget, max_windows=count)

    went = [window for _, batch in steps for window in batch.windows]
    assert len(went) == len(pending)
    assert set(went) == set(pending)
    for waiting, batch in steps:
        assert len(batch.windows) == 1 or batch.padded_tokens <= budget
        assert len(batch.windows) <= count
        assert batch.tokens >= MIN_EFFICIENCY * batch.padded_tokens
        live = [window for window in waiting if window.document.lane is Lane.LIVE]
        assert batch.windows[0] is (live or waiting)[0], "the oldest of the first lane seeds the batch"
        assert len({window.document.lane for window in batch.windows}) == 1
        if any(window.document.suspect for window in batch.windows):
            assert len({id(window.document) for window in batch.windows}) == 1


@given(pending=queues(), budget=st.integers(1, 2000))
def test_what_remains_keeps_its_order_and_the_input_is_left_alone(pending: list[Window], budget: int) -> None:
    before = list(pending)
    for waiting, batch in drain(pending, max_padded_tokens=budget, max_windows=COUNT):
        assert remaining(waiting, batch.windows) == [window for window in waiting if window not in batch.windows]
    assert pending == before


@example(lengths=[236, 216, 255, 256])  # 216 is too short beside the first two, and not beside the third
@given(lengths=st.lists(st.integers(1, 512), min_size=1, max_size=80))
def test_no_window_left_behind_would_have_fitted(lengths: list[int]) -> None:
    """A batch is as full as its rules allow: whatever nearer than its farthest mate was left out breaks a rule."""
    pending = [window for n, length in enumerate(lengths) for window in windows_of(n, length)]
    batch = next_batch(pending, max_padded_tokens=BUDGET, max_windows=COUNT)
    longest = max(window.length for window in batch.windows)
    for window in remaining(pending, batch.windows):
        count = len(batch.windows) + 1
        padded = count * max(longest, window.length)
        full = count > COUNT or padded > BUDGET
        assert full or batch.tokens + window.length < MIN_EFFICIENCY * padded


def test_mates_are_the_nearest_lengths_and_among_equals_the_oldest() -> None:
    pending = [windows_of(n, length)[0] for n, length in enumerate([100, 96, 101, 104, 101, 100, 30])]
    batch = next_batch(pending, max_padded_tokens=BUDGET, max_windows=4)
    assert [int(window.document.key) for window in batch.windows] == [0, 5, 2, 4]


def test_a_longer_mate_that_bursts_the_budget_does_not_end_the_search() -> None:
    pending = [windows_of(n, length)[0] for n, length in enumerate([100, 101, 98])]
    batch = next_batch(pending, max_padded_tokens=200, max_windows=COUNT)
    assert [window.length for window in batch.windows] == [100, 98]


def test_a_window_longer_than_the_budget_goes_alone() -> None:
    pending = [*windows_of(0, 512), *windows_of(1, 512)]
    assert [len(b.windows) for _, b in drain(pending, max_padded_tokens=300, max_windows=COUNT)] == [1, 1]


def test_a_lone_long_window_is_not_padded_with_short_ones() -> None:
    pending = [*windows_of(0, 490), *windows_of(1, 30)]
    batch = next_batch(pending, max_padded_tokens=BUDGET, max_windows=COUNT)
    assert [window.length for window in batch.windows] == [490]


def test_a_live_edit_overtakes_an_older_backfill_and_takes_no_bulk_along() -> None:
    bulk, live, later = windows_of(0, 30), windows_of(1, 30, lane=Lane.LIVE), windows_of(2, 30, lane=Lane.LIVE)
    steps = drain([*bulk, *live, *later], max_padded_tokens=BUDGET, max_windows=COUNT)
    assert [list(batch.windows) for _, batch in steps] == [[*live, *later], bulk]


def test_the_windows_of_a_suspect_share_a_batch_with_one_another_only() -> None:
    suspect = windows_of(1, 30, 30, suspect=True)
    innocents = [*windows_of(0, 30), *windows_of(2, 30)]
    other = windows_of(3, 30, suspect=True)
    pending = [innocents[0], *suspect, innocents[1], *other]
    steps = drain(pending, max_padded_tokens=BUDGET, max_windows=COUNT)
    assert [list(batch.windows) for _, batch in steps] == [innocents, suspect, other]


def test_a_suspect_is_told_from_a_later_reading_of_the_same_key() -> None:
    suspect, clean = windows_of(1, 30, suspect=True, key="a"), windows_of(2, 30, key="a")
    steps = drain([*suspect, *clean], max_padded_tokens=BUDGET, max_windows=COUNT)
    assert [list(batch.windows) for _, batch in steps] == [suspect, clean]


def test_nothing_pending_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one pending window"):
        next_batch([], max_padded_tokens=BUDGET, max_windows=COUNT)


def docstrings(rng: np.random.Generator, n: int) -> list[int]:
    """Lengths shaped as the standard library's docstrings: median 30, mean near 59, p99 near 490."""
    return [int(x) for x in np.clip(rng.lognormal(np.log(30), 1.15, n), 3, 512)]


def bimodal(rng: np.random.Generator, n: int) -> list[int]:
    """80 % of 20 to 60 tokens, 20 % full windows, shuffled."""
    return [int(x) for x in np.where(rng.random(n) < 0.8, rng.integers(20, 61, n), 512)]


def titles(rng: np.random.Generator, n: int) -> list[int]:
    """About twelve tokens each: where a token of padding weighs most."""
    return [int(x) for x in np.clip(rng.normal(12, 3, n), 4, 30)]


CORPORA = {"docstrings": docstrings, "bimodal": bimodal, "titles": titles}


@pytest.mark.parametrize("corpus", CORPORA)
def test_a_stream_over_a_window_of_256_documents_pads_little_and_starves_nobody(corpus: str) -> None:
    """PERFORMANCE P3, and: the seed is the oldest, so at most as many batches go first as windows stood before."""
    arriving = [
        w for n, size in enumerate(CORPORA[corpus](np.random.default_rng(7), 2000)) for w in windows_of(n, size)
    ]
    runs: list[Batch] = []
    seen_at: dict[Window, int] = {}
    ahead: dict[Window, int] = {}
    pending: list[Window] = []
    while arriving or pending:
        while arriving and len(pending) < 256:
            window = arriving.pop(0)
            seen_at[window], ahead[window] = len(runs), len(pending)
            pending.append(window)
        batch = next_batch(pending, max_padded_tokens=BUDGET, max_windows=COUNT)
        for window in batch.windows:
            assert len(runs) - seen_at[window] <= ahead[window]
        pending = remaining(pending, batch.windows)
        runs.append(batch)

    assert sum(len(batch.windows) for batch in runs) == 2000
    assert efficiency(runs) >= 0.93
    assert 2000 / len(runs) >= 5, "little padding must not come from tiny batches"


def test_a_backlog_is_sorted_not_searched_pair_by_pair() -> None:
    """Work grows as n log n: the lengths of 2,000 windows are read a handful of times each, not 2,000 times."""
    reads = 0

    class Counted(Window):
        @property
        def length(self) -> int:
            nonlocal reads
            reads += 1
            return len(self.tokens.ids)

    sizes = np.random.default_rng(3).integers(3, 513, 2000)
    plain = [w for n, size in enumerate(sizes) for w in windows_of(n, int(size))]
    pending: list[Window] = [Counted(w.document, w.ordinal, w.of, w.tokens) for w in plain]
    next_batch(pending, max_padded_tokens=BUDGET, max_windows=COUNT)
    assert reads <= 5 * len(pending)
