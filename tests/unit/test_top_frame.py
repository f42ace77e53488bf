"""What ``top`` draws for a look, and how the looks of several replicas become one."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from sidecar_daemon.adapters.replicas import Overview
from sidecar_daemon.app.merging import merged
from sidecar_daemon.app.watching import Replica, View
from sidecar_daemon.cli.top_frame import frame, short, sparkline
from tests.overview_server import lane, overview, pipeline

SIZES = [(80, 24), (120, 40), (200, None), (80, 12), (60, 24), (40, 10), (20, 5)]


def seen(*bodies: dict[str, Any], notice: str | None = None) -> View:
    """A look at replicas that answered this."""
    answers = [Overview.model_validate(body) for body in bodies]
    replicas = tuple(Replica(f"http://replica-{n}:8088", answer, None) for n, answer in enumerate(answers))
    return View(merged(answers), replicas, notice)


def drawn(view: View, width: int = 80, height: int | None = 24, **known: Any) -> list[str]:
    """The lines of a frame, as they stand in a window of that size."""
    screen = Console(width=width, height=height or 100, color_system=None, force_terminal=False)
    with screen.capture() as captured:
        screen.print(frame(view, width, height, footer="q ends", **known))
    return captured.get().rstrip("\n").splitlines()


TROUBLE = [
    pipeline("paused_one", state="paused", rate=0.0),
    pipeline("refused_one", state="refused", reason="pipeline refused_one needs model x, this replica has y"),
    pipeline("a_name_of_forty_one_characters_no_more_no", circuit="half_open", coverage=None, rate=None),
]


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("count", [0, 1, 3, 30])
def test_a_frame_fits_its_window(width: int, height: int | None, count: int) -> None:
    shown = [{**TROUBLE[n % 3], "name": f"{TROUBLE[n % 3]['name'][:36]}_{n:03}"} for n in range(count)]
    view = seen(overview(reasons=["the database does not answer " * 5]) | {"pipelines": shown})
    lines = drawn(view, width, height)
    assert max(len(line) for line in lines) <= width
    if height is not None:
        assert len(lines) <= height
    assert lines[0].startswith("sidecar-daemon")


def test_eighty_columns_show_every_number() -> None:
    lines = drawn(seen(overview()))
    head = next(line for line in lines if line.startswith("pipeline"))
    assert head.split() == [
        *("pipeline", "state", "live", "bulk", "flight", "oldest", "dead", "cover", "docs/s", "p50", "p99")
    ]
    row = next(line for line in lines if line.startswith("articles"))
    assert row.split() == [*("articles", "working", "12", "1,204", "20", "61s", "2", "98.7%", "69.4", "27ms", "1.2s")]
    assert "ready · up 3 h · embedder@db:5432/shop" in lines[0]
    assert any("1,305 in 15 min  swept 2 min ago" in line and "█" in line for line in lines)
    letters = lines[lines.index("newest dead letters") + 1 :]
    assert letters[0] == "  articles 42: too_large, 1 attempt, 3 min ago"
    assert lines[-1] == "q ends"


def test_what_is_wrong_is_said_in_whole_sentences() -> None:
    reason = "the database does not answer: connection refused at embedder@db:5432/shop, trying again in 12 s and so on"
    lines = drawn(seen(overview(*TROUBLE, ready=False, reasons=[reason])))
    text = " ".join(" ".join(lines).split())
    assert "not ready" in lines[0]
    assert reason in text
    assert "paused_one paused" in text
    assert "edits are queued; sidecar-daemon resume paused_one" in text
    assert "needs model x, this replica has y" in text
    assert "circuit half open" in text
    assert "no daemon answers at x" in " ".join(drawn(seen(overview(), notice="no daemon answers at x")))
    assert "it is gone" in " ".join(drawn(seen(overview()), lost="it is gone"))


def test_what_is_wrong_is_kept_where_little_fits() -> None:
    shown = [*[pipeline(f"fine_{n:02}") for n in range(30)], pipeline("zz_refused", state="refused")]
    lines = drawn(seen(overview(*shown)), 80, 12)
    assert "zz_refused" in lines[3]
    assert any("more; a taller window" in line for line in lines)
    assert "and" not in " ".join(drawn(seen(overview(pipeline("a"), pipeline("b"))), 80, 8)[3:5])


def test_a_key_cannot_command_the_terminal() -> None:
    letter = {"key": "\x1b[2J\u202e", "reason": "a\nb", "age_seconds": 1.0, "attempts": None}
    text = "\n".join(drawn(seen(overview(pipeline(dead_letters=[letter])))))
    assert "\x1b" not in text
    assert "articles \ufffd[2J\ufffd: a\ufffdb, 1.0 s ago" in text


@pytest.mark.parametrize(
    ("number", "said"),
    [
        *((0, "0"), (9_999, "9,999"), (10_000, "10.0k"), (99_949, "99.9k"), (99_951, "100k"), (999_499, "999k")),
        *((999_500, "1.0M"), (4_560_000, "4.6M"), (2_000_000_000, "2.0G")),
    ],
)
def test_a_count_stays_short(number: int, said: str) -> None:
    assert short(number) == said


def test_a_sparkline_tells_nothing_from_unknown() -> None:
    assert sparkline([None, 0, 1, 8], 4) == " ▁▂█"
    assert sparkline([1, 1, 4, 4], 2) == "▃█"
    assert sparkline([0, 0], 2) == "▁▁"
    assert sparkline([3], 3) == "  █"


@given(st.lists(st.none() | st.floats(0, 1e9), max_size=200), st.integers(1, 90))
def test_a_sparkline_has_its_width(steps: list[float | None], cells: int) -> None:
    assert len(sparkline(steps, cells)) == cells


def test_replicas_add_up_what_they_did_and_share_the_queue() -> None:
    one = overview(
        pipeline(rate=10.0, freshness={"p50": 1.0, "p99": 2.0, "count": 30}, outcomes={"embedded": 5}),
        observed_seconds_ago=4.0,
        uptime_seconds=500.0,
    )
    two = overview(
        pipeline(
            rate=5.5,
            freshness={"p50": 2.0, "p99": 9.0, "count": 10},
            outcomes={"embedded": 1, "gone": 2},
            queue={"live": lane(3), "bulk": lane(0), "dead": 7},
            state="waiting",
            reason="the database is away",
            circuit="open",
            sweep={"walking": True, "scanned": 10, "age_seconds": 9.0},
        ),
        pipeline("only_there", rate=None),
        observed_seconds_ago=0.5,
        uptime_seconds=20.0,
        ready=False,
        reasons=["starting"],
    )
    two["history"]["series"]["articles"]["embedded"] = [100, None]
    both = merged([Overview.model_validate(one), Overview.model_validate(two)])
    articles, other = both.pipelines
    assert (articles.name, other.name, other.rate) == ("articles", "only_there", None)
    assert (articles.rate, articles.outcomes) == (15.5, {"embedded": 6, "gone": 2})
    assert (articles.queue.live.depth, articles.queue.dead) == (3, 7)
    assert (articles.state, articles.reason, articles.circuit) == ("waiting", "the database is away", "open")
    assert (articles.freshness.p50, articles.freshness.p99, articles.freshness.count) == (1.25, 9.0, 40)
    assert articles.sweep.walking
    assert articles.sweep.age_seconds == 9.0
    assert (both.ready, both.reasons, both.uptime_seconds, both.observed_seconds_ago) == (False, ("starting",), 20, 0.5)
    embedded = both.history.series["articles"].embedded
    assert embedded[-3:] == (27, 28 + 100, 29)
    assert len(embedded) == 90


def test_one_replica_is_shown_as_it_is() -> None:
    answer = Overview.model_validate(overview())
    assert merged([answer]) is answer


def test_an_overview_of_another_release_is_read() -> None:
    bare = Overview.model_validate({"ready": True, "pipelines": [{"name": "notes"}], "news": 1})
    assert bare.pipelines[0].state == "unknown"
    assert "notes" in " ".join(drawn(View(bare, (Replica("http://a", bare, None),))))
