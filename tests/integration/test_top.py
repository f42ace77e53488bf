"""``top`` through the real command line: on a terminal, into a pipe, as JSON, with and without daemons."""

from __future__ import annotations

import asyncio
import itertools
import signal
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from sidecar_daemon.app.watching import Watcher
from sidecar_daemon.settings import Settings
from tests.command_line import called, sidecar
from tests.conftest import admin
from tests.daemon import free_port
from tests.integration.test_doctor_document import CANARY
from tests.overview_server import OverviewServer, overview, pipeline
from tests.terminal import ENTERED, LEFT, terminal
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.rig import Rig

NOWHERE = "postgresql://me:s3cret-canary@127.0.0.1:1/shop"


@pytest.fixture
def daemon() -> Iterator[OverviewServer]:
    """What answers as a daemon does."""
    with OverviewServer().running() as running:
        yield running


async def test_a_pipe_gets_one_frame(daemon: OverviewServer) -> None:
    printed = await sidecar("top", "--url", daemon.url, database_url=NOWHERE)
    assert (printed.code, printed.err, daemon.asked) == (0, "", 1)
    lines = printed.out.splitlines()
    assert "ready · up 3 h · embedder@db:5432/shop" in lines[0]
    assert any(line.startswith("articles working    12 1,204") for line in lines)
    assert "  articles 42: too_large, 1 attempt, 3 min ago" in lines
    assert "\x1b" not in printed.out


async def test_a_stream_without_blocks_and_dots_gets_question_marks(
    daemon: OverviewServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    daemon.body = overview(pipeline(source="café"))
    printed = await sidecar("top", "--url", daemon.url)
    assert (printed.code, printed.err) == (0, "")
    assert "sidecar-daemon 0.1.0 ? ready" in printed.out
    told = (await sidecar("top", "--url", daemon.url, "--json")).json
    assert told["pipelines"][0]["source"] == "café"


async def test_json_is_one_object_and_the_default_url_is_of_the_settings(daemon: OverviewServer) -> None:
    port = daemon.url.rpartition(":")[2]
    everywhere = "0.0.0.0"  # noqa: S104  nothing is bound: it is what a daemon in a container is told
    told = (await called("top", "--json", HTTP_HOST=everywhere, HTTP_PORT=port)).json
    assert (told["from"], told["notice"]) == ("daemons", None)
    assert told["replicas"] == [
        {
            "url": daemon.url,
            "error": None,
            "version": "0.1.0",
            "uptime_seconds": 11000.0,
            "ready": True,
            "reasons": [],
        }
    ]
    articles = told["pipelines"][0]
    assert (articles["name"], articles["rate"], articles["queue"]["live"]["depth"]) == ("articles", 69.4, 12)
    assert len(told["history"]["series"]["articles"]["embedded"]) == 90


async def test_replicas_add_up_and_one_that_is_away_is_named(daemon: OverviewServer) -> None:
    with ExitStack() as stack:
        other = stack.enter_context(OverviewServer(overview(pipeline(rate=30.6))).running())
        old = stack.enter_context(OverviewServer("{}", status=404).running())
        away = f"http://127.0.0.1:{free_port()}"
        urls = [argument for url in (daemon.url, other.url, old.url, away) for argument in ("--url", url)]
        printed = await called("top", *urls, "--once")
    assert "2 of 4 replicas answer, 2 ready" in printed.out
    assert " 100.0 " in printed.out
    assert f"{away} does not answer: connection refused" in printed.out
    assert f"{old.url} does not answer: HTTP 404 for /overview: no daemon of this release" in printed.out


async def test_the_database_answers_where_no_daemon_does(rig: Rig) -> None:
    await rig.write(k1=CANARY, k2="two", k3="three")
    first, second, third = await rig.lease()
    await rig.settle(rig.settlement(1, CANARY, first))
    await rig.queue.dead_letter([second], reason="bad_vector", detail="why", content_hash=None)
    await rig.connection.execute("SELECT sidecar.set_enabled('docs', false)")
    url = f"http://127.0.0.1:{free_port()}"
    printed = await called("top", "--url", url, database_url=rig.url)
    assert printed.code == 0
    assert "no daemon answers" in printed.out.splitlines()[0]
    assert f"no daemon answers at {url} (connection refused)" in printed.out
    assert "this is the database's own view" in printed.out
    (row,) = [line.split() for line in printed.out.splitlines() if line.startswith("docs")]
    assert (row[1], row[2], row[4], row[6], row[7:]) == ("paused", "1", "1", "1", ["33.3%", "-", "-", "-"])
    assert "edits are queued; sidecar-daemon resume docs" in printed.out
    assert "docs 2: bad_vector, 1 attempt" in printed.out
    told = (await called("top", "--json", database_url=rig.url, HTTP_PORT="0")).json
    assert told["from"] == "database"
    assert "SIDECAR_HTTP_PORT is 0" in told["notice"]
    assert (told["replicas"], told["pipelines"][0]["rate"]) == ([], None)
    assert third.key == "3"


@pytest.mark.parametrize(
    ("arguments", "settings", "code", "words"),
    [
        (("--url", "localhost:8088"), {}, 2, ("'localhost:8088'", "http://127.0.0.1:8088")),
        (("--url", "http://me:s3cret-canary@db:8088"), {}, 2, ("'db:8088'",)),
        (("--url", "http://db:99999"), {}, 2, ("'http://db:99999'",)),
        (("--interval", "0"), {}, 2, ("--interval",)),
        (("--url", "http://127.0.0.1:1"), {}, 1, ("http://127.0.0.1:1 (connection refused)", "me@127.0.0.1:1/shop")),
        (("--json", "--url", "http://no-such-host.invalid"), {}, 1, ("(the host name is unknown)",)),
        (("--once",), {"HTTP_PORT": "0", "DATABASE_URL": ""}, 2, ("HTTP_PORT is 0", "SIDECAR_DATABASE_URL is not")),
        (("--once",), {"HTTP_PORT": "many"}, 2, ("SIDECAR_HTTP_PORT is 'many'",)),
    ],
)
async def test_nothing_to_show_is_one_clear_line(
    arguments: tuple[str, ...], settings: dict[str, str], code: int, words: tuple[str, ...]
) -> None:
    finished = await called("top", *arguments, **{"DATABASE_URL": NOWHERE, **settings})
    assert (finished.code, finished.out) == (code, "")
    (line,) = finished.err.splitlines()
    assert [word for word in words if word not in line] == [], line
    assert "s3cret-canary" not in line


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("not JSON", "its /overview cannot be read"),
        ('{"ready": true, "pipelines": [{}]}', "cannot be read (pipelines.0.name)"),
    ],
)
async def test_what_answers_is_no_daemon(daemon: OverviewServer, body: str, words: str) -> None:
    daemon.body = body
    finished = await called("top", "--url", daemon.url, database_url=NOWHERE)
    assert finished.code == 1
    assert words in finished.err


