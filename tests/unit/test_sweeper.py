"""The sweep loop on a real queue: it rests, wakes, keeps to its duty, and waits out an outage."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar_daemon.domain.errors import Refused, Transient
from sidecar_daemon.domain.messages import SweepWindow
from sidecar_daemon.sweeper import (
    FEWEST_ROWS,
    FIRST_ROWS,
    LONGEST_REST,
    LONGEST_SECONDS,
    Sweeper,
    SweepLimits,
    fewer_rows,
    next_rows,
)
from tests.rig import NAME
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.unit.conftest import Bench


def build(bench: Bench, *, interval: float = 3600.0, rows: int = 1000, duty: float = 0.5) -> Sweeper:
    return Sweeper(
        NAME,
        queue=bench.queue,
        limits=SweepLimits(interval=interval, rows=rows, duty=duty),
        telemetry=bench.told.telemetry,
        patience=bench.told.patience("docs"),
        uniform=lambda low, high: (low + high) / 2,
        pulse=bench.pulse,
    )


@asynccontextmanager
async def sweeping(sweeper: Sweeper) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(sweeper.run())
    try:
        yield task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def quietly(bench: Bench, count: int, first: int = 0) -> None:
    await bench.rig.connection.execute("ALTER TABLE docs DISABLE TRIGGER USER")
    await bench.rig.write(**{f"k{n}": f"text {n}" for n in range(first, first + count)})
    await bench.rig.connection.execute("ALTER TABLE docs ENABLE TRIGGER USER")


async def test_a_backfill_walks_to_the_end_without_rest_and_then_rests(bench: Bench) -> None:
    await quietly(bench, 30)
    await bench.rig.connection.execute("SELECT sidecar.request_sweep('docs')")
    async with sweeping(build(bench, rows=4)):
        await eventually(bench.queue.calls.__len__)
        await eventually(lambda: [line["state"] for line in bench.told.events("swept")][-1:] == ["finished"])
    assert await bench.rig.depth() == 30
    assert [line["state"] for line in bench.told.events("swept")] == ["walked"] * 7 + ["finished"]
    assert all(line["backfill"] for line in bench.told.events("swept"))


async def test_a_routine_walk_rests_between_windows_and_a_request_wakes_it(bench: Bench) -> None:
    sweeper = build(bench, interval=3600)
    async with sweeping(sweeper):
        await eventually(lambda: bench.told.events("swept"))
        assert bench.told.events("swept")[0]["state"] == "resting"
        await quietly(bench, 1)
        await bench.rig.connection.execute("SELECT sidecar.request_sweep('docs', false)")
        sweeper.wake()
        await eventually(lambda: len(bench.told.events("swept")) == 2)
        assert bench.told.events("swept")[1]["missing"] == 1
    assert bench.queue.count("sweep") == 2


async def test_it_waits_out_an_outage(bench: Bench) -> None:
    await quietly(bench, 1)
    await bench.rig.connection.execute("SELECT sidecar.request_sweep('docs')")
    bench.queue.fail("sweep", Transient("connection_lost", "planted"), times=3)
    async with sweeping(build(bench)):
        await eventually(lambda: bench.told.events("swept"))
    assert len(bench.told.events("fault")) == len(bench.told.events("recovered")) == 1


@pytest.mark.parametrize("code", ["statement_timeout", "timeout"])
async def test_a_window_that_runs_out_of_time_shrinks_until_it_is_through(bench: Bench, code: str) -> None:
    """A backfill of large documents: were it asked for the same rows for ever, it would never begin."""
    await quietly(bench, 3)
    await bench.rig.connection.execute("SELECT sidecar.request_sweep('docs')")
    bench.queue.fail("sweep", Transient(code, "planted"), times=5)
    async with sweeping(build(bench)):
        await eventually(lambda: bench.told.events("swept"))
    asked = [rows for name, rows in bench.queue.calls if name == "sweep"]
    assert asked[:6] == [200, 100, 50, 25, 12, 6]
    assert await bench.rig.depth() == 3
    assert len(bench.told.events("fault")) == len(bench.told.events("recovered")) == 1


async def test_a_window_of_one_row_that_runs_out_of_time_is_waited_for(bench: Bench) -> None:
    bench.queue.cut(Transient("statement_timeout", "planted"), "sweep")
    sweeper = build(bench, rows=2)
    async with sweeping(sweeper):
        await eventually(lambda: bench.queue.count("sweep") >= 4)
        assert sweeper._patience.away
    assert {rows for _, rows in bench.queue.calls[1:]} == {1}


async def test_an_outage_does_not_shrink_a_window(bench: Bench) -> None:
    bench.queue.fail("sweep", Transient("connection_lost", "planted"), times=3)
    async with sweeping(build(bench)):
        await eventually(lambda: bench.told.events("swept"))
    assert {rows for _, rows in bench.queue.calls} == {FIRST_ROWS}


async def test_windows_begin_small_and_grow_while_they_are_quick(bench: Bench) -> None:
    await quietly(bench, 2 * FIRST_ROWS)
    await bench.rig.connection.execute("SELECT sidecar.request_sweep('docs')")
    async with sweeping(build(bench, rows=1_000_000)):
        await eventually(lambda: [line["state"] for line in bench.told.events("swept")][-1:] == ["finished"])
    asked = [rows for _, rows in bench.queue.calls]
    assert asked[0] == FIRST_ROWS
    assert asked[1] in {FIRST_ROWS, 2 * FIRST_ROWS}, "as quick as this machine is"


async def test_an_answer_without_a_row_says_nothing_of_the_next_window(bench: Bench) -> None:
    """Quick as it is: were windows to grow by it, an idle pipeline would begin its walk with the largest."""
    sweeper = build(bench, rows=1_000_000)
    async with sweeping(sweeper):
        await eventually(lambda: bench.told.events("swept"))
        sweeper.wake()
        await eventually(lambda: len(bench.told.events("swept")) == 2)
    assert {line["state"] for line in bench.told.events("swept")} == {"resting"}
    assert {rows for _, rows in bench.queue.calls} == {FIRST_ROWS}


async def test_a_pause_ends_it(bench: Bench) -> None:
    await bench.rig.connection.execute("SELECT sidecar.set_enabled('docs', false)")
    with pytest.raises(Refused):
        await build(bench).run()


@pytest.mark.parametrize(
    ("state", "backfill", "seconds", "rest"),
    [
        ("walked", True, 0.3, 0.0),
        ("walked", False, 0.3, 0.3 * 49),
        ("waiting", True, 0.1, 1.0),
        ("waiting", False, 0.1, 1.0),
        ("finished", False, 0.1, LONGEST_REST / 4),
        ("resting", False, 0.1, LONGEST_REST / 4),
        ("busy", True, 0.1, LONGEST_REST / 4),
    ],
)
def test_how_long_it_rests(bench: Bench, state: str, *, backfill: bool, seconds: float, rest: float) -> None:
    window = SweepWindow(state, 1, 0, 0, 0, 0, 0, backfill)
    assert build(bench, duty=0.02)._rest(window, seconds) == pytest.approx(rest)
    assert build(bench, interval=2.0)._rest(SweepWindow("resting", 0, 0, 0, 0, 0, 0, False), 0.1) == 0.5


@pytest.mark.parametrize(
    ("rows", "seconds", "most", "following"),
    [
        (1000, 0.6, 5000, 500),
        (150, 0.6, 5000, FEWEST_ROWS),
        (50, 0.6, 5000, 50),
        (100, 2.0, 5000, 25),
        (100, 1.1, 5000, 45),
        (2, 3.0, 5000, 1),
        (1, 30.0, 5000, 1),
        (10, 0.6, 10, 10),
        (1000, 0.05, 5000, 2000),
        (4000, 0.05, 5000, 5000),
        (1000, 0.3, 5000, 1000),
    ],
)
def test_windows_shrink_when_slow_and_grow_when_quick(rows: int, seconds: float, most: int, following: int) -> None:
    assert next_rows(rows, seconds, most=most) == following


@given(rows=st.integers(1, 1_000_000), seconds=st.floats(0, 100), most=st.integers(1, 1_000_000))
def test_a_window_never_has_less_than_a_row_nor_more_than_the_most(rows: int, seconds: float, most: int) -> None:
    rows = min(rows, most)
    following = next_rows(rows, seconds, most=most)
    assert 1 <= following <= most
    assert 1 <= fewer_rows(rows, seconds) <= max(1, rows // 2)
    if seconds > LONGEST_SECONDS:
        assert following < rows or following == 1
