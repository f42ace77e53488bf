"""Settling under concurrent writers, replicas and deletions: what is stored is always the current text's."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import numpy as np
import pytest
from pgvector import Vector

from sidecar_daemon.domain.errors import Poison, Transient
from sidecar_daemon.domain.messages import DocumentKey, Lane
from sidecar_daemon.domain.outcomes import Outcome, Verdict
from tests.rig import MODEL, Rig, attach, blocked, md5, second_session, write
from tests.waiting import eventually

if TYPE_CHECKING:
    import asyncpg

    from sidecar_daemon.domain.messages import Lease

LOCK_OF_1 = "SELECT sidecar._lock_documents('docs', ARRAY['1'])"
NAIVE = """
INSERT INTO docs_embeddings AS e (id, chunk_no, source_text, source_text_hash, embedding, model)
SELECT d.id, 0, $2, md5($2), $3, $4 FROM docs AS d WHERE d.id = $1 AND md5(d.body) = md5($2)
ON CONFLICT (id, chunk_no) DO UPDATE SET source_text = excluded.source_text,
    source_text_hash = excluded.source_text_hash, embedding = excluded.embedding
"""
"""The single statement that looks as if it were safe."""


async def lease(rig: Rig) -> Lease:
    return (await rig.lease())[0]


async def test_it_writes_acknowledges_and_tells(rig: Rig) -> None:
    await rig.write(k1="one", k2="two")
    one, two = await rig.lease()
    settled = await rig.settle(rig.settlement(1, "one", one), rig.settlement(2, "two", two))
    assert [(s.key, s.outcome, s.acknowledged) for s in settled] == [
        ("1", Outcome.EMBEDDED, 1),
        ("2", Outcome.EMBEDDED, 1),
    ]
    assert all(s.freshness_seconds is not None and 0 <= s.freshness_seconds < 60 for s in settled)
    assert await rig.embedded() == {1: "one", 2: "two"}
    assert [row["model"] for row in await rig.vectors()] == [MODEL, MODEL]
    await rig.assert_true()
    assert await rig.depth() == 0


async def test_an_older_text_never_overwrites_a_newer_vector(rig: Rig) -> None:
    """R1: A reads v1, the edit, B writes v2, A comes last."""
    await rig.write(k1="v1")
    a = await lease(rig)
    await rig.write(k1="v2")
    b = await lease(rig)
    await rig.settle(rig.settlement(1, "v2", b))
    (settled,) = await rig.settle(rig.settlement(1, "v1", a))
    assert (settled.outcome, settled.acknowledged) == (Outcome.SUPERSEDED, 1)
    assert await rig.embedded() == {1: "v2"}
    assert await rig.depth() == 0


async def test_an_edit_after_the_check_has_its_own_message(rig: Rig) -> None:
    """R2: v1 is settled beside an uncommitted edit; the edit's message brings v2."""
    await rig.write(k1="v1")
    a = await lease(rig)
    async with second_session(rig.url) as writer:
        transaction = writer.transaction()
        await transaction.start()
        await write(writer, {"k1": "v2"})
        (settled,) = await rig.settle(rig.settlement(1, "v1", a))
        await transaction.commit()
    assert settled.outcome is Outcome.EMBEDDED
    b = await lease(rig)
    assert (await rig.queue.read([DocumentKey("1")]))[0].verdict is Verdict.EMBED
    await rig.settle(rig.settlement(1, "v2", b))
    assert await rig.embedded() == {1: "v2"}


SETTLE_V2 = (
    "SELECT sidecar.settle('docs', $1, ARRAY['1'], ARRAY[md5('v2')], ARRAY[1], ARRAY[0], ARRAY['v2'], "
    "ARRAY[$2::vector], ARRAY[1], ARRAY['live'], ARRAY[$3::bigint], ARRAY[$4::int])"
)


async def test_a_text_that_returns_is_not_unchanged_while_the_one_between_is_settled(rig: Rig) -> None:
    """R1, there and back: v1 has its vector, v2 is about to commit, v1 is the text again and finds its own vector."""
    await rig.write(k1="v1")
    await rig.settle(rig.settlement(1, "v1", await lease(rig)))
    await rig.write(k1="v2")
    between = await lease(rig)
    async with second_session(rig.url) as replica:
        transaction = replica.transaction()
        await transaction.start()
        vector = Vector(rig.settlement(1, "v2").chunks[0].vector)
        await replica.execute(SETTLE_V2, MODEL, vector, between.msg_id, between.read_ct)
        await rig.write(k1="v1")
        await lease(rig)
        key = DocumentKey("1")
        assert (await rig.queue.read([key]))[0].verdict is Verdict.CLAIMED, "nobody may acknowledge it now"
        assert (await rig.queue.read([key], claim_seconds=60))[0].verdict is Verdict.CLAIMED
        await transaction.commit()
    assert (await rig.queue.read([key]))[0].verdict is Verdict.EMBED


