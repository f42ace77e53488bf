"""Which stillness is excused and which is not: by the judge alone, and in a real worker whose clock is the test's."""

from __future__ import annotations

import asyncio
import threading
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar_daemon.domain.errors import Transient
from sidecar_daemon.domain.messages import Lane
from sidecar_daemon.domain.pulse import COMPUTING_SECONDS, GLANCE, Pulse
from tests.rig import running
from tests.unit.test_supervisor import Office, at_work
from tests.unit.test_sweeper import build, sweeping
from tests.unit.test_worker_parts import document, windows
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sidecar_daemon.domain.messages import Pipeline
    from sidecar_daemon.domain.pulse import Beat
    from sidecar_daemon.supervisor import Crew
    from sidecar_daemon.worker import Worker
    from tests.unit.conftest import Bench

STILL = 10.0
LONG = 100.0
"""Seconds of the test's clock: far beyond what is forgiven."""
RARE = {"poll_min": 6000.0, "poll_max": 6000.0, "lease_seconds": 6000.0}
"""Nothing happens by itself while the test's clock runs on."""


@dataclass
class Clock:
    """A clock that only the test moves on."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds

    def pass_under(self, pulse: Pulse, seconds: float) -> None:
        """Move on as in a process that runs, where somebody looks again and again."""
        for _ in range(round(seconds)):
            self.now += 1
            pulse.stuck()


@dataclass
class Judged:
    """A worker at work, and its judge."""

    bench: Bench
    clock: Clock = field(default_factory=Clock)
    pulse: Pulse = field(init=False)

    def __post_init__(self) -> None:
        self.pulse = Pulse(self.clock, STILL)
        self.bench.pulse = self.pulse

    @asynccontextmanager
    async def at_work(self, **limits: float) -> AsyncIterator[Worker]:
        worker = await self.bench.worker(**{**RARE, **limits})
        async with running(worker):
            yield worker

    async def alive_later(self, seconds: float = LONG) -> None:
        """Let a long time pass: whoever was just moving moves on, everybody else is excused."""
        assert self.pulse.stuck() is None
        self.clock.pass_under(self.pulse, seconds)
        await eventually(lambda: self.pulse.stuck() is None, timeout=5, what=f"an excuse: {self.pulse.stuck()}")

    async def named_later(self, loop: str) -> None:
        """Let a long time pass: this loop has no excuse."""
        assert self.pulse.stuck() is None
        self.clock.pass_under(self.pulse, LONG)
        await eventually(lambda: self.pulse.stuck() == f"docs: {loop} has not moved for {LONG:.0f} s", timeout=10)


@pytest.fixture
def judged(bench: Bench) -> Judged:
    return Judged(bench)


def test_a_loop_without_a_turn_is_named() -> None:
    clock = Clock()
    pulse = Pulse(clock, STILL)
    assert pulse.stuck() is None
    with pulse.watch("one", "two") as (one, two):
        clock.pass_under(pulse, STILL)
        assert pulse.stuck() is None
        one.turn()
        clock.pass_under(pulse, 1)
        assert pulse.stuck() == "two has not moved for 11 s"
        two.turn()
        assert pulse.stuck() is None
        clock.pass_under(pulse, LONG)
    assert pulse.stuck() is None


def test_a_wait_is_an_excuse_while_what_it_waits_for_has_not_come() -> None:
    clock, empty = Clock(), [True]
    pulse = Pulse(clock, STILL)
    with pulse.watch("loop") as (loop,):
        with loop.waiting(lambda: empty[0]):
            clock.pass_under(pulse, LONG)
            assert pulse.stuck() is None
            empty[0] = False
            clock.pass_under(pulse, STILL)
            assert pulse.stuck() is None
            clock.pass_under(pulse, 1)
            assert pulse.stuck() == "loop has not moved for 11 s"
        assert pulse.stuck() is None
        empty[0] = True
        clock.pass_under(pulse, STILL + 1)
        assert pulse.stuck() == "loop has not moved for 11 s"


def test_a_sleep_is_an_excuse_until_its_end() -> None:
    clock = Clock()
    pulse = Pulse(clock, STILL)
    with pulse.watch("loop") as (loop,), loop.asleep(LONG):
        clock.pass_under(pulse, LONG - 1)
        assert pulse.stuck() is None
        clock.pass_under(pulse, STILL + 1)
        assert pulse.stuck() == "loop has not moved for 11 s"


def test_a_thread_that_computes_is_an_excuse_for_a_quarter_of_an_hour() -> None:
    clock, done = Clock(), [False]
    pulse = Pulse(clock, STILL)
    with pulse.watch("loop") as (loop,):
        with loop.computing(lambda: done[0]):
            clock.pass_under(pulse, COMPUTING_SECONDS + STILL - 1)
            assert pulse.stuck() is None
            clock.pass_under(pulse, 1)
            assert pulse.stuck() == "loop has not moved for 11 s"
        with loop.computing(lambda: done[0]):
            done[0] = True
            clock.pass_under(pulse, STILL + 1)
            assert pulse.stuck() == "loop has not moved for 11 s"
        assert pulse.stuck() is None


def test_an_excuse_for_all_of_a_group_ends_with_its_cause() -> None:
    clock, away = Clock(), [True]
    pulse = Pulse(clock, STILL)
    with pulse.watch("loop", excused=lambda: away[0]):
        clock.pass_under(pulse, LONG)
        assert pulse.stuck() is None
        away[0] = False
        clock.pass_under(pulse, STILL + 1)
        assert pulse.stuck() == "loop has not moved for 11 s"


def test_a_process_that_was_frozen_is_not_stuck_when_it_wakes() -> None:
    """Nobody looked meanwhile, for whoever looks was frozen with the loops."""
    clock = Clock()
    pulse = Pulse(clock, STILL)
    with pulse.watch("loop", "sleeper") as (loop, sleeper), sleeper.asleep(LONG):
        clock.pass_under(pulse, STILL - 2)
        clock.advance(1000 * LONG)
        assert pulse.stuck() is None
        loop.turn()
        clock.pass_under(pulse, STILL - 1)
        assert pulse.stuck() is None
        clock.pass_under(pulse, 2)
        assert pulse.stuck() == "sleeper has not moved for 12 s"


@given(gaps=st.lists(st.floats(0, 1e6), max_size=60), turns=st.sets(st.integers(0, 59)))
def test_only_time_under_somebodys_eyes_counts_and_a_stuck_loop_is_found_however_rare_the_looks(
    gaps: list[float], turns: set[int]
) -> None:
    clock = Clock()
    pulse = Pulse(clock, STILL)
    with pulse.watch("loop") as (loop,):
        counted = 0.0
        for number, gap in enumerate(gaps):
            clock.advance(gap)
            counted += min(gap, GLANCE * STILL)
            if abs(counted - STILL) > 1e-3:  # the clock's own rounding
                assert (pulse.stuck() is not None) == (counted > STILL)
            else:
                pulse.stuck()
            if number in turns:
                loop.turn()
                counted = 0.0


async def test_an_idle_worker_is_alive(judged: Judged) -> None:
    async with judged.at_work():
        await eventually(lambda: judged.bench.queue.count("lease") == len(Lane))
        await eventually(lambda: judged.bench.queue.under_way == 0)
        await judged.alive_later()


@pytest.mark.parametrize("messages", [16, 200], ids=["before it leases", "with what it leased"])
async def test_a_slow_model_is_no_hang_nor_is_a_leaser_that_waits_for_room(judged: Judged, messages: int) -> None:
    bench = judged.bench
    bench.embedder.gate.clear()
    await bench.rig.write(**{f"k{n}": f"text {n} " * 20 for n in range(200)})
    async with judged.at_work(threads=1, batch_windows=1, lease_messages=messages):
        await eventually(lambda: len(bench.embedder.runs) == 1, what="a run of the model")
        await eventually(lambda: bench.queue.count("read") > 0 and bench.queue.under_way == 0)
        await judged.alive_later()
        bench.embedder.gate.set()


@pytest.mark.parametrize(("call", "loop"), [("embed", "embedding 1"), ("tokenize", "leasing live")])
async def test_a_model_that_never_ends_is_named(
    judged: Judged, monkeypatch: pytest.MonkeyPatch, call: str, loop: str
) -> None:
    bench, gate, entered = judged.bench, threading.Event(), threading.Event()
    real = getattr(bench.embedder, call)

    def hanging(argument: object) -> object:
        entered.set()
        gate.wait(60)
        return real(argument)

    monkeypatch.setattr(bench.embedder, call, hanging)
    await bench.rig.write(k1="text")
    async with judged.at_work(threads=1):
        await eventually(entered.is_set)
        await eventually(lambda: bench.queue.under_way == 0)
        await judged.alive_later()
        judged.clock.pass_under(judged.pulse, COMPUTING_SECONDS)
        assert (judged.pulse.stuck() or "").startswith(f"docs: {loop} has not moved")
        gate.set()
        await eventually(bench.settled)


async def test_a_suspect_that_waits_for_its_turn_is_no_hang(judged: Judged) -> None:
    bench = judged.bench
    bench.embedder.gate.clear()
    await bench.rig.write(k1="one", k2="two")
    assert len(await bench.rig.lease()) == 2
    await bench.rig.expire()
    async with judged.at_work(threads=2):
        await eventually(lambda: bench.queue.count("begin") == 1 and len(bench.embedder.runs) == 1)
        await judged.alive_later()
        bench.embedder.gate.set()
        await eventually(bench.settled)


async def test_an_outage_is_no_hang(judged: Judged) -> None:
    bench = judged.bench
    bench.queue.cut(Transient("connection_failed", "planted"), "settle")
    async with judged.at_work() as worker:
        await bench.rig.write(k1="text")
        worker.wake()
        await eventually(lambda: worker.waiting is not None, what="the outage to be noticed")
        await judged.alive_later()
        bench.queue.mend()
        await eventually(bench.settled)


@pytest.mark.parametrize(
    ("call", "loop"),
    [("lease", "leasing live"), ("read", "leasing live"), ("settle", "settling"), ("begin", "leasing live")],
)
async def test_a_call_that_never_ends_is_named(judged: Judged, call: str, loop: str) -> None:
    bench = judged.bench
    gate = bench.queue.hold(call)
    await bench.rig.write(k1="text")
    if call == "begin":  # only a suspect is announced
        await bench.rig.lease_one()
        await bench.rig.expire()
    async with judged.at_work(threads=1):
        await asyncio.wait_for(gate.reached.wait(), 30)
        await judged.named_later(loop)
        gate.open.set()


async def test_a_keeper_that_hangs_is_named(judged: Judged) -> None:
    bench = judged.bench
    bench.embedder.gate.clear()
    gate = bench.queue.hold("extend")
    await bench.rig.write(k1="text")
    async with judged.at_work(lease_seconds=1.0):
        await asyncio.wait_for(gate.reached.wait(), 30)
        await judged.named_later("keeping")
        gate.open.set()
        bench.embedder.gate.set()


async def test_a_stage_that_sleeps_on_behind_its_work_is_named(judged: Judged) -> None:
    """As after a lost wake-up: the windows are there, whoever should take them does not look."""
    async with judged.at_work(threads=1) as worker:
        await eventually(lambda: judged.bench.queue.count("lease") == len(Lane))
        worker._state.backlog._pending += windows(document("lost"))
        await judged.named_later("embedding 1")
        worker._state.backlog._pending.clear()


async def test_a_drain_has_a_limit_of_its_own(judged: Judged) -> None:
    bench = judged.bench
    gate = bench.queue.hold("settle")
    await bench.rig.write(k1="text")
    async with judged.at_work() as worker:
        await asyncio.wait_for(gate.reached.wait(), 30)
        worker.stop()
        await judged.alive_later()
        gate.open.set()


async def test_a_sweep_rests_without_being_taken_for_dead_and_its_hang_is_named(judged: Judged) -> None:
    bench = judged.bench
    sweeper = build(bench)
    async with sweeping(sweeper):
        await eventually(lambda: bench.queue.count("sweep") == 1 and bench.queue.under_way == 0)
        await judged.alive_later(STILL + 1)  # a quarter of a minute is its rest
        gate = bench.queue.hold("sweep")
        sweeper.wake()
        await asyncio.wait_for(gate.reached.wait(), 30)
        await judged.named_later("sweeping")
        gate.open.set()


async def test_a_supervisor_that_waits_for_the_database_is_no_hang(bench: Bench) -> None:
    clock = Clock()
    office = Office(bench, pulse=Pulse(clock, STILL), refuse=Transient("connection_failed", "planted"))
    async with at_work(office):
        await eventually(lambda: office.supervisor._patience.away, what="the outage to be noticed")
        clock.pass_under(office.pulse, LONG)
        assert office.pulse.stuck() is None
        office.refuse = None
        await office.started()


async def test_a_supervisor_that_hangs_is_named(bench: Bench) -> None:
    clock, entered, gate = Clock(), asyncio.Event(), asyncio.Event()
    office = Office(bench, pulse=Pulse(clock, STILL))

    async def hire(pipeline: Pipeline, beat: Beat) -> Crew:
        entered.set()
        await gate.wait()
        return await office.hire(pipeline, beat)

    office.supervisor._hire = hire
    async with at_work(office):
        await asyncio.wait_for(entered.wait(), 30)
        clock.pass_under(office.pulse, LONG)
        assert office.pulse.stuck() == f"supervising has not moved for {LONG:.0f} s"
        gate.set()
        await office.started()
