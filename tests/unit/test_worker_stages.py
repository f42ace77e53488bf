"""The worker on a real queue: every verdict, every way to fail, and who is blamed."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import numpy as np
import pytest

from sidecar_daemon.domain.errors import Poison, Transient
from sidecar_daemon.domain.messages import DocumentKey, Lane, LongDocuments
from sidecar_daemon.domain.windows import combine_windows
from sidecar_daemon.patience import GRACE_SECONDS
from sidecar_daemon.worker.state import WorkerLimits
from tests.faulty import FaultyEmbedder, FaultyQueue
from tests.rig import MAX_BYTES, PLAIN, Told, build_worker, md5, running, second_session
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sidecar_daemon.domain.messages import TokenIds, Vectors
    from tests.unit.conftest import Bench

LONG = " ".join(f"word{n}" for n in range(150))


async def entered(bench: Bench) -> None:
    """Wait until a run has begun."""
    await eventually(lambda: bench.embedder.entered.acquire(blocking=False), what="a run of the model")


async def test_every_verdict_ends_where_it_should(bench: Bench) -> None:
    rig = bench.rig
    await rig.write(k1="one", k2=" ", k3="x" * (MAX_BYTES + 1), k4="gone", k5="known", k6=LONG)
    await rig.settle(rig.settlement(5, "known"), rig.settlement(2, " "))
    await rig.connection.execute("DELETE FROM docs WHERE id = 4")
    await rig.connection.execute("SELECT pgmq.send('docs', '{\"id\": 1}')")
    async with running(await bench.worker()):
        await eventually(bench.settled)
        await eventually(lambda: bench.told.documents("embedded") == 2)
    assert sorted(await rig.embedded()) == [1, 5, 6]
    assert {d["document_id"]: d["reason"] for d in await rig.dead()} == {"3": "too_large", None: "malformed"}
    counted = {name: bench.told.documents(name) for name in ("gone", "unchanged", "blank", "dead_lettered", "released")}
    assert counted == {"gone": 1, "unchanged": 1, "blank": 1, "dead_lettered": 2, "released": 0}
    assert all(line["documents"] for line in bench.told.events("batch_settled"))
    await rig.assert_true()


async def test_hundreds_in_both_lanes(bench: Bench) -> None:
    rig = bench.rig
    await rig.write(**{f"k{n}": f"text {n} " * (n % 40 + 1) for n in range(200)})
    await rig.connection.execute(
        "WITH m AS (DELETE FROM pgmq.q_docs WHERE msg_id > 100 RETURNING vt, message) "
        "INSERT INTO pgmq.q_docs_bulk (vt, message) SELECT vt, message FROM m"
    )
    async with running(await bench.worker(batch_tokens=64)):
        await eventually(bench.settled)
    assert len(await rig.vectors()) == 200
    await rig.assert_true()


async def test_a_worker_holds_no_more_work_than_it_has_room_for(bench: Bench) -> None:
    """A lease is a horizon of tokens: what one replica cannot begin soon, another may have."""
    rig = bench.rig
    bench.embedder.gate.clear()
    await rig.write(**{f"k{n}": " ".join(f"word{n * 100 + w}" for w in range(60)) for n in range(100)})
    worker = await bench.worker(threads=1, batch_tokens=64, lease_messages=100)
    async with running(worker):
        await entered(bench)
        await eventually(lambda: not worker._state.backlog.has_room(Lane.LIVE))
        assert 1 <= len(worker._state.in_flight.leases) < 20
        bench.embedder.gate.set()
        await eventually(bench.settled)
    assert len(await rig.vectors()) == 100


async def test_where_runs_take_few_windows_few_messages_are_held(bench: Bench) -> None:
    """However short the texts: sixteen runs wait at most, and the others' share stays in the queue."""
    rig = bench.rig
    bench.embedder.gate.clear()
    await rig.write(**{f"k{n}": f"word{n}" for n in range(100)})
    worker = await bench.worker(threads=1, batch_windows=2, lease_messages=100)
    async with running(worker):
        await entered(bench)
        await eventually(lambda: not worker._state.backlog.has_room(Lane.LIVE))
        assert 8 <= len(worker._state.in_flight.leases) <= 20
        bench.embedder.gate.set()
        await eventually(bench.settled)
    assert len(await rig.vectors()) == 100


