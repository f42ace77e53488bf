"""The sweep loop on a real queue: it rests, wakes, keeps to its duty, and waits out an outage."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import pytest

from sidecar_daemon.domain.errors import Refused, Transient
from sidecar_daemon.domain.messages import SweepWindow
from sidecar_daemon.sweeper import FEWEST_ROWS, LONGEST_REST, Sweeper, SweepLimits, next_rows
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
        (10, 0.6, 10, 10),
        (1000, 0.05, 5000, 2000),
        (4000, 0.05, 5000, 5000),
        (1000, 0.3, 5000, 1000),
    ],
)
def test_windows_shrink_when_slow_and_grow_when_quick(rows: int, seconds: float, most: int, following: int) -> None:
    assert next_rows(rows, seconds, most=most) == following