@pytest.mark.parametrize("end", ["q", "\x03"])
async def test_on_a_terminal_it_is_live_and_ends_cleanly(daemon: OverviewServer, end: str) -> None:
    async with terminal("top", "--url", daemon.url, "--interval", "0.2", settings={}) as screen:
        await eventually(lambda: "articles working" in screen.last, 60)
        assert ENTERED in screen.raw
        assert LEFT not in screen.raw
        assert "\x1b[32m" in screen.raw  # green: it works
        assert not screen.cooked()
        daemon.body = overview(pipeline(state="paused"))
        await eventually(lambda: "articles paused" in screen.last, 60)
        assert all(len(line) <= 80 for frame in screen.frames for line in frame)
        screen.press(end)
        assert await screen.process.wait() == 0
        await eventually(lambda: screen.raw.rstrip().endswith(("\x1b[?25h", LEFT)))
        assert LEFT in screen.raw
        assert screen.cooked()
        assert "Traceback" not in screen.raw


async def test_it_follows_the_size_of_the_window(daemon: OverviewServer) -> None:
    async with terminal("top", "--url", daemon.url, "--interval", "3600", settings={}) as screen:
        await eventually(lambda: "q ends" in screen.last, 60)
        before = len(screen.frames)
        screen.resize(50, 12)
        await eventually(lambda: len(screen.frames) > before and "p99" in screen.last, 60)
        assert "flight" not in screen.last
        assert all(len(line) <= 50 for line in screen.frames[-1])
        assert daemon.asked == 1