async def test_a_find_makes_the_next_looks_come_soon_however_small_the_lease(bench: Bench) -> None:
    """Without a notification, whoever edits after an idle hour would wait for the longest pause with every edit."""
    worker = await bench.worker(threads=1, batch_tokens=16, poll_min=0.01, poll_max=600)
    async with running(worker):
        await eventually(lambda: bench.queue.count("lease") >= 18, what="pauses of seconds")
        await bench.rig.write(k1="one")
        worker.wake()
        await eventually(bench.settled)
        before = bench.queue.count("lease")
        await eventually(lambda: bench.queue.count("lease") >= before + 8, what="pauses that begin anew")


async def test_five_messages_of_one_document_are_one_run(bench: Bench) -> None:
    """R5."""
    for n in range(5):
        await bench.rig.write(k1=f"edit {n}")
    async with running(await bench.worker()):
        await eventually(bench.settled)
    assert bench.embedder.runs == [["edit 4"]]
    assert bench.told.documents("embedded") == 1


async def test_a_message_of_a_text_in_the_model_rides_along(bench: Bench) -> None:
    rig = bench.rig
    bench.embedder.gate.clear()
    await rig.write(k1="text")
    worker = await bench.worker()
    async with running(worker):
        await entered(bench)
        await rig.connection.execute("SELECT pgmq.send('docs', '{\"document_id\": 1}')")
        await rig.connection.execute("SELECT pgmq.send('docs_bulk', '{\"document_id\": 1}')")
        await eventually(lambda: [len(job.leases) for job in worker._state.in_flight.jobs] == [3])
        bench.embedder.gate.set()
        await eventually(bench.settled)
    assert bench.embedder.runs == [["text"]]


async def test_both_lanes_may_bring_one_document_at_the_same_moment(bench: Bench) -> None:
    """Settled twice in one transaction, it would end the process: one INSERT takes a row once."""
    gates = [bench.queue.hold("read", after=True) for _ in Lane]
    bench.embedder.gate.clear()  # else the first lane may be through before the second has tokenized
    await bench.rig.write(k1="text")
    await bench.rig.connection.execute("SELECT pgmq.send('docs_bulk', '{\"document_id\": 1}')")
    worker = await bench.worker()
    async with running(worker):
        for gate in gates:
            await gate.reached.wait()
        for gate in gates:
            gate.open.set()
        await eventually(lambda: [len(job.leases) for job in worker._state.in_flight.jobs] == [2])
        bench.embedder.gate.set()
        await eventually(bench.settled)
    assert bench.embedder.runs == [["text"]]


async def test_freshness_is_told_by_the_lane_of_the_oldest_message(bench: Bench) -> None:
    """Else a backfill, old by nature, would count as a late edit."""
    rig = bench.rig
    bench.embedder.gate.clear()
    await rig.write(k1="edited", k2="found by the sweep", k3="both")
    await rig.connection.execute(
        "WITH m AS (DELETE FROM pgmq.q_docs WHERE message ->> 'document_id' = '2' RETURNING vt, message) "
        "INSERT INTO pgmq.q_docs_bulk (enqueued_at, vt, message) "
        "SELECT now() - interval '1 h', n.vt, n.message FROM (TABLE m UNION ALL "
        "SELECT vt, message FROM pgmq.q_docs WHERE message ->> 'document_id' = '3') AS n"
    )
    worker = await bench.worker()
    async with running(worker):
        await eventually(lambda: sorted(len(job.leases) for job in worker._state.in_flight.jobs) == [1, 1, 2])
        bench.embedder.gate.set()
        await eventually(bench.settled)
        await eventually(lambda: bench.told.documents("embedded") == 3)
    late = {"le": "60.0"}
    for series, labels, counts in (("count", {}, {"live": 1, "bulk": 2}), ("bucket", late, {"live": 1, "bulk": 0})):
        for lane, count in counts.items():
            found = {"pipeline": "docs", "lane": lane, **labels}
            assert bench.told.registry.get_sample_value(f"sidecar_freshness_seconds_{series}", found) == count


async def test_an_edit_while_the_model_runs_wins(bench: Bench) -> None:
    """R1 and R2 through the worker."""
    bench.embedder.gate.clear()
    await bench.rig.write(k1="v1")
    async with running(await bench.worker()):
        await entered(bench)
        await bench.rig.write(k1="v2")
        await entered(bench)
        bench.embedder.gate.set()
        await eventually(bench.settled)
    assert await bench.rig.embedded() == {1: "v2"}
    await bench.rig.assert_true()


