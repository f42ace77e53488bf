"""The benchmark's arithmetic and its report: figures that nobody can check by hand must at least be computed right."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bench import plot, profile
from tests.bench.accuracy import cosines
from tests.bench.arithmetic import (
    Block,
    dropped,
    histogram,
    kept,
    palindrome,
    quantile,
    ratios,
    slope,
    spread,
)
from tests.bench.contest import Contestant, ContestantError, unpacked
from tests.bench.contestants.streaming import WINDOW, Stream, embed_all
from tests.bench.contestants.wire import packed
from tests.bench.measures import MEASURES
from tests.bench.measures.p02_flops import ATTENTION_FLOPS, LINEAR_FLOPS, flops
from tests.bench.null_daemon import NullEmbedder
from tests.bench.peers import PINS
from tests.bench.report import GOALS, Report, as_text, measure_of, merged
from tests.bench.rounds import Rounds
from tests.deterministic import DeterministicEmbedder

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sidecar_daemon.domain.messages import TokenWindow


ROOT = Path(__file__).resolve().parents[2]


def block(contestant: str, number: int, *, seconds: float = 1.0, calibration: float = 100.0) -> Block:
    return Block(contestant, number, 10, seconds, calibration)


def test_a_quantile_lies_between_its_neighbours() -> None:
    assert quantile([3, 1, 2], 0.5) == 2
    assert quantile([1, 2], 0.5) == 1.5
    assert quantile([1, 2, 3, 4, 5], 0.99) == pytest.approx(4.96)
    assert quantile([7], 0.99) == 7


@pytest.mark.parametrize(("values", "share"), [([], 0.5), ([1.0], 1.1), ([1.0], -0.1)])
def test_a_quantile_of_nothing_is_refused(values: list[float], share: float) -> None:
    with pytest.raises(ValueError, match="a quantile of"):
        quantile(values, share)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1))
def test_a_quantile_agrees_with_numpy(values: list[float]) -> None:
    for share in (0.0, 0.25, 0.5, 0.99, 1.0):
        assert quantile(values, share) == pytest.approx(np.quantile(values, share), abs=1e-6)


def test_a_spread_says_median_extremes_and_quartiles() -> None:
    found = spread([4, 1, 2, 3, 5])
    assert (found.median, found.low, found.high, found.iqr, found.count) == (3, 1, 5, 2, 5)
    assert spread([1 / 3]).rounded(2) == {"median": 0.33, "low": 0.33, "high": 0.33, "iqr": 0.0, "count": 1}


def test_contestants_go_forwards_and_backwards() -> None:
    assert palindrome(["a", "b"]) == ["a", "b", "b", "a"]
    assert palindrome(["a", "b", "c"]) == ["a", "b", "c", "c", "b", "a"]


def test_the_first_round_warms_up_and_counts_for_nothing() -> None:
    assert kept([block("a", 0), block("a", 1)]) == [block("a", 1)]
    assert kept([block("a", 0)]) == []
    assert dropped([block("a", 0, calibration=1), block("a", 1)]) == 0


def test_a_block_of_a_disturbed_machine_is_dropped_and_counted() -> None:
    calm = [block("a", number) for number in range(1, 6)]
    slow, fast, close = block("b", 1, calibration=94), block("b", 2, calibration=106), block("b", 3, calibration=96)
    assert kept([*calm, slow, fast, close]) == [*calm, close]
    assert dropped([*calm, slow, fast, close]) == 2
    assert dropped([*calm, slow, fast, close], tolerance=0.07) == 0


def test_a_ratio_is_taken_within_each_round() -> None:
    # The machine is twice as slow in the second round: for both, so the ratio stays.
    blocks = [block("ours", 1, seconds=1), block("theirs", 1, seconds=3)]
    blocks += [block("ours", 2, seconds=2), block("theirs", 2, seconds=6)]
    assert ratios(blocks, "ours", "theirs") == pytest.approx([3, 3])


def test_both_blocks_of_a_round_weigh_by_what_they_did() -> None:
    blocks = [block("ours", 1, seconds=1), block("ours", 1, seconds=3), block("theirs", 1, seconds=4)]
    assert ratios(blocks, "ours", "theirs") == pytest.approx([2.0])


def test_a_round_without_one_of_them_has_no_ratio() -> None:
    blocks = [block("ours", 1), block("ours", 2), block("theirs", 2)]
    assert ratios(blocks, "ours", "theirs") == [1.0]


@dataclass
class Bystander:
    """What ``Rounds`` wants of a workplace: a calibration that answers with what is next."""

    speeds: list[float]
    tolerance: float = 0.05
    happened: list[str] = field(default_factory=list)

    async def calibrate(self) -> dict[str, float]:
        self.happened.append("calibrate")
        return {"median": self.speeds.pop(0) if self.speeds else 100.0}

    def say(self, line: str) -> None:
        assert line

    def turn(self, name: str, seconds: float) -> Any:
        async def take() -> Mapping[str, float]:
            self.happened.append(name)
            return {"amount": 12, "seconds": seconds}

        return take


async def test_rounds_interleave_and_calibrate_before_each_block() -> None:
    place = Bystander([])
    rounds = Rounds(place, "label")  # type: ignore[arg-type]  # all that it uses of a workplace
    await rounds.play({"ours": place.turn("ours", 1), "theirs": place.turn("theirs", 2)}, 3)
    assert (
        place.happened == ["calibrate", "ours", "calibrate", "theirs", "calibrate", "theirs", "calibrate", "ours"] * 3
    )
    assert rounds.ratio("ours", "theirs") == {"median": 2.0, "low": 2.0, "high": 2.0, "iqr": 0.0, "count": 2}
    summary = rounds.summary()
    assert (summary["blocks"], summary["dropped"], summary["rounds"]) == (12, 0, 2)
    assert summary["rates"]["ours"]["median"] == 12


async def test_rounds_without_a_calm_round_say_what_to_do() -> None:
    place = Bystander([100.0] * 4 + [100.0, 50.0, 50.0, 100.0] * 2)
    rounds = Rounds(place, "label")  # type: ignore[arg-type]  # all that it uses of a workplace
    await rounds.play({"ours": place.turn("ours", 1), "theirs": place.turn("theirs", 2)}, 3)
    with pytest.raises(ValueError, match="blocks were dropped; run it on a quiet machine"):
        rounds.ratio("ours", "theirs")


async def test_a_contestant_is_a_process_that_answers_and_tells_its_errors(tmp_path: Path) -> None:
    async with Contestant("calibrator", "tests.bench.contestants.calibrator", folder=tmp_path) as calibrator:
        assert (await calibrator.ask("product", seconds=0.0))["best"] > 0
        with pytest.raises(ContestantError, match="calibrator, asked for product: TypeError"):
            await calibrator.ask("product", minutes=1)
        assert (await calibrator.ask("product", seconds=0.0))["median"] > 0  # it lives on
    async with Contestant("nobody", "tests.bench.contestants.nobody", folder=tmp_path) as nobody:
        with pytest.raises(ContestantError, match="No module named"):
            await nobody.ask("about")


def test_what_a_library_prints_does_not_break_an_answer() -> None:
    source = "from tests.bench.contestants.wire import serve; serve({'x': lambda: print('noise') or 1})"
    done = subprocess.run(
        [sys.executable, "-c", source], input='{"op": "x"}\n', capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == '{"answer": 1}\n'
    assert "noise" in done.stderr


def test_a_slope_is_that_of_a_line() -> None:
    assert slope([(0, 5), (1, 7), (2, 9)]) == pytest.approx(2)
    with pytest.raises(ValueError, match="two different moments"):
        slope([(1, 5), (1, 7)])


def test_a_histogram_holds_every_value_once() -> None:
    assert histogram([1, 8, 9, 20, 21], [8, 20]) == {"<=8": 2, "<=20": 2, ">20": 1}


def test_flops_are_those_of_performance() -> None:
    assert flops([1]) == LINEAR_FLOPS + ATTENTION_FLOPS
    assert flops([100, 100]) == pytest.approx(200 * (LINEAR_FLOPS + 100 * ATTENTION_FLOPS))
    assert flops([100], layers=6) == pytest.approx(flops([100]) / 2)
    # From the architecture: 2 flops for each weight of a linear layer, and for each product of two tokens.
    assert pytest.approx(12 * 2 * (4 * 384 * 384 + 2 * 384 * 1536), rel=0.01) == LINEAR_FLOPS
    assert pytest.approx(12 * 2 * 2 * 384, rel=0.01) == ATTENTION_FLOPS


def test_cosines_are_taken_row_by_row() -> None:
    left = np.array([[1, 0], [0, 2]], dtype=np.float32)
    right = np.array([[3, 0], [1, 0]], dtype=np.float32)
    assert cosines(left, right) == pytest.approx([1.0, 0.0])


def test_a_vector_survives_the_wire() -> None:
    row = np.random.default_rng(1).standard_normal(384).astype(np.float32)
    assert np.array_equal(unpacked(packed(row)), row)


def test_a_stream_takes_every_text_once_and_only_a_window_of_them_waits() -> None:
    embedder = DeterministicEmbedder()
    texts = [f"word {number} " + "more " * (number % 40) for number in range(3 * WINDOW)]
    seen: list[str] = []

    def tokenize(text: str) -> list[TokenWindow]:
        seen.append(text)
        return embedder.tokenize(text)

    stream = Stream(tokenize, texts, batch_tokens=512, batch_windows=64)
    taken = stream.take()
    assert taken is not None
    assert len(seen) <= WINDOW
    places = [*taken[1]]
    while (following := stream.take()) is not None:
        assert len(seen) <= len(places) + WINDOW
        places += following[1]
    assert sorted(places) == list(range(len(texts)))
    assert seen == texts


def test_a_streams_vectors_come_in_the_order_of_the_texts() -> None:
    embedder = DeterministicEmbedder()
    texts = [f"word {number} " + "more " * (number % 30) for number in range(200)]
    vectors = embed_all(embedder, Stream(embedder.tokenize, texts, 256, 16), threads=2)
    alone = np.concatenate([embedder.embed([embedder.tokenize(text)[0].ids]) for text in texts])
    assert np.array_equal(vectors, alone)


def test_the_null_model_gives_different_texts_different_vectors_of_unit_length() -> None:
    null = NullEmbedder()
    windows = [null.tokenize(f"document {number}")[0].ids for number in range(500)]
    vectors = null.embed(windows)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(500), abs=1e-5)
    assert len({row.tobytes() for row in vectors}) == 500
    assert np.array_equal(null.embed(windows[:1])[0], vectors[0])


def test_every_measure_has_a_goal_and_every_goal_a_measure() -> None:
    assert {measure_of(figure) for figure in GOALS} == set(MEASURES) == {f"P{number}" for number in range(1, 13)}


def test_the_report_has_every_figure_of_the_chosen_measures() -> None:
    report = Report("quick", 5)
    report.figure("P6_p50_ms", 20.12345)
    report.figure("P9", 4000.0)
    report.leave_out("P1_bf16", "no bf16 here")
    found = json.loads(json.dumps(report.summary(["P1", "P6", "P9"])))
    assert {"figures", "goals", "met", "machine", "tables"} <= found.keys()
    assert found["figures"] == {
        "P1_fp32": None,
        "P1_bf16": None,
        "P6_p50_ms": 20.1234,
        "P6_p99_ms": None,
        "P9": 4000.0,
    }
    assert found["figures"].keys() == found["goals"].keys() == found["met"].keys()
    assert found["met"] == {"P1_fp32": None, "P1_bf16": None, "P6_p50_ms": True, "P6_p99_ms": None, "P9": False}
    assert found["goals"]["P9"]["goal"] == 5000
    assert found["left_out"] == {"P1_bf16": "no bf16 here"}


def test_a_goal_is_met_at_its_value() -> None:
    assert GOALS["P8"].met(0.95)
    assert not GOALS["P8"].met(0.9499)
    assert GOALS["P6_p50_ms"].met(25)
    assert not GOALS["P6_p50_ms"].met(25.01)


def test_a_figure_without_a_goal_is_refused() -> None:
    with pytest.raises(KeyError, match="P99"):
        Report("quick", 5).figure("P99", 1)


def test_the_text_says_what_was_missed_left_out_and_broken() -> None:
    report = Report("quick", 5)
    report.figure("P9", 4000.0)
    report.leave_out("P1_bf16", "no bf16 here")
    report.broken["P4"] = "pip cannot"
    text = as_text(report.summary(["P1", "P9"]))
    assert "MISSED" in text
    assert "left out: P1_bf16: no bf16 here" in text
    assert "BROKEN: P4: pip cannot" in text


def test_parts_of_a_run_are_merged_and_the_later_figure_counts() -> None:
    first = {"profile": "full", "figures": {"P8": 0.9, "P9": 1.0}, "tables": {"a": 1}}
    second = {"profile": "full", "figures": {"P9": 2.0, "P8": None}, "tables": {"b": 2}}
    assert merged([first, second]) == {
        "profile": "full",
        "figures": {"P8": 0.9, "P9": 2.0},
        "tables": {"a": 1, "b": 2},
    }


def test_every_pin_names_one_version_and_says_why() -> None:
    for path in PINS.values():
        pins = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
        assert pins
        for line in pins:
            pin, _, why = line.partition("#")
            assert pin.count("==") == 1, line
            assert why.strip(), line


def test_the_plot_shows_every_figure_that_was_measured(tmp_path: Path) -> None:
    report = Report("full", 5)
    report.figure("P9", 4000.0)
    report.figure("P6_p50_ms", 12.5)
    report.tables["model_only"] = {
        "corpora": {"docstrings": {"rates": {"ours_fp32": {"median": 120.0}, "fast<embed": {"median": 85.0}}}}
    }
    (tmp_path / "part.json").write_text(json.dumps(report.summary(["P6", "P9"])))
    target = tmp_path / "bench.svg"
    assert plot.main([str(tmp_path / "part.json"), "--output", str(target)]) == 0
    drawn = target.read_text()
    plot.parsed(drawn)  # well-formed
    for word in ("P9", "P6_p50_ms", "ours_fp32", "fast&lt;embed", "120"):
        assert word in drawn, word
    assert "P6_p99_ms" not in drawn


def test_a_sample_belongs_to_the_innermost_stage_that_is_named() -> None:
    lines = [
        "main (__main__.py:1);run (sidecar_daemon/worker/embedding.py:9);run (x/onnxruntime_graph.py:7) 90",
        "main (sidecar_daemon/__main__.py:1);run (sidecar_daemon/worker/embedding.py:9) 4",
        "main (sidecar_daemon/__main__.py:1);_settle (worker/settling.py:9);fetch (asyncpg/connection.py:5) 5",
        "main (sidecar_daemon/__main__.py:1) 1",
        "main (sidecar_daemon/__main__.py:1);select (selectors.py:468) 500",
        "_bootstrap (threading.py:1);_worker (concurrent/futures/thread.py:81) 500",
        "",
    ]
    assert profile.shares(lines) == {
        "model": 0.9,
        "database": 0.05,
        "around the model: padding, pooling": 0.04,
        "rest": 0.01,
    }
    with pytest.raises(ValueError, match="no sample"):
        profile.shares([""])