async def test_no_color_has_no_colour(daemon: OverviewServer) -> None:
    async with terminal("top", "--url", daemon.url, settings={}, environment={"NO_COLOR": "1"}) as screen:
        await eventually(lambda: "articles working" in screen.last, 60)
        assert "\x1b[32m" not in screen.raw
        assert "\x1b[36m" not in screen.raw


async def test_a_dumb_terminal_gets_one_frame(daemon: OverviewServer) -> None:
    async with terminal("top", "--url", daemon.url, settings={}, environment={"TERM": "dumb"}) as screen:
        assert await screen.process.wait() == 0
        await eventually(lambda: "articles working" in screen.raw)
        assert ENTERED not in screen.raw


async def test_what_was_seen_stays_while_nothing_answers(daemon: OverviewServer) -> None:
    arguments = ("top", "--url", daemon.url, "--interval", "0.2")
    async with terminal(*arguments, settings={"DATABASE_URL": NOWHERE}) as screen:
        await eventually(lambda: "articles working" in screen.last, 60)
        daemon.status = 503
        await eventually(lambda: "this was seen" in " ".join(screen.last.split()), 60)
        assert "articles working" in screen.last
        assert "s3cret-canary" not in screen.raw
        daemon.status = 200
        await eventually(lambda: "articles working" in screen.last and "this was seen" not in screen.last, 60)
        screen.process.send_signal(signal.SIGTERM)
        assert await screen.process.wait() == 128 + signal.SIGTERM
        assert screen.cooked()


async def test_the_end_does_not_wait_for_the_next_look(daemon: OverviewServer) -> None:
    async with terminal("top", "--url", daemon.url, "--interval", "3600", settings={}) as screen:
        await eventually(lambda: "articles working" in screen.last, 60)
        screen.press("q")
        async with asyncio.timeout(60):
            assert await screen.process.wait() == 0


async def test_a_daemon_that_takes_the_question_and_never_answers(daemon: OverviewServer) -> None:
    daemon.stalled = True
    finished = await called("top", "--url", daemon.url, database_url=NOWHERE)
    assert finished.code == 1
    assert f"no daemon answers at {daemon.url} (no answer within 2 s)" in finished.err


async def test_a_first_look_that_fails_is_told_on_a_terminal() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    async with terminal("top", "--url", url, settings={"DATABASE_URL": NOWHERE}) as screen:
        assert await screen.process.wait() == 1
        await eventually(lambda: f"error: no daemon answers at {url}" in " ".join(screen.raw.split()))
        assert ENTERED not in screen.raw


async def test_it_can_be_suspended(daemon: OverviewServer) -> None:
    """Ctrl-Z gives the terminal back; the next foreground goes on where it was."""
    async with terminal("top", "--url", daemon.url, "--interval", "0.2", settings={}) as screen:
        await eventually(lambda: "articles working" in screen.last, 60)
        screen.process.send_signal(signal.SIGTSTP)
        await eventually(lambda: LEFT in screen.raw, 60)
        screen.process.send_signal(signal.SIGCONT)
        await eventually(lambda: "articles working" in screen.since(LEFT), 60)
        screen.press("q")
        assert await screen.process.wait() == 0
        assert screen.cooked()


async def test_counting_every_source_is_not_done_at_every_look(rig: Rig) -> None:
    ticks = itertools.count()  # every look at the clock is a second later: counting seems to take one
    settings = Settings.read(database_url=rig.url, http_port="0")
    watcher = Watcher(settings, [], clock=lambda: float(next(ticks)))
    depths = []
    for key in range(30):
        await rig.write(**{f"k{key}": "text"})
        depths.append((await watcher.look()).overview.pipelines[0].queue.live.depth)
    assert depths == [1] * 19 + [20] * 11


async def test_a_reader_may_look_through_the_fallback(rig: Rig) -> None:
    admin(rig.url, "CREATE ROLE onlooker LOGIN IN ROLE sidecar_reader")
    try:
        url = rig.url.replace("postgres@", "onlooker@", 1)
        assert (await called("top", "--json", database_url=url, HTTP_PORT="0")).json["from"] == "database"
    finally:
        admin(rig.url, "DROP ROLE onlooker")