async def test_poison_fails_alone(bench: Bench) -> None:
    """R12: one retry for its mates, a backoff for itself, the dead letters after its last attempt."""
    rig = bench.rig
    bench.embedder.poison("poison", Poison("inference_failed", "planted"))
    await rig.write(k1="good one", k2="poison two", k3="good three")
    async with running(await bench.worker(threads=1, max_attempts=3)):
        await eventually(bench.settled)
    assert sorted(await rig.embedded()) == [1, 3]
    (letter,) = await rig.dead()
    assert (letter["document_id"], letter["reason"], letter["attempts"]) == ("2", "inference_failed", 3)
    assert letter["content_hash"] == md5("poison two")
    assert bench.embedder.runs[0] == ["good one", "poison two", "good three"]
    assert sorted(bench.embedder.runs[1:]) == [["good one"], ["good three"], *[["poison two"]] * 3, *[["probe"]] * 3]
    assert [line["attempt"] for line in bench.told.events("deferred")] == [1, 2]
    assert bench.told.documents("deferred") == 2
    assert bench.told.documents("dead_lettered") == 1


async def test_a_deferred_document_that_heals_is_embedded(bench: Bench) -> None:
    bench.embedder.poison("poison")
    await bench.rig.write(k1="poison")
    async with running(await bench.worker(max_attempts=1000)):
        await eventually(lambda: len(bench.told.events("deferred")) >= 2)
        bench.embedder.heal()
        await eventually(bench.settled)
    assert await bench.rig.dead() == []
    await bench.rig.assert_true()


async def test_a_bad_vector_is_not_tried_again(bench: Bench) -> None:
    """R25."""
    bench.embedder.poison("poison", Poison("bad_vector", "NaN"))
    await bench.rig.write(k1="poison", k2="good")
    async with running(await bench.worker()):
        await eventually(bench.settled)
    (letter,) = await bench.rig.dead()
    assert (letter["reason"], letter["attempts"]) == ("bad_vector", 1)
    assert sorted(await bench.rig.embedded()) == [2]


async def test_a_text_that_cannot_be_tokenized_fails_alone(bench: Bench) -> None:
    bench.embedder.unreadable("poison", Poison("not_unicode", "planted"))
    await bench.rig.write(k1="good", k2="poison", k3="good too")
    async with running(await bench.worker()):
        await eventually(bench.settled)
    (letter,) = await bench.rig.dead()
    assert (letter["document_id"], letter["reason"], letter["attempts"]) == ("2", "not_unicode", 3)
    assert sorted(await bench.rig.embedded()) == [1, 3]


async def test_suspects_travel_alone_and_are_announced(bench: Bench) -> None:
    """R13: what ended uncleanly before shares its run with nobody, and says so first."""
    rig = bench.rig
    await rig.write(k1="one", k2="two")
    await rig.lease()
    await rig.expire()
    await rig.write(k3="three", k4="four")
    bench.embedder.gate.clear()
    async with running(await bench.worker(threads=1)):
        await entered(bench)
        await eventually(lambda: bench.queue.count("begin") == 1 and bench.queue.under_way == 0)
        first, second, *_ = await rig.messages()
        assert first["message"]["sidecar"]["accounted"] == first["read_ct"] == 2
        assert "accounted" not in second["message"].get("sidecar", {}), "it waits: its end would not count"
        bench.embedder.gate.set()
        await eventually(bench.settled)
    assert sorted(bench.embedder.runs) == [["one"], ["three", "four"], ["two"]]
    begun = [[lease.key for lease in argument] for name, argument in bench.queue.calls if name == "begin"]
    assert begun == [["1"], ["2"]]


async def test_a_suspect_of_many_windows_is_announced_once(bench: Bench) -> None:
    await bench.rig.write(k1=LONG)
    await bench.rig.lease()
    await bench.rig.expire()
    async with running(await bench.worker(batch_tokens=64)):
        await eventually(bench.settled)
    assert bench.queue.count("begin") == 1
    assert len(bench.embedder.runs) == 3


