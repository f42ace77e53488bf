"""Dead letters: moved once, one a document, replayed with a clean count."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import asyncpg
import pytest

from sidecar_daemon.domain.errors import Transient
from sidecar_daemon.domain.messages import DocumentKey, Lane
from tests.rig import Rig, md5, second_session

if TYPE_CHECKING:
    from sidecar_daemon.domain.messages import ContentHash, Lease


async def bury(rig: Rig, *leases: Lease, reason: str = "inference_failed", of: ContentHash | None = None) -> int:
    return await rig.queue.dead_letter(leases, reason=reason, detail="what happened", content_hash=of)


async def test_a_dead_letter_says_why(rig: Rig) -> None:
    await rig.write(k1="text")
    lease = await rig.lease_one()
    assert await bury(rig, lease, of=md5("text")) == 1
    (letter,) = await rig.dead()
    assert (letter["document_id"], letter["reason"], letter["detail"]) == ("1", "inference_failed", "what happened")
    assert (letter["attempts"], letter["lane"], letter["content_hash"]) == (1, "live", md5("text"))
    assert json.loads(letter["message"]) == {"document_id": "1", "action": "insert"}
    assert not letter["resolved"]
    assert await rig.depth() == 0


async def test_it_is_moved_once(rig: Rig) -> None:
    """R9, R10: the answer was lost, the call comes again; two replicas hold the same message."""
    await rig.write(k1="text")
    lost = await rig.lease_one()
    await rig.expire()
    lease = await rig.lease_one()
    assert [await bury(rig, one) for one in (lost, lease, lease)] == [0, 1, 0]
    assert len(await rig.dead()) == 1


async def test_a_queue_made_anew_counts_from_one_and_nothing_clashes(rig: Rig) -> None:
    """R27: message ids come back after a restore or a recreated queue; the dead letters know nothing of them."""
    await rig.write(k1="first")
    first = await rig.lease_one()
    assert await bury(rig, first) == 1
    await rig.connection.execute("SELECT pgmq.drop_queue('docs')")
    await rig.connection.execute("SELECT pgmq.create('docs')")
    await rig.connection.execute("GRANT ALL ON pgmq.q_docs TO sidecar_owner")
    await rig.write(k2="second")
    second = await rig.lease_one()
    assert (second.msg_id, second.read_ct) == (first.msg_id, first.read_ct), "the ids start again"
    assert await bury(rig, second) == 1
    assert {letter["document_id"] for letter in await rig.dead()} == {"1", "2"}
    assert await rig.depth() == 0


async def test_never_both_queues_and_never_neither(rig: Rig) -> None:
    """R9: what fails on its way into the dead letters is still in its lane."""
    await rig.write(k1="text")
    lease = await rig.lease_one()
    await rig.connection.execute("ALTER TABLE pgmq.q_docs_dlq ADD CONSTRAINT no CHECK (message ->> 'reason' <> 'x')")
    with pytest.raises(Exception, match="check violation"):
        await bury(rig, lease, reason="x")
    assert (len(await rig.messages()), len(await rig.dead())) == (1, 0)


async def test_two_replicas_at_once_make_one_dead_letter(rig: Rig) -> None:
    await rig.write(k1="text")
    lease = await rig.lease_one()
    moved = await asyncio.gather(*[bury(rig, lease) for _ in range(6)])
    assert sorted(moved) == [0, 0, 0, 0, 0, 1]
    assert len(await rig.dead()) == 1


async def test_all_messages_of_the_document_become_one(rig: Rig) -> None:
    await rig.write(k1="a")
    await rig.write(k1="b")
    await rig.connection.execute("SELECT pgmq.send('docs_bulk', '{\"document_id\": 1}')")
    leases = [*await rig.lease(), await rig.lease_one(Lane.BULK)]
    assert await bury(rig, *leases) == 3
    (letter,) = await rig.dead()
    assert json.loads(letter["message"])["action"] == "insert"
    assert await rig.depth() == 0


async def test_a_newer_one_replaces_the_older(rig: Rig) -> None:
    await rig.write(k1="a", k2="other")
    one, two = await rig.lease()
    await bury(rig, one)
    await bury(rig, two)
    await rig.write(k1="b")
    await bury(rig, await rig.lease_one(), reason="newer")
    assert [(d["document_id"], d["reason"]) for d in await rig.dead()] == [("2", "inference_failed"), ("1", "newer")]


async def test_a_lost_lease_leaves_the_older_one_alone(rig: Rig) -> None:
    await rig.write(k1="a")
    await bury(rig, await rig.lease_one(), reason="first")
    await rig.write(k1="b")
    lost = await rig.lease_one()
    await rig.expire()
    await rig.lease_one()
    assert await bury(rig, lost, reason="second") == 0
    assert [d["reason"] for d in await rig.dead()] == ["first"]


async def test_vectors_of_older_text_go_and_those_of_the_current_text_stay(rig: Rig) -> None:
    """Promise 2: a search must not find what the document no longer says."""
    await rig.write(k1="old", k2="same")
    await rig.drain_queue()
    await rig.settle(rig.settlement(1, "old", chunks=3), rig.settlement(2, "same"))
    await rig.write(k1="new")
    await rig.connection.execute("SELECT pgmq.send('docs', '{\"document_id\": 2}')")
    one, two = await rig.lease()
    await bury(rig, one, of=md5("new"))
    await bury(rig, two, of=md5("same"))
    assert await rig.embedded() == {2: "same"}
    assert [d["resolved"] for d in await rig.dead()] == [False, True], "the second one is embedded"


async def test_the_hash_is_taken_where_the_text_was_never_read(rig: Rig) -> None:
    await rig.write(k1="x" * 500_000, k2="text")
    one, two = await rig.lease()
    await rig.connection.execute("DELETE FROM docs WHERE id = 2")
    await bury(rig, one, reason="too_large")
    await bury(rig, two, reason="attempts_exhausted")
    large, gone = await rig.dead()
    assert (large["content_hash"], large["resolved"]) == (md5("x" * 500_000), False)
    assert (gone["content_hash"], gone["resolved"]) == (None, True)


async def test_an_edit_resolves_it(rig: Rig) -> None:
    await rig.write(k1="bad")
    await bury(rig, await rig.lease_one(), of=md5("bad"))
    await rig.write(k1="mended")
    assert [d["resolved"] for d in await rig.dead()] == [True]


async def test_a_foreign_shape_is_kept_as_it_came(rig: Rig) -> None:
    shapes = ['{"document_id": "seven", "x": [1]}', '"text"', "[1, 2]", "null"]
    for shape in shapes:
        await rig.connection.execute("SELECT pgmq.send('docs', $1::jsonb)", shape)
    assert await rig.queue.release(await rig.lease()) == len(shapes), "a drain that came before the burial"
    for lease in await rig.lease():
        assert await bury(rig, lease, reason="malformed") == 1
    letters = await rig.dead()
    kept = [json.loads(d["message"]) for d in letters]
    assert [{k: v for k, v in m.items() if k != "sidecar"} if isinstance(m, dict) else m for m in kept] == [
        json.loads(shape) for shape in shapes
    ]
    assert [d["document_id"] for d in letters] == ["seven", None, None, None]
    assert not any(d["resolved"] for d in letters)


async def test_a_replay_counts_from_one_and_wakes(rig: Rig) -> None:
    await rig.write(k1="text", k2="text")
    await rig.queue.release(await rig.lease())
    for _ in range(3):
        await rig.queue.begin(await rig.lease())
        await rig.expire()
    for lease in await rig.lease():
        assert lease.attempt == 4
        await bury(rig, lease)
    first, second = await rig.dead()
    heard: asyncio.Queue[object] = asyncio.Queue()
    async with second_session(rig.url) as listener:

        def hear(_: object, __: int, ___: str, payload: object) -> None:
            heard.put_nowait(payload)

        await listener.add_listener("sidecar", hear)
        assert await rig.connection.fetchval("SELECT sidecar.replay('docs', ARRAY[$1::bigint])", first["id"]) == 1
        assert await asyncio.wait_for(heard.get(), 30) == "live:docs"
    lease = await rig.lease_one()
    assert (lease.key, lease.attempt, lease.read_ct, lease.last_error) == ("1", 1, 1, None)
    assert [d["id"] for d in await rig.dead()] == [second["id"]]
    assert await rig.connection.fetchval("SELECT sidecar.replay('docs')") == 1
    assert await rig.connection.fetchval("SELECT sidecar.replay('docs')") == 0
    assert await rig.dead() == []


async def test_a_purge_deletes_what_is_named_or_all(rig: Rig) -> None:
    await rig.write(k1="a", k2="b", k3="c")
    for lease in await rig.lease():
        await bury(rig, lease)
    first, *_ = await rig.dead()
    assert await rig.connection.fetchval("SELECT sidecar.purge('docs', ARRAY[$1::bigint, -1])", first["id"]) == 1
    assert await rig.connection.fetchval("SELECT sidecar.purge('docs')") == 2
    assert await rig.dead() == []
    assert await rig.depth() == 0


async def test_it_waits_for_a_settlement_no_longer_than_the_lock_timeout(rig: Rig) -> None:
    await rig.write(k1="text")
    lease = await rig.lease_one()
    async with second_session(rig.url) as settler:
        transaction = settler.transaction()
        await transaction.start()
        await settler.execute("SELECT sidecar._lock_documents('docs', ARRAY['1'])")
        with pytest.raises(Transient) as caught:
            await rig.database.call(
                "SELECT sidecar.dead_letter('docs', '1', ARRAY['live'], ARRAY[$1::bigint], ARRAY[1], 1, 'x', 'y', '')",
                lease.msg_id,
                retry=False,
            )
        await transaction.rollback()
    assert caught.value.code == "lock_timeout"
    assert await rig.dead() == []


async def test_the_runtime_role_sees_and_replays_but_touches_no_table(rig: Rig, runtime_url: str) -> None:
    await rig.write(k1="text")
    await bury(rig, await rig.lease_one())
    async with second_session(runtime_url) as runtime:
        assert len(await runtime.fetch("SELECT * FROM sidecar.dead_letters")) == 1
        for statement in ("SELECT * FROM pgmq.q_docs_dlq", "SELECT * FROM docs", "DELETE FROM docs_embeddings"):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await runtime.execute(statement)
        assert await runtime.fetchval("SELECT sidecar.replay('docs')") == 1
    assert (await rig.queue.read([DocumentKey("1")]))[0].content == "text"
