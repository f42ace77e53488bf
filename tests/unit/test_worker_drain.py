"""How a worker ends: drained, refused, or broken; what it held is released, kept or left to expire."""

from __future__ import annotations

import asyncio
import functools
from typing import TYPE_CHECKING

import pytest

from sidecar_daemon.domain.errors import Fatal, Refused, Transient
from sidecar_daemon.domain.messages import DocumentKey
from tests.faulty import FaultyQueue
from tests.rig import Rig, running
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Collection

    from sidecar_daemon.domain.messages import Reading
    from tests.unit.conftest import Bench


class Bug(Exception):  # noqa: N818  it is one
    """What nobody named."""


class Panic(BaseException):
    """What a library in another language raises when it breaks."""


async def entered(bench: Bench) -> None:
    await eventually(lambda: bench.embedder.entered.acquire(blocking=False), what="a run of the model")


async def assert_released(rig: Rig, count: int) -> None:
    """Messages are visible now, and every lease of them is excused."""
    messages = await rig.messages()
    assert len(messages) == count
    for message in messages:
        assert message["hidden"] <= 0
        assert message["message"]["sidecar"]["excused"] == message["read_ct"]


async def test_a_drain_finishes_what_began_and_releases_the_rest(bench: Bench) -> None:
    """T15."""
    rig = bench.rig
    await rig.write(**{f"k{n}": f"text {n}" for n in range(12)})
    bench.embedder.gate.clear()
    worker = await bench.worker(threads=1, batch_windows=4)
    async with running(worker) as task:
        await entered(bench)
        await eventually(lambda: len(bench.embedder._texts) == 12)
        worker.stop()
        await eventually(lambda: bench.told.documents("released") == 8)
        assert not task.done(), "four are in the model"
        assert [m["hidden"] <= 0 for m in await rig.messages()] == [False] * 4 + [True] * 8
        bench.embedder.gate.set()
    assert len(await rig.vectors()) == 4
    await assert_released(rig, 8)
    assert [lease.attempt for lease in await rig.lease()] == [1] * 8


async def test_a_document_that_began_in_part_is_released_whole(bench: Bench) -> None:
    await bench.rig.write(k1=" ".join(f"word{n}" for n in range(300)))
    bench.embedder.gate.clear()
    worker = await bench.worker(threads=1, batch_windows=1)
    async with running(worker):
        await entered(bench)
        worker.stop()
        await eventually(lambda: bench.told.documents("released") == 1)
        bench.embedder.gate.set()
    await assert_released(bench.rig, 1)
    assert await bench.rig.vectors() == []


async def test_the_drain_ends_at_its_deadline(bench: Bench) -> None:
    await bench.rig.write(k1="stuck")
    bench.embedder.gate.clear()
    worker = await bench.worker(drain_seconds=0.1)
    async with running(worker):
        await entered(bench)
    assert not bench.embedder.gate.is_set()
    await assert_released(bench.rig, 1)


async def test_a_drain_during_an_outage_ends_at_its_deadline(bench: Bench) -> None:
    await bench.rig.write(k1="text")
    error = Transient("connection_lost", "planted")
    worker = await bench.worker(drain_seconds=0.1)
    bench.queue.cut(error, "settle", "release", "lease")
    async with running(worker) as task:
        bench.queue.mend()
        bench.queue.cut(error, "settle", "release")
        await eventually(lambda: bench.queue.count("settle") >= 2)
        worker.stop()
        await asyncio.wait_for(task, 30)
    (message,) = await bench.rig.messages()
    assert message["hidden"] > 0, "nobody could release it: it expires"


async def test_a_stop_between_two_reads_releases_the_unread(bench: Bench) -> None:
    gate = bench.queue.hold("read")
    rig = bench.rig
    await rig.write(**{f"k{n}": f"text {n}" for n in range(70)})
    worker = await bench.worker(lease_messages=100, batch_tokens=4096)
    async with running(worker):
        await gate.reached.wait()
        worker.stop()
        gate.open.set()
    assert bench.queue.count("read") == 1, "the second part is not read"
    await assert_released(rig, 70)
    assert bench.told.documents("released") == 70