async def test_what_used_up_its_attempts_is_buried_unread(bench: Bench) -> None:
    """R13: the payload of a text that kills the process is never touched again."""
    rig = bench.rig
    await rig.write(k1="killer")
    await rig.connection.execute(
        "UPDATE pgmq.q_docs SET read_ct = 3, message = message || "
        '\'{"sidecar": {"accounted": 3, "error": "inference_failed"}}\''
    )
    async with running(await bench.worker(max_attempts=3)):
        await eventually(bench.settled)
    assert bench.queue.count("read") == 0
    (letter,) = await rig.dead()
    assert (letter["reason"], letter["attempts"]) == ("attempts_exhausted", 4)
    assert letter["detail"] == "3 attempts ended without an answer; last error: inference_failed"


async def test_leases_are_kept_while_the_model_runs(bench: Bench) -> None:
    """R6."""
    bench.embedder.gate.clear()
    await bench.rig.write(k1="slow")
    async with running(await bench.worker(lease_seconds=1.2)):
        await eventually(lambda: bench.queue.count("extend") >= 4)
        (message,) = await bench.rig.messages()
        assert (message["read_ct"], message["hidden"] > 0) == (1, True)
        bench.embedder.gate.set()
        await eventually(bench.settled)
    assert len(bench.embedder.runs) == 1


async def steal(bench: Bench) -> None:
    """Another replica leases what this one holds."""
    await bench.rig.connection.execute(
        "UPDATE pgmq.q_docs SET read_ct = read_ct + 1, vt = clock_timestamp() + interval '1 h'"
    )


@pytest.mark.parametrize("poison", [False, True])
async def test_a_lost_lease_ends_its_documents_run(bench: Bench, *, poison: bool) -> None:
    if poison:
        bench.embedder.poison("lost")
    bench.embedder.gate.clear()
    await bench.rig.write(k1="lost")
    async with running(await bench.worker(lease_seconds=1.2)):
        await entered(bench)
        await steal(bench)
        await eventually(lambda: bench.told.events("leases_lost"))
        bench.embedder.gate.set()
        await bench.rig.write(k2="next")
        await eventually(lambda: bench.told.documents("embedded") == 1)
        assert await bench.rig.embedded() == {2: "next"}
        assert [m["hidden"] > 1000 for m in await bench.rig.messages()] == [True], "untouched"
    (told,) = bench.told.events("leases_lost")
    assert (told["messages"], told["documents"]) == (1, 1)
    assert bench.queue.count("defer") == bench.queue.count("dead_letter") == 0


async def test_a_document_with_one_lease_left_goes_on(bench: Bench) -> None:
    bench.embedder.gate.clear()
    await bench.rig.write(k1="a")
    await bench.rig.write(k1="b")
    async with running(await bench.worker(lease_seconds=1.2)):
        await entered(bench)
        await bench.rig.connection.execute(
            "UPDATE pgmq.q_docs SET read_ct = 9, vt = clock_timestamp() + interval '1 h' WHERE msg_id = 1"
        )
        await eventually(lambda: bench.told.events("leases_lost"))
        bench.embedder.gate.set()
        await eventually(lambda: bench.told.documents("embedded") == 1)
    assert [m["msg_id"] for m in await bench.rig.messages()] == [1]
    assert bench.told.events("leases_lost")[0]["documents"] == 0


async def test_a_document_whose_lease_was_lost_before_stage_3_is_left_to_others(bench: Bench) -> None:
    """Were it settled, the same document leased once more could be in the same settlement."""
    gate = bench.queue.hold("settle")
    await bench.rig.write(k1="first")
    async with running(await bench.worker(lease_seconds=1.2)):
        await gate.reached.wait()
        await bench.rig.write(k2="second")
        await eventually(lambda: len(bench.embedder.runs) == 2)
        await bench.rig.connection.execute(
            "UPDATE pgmq.q_docs SET read_ct = 2, vt = clock_timestamp() + interval '1 h' WHERE msg_id = 2"
        )
        await eventually(lambda: bench.told.events("leases_lost"))
        await bench.rig.connection.execute("UPDATE pgmq.q_docs SET vt = clock_timestamp() WHERE msg_id = 2")
        await eventually(lambda: len(bench.embedder.runs) == 3, what="the second run of the document")
        gate.open.set()
        await eventually(bench.settled)
    assert bench.embedder.runs == [["first"], ["second"], ["second"]]
    settled = [[s.key for s in argument] for name, argument in bench.queue.calls if name == "settle"]
    assert settled == [["1"], ["2"]]


