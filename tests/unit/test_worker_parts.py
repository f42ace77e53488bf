"""The parts of a worker that need no database: the backlog's bounds and the patience with the world."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from sidecar_daemon.domain.errors import Poison, Refused, Transient
from sidecar_daemon.domain.messages import Document, DocumentKey, Lane, Lease, MessageId, Window
from sidecar_daemon.domain.pacing import RunBudget
from sidecar_daemon.patience import GRACE_SECONDS, Patience
from sidecar_daemon.worker.backlog import Backlog
from sidecar_daemon.worker.state import InFlight, Job
from tests.rig import PLAIN, Told, md5
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Collection

    from sidecar_daemon.domain.messages import Batch


def document(key: str, *, lane: Lane = Lane.LIVE, attempt: int = 1) -> Document:
    lease = Lease(lane, MessageId(hash(key) % 1000), attempt, attempt, DocumentKey(key), 0.0)
    return Document(DocumentKey(key), key, md5(key), (lease,))


def windows(of: Document, words: int = 8, count: int = 1) -> list[Window]:
    (tokens,) = PLAIN.tokenize(" ".join(f"w{n}" for n in range(words)))
    return [Window(of, n, count, tokens) for n in range(count)]


def backlog(lane_tokens: int = 20, lane_windows: int = 100) -> Backlog:
    return Backlog(lane_tokens=lane_tokens, lane_windows=lane_windows, budget=RunBudget(most=1000), max_windows=10)


async def test_a_full_lane_makes_the_next_wait_and_the_other_lane_not() -> None:
    waiting = backlog()
    one, two, bulk = document("one"), document("two"), document("bulk", lane=Lane.BULK)
    assert await waiting.put(windows(one, words=30))
    late = asyncio.create_task(waiting.put(windows(two)))
    assert await waiting.put(windows(bulk))
    assert not late.done()
    batch = await waiting.take()
    assert batch is not None
    assert [window.document.key for window in batch.windows] == ["one"]
    assert await late
    assert len(waiting) == 2


async def test_room_comes_when_half_is_gone() -> None:
    waiting = backlog(lane_tokens=40)
    await waiting.put(windows(document("one"), words=18))
    asked = asyncio.create_task(waiting.room(Lane.LIVE))
    assert await waiting.room(Lane.BULK)
    assert not asked.done()
    await waiting.take()
    assert await asked


async def test_a_close_ends_every_wait() -> None:
    waiting, idle = backlog(), backlog()
    one, two = document("one"), document("two")
    await waiting.put(windows(one, words=10, count=3))
    put = asyncio.create_task(waiting.put(windows(two)))
    room = asyncio.create_task(waiting.room(Lane.LIVE))
    take = asyncio.create_task(idle.take())
    await asyncio.sleep(0)
    assert await waiting.close() == [one]
    assert await idle.close() == []
    assert (await put, await room, await take) == (False, False, None)
    assert await waiting.take() is None


async def test_many_short_windows_fill_a_lane_as_long_ones_do() -> None:
    """R14: a replica that hoards what it cannot begin soon leaves others idle, and loses more when it dies."""
    waiting = backlog(lane_tokens=10_000, lane_windows=4)
    assert waiting.room_windows(Lane.LIVE) == 4
    await waiting.put(windows(document("one"), words=1))
    assert waiting.has_room(Lane.LIVE)
    await waiting.put(windows(document("two"), words=1))
    assert not waiting.has_room(Lane.LIVE)
    assert (waiting.room_windows(Lane.LIVE), waiting.room_windows(Lane.BULK)) == (2, 4)
    await waiting.put(windows(document("three"), words=1, count=2))
    assert waiting.full(Lane.LIVE)
    await waiting.take()
    assert waiting.room_windows(Lane.LIVE) == 4


async def test_a_suspect_goes_first() -> None:
    """It has begun: whatever breaks while it waits may be blamed on it."""
    waiting = backlog(lane_tokens=1000)
    clean, suspect = document("clean"), document("suspect", attempt=2)
    await waiting.put(windows(clean))
    await waiting.put(windows(suspect, count=2))
    batch = await waiting.take()
    assert batch is not None
    assert [(window.document.key, window.ordinal) for window in batch.windows] == [("suspect", 0), ("suspect", 1)]


async def test_a_removed_document_makes_room() -> None:
    waiting = backlog()
    one, two = document("one"), document("two")
    await waiting.put(windows(one, words=30))
    put = asyncio.create_task(waiting.put(windows(two)))
    await waiting.remove(one)
    assert await put
    batch: Batch | None = await waiting.take()
    assert batch is not None
    assert [window.document for window in batch.windows] == [two]


def test_a_closed_job_is_joined_no_more() -> None:
    held = InFlight()
    first, second = (Job(document("same"), (), []) for _ in range(2))
    held.open(first)
    assert held.join(document("same"))
    assert len(first.leases) == 1
    held.open(second)
    held.close(first)
    assert held.join(document("same"))
    assert len(second.leases) == 1
    held.close(second)
    assert not held.join(document("same"))
    assert held.jobs == []


class Steps:
    """Raises what is planted, then answers."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.calls = 0

    async def __call__(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "answer"


async def test_patience_repeats_and_tells_once() -> None:
    told = Told()
    patience = told.patience()
    step = Steps(*[Transient("connection_lost", "the server is away")] * 5)
    assert await patience(step) == "answer"
    assert step.calls == 6
    assert [line["code"] for line in told.events("fault")] == ["connection_lost"]
    (recovered,) = told.events("recovered")
    assert recovered["failed_tries"] == 5
    assert patience.reason is None


async def test_patience_says_what_it_waits_for() -> None:
    told = Told()
    patience = told.patience()
    step = Steps(*[Transient("disk_full", "no space left")] * 3)
    asked = asyncio.create_task(patience(step))
    await eventually(lambda: patience.reason == "no space left")
    await asked


@pytest.mark.parametrize("error", [Refused("paused", "p"), Poison("x", "y"), RuntimeError("bug")])
async def test_patience_is_for_the_world_only(error: Exception) -> None:
    told = Told()
    step = Steps(error)
    with pytest.raises(type(error)):
        await told.patience()(step)
    assert step.calls == 1
    assert told.lines == []


async def test_patience_lets_through_what_the_caller_names() -> None:
    step = Steps(Transient("serialization", "a"), Transient("lock_timeout", "b"))
    with pytest.raises(Transient, match="b"):
        await Told().patience()(step, raising={"lock_timeout"})
    assert step.calls == 2


async def test_an_open_circuit_holds_the_gate_shut_until_its_probe_works() -> None:
    told = Told()
    patience = told.patience()
    hold = asyncio.Event()
    failed = asyncio.Event()

    async def step() -> str:
        if not failed.is_set():
            failed.set()
            raise Transient("read_only", "a standby")
        await hold.wait()
        return "answer"

    asked = asyncio.create_task(patience(step))
    await failed.wait()
    await eventually(lambda: patience.reason == "a standby")
    gate = asyncio.create_task(patience.closed())
    assert await patience(Steps()) == "answer"
    assert not gate.done(), "another step that works does not close it"
    assert patience.reason == "a standby"
    hold.set()
    assert await asked == "answer"
    await gate
    assert told.circuit() == "closed"


async def test_a_step_that_works_again_wakes_the_others_at_once() -> None:
    """One probe finds the end of an outage; the rest need not sleep theirs out."""
    told = Told()
    delays = iter([30.0, 0.05, 0.05])
    patience = Patience("database", told.telemetry, uniform=lambda *_: next(delays), clock=time.monotonic)
    sleeper, prober = Steps(Transient("disk_full", "a")), Steps(*[Transient("disk_full", "b")] * 2)
    async with asyncio.timeout(20):
        await asyncio.gather(patience(sleeper), patience(prober))
    assert (sleeper.calls, prober.calls) == (2, 3)
    assert told.circuit() == "closed"


async def test_a_step_that_never_failed_wakes_nobody() -> None:
    """What works all along says nothing of what does not: a full disk leaves the reads alone."""
    told = Told()
    patience = Patience("database", told.telemetry, uniform=lambda *_: 30.0, clock=time.monotonic)
    sleeper = Steps(Transient("disk_full", "a"))
    asked = asyncio.create_task(patience(sleeper))
    await eventually(lambda: patience.away)
    await patience(Steps())
    await asyncio.sleep(0.05)
    assert sleeper.calls == 1
    asked.cancel()


@dataclass
class Outage:
    """A patience whose clock is turned by hand: leases may have run out after 10 s without an answer."""

    told: Told = field(default_factory=Told)
    now: float = 100.0
    patience: Patience = field(init=False)

    def __post_init__(self) -> None:
        self.patience = Patience(
            "database", self.told.telemetry, uniform=lambda *_: 0.0, clock=lambda: self.now, expiring=10.0
        )

    async def last(self, seconds: float, *, error: Transient | None = None, raising: Collection[str] = ()) -> None:
        """One step fails, and answers after so many seconds: with an error where one is given."""

        async def step() -> None:
            if not self.patience.away:
                raise Transient("connection_lost", "planted")
            self.now += seconds
            if error is not None:
                raise error

        await self.patience(step, raising=raising)

    async def opens(self) -> bool:
        """Whether the gate is open now."""
        gate = asyncio.create_task(self.patience.closed())
        await asyncio.sleep(0.05)
        gate.cancel()
        return gate.done() and not gate.cancelled()


@pytest.mark.parametrize(("silent", "lasted", "waits"), [(0.0, 9.0, False), (0.0, 10.0, True), (6.0, 4.0, True)])
async def test_after_an_outage_in_which_leases_ran_out_others_get_a_moment(
    silent: float, lasted: float, waits: bool
) -> None:
    """Counted from the last answer: a call that hangs, or tries again by itself, fails late."""
    world = Outage()
    world.now += 50
    await world.patience(Steps())
    world.now += silent
    await world.last(lasted)
    assert await world.opens() is not waits
    assert world.patience.grace == (GRACE_SECONDS if waits else 0)
    world.now += GRACE_SECONDS
    assert await world.opens()


async def test_a_failure_within_the_grace_does_not_end_it() -> None:
    world = Outage()
    await world.last(60)
    world.now += 1
    await world.last(0.2)
    assert world.patience.grace == GRACE_SECONDS
    world.now += GRACE_SECONDS
    await world.last(0.2)
    assert await world.opens()


async def test_a_contended_lock_is_an_answer_too() -> None:
    """Else the gate would stay shut, and the next outage would not be told."""
    world = Outage()
    with pytest.raises(Transient, match="held"):
        await world.last(60, error=Transient("lock_timeout", "held"), raising={"lock_timeout"})
    assert len(world.told.events("recovered")) == 1
    world.now += GRACE_SECONDS
    assert await world.opens()


async def test_the_end_of_an_outage_is_not_missed() -> None:
    world = Outage()
    await world.last(60)
    async with asyncio.timeout(20):
        await world.patience.relief(within=30)
    for seconds in (0, 1):
        world.now += GRACE_SECONDS
        await world.last(seconds)  # leases cannot have run out: nobody prolongs them for that
        begun = time.monotonic()
        await world.patience.relief(within=0.05)
        assert time.monotonic() - begun >= 0.05


async def test_a_step_is_not_repeated_once_the_caller_stops() -> None:
    stop = asyncio.Event()
    patience = Told().patience()
    step = Steps(*[Transient("disk_full", "no space left")] * 100)
    asked = asyncio.create_task(patience(step, until=stop))
    await eventually(lambda: step.calls >= 1)
    stop.set()
    with pytest.raises(Transient, match="no space left"):
        await asked
    await patience.closed()


async def test_trouble_that_the_caller_deals_with_is_told_once_and_taken_back() -> None:
    told = Told()
    patience = told.patience()
    patience.relieved()
    for _ in range(3):
        patience.troubled(Transient("statement_timeout", "too slow"), waiting=1.0)
    assert patience.reason == "too slow"
    assert told.circuit() == "half_open"
    await patience.closed()
    patience.relieved()
    patience.relieved()
    assert not patience.reason
    assert told.circuit() == "closed"
    assert [line["code"] for line in told.events("fault")] == ["statement_timeout"]
    assert [line["failed_tries"] for line in told.events("recovered")] == [3]