async def test_a_stop_while_the_lane_is_full_releases_what_waits_for_room(bench: Bench) -> None:
    """Titles first: a worker that has seen nothing else leases more books than there is room for."""
    rig = bench.rig
    worker = await bench.worker(threads=1, batch_tokens=16, lease_messages=12)
    async with running(worker):
        await rig.write(**{f"k{100 + n}": f"t{n}" for n in range(60)})
        await eventually(lambda: bench.told.documents("embedded") == 60)
        before = len(bench.embedder._texts)
        bench.embedder.gate.clear()
        await rig.write(**{f"k{n}": " ".join(f"word{n * 100 + w}" for w in range(60)) for n in range(12)})
        await eventually(lambda: len(bench.embedder._texts) == before + 12)
        await entered(bench)
        worker.stop()
        await eventually(lambda: bench.told.documents("released") == 11)
        bench.embedder.gate.set()
    assert len(await rig.vectors()) == 61
    await assert_released(rig, 11)


async def test_an_idle_worker_stops_at_once(bench: Bench) -> None:
    worker = await bench.worker(poll_min=600, poll_max=600)
    async with running(worker) as task:
        await eventually(lambda: bench.queue.count("lease") == 2)
        worker.stop()
        await asyncio.wait_for(task, 30)
    assert bench.queue.count("release") == 0


@pytest.mark.parametrize(
    ("how", "code"),
    [
        ("SELECT sidecar.set_enabled('docs', false)", "paused"),
        ("UPDATE sidecar.pipelines SET model_id = 'other@2'", "model_mismatch"),
        ("SELECT sidecar.detach('docs')", "unknown_pipeline"),
    ],
)
async def test_a_refusal_ends_the_worker_and_gives_everything_back(bench: Bench, how: str, code: str) -> None:
    rig = bench.rig
    await rig.write(k1="in the model", k2="waiting")
    bench.embedder.gate.clear()
    worker = await bench.worker(threads=1, batch_windows=1)
    task = asyncio.create_task(worker.run())
    await entered(bench)
    await rig.connection.execute(how)
    worker.wake()
    await eventually(lambda: bench.queue.count("release") >= 1)
    bench.embedder.gate.set()
    with pytest.raises(Refused) as caught:
        await task
    assert caught.value.code == code
    if code == "paused":  # what was in the model may still be settled
        assert await rig.embedded() == {1: "in the model"}
        await assert_released(rig, 1)
    elif code == "model_mismatch":
        assert await rig.embedded() == {}
        await assert_released(rig, 2)


async def test_a_refused_settle_gives_its_documents_back(bench: Bench) -> None:
    gate = bench.queue.hold("settle")
    await bench.rig.write(k1="one")
    task = asyncio.create_task((await bench.worker(poll_min=600, poll_max=600)).run())
    await gate.reached.wait()
    await bench.rig.connection.execute("UPDATE sidecar.pipelines SET model_id = 'other@2'")
    gate.open.set()
    with pytest.raises(Refused):
        await task
    await assert_released(bench.rig, 1)
    assert bench.told.documents("released") == 1


@pytest.mark.parametrize("error", [Bug("planted"), Fatal("graph_bad", "planted"), Panic("planted")])
async def test_a_bug_ends_the_worker_and_counts_for_what_had_begun(bench: Bench, error: BaseException) -> None:
    """Crash-only. Were it released and excused, a text that breaks us would come back for ever."""
    rig = bench.rig
    bench.embedder.poison("breaks", error)
    await rig.write(k1="breaks")
    await rig.write(k2="waits behind")
    task = asyncio.create_task((await bench.worker(threads=1, batch_windows=1)).run())
    with pytest.raises(type(error), match="planted"):
        await asyncio.wait_for(task, 30)
    culprit = (await rig.messages())[0]
    assert culprit["hidden"] > 0
    assert "sidecar" not in culprit["message"]
    await rig.expire()
    assert {lease.key: lease.attempt for lease in await rig.lease()}[DocumentKey("1")] == 2