async def test_what_was_settled_after_the_first_look_is_seen_by_the_second(rig: Rig) -> None:
    """The same, where the settlement ends between the verdict and the lock: a new statement looks once more."""
    await rig.write(k1="v1", k2="other")
    one, two = await rig.lease()
    await rig.settle(rig.settlement(1, "v1", one), rig.settlement(2, "other", two))
    verdicts = await rig.connection.fetchval(
        "SELECT sidecar._unchanged_for_good(p, ARRAY['1', '2'], ARRAY['unchanged', 'unchanged'], "
        "ARRAY[md5('a text whose vector is no longer there'), md5('other')]) FROM sidecar.pipelines AS p"
    )
    assert verdicts == ["claimed", "unchanged"]


async def blocked_behind_a_newer_writer(rig: Rig, late: str, *arguments: object) -> None:
    """B holds v2 uncommitted; A's late statement for v1 starts, the edit to v2 commits, then B commits."""
    async with second_session(rig.url) as replica_b, second_session(rig.url) as replica_a:
        transaction = replica_b.transaction()
        await transaction.start()
        await replica_b.execute(LOCK_OF_1)
        vector = Vector(rig.settlement(1, "v2").chunks[0].vector)
        await replica_b.execute(
            "INSERT INTO docs_embeddings (id, source_text, source_text_hash, embedding, model) "
            "VALUES (1, 'v2', md5('v2'), $1, $2)",
            vector,
            MODEL,
        )
        running = asyncio.create_task(replica_a.execute(late, *arguments))
        await eventually(lambda: blocked(rig.connection, late[:30].strip()), what="the late statement to wait")
        await rig.write(k1="v2")
        await transaction.commit()
        await running


async def test_the_naive_statement_overwrites_the_newer_vector(rig: Rig) -> None:
    """Why settle is not one INSERT ... SELECT ... WHERE hash = ... ON CONFLICT: its guard saw an older snapshot."""
    await rig.write(k1="v1")
    vector = Vector(rig.settlement(1, "v1").chunks[0].vector)
    await blocked_behind_a_newer_writer(rig, NAIVE, 1, "v1", vector, MODEL)
    assert await rig.embedded() == {1: "v1"}, "stale beside the text v2"


async def test_settle_blocked_behind_a_newer_writer_writes_nothing(rig: Rig) -> None:
    await rig.write(k1="v1")
    held = await lease(rig)
    chunk = rig.settlement(1, "v1").chunks[0]
    statement = (
        "SELECT sidecar.settle('docs', $1, ARRAY['1'], ARRAY[md5('v1')], ARRAY[1], ARRAY[0], ARRAY['v1'], "
        "ARRAY[$2::vector], ARRAY[1], ARRAY['live'], ARRAY[$3::bigint], ARRAY[$4::int])"
    )
    await blocked_behind_a_newer_writer(rig, statement, MODEL, Vector(chunk.vector), held.msg_id, held.read_ct)
    assert await rig.embedded() == {1: "v2"}
    assert [m["msg_id"] for m in await rig.messages()] != [held.msg_id], "its own message is acknowledged"


async def test_two_replicas_with_one_message(rig: Rig) -> None:
    """R7: both succeed; the vector is there once and the loser's fence takes nothing."""
    await rig.write(k1="text")
    loser = await lease(rig)
    await rig.expire()
    winner = await lease(rig)
    (first,) = await rig.settle(rig.settlement(1, "text", loser))
    (second,) = await rig.settle(rig.settlement(1, "text", winner))
    assert (first.outcome, first.acknowledged, first.freshness_seconds) == (Outcome.EMBEDDED, 0, None)
    assert (second.outcome, second.acknowledged) == (Outcome.EMBEDDED, 1)
    assert len(await rig.vectors()) == 1


async def test_all_messages_of_one_document_are_acknowledged_together(rig: Rig) -> None:
    """R5: across lanes, and one that was lost does not count."""
    await rig.write(k1="a")
    await rig.write(k1="b")
    await rig.connection.execute("SELECT pgmq.send('docs_bulk', '{\"document_id\": 1}')")
    live = await rig.lease()
    bulk = await rig.lease_one(Lane.BULK)
    (settled,) = await rig.settle(rig.settlement(1, "b", *live, bulk))
    assert settled.acknowledged == 3
    assert await rig.depth() == 0