async def test_a_row_that_the_table_refuses_is_blamed_alone(bench: Bench) -> None:
    """R12 at settle: its mates are stored, it is deferred and then dead."""
    rig = bench.rig
    await rig.connection.execute("ALTER TABLE docs_embeddings ADD CHECK (id <> 2)")
    await rig.write(k1="one", k2="two", k3="three")
    async with running(await bench.worker(max_attempts=2)):
        await eventually(bench.settled)
    assert sorted(await rig.embedded()) == [1, 3]
    (letter,) = await rig.dead()
    assert (letter["document_id"], letter["reason"], letter["attempts"]) == ("2", "check_violation", 2)
    assert "two" not in letter["detail"]


@pytest.mark.parametrize(
    ("harm", "mend", "code"),
    [
        ("ADD tenant int NOT NULL", "DROP tenant", "not_null_violation"),
        ("ALTER embedding TYPE vector(3)", "ALTER embedding TYPE vector(16)", "wrong_dimensions"),
    ],
)
async def test_a_table_that_takes_no_vector_is_no_documents_fault(
    bench: Bench, harm: str, mend: str, code: str
) -> None:
    """It would be the dead letter of all: as an outage it is told, and over when an operator has mended it."""
    rig = bench.rig
    await rig.connection.execute(f"ALTER TABLE docs_embeddings {harm}")
    await rig.write(**{f"k{n}": f"text {n}" for n in range(6)})
    worker = await bench.worker(max_attempts=2)
    async with running(worker):
        await eventually(lambda: worker.waiting is not None)
        await rig.connection.execute(f"ALTER TABLE docs_embeddings {mend}")
        await eventually(bench.settled)
        await eventually(lambda: worker.waiting is None)
    assert {line["code"] for line in bench.told.events("fault")} == {code}
    assert (bench.told.documents("deferred"), await rig.dead()) == (0, [])
    assert len(await rig.embedded()) == 6


async def test_a_runtime_that_fails_every_run_is_no_documents_fault(bench: Bench) -> None:
    """Nothing reaches stage 3 meanwhile, but for a blank document: neither is an end of it."""
    rig = bench.rig
    bench.embedder.poison("")
    await rig.write(**{f"k{n}": f"text {n}" for n in range(6)})
    worker = await bench.worker(max_attempts=2, poll_max=0.2)
    async with running(worker):
        await eventually(lambda: bench.told.documents("released") >= 12)
        await rig.write(k9=" ")
        await eventually(lambda: bench.told.documents("blank") == 1)
        released = bench.told.documents("released")
        await eventually(lambda: bench.told.documents("released") >= released + 12)
        assert worker.waiting == "planted"
        assert bench.told.events("recovered") == []
        bench.embedder.heal()
        await eventually(bench.settled)
        await eventually(lambda: worker.waiting is None)
    assert (bench.told.documents("deferred"), await rig.dead()) == (0, [])
    assert [line["code"] for line in bench.told.events("fault")] == ["runtime_failed"]
    assert len(await rig.embedded()) == 6


@pytest.mark.parametrize(
    ("meanwhile", "outcome", "left"),
    [
        ("DELETE FROM docs", "gone", 0),
        ("ALTER TABLE docs DISABLE TRIGGER USER; UPDATE docs SET body = 'edited'", "superseded", 0),
        ("SELECT 1", "deferred", 1),
    ],
)
async def test_a_refused_document_is_looked_at_before_it_is_blamed(
    bench: Bench, meanwhile: str, outcome: str, left: int
) -> None:
    """R4: a deletion or an edit under the settlement is nobody's fault."""
    gate = bench.queue.hold("settle", error=Poison("foreign_key_violation", "planted"))
    await bench.rig.write(k1="text")
    async with running(await bench.worker(backoff_base=60, backoff_cap=60)):
        await gate.reached.wait()
        await bench.rig.connection.execute(meanwhile)
        gate.open.set()
        await eventually(lambda: bench.told.documents(outcome) == 1)
    assert await bench.rig.depth() == left
    assert await bench.rig.dead() == []


async def test_a_blank_document_that_the_table_refuses_is_buried(bench: Bench) -> None:
    bench.queue.cut(Poison("raised", "planted"), "settle")
    await bench.rig.write(k1=" ")
    async with running(await bench.worker()):
        await eventually(bench.settled)
    assert [d["reason"] for d in await bench.rig.dead()] == ["raised"]