def broke_or_buried(bench: Bench, task: asyncio.Task[None]) -> bool:
    return task.done() or len(bench.told.events("dead_lettered")) == 1


class BrokenReads(FaultyQueue):
    """Reading document 2 breaks the worker."""

    async def read(self, keys: Collection[DocumentKey], *, claim_seconds: float | None = None) -> list[Reading]:
        if "2" in keys:
            raise Panic("planted")
        return await super().read(keys, claim_seconds=claim_seconds)


@pytest.mark.parametrize("where", ["reading", "tokenizing", "running"])
async def test_a_text_that_breaks_the_worker_again_and_again_is_buried(bench: Bench, where: str) -> None:
    """R13, with an error instead of a signal: the culprit is dead-lettered, its neighbours are not."""
    rig = bench.rig
    match where:
        case "reading":
            bench.queue = BrokenReads(rig.queue)
        case "tokenizing":
            bench.embedder.unreadable("breaks", Panic("planted"))
        case _:
            bench.embedder.poison("breaks", Bug("planted"))
    await rig.write(k1="good", k2="breaks", k3="good too")
    for _ in range(8):
        worker = await bench.worker(threads=1, max_attempts=3)
        task = asyncio.create_task(worker.run())
        await eventually(functools.partial(broke_or_buried, bench, task))
        if not task.done():
            await eventually(bench.settled)
            worker.stop()
            await task
            break
        assert isinstance(task.exception(), Bug | Panic)
        await rig.expire()
    assert [(d["document_id"], d["reason"]) for d in await rig.dead()] == [("2", "attempts_exhausted")]
    assert sorted(await rig.embedded()) == [1, 3]


async def test_a_stop_releases_suspects_that_wait_for_their_turn(bench: Bench) -> None:
    rig = bench.rig
    await rig.write(k1="one", k2="two", k3="three")
    await rig.lease()
    await rig.expire()
    bench.embedder.gate.clear()
    worker = await bench.worker()
    async with running(worker):
        await entered(bench)
        worker.stop()
        bench.embedder.gate.set()
    assert await rig.embedded() == {1: "one"}
    assert [lease.attempt for lease in await rig.lease()] == [2, 2]
    assert bench.queue.count("begin") == bench.queue.count("read") == 1


async def test_a_suspect_that_was_lost_while_it_waited_is_not_touched(bench: Bench) -> None:
    rig = bench.rig
    await rig.write(k1="one", k2="two")
    await rig.lease()
    await rig.expire()
    bench.embedder.gate.clear()
    async with running(await bench.worker(lease_seconds=1.2)):
        await entered(bench)
        await rig.connection.execute(
            "UPDATE pgmq.q_docs SET read_ct = read_ct + 1, vt = clock_timestamp() + interval '1 h' WHERE msg_id = 2"
        )
        await eventually(lambda: bench.told.events("leases_lost"))
        bench.embedder.gate.set()
        await eventually(lambda: bench.told.documents("embedded") == 1)
    assert bench.queue.count("begin") == bench.queue.count("read") == 1


async def test_a_settler_that_breaks_while_draining_ends_the_drain(bench: Bench) -> None:
    """Nobody takes from it any more: the stages before it must not wait for the deadline."""
    gate = bench.queue.hold("settle", error=Bug("planted"))
    bench.embedder.gate.clear()
    await bench.rig.write(k1="one", k2="two")
    worker = await bench.worker(threads=2, batch_windows=1, drain_seconds=600)
    task = asyncio.create_task(worker.run())
    await entered(bench)
    await entered(bench)
    await bench.rig.write(k3=" ")
    await gate.reached.wait()
    worker.stop()
    await eventually(lambda: worker._state.backlog._closed, what="the drain to begin")
    gate.open.set()
    with pytest.raises(Bug):
        await asyncio.wait_for(task, 20)  # the model would wait longer at its gate


async def test_a_cancelled_worker_leaves_nothing_running(bench: Bench) -> None:
    task = asyncio.create_task((await bench.worker()).run())
    await eventually(lambda: bench.queue.count("lease") >= 2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [t.get_coro() for t in asyncio.all_tasks() if t is not asyncio.current_task()] == []