async def test_a_repeated_settle_changes_nothing(rig: Rig) -> None:
    """R10: the answer of a commit was lost."""
    await rig.write(k1="text")
    held = await lease(rig)
    await rig.settle(rig.settlement(1, "text", held))
    before = await rig.vectors()
    (again,) = await rig.settle(rig.settlement(1, "text", held))
    assert (again.outcome, again.acknowledged) == (Outcome.EMBEDDED, 0)
    (row,) = await rig.vectors()
    assert (row["created_at"], row["source_text_hash"]) == (before[0]["created_at"], before[0]["source_text_hash"])


async def test_write_and_acknowledgement_are_one_transaction(rig: Rig) -> None:
    """R8: what fails at the acknowledgement leaves no vector behind, and the message where it was."""
    await rig.write(k1="text")
    held = await lease(rig)
    await rig.connection.execute(
        "CREATE FUNCTION explode() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION USING ERRCODE = '53100'; END $$; "
        "CREATE TRIGGER explode BEFORE DELETE ON pgmq.q_docs EXECUTE FUNCTION explode()"
    )
    with pytest.raises(Transient):
        await rig.settle(rig.settlement(1, "text", held))
    assert await rig.vectors() == []
    assert len(await rig.messages()) == 1


async def test_a_document_deleted_before_it_settles_is_gone(rig: Rig) -> None:
    await rig.write(k1="one", k2="two")
    one, two = await rig.lease()
    await rig.connection.execute("DELETE FROM docs WHERE id = 1")
    settled = await rig.settle(rig.settlement(1, "one", one), rig.settlement(2, "two", two))
    assert [s.outcome for s in settled] == [Outcome.GONE, Outcome.EMBEDDED]
    assert await rig.embedded() == {2: "two"}
    assert await rig.depth() == 0


async def test_a_document_deleted_under_the_settlement_is_poison_then_gone(rig: Rig) -> None:
    """R4: the deletion commits between the check and the foreign key."""
    await rig.write(k1="text")
    held = await lease(rig)
    async with second_session(rig.url) as writer, second_session(rig.url) as observer:
        transaction = writer.transaction()
        await transaction.start()
        await writer.execute("DELETE FROM docs WHERE id = 1")
        settling = asyncio.create_task(rig.settle(rig.settlement(1, "text", held)))
        await eventually(lambda: blocked(observer, "sidecar.settle"), what="settle to wait for the deletion")
        await transaction.commit()
    with pytest.raises(Poison) as caught:
        await settling
    assert caught.value.code == "foreign_key_violation"
    (reading,) = await rig.queue.read([DocumentKey("1")])
    assert reading.verdict is Verdict.GONE
    assert len(await rig.messages()) == 1


async def test_a_writers_open_deletion_is_waited_for_no_longer_than_the_lock_timeout(rig: Rig) -> None:
    await rig.write(k1="text")
    held = await lease(rig)
    async with second_session(rig.url) as writer:
        transaction = writer.transaction()
        await transaction.start()
        await writer.execute("DELETE FROM docs WHERE id = 1")
        with pytest.raises(Transient) as caught:
            await rig.settle(rig.settlement(1, "text", held))
        assert caught.value.code == "lock_timeout"
        await transaction.rollback()
    assert (await rig.settle(rig.settlement(1, "text", held)))[0].acknowledged == 1


async def test_no_writer_waits_for_an_edit_beside_a_settlement(rig: Rig) -> None:
    """Promise 5: an open edit does not stop settle, an open settlement does not stop an edit."""
    await rig.write(k1="text")
    held = await lease(rig)
    async with second_session(rig.url) as replica:
        transaction = replica.transaction()
        await transaction.start()
        await replica.fetch(
            "SELECT * FROM sidecar.settle('docs', $1, ARRAY['1'], ARRAY[md5('text')], ARRAY[1], ARRAY[0], "
            "ARRAY['text'], ARRAY[$2::vector], ARRAY[1], ARRAY['live'], ARRAY[$3::bigint], ARRAY[$4::int])",
            *(MODEL, Vector(rig.settlement(1, "text").chunks[0].vector), held.msg_id, held.read_ct),
        )
        await rig.connection.execute("SET lock_timeout = '100ms'")
        await rig.write(k1="edited")
        await transaction.commit()