async def test_a_document_that_cannot_be_rendered_is_blamed_alone(bench: Bench) -> None:
    error = Poison("invalid_text", "planted")
    bench.queue.fail("read", error, times=2)
    await bench.rig.write(k1="one", k2="two", k3="three")
    async with running(await bench.worker()):
        await eventually(bench.settled)
    assert [(d["document_id"], d["reason"]) for d in await bench.rig.dead()] == [("1", "invalid_text")]
    assert sorted(await bench.rig.embedded()) == [2, 3]


async def test_a_document_that_a_writer_holds_is_split_off_and_comes_later(bench: Bench) -> None:
    """R21: its mates do not wait for the writer, and it burns no attempt."""
    rig = bench.rig
    await rig.write(**{f"k{n}": f"text {n}" for n in range(1, 5)})
    async with second_session(rig.url) as writer:
        transaction = writer.transaction()
        await transaction.start()
        await writer.execute("DELETE FROM docs WHERE id = 2")
        async with running(await bench.worker()):
            await eventually(lambda: bench.told.documents("released") >= 1, what="the held document's release")

            async def mates() -> bool:
                return sorted(await rig.embedded()) == [1, 3, 4]

            await eventually(mates, what="the vectors of its mates")
            (message,) = await rig.messages()
            assert message["message"]["sidecar"]["excused"] >= 1
            await transaction.rollback()
            await eventually(bench.settled)
    assert sorted(await rig.embedded()) == [1, 2, 3, 4]
    assert bench.told.events("deferred") == bench.told.events("fault") == []


async def test_a_hopeless_document_that_a_writer_holds_makes_nobody_wait(bench: Bench) -> None:
    """Its dead letter must wait for the writer; what was leased beside it must not."""
    held = Transient("lock_timeout", "canceling statement due to lock timeout")
    bench.embedder.poison("poison", Poison("bad_vector", "NaN"))
    bench.queue.fail("dead_letter", held)
    await bench.rig.write(k1="poison", k2="good")
    async with running(await bench.worker()):
        await eventually(bench.settled)
    assert [letter["document_id"] for letter in await bench.rig.dead()] == ["1"]
    assert bench.told.documents("released") == 1
    assert bench.told.events("fault") == []