async def test_opposite_orders_do_not_deadlock(rig: Rig) -> None:
    """Each replica settles the same documents, in opposite order, again and again."""
    keys = list(range(1, 9))
    await rig.write(**{f"k{key}": f"text {key}" for key in keys})
    up = [rig.settlement(key, f"text {key}") for key in keys]
    await asyncio.gather(*[rig.settle(*(up if n % 2 else reversed(up))) for n in range(24)])
    await rig.assert_true()


@pytest.mark.parametrize("reverse", [False, True])
async def test_locks_are_taken_in_one_order(rig: Rig, *, reverse: bool) -> None:
    """A session that holds the lock that comes first lets nobody take a later one."""
    order = await rig.connection.fetch(
        "SELECT k FROM unnest(ARRAY['1', '2', '3']) AS k ORDER BY hashtextextended('docs' || chr(31) || k, 8088)"
    )
    keys = [row["k"] for row in order]
    await rig.write(k1="text", k2="text", k3="text")
    async with second_session(rig.url) as holder, second_session(rig.url) as prober:
        transaction = holder.transaction()
        await transaction.start()
        await holder.execute("SELECT sidecar._lock_documents('docs', ARRAY[$1])", keys[0])
        asked = list(reversed(keys)) if reverse else keys
        settling = asyncio.create_task(rig.settle(*[rig.settlement(key, "text") for key in asked]))
        await eventually(lambda: blocked(prober, "sidecar.settle"), what="settle to wait for the first lock")
        free = await prober.fetchval(
            "SELECT bool_and(pg_try_advisory_xact_lock(hashtextextended('docs' || chr(31) || k, 8088))) "
            "FROM unnest($1::text[]) AS k",
            keys[1:],
        )
        await transaction.commit()
        assert free
        await settling


async def test_a_document_that_shrank_loses_its_surplus_chunks(rig: Rig) -> None:
    """R17, and blank is the same with nothing left."""
    await rig.write(k1="long", k2="long")
    await rig.settle(rig.settlement(1, "long", chunks=10), rig.settlement(2, "long", chunks=3))
    await rig.write(k1="short")
    await rig.settle(rig.settlement(1, "short", chunks=4))
    assert [(row["id"], row["chunk_no"]) for row in await rig.vectors()] == [
        *[(1, n) for n in range(4)],
        *[(2, n) for n in range(3)],
    ]
    assert {row["source_text"] for row in await rig.vectors(1)} == {"short"}
    await rig.write(k1=" ")
    (settled,) = await rig.settle(rig.settlement(1, " ", chunks=0))
    assert settled.outcome is Outcome.BLANK
    assert await rig.vectors(1) == []


async def test_a_blank_settlement_of_an_older_text_removes_nothing(rig: Rig) -> None:
    await rig.write(k1="again text")
    await rig.settle(rig.settlement(1, "again text"))
    (settled,) = await rig.settle(rig.settlement(1, " ", chunks=0))
    assert settled.outcome is Outcome.SUPERSEDED
    assert await rig.embedded() == {1: "again text"}


async def test_a_switch_of_the_model_refuses_older_vectors(rig: Rig) -> None:
    """R16."""
    await rig.write(k1="text")
    held = await lease(rig)
    await rig.connection.execute("UPDATE sidecar.pipelines SET model_id = 'other@2'")
    with pytest.raises(Transient, match="these vectors are of") as caught:
        await rig.settle(rig.settlement(1, "text", held))
    assert caught.value.code == "model_mismatch"
    assert await rig.vectors() == []


async def test_a_pipeline_may_keep_no_text(connection: asyncpg.Connection, rig: Rig) -> None:
    await connection.execute("UPDATE sidecar.pipelines SET store_text = false")
    await rig.write(k1="secret")
    await rig.settle(rig.settlement(1, "secret"))
    (row,) = await rig.vectors()
    assert (row["source_text"], row["source_text_hash"]) == (None, md5("secret"))
    assert np.linalg.norm(row["embedding"].to_numpy()) == pytest.approx(1)


@pytest.mark.parametrize("key", ["uuid", "text"])
async def test_other_keys_settle_alike(rig: Rig, key: str) -> None:
    await rig.connection.execute("SELECT sidecar.detach('docs'); DROP TABLE docs")
    await attach(rig.connection, key=key)
    value = "00000000-0000-0000-0000-00000000000a" if key == "uuid" else 'it\'s "quoted" % ü'
    await rig.connection.execute(f"INSERT INTO docs VALUES ($1::{key}, 'text')", value)
    held = await lease(rig)
    assert held.key == value
    (settled,) = await rig.settle(rig.settlement(value, "text", held))
    assert (settled.outcome, settled.acknowledged) == (Outcome.EMBEDDED, 1)