async def test_texts_beyond_the_budget_come_with_the_next_read(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar_daemon.adapters.postgres.queue.READ_BUDGET_BYTES", 10)
    await bench.rig.write(k1="a" * 50, k2="b" * 50, k3="c" * 50)
    async with running(await bench.worker()):
        await eventually(bench.settled)
    assert sorted(await bench.rig.embedded()) == [1, 2, 3]
    assert bench.told.documents("released") == 3


@pytest.mark.parametrize("policy", list(LongDocuments))
async def test_long_documents(bench: Bench, policy: LongDocuments) -> None:
    rig = bench.rig
    await rig.connection.execute(
        "UPDATE sidecar.pipelines SET long_documents = $1, model_id = $2", policy.value, PLAIN.model_id(policy)
    )
    rig.model_id = PLAIN.model_id(policy)
    bench.queue = type(bench.queue)(rig.queue)
    await rig.write(k1=LONG, k2="short")
    async with running(await bench.worker(batch_tokens=64)):
        await eventually(bench.settled)
    windows = PLAIN.tokenize(LONG)
    vectors = PLAIN.embed([window.ids for window in windows])
    rows = await rig.vectors(1)
    found = np.stack([row["embedding"].to_numpy() for row in rows])
    match policy:
        case LongDocuments.MEAN:
            expected = combine_windows(vectors, [window.content_tokens for window in windows])[None]
            texts = [LONG]
        case LongDocuments.CHUNKS:
            expected, texts = vectors, [LONG[window.start : window.end] for window in windows]
        case LongDocuments.TRUNCATE:
            expected, texts = vectors[:1], [LONG[: windows[0].end]]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert [row["source_text"] for row in rows] == texts
    assert len(await rig.vectors(2)) == 1


class Opposed:
    """Every second window points the other way."""

    dimensions, model_id, tokenize = PLAIN.dimensions, PLAIN.model_id, PLAIN.tokenize

    def embed(self, windows: Sequence[TokenIds]) -> Vectors:
        one = PLAIN.embed([windows[0]])[0]
        return np.stack([one if n % 2 else -one for n in range(len(windows))])


async def test_windows_that_cancel_out_are_a_bad_vector(bench: Bench) -> None:
    bench.embedder = FaultyEmbedder(Opposed())
    await bench.rig.write(k1=" ".join(f"word{n}" for n in range(2 * 62)))
    async with running(await bench.worker()):
        await eventually(bench.settled)
    assert [d["reason"] for d in await bench.rig.dead()] == ["bad_vector"]
    assert await bench.rig.vectors() == []


async def test_a_lost_answer_of_settle_is_asked_again(bench: Bench) -> None:
    """R10."""
    bench.queue.fail("settle", Transient("connection_lost", "planted"), after=True)
    await bench.rig.write(k1="text")
    async with running(await bench.worker()):
        await eventually(lambda: bench.queue.count("settle") == 2)
        await eventually(lambda: bench.told.events("recovered"))
    assert len(await bench.rig.vectors()) == 1
    assert await bench.rig.depth() == 0


async def test_a_lost_answer_of_lease_comes_back_with_the_lease(bench: Bench) -> None:
    bench.queue.fail("lease", Transient("connection_lost", "planted"), times=2, after=True)
    await bench.rig.write(k1="text")
    async with running(await bench.worker(lease_seconds=1)):
        await eventually(bench.settled)
    assert await bench.rig.dead() == []
    await bench.rig.assert_true()


async def test_an_outage_is_told_once_and_blames_nobody(bench: Bench) -> None:
    """R22."""
    rig = bench.rig
    await rig.write(**{f"k{n}": f"text {n}" for n in range(30)})
    bench.embedder.gate.clear()
    worker = await bench.worker(lease_messages=100, poll_min=600, poll_max=600)
    async with running(worker):
        await eventually(lambda: len(bench.embedder._texts) == 30 and bench.queue.under_way == 0)
        bench.queue.cut(Transient("connection_lost", "planted"), "lease", "settle")
        failed = len(bench.queue.calls)
        bench.embedder.gate.set()
        worker.wake()
        await eventually(lambda: len(bench.queue.calls) > failed + 20)
        assert worker.waiting == "planted"
        bench.queue.mend()
        await eventually(bench.settled)
        await eventually(lambda: worker.waiting is None)
    assert [line["code"] for line in bench.told.events("fault")] == ["connection_lost"]
    assert len(bench.told.events("recovered")) == 1
    assert await rig.dead() == []
    assert bench.told.documents("deferred") == 0
    await rig.assert_true()


async def test_a_replica_that_is_back_first_leaves_the_others_their_leases(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R14: what ran out while the database was away is no suspect, its holder lives and prolongs it."""
    monkeypatch.setattr(WorkerLimits, "expiring_seconds", 1.0)
    rig, told = bench.rig, Told()
    bench.embedder.gate.clear()
    await rig.write(**{f"k{n}": f"text {n}" for n in range(5)})
    # So long that no keeper's turn falls into the outage: its end makes the holder extend.
    holder = await bench.worker(lease_seconds=1000)
    first = FaultyQueue(rig.queue)
    other = build_worker(
        await rig.pipeline(), first, FaultyEmbedder(PLAIN), told, bench.executor, lease_seconds=1000, poll_max=0.05
    )
    async with running(holder):
        await entered(bench)
        await eventually(lambda: len(holder._state.in_flight.leases) == 5)
        async with running(other):
            await eventually(lambda: first.count("lease") > 4)
            for queue in (bench.queue, first):
                queue.cut(Transient("connection_lost", "planted"), "lease", "read", "extend", "settle")
            holder.wake()
            await eventually(lambda: all(worker._state.patience.expiring for worker in (holder, other)))
            await rig.expire()
            leased, read = first.count("lease"), first.count("read")
            first.mend()
            await eventually(lambda: first.count("read") > read, what="the other to find the database back")
            await asyncio.sleep(GRACE_SECONDS / 5)  # the holder is back a moment later
            bench.queue.mend()
            await eventually(lambda: bench.queue.count("extend") > 0)
            await eventually(lambda: first.count("lease") > leased, what="the other to lease again")
            bench.embedder.gate.set()
            await eventually(bench.settled)
    assert bench.told.events("leases_lost") == []
    assert (told.documents("embedded"), bench.told.documents("embedded")) == (0, 5)
    await rig.assert_true()


async def test_a_replica_whose_leasing_did_not_fail_waits_as_well(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only its settlement met the outage, and the leases were held back: they come after the grace too."""
    monkeypatch.setattr(WorkerLimits, "expiring_seconds", 1.0)
    bench.embedder.gate.clear()
    await bench.rig.write(k1="text")
    worker = await bench.worker(poll_max=0.05)
    async with running(worker):
        await entered(bench)
        planted = Transient("connection_lost", "planted")
        bench.queue.cut(planted, "settle", "extend")
        bench.embedder.gate.set()
        await eventually(lambda: worker._state.patience.expiring)
        leased = bench.queue.count("lease")
        bench.queue.mend()
        await eventually(lambda: worker.waiting is None)
        assert worker._state.patience.grace > 0
        assert bench.queue.count("lease") == leased
        await eventually(lambda: bench.queue.count("lease") > leased)
        assert worker._state.patience.grace == 0


async def test_a_server_that_answers_but_takes_no_lease_is_one_outage(bench: Bench) -> None:
    """A standby, a full disk: what is tried first works, the lease does not; nothing has ended."""
    worker = await bench.worker(lease_seconds=1, poll_max=0.05)
    async with running(worker):
        bench.queue.cut(Transient("read_only", "planted"), "lease")
        await eventually(lambda: worker._state.patience.expiring)
        tried = bench.queue.count("lease")
        await eventually(lambda: bench.queue.count("lease") > tried + 2)
        assert bench.queue.count("read") >= 2
        assert worker.waiting == "planted"
        assert bench.told.events("recovered") == []
        bench.queue.mend()
        await eventually(lambda: worker.waiting is None)
    assert [line["code"] for line in bench.told.events("fault")] == ["read_only"]
    assert len(bench.told.events("recovered")) == 1


async def test_the_bulk_lane_waits_behind_the_live_lane(bench: Bench) -> None:
    rig = bench.rig
    await rig.connection.execute("ALTER TABLE docs DISABLE TRIGGER USER")
    await rig.write(**{f"k{n}": f"bulk {n}" for n in range(16)})
    await rig.connection.execute("ALTER TABLE docs ENABLE TRIGGER USER")
    await rig.queue.sweep(rows=1000, interval=0)
    bench.embedder.gate.clear()
    async with running(await bench.worker(threads=1, batch_windows=4, lease_messages=40)):
        await entered(bench)
        await rig.write(k100="live")
        reads = len([1 for name, keys in bench.queue.calls if name == "read" and keys == ["100"]])
        await eventually(lambda: any(n == "read" and k == ["100"] for n, k in bench.queue.calls) or reads)
        await eventually(lambda: len(bench.embedder._texts) == 17)
        await asyncio.sleep(0)
        bench.embedder.gate.set()
        await eventually(bench.settled)
    assert "live" in [run[0] for run in bench.embedder.runs][:3]
    assert all(run == ["live"] or "live" not in run for run in bench.embedder.runs)


async def test_a_wake_is_quicker_than_the_poll(bench: Bench) -> None:
    worker = await bench.worker(poll_min=600, poll_max=600)
    async with running(worker):
        await eventually(lambda: bench.queue.count("lease") == 2)
        await bench.rig.write(k1="text")
        worker.wake(Lane.LIVE)
        await eventually(bench.settled)
        assert [argument for name, argument in bench.queue.calls if name == "lease"].count(Lane.BULK) == 1
        worker.wake()
        await eventually(lambda: bench.queue.count("lease") >= 4)


async def test_reading_says_what_became_of_a_key(bench: Bench) -> None:
    assert [r.key for r in await bench.queue.read([DocumentKey("1")])] == ["1"]


async def test_a_text_that_is_being_settled_is_not_embedded_again(bench: Bench) -> None:
    """Its messages come again a little later, without a notification, and without giving up the claim."""
    rig = bench.rig
    await rig.write(k1="text")
    gate = bench.queue.hold("settle")
    worker = await bench.worker()
    async with running(worker):
        await gate.reached.wait()
        await rig.connection.execute("SELECT pgmq.send('docs', '{\"document_id\": 1}')")
        worker.wake(Lane.LIVE)
        await eventually(lambda: bench.told.documents("released") >= 1)
        assert await rig.connection.fetchval("SELECT count(*) FROM sidecar.claims") == 1
        gate.open.set()
        await eventually(bench.settled)
    assert bench.embedder.runs == [["text"]]
    assert [bench.told.documents(name) for name in ("embedded", "unchanged")] == [1, 1]
