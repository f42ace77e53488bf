"""Claims: of several replicas that hold messages of one text, one embeds it; whatever happens to it, another may."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from sidecar_daemon.adapters.postgres.queue import PostgresQueue
from sidecar_daemon.domain.messages import DocumentKey, ModelId, PipelineName
from sidecar_daemon.domain.outcomes import Outcome, Verdict
from tests.faulty import FaultyEmbedder
from tests.rig import MAX_BYTES, MODEL, NAME, PLAIN, Rig, Told, blocked, build_worker, md5, running, second_session
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sidecar_daemon.domain.messages import Lease

READ = "sidecar.read_documents(text, text, text[], bigint, bigint, text, double precision)"
CLAIM = Verdict.EMBED
OTHERS = Verdict.CLAIMED


async def look(queue: PostgresQueue, *keys: int, seconds: float | None = 60) -> list[Verdict]:
    """What a replica may do with documents; what it may embed is then claimed."""
    return [r.verdict for r in await queue.read([DocumentKey(str(key)) for key in keys], claim_seconds=seconds)]


async def send(rig: Rig, key: int, times: int = 1) -> None:
    """More messages of a document."""
    await rig.connection.execute(
        "INSERT INTO pgmq.q_docs (vt, message) SELECT clock_timestamp(), jsonb_build_object('document_id', $1::int) "
        "FROM generate_series(1, $2)",
        key,
        times,
    )


async def claims(rig: Rig) -> list[str]:
    """The keys that are claimed."""
    return [row["key"] for row in await rig.connection.fetch("SELECT key FROM sidecar.claims ORDER BY key")]


async def lapse(rig: Rig) -> None:
    """Let every claim run out, as that of a crashed replica does."""
    await rig.connection.execute("UPDATE sidecar.claims SET expires_at = clock_timestamp()")


async def test_the_second_replica_leaves_a_text_to_the_first(rig: Rig) -> None:
    await rig.write(k1="one", k2="two")
    first, second = rig.queue, rig.queue
    assert await look(first, 1) == [CLAIM]
    readings = await second.read([DocumentKey("2"), DocumentKey("1")], claim_seconds=60)
    assert [(r.key, r.verdict, r.content, r.content_hash) for r in readings] == [
        ("2", CLAIM, "two", md5("two")),
        ("1", OTHERS, None, md5("one")),
    ]
    assert await look(first, 1, 2) == [CLAIM, OTHERS], "its own claim is no obstacle"


async def test_who_claims_nothing_sees_no_claims_and_makes_none(rig: Rig) -> None:
    await rig.write(k1="one")
    assert await look(rig.queue, 1, seconds=None) == [CLAIM]
    assert await claims(rig) == []
    await look(rig.queue, 1)
    assert await look(rig.queue, 1, seconds=None) == [CLAIM]


async def test_a_claim_expires_and_is_taken_over(rig: Rig) -> None:
    await rig.write(k1="one")
    crashed, second, third = rig.queue, rig.queue, rig.queue
    await look(crashed, 1)
    await lapse(rig)
    assert await look(second, 1) == [CLAIM]
    assert await look(third, 1) == [OTHERS]
    assert await look(crashed, 1) == [OTHERS]


async def test_a_claim_lasts_as_long_as_it_was_asked_for(rig: Rig) -> None:
    await rig.write(k1="one")
    await look(rig.queue, 1, seconds=40)
    left = "SELECT extract(epoch FROM expires_at - clock_timestamp())::float FROM sidecar.claims"
    assert 0 < await rig.connection.fetchval(left) <= 40


async def test_another_text_takes_the_claim_over(rig: Rig) -> None:
    await rig.write(k1="one")
    first, second = rig.queue, rig.queue
    await look(first, 1)
    await rig.write(k1="two")
    assert await look(second, 1) == [CLAIM]
    assert await look(first, 1) == [OTHERS]
    await first.settle([rig.settlement(1, "one")])
    assert await claims(rig) == ["1"], "the settlement of the older text"


async def test_another_model_takes_the_claim_over(rig: Rig) -> None:
    await rig.write(k1="one")
    await look(rig.queue, 1)
    await rig.connection.execute("UPDATE sidecar.pipelines SET model_id = 'other@1'")
    other = PostgresQueue(rig.database, NAME, ModelId("other@1"), max_document_bytes=MAX_BYTES)
    assert await look(other, 1) == [CLAIM]


async def test_a_settlement_frees_the_claim(rig: Rig) -> None:
    await rig.write(k1="one", k2="two")
    leases = await rig.lease()
    first = rig.queue
    await look(first, 1, 2)
    await first.settle([rig.settlement(1, "one", leases[0])])
    assert await claims(rig) == ["2"]
    assert await look(rig.queue, 1, 2) == [Verdict.UNCHANGED, OTHERS]


@pytest.mark.parametrize("way", ["defer", "release", "acknowledge", "dead_letter"])
async def test_whoever_gives_a_document_up_frees_its_claim(rig: Rig, way: str) -> None:
    await rig.write(k1="one", k2="two")
    first, second = rig.queue, rig.queue
    lease, _ = await rig.lease()
    await look(first, 1, 2)
    assert await _end(second, lease, "keep_claims") == 1
    assert await claims(rig) == ["1", "2"], "nobody frees another's"
    (lease,) = await rig.lease()
    assert await _end(first, lease, way) == 1
    assert await claims(rig) == ["2"]


async def _end(queue: PostgresQueue, lease: Lease, way: str) -> int:
    if way == "defer":
        return await queue.defer({lease: 0.0}, code="inference_failed")
    if way == "acknowledge":
        return await queue.acknowledge([lease])
    if way == "dead_letter":
        return await queue.dead_letter([lease], reason="x", detail="y", content_hash=md5("one"))
    return await queue.release([lease], keep_claims=way == "keep_claims")


async def test_nobody_frees_the_claim_of_another(rig: Rig) -> None:
    await rig.write(k1="one")
    first, second = rig.queue, rig.queue
    lease = await rig.lease_one()
    await look(first, 1)
    await second.release([lease])
    await second.acknowledge([await rig.lease_one()])
    assert await claims(rig) == ["1"]
    await send(rig, 1)
    await lapse(rig)
    await second.acknowledge([await rig.lease_one()])
    assert await claims(rig) == [], "that of a crashed replica is swept up"


async def test_messages_without_a_part_in_the_claim_leave_it(rig: Rig) -> None:
    await rig.write(k1="one")
    first = rig.queue
    await look(first, 1)
    assert await first.release([await rig.lease_one()], delay=30, keep_claims=True) == 1
    assert await claims(rig) == ["1"]


async def test_a_claim_is_held_as_long_as_its_lease_and_no_longer(rig: Rig) -> None:
    await rig.write(k1="one", k2="two")
    first = rig.queue
    held, lost = await rig.lease()
    await look(first, 1, 2)
    await rig.connection.execute("UPDATE pgmq.q_docs SET read_ct = read_ct + 1 WHERE msg_id = $1", lost.msg_id)
    longer = "SELECT array_agg(expires_at > clock_timestamp() + interval '60 s' ORDER BY key::int) FROM sidecar.claims"
    assert await rig.queue.extend([held], seconds=600) == {held}
    assert await rig.connection.fetchval(longer) == [False, False], "another's claim"
    assert await first.extend([held, lost], seconds=900) == {held}
    assert await rig.connection.fetchval(longer) == [True, False]
    assert await look(rig.queue, 1) == [OTHERS]


async def test_a_vector_written_between_the_verdict_and_the_claim_counts(rig: Rig) -> None:
    """The settlement's transaction holds the row that is to be claimed, so the read waits for it to end."""
    await rig.write(k1="one", k2="two")
    await rig.connection.execute(f"ALTER FUNCTION {READ} SET lock_timeout = '30s'")
    first, second = rig.queue, rig.queue
    await look(first, 1)
    await lapse(rig)  # so that the read's snapshot finds no claim in its way
    async with second_session(rig.url) as settling:
        transaction = settling.transaction()
        await transaction.start()
        await settling.execute(
            "INSERT INTO docs_embeddings (id, chunk_no, source_text_hash, embedding, model) "
            "VALUES (1, 0, md5('one'), array_fill(0.25, ARRAY[16])::vector, $1)",
            MODEL,
        )
        await settling.execute("DELETE FROM sidecar.claims")
        reading = asyncio.create_task(look(second, 2, 1))
        await eventually(lambda: blocked(rig.connection, "read_documents"), what="a read that waits for the claim")
        await transaction.commit()
        assert await reading == [CLAIM, Verdict.UNCHANGED]
    assert await claims(rig) == ["2"]


async def test_nobody_waits_long_for_a_claim(rig: Rig) -> None:
    await rig.write(k1="one", k2="two")
    async with second_session(rig.url) as slow, slow.transaction():
        await slow.fetch(
            "SELECT * FROM sidecar.read_documents('docs', $1, '{2}', 1000, 1000, 'slow', 60::float)", MODEL
        )
        assert await look(rig.queue, 1, 2) == [OTHERS, OTHERS]
    assert await look(rig.queue, 1, 2) == [CLAIM, OTHERS]


async def test_two_that_read_the_same_in_opposite_orders_never_deadlock(rig: Rig) -> None:
    keys = list(range(1, 41))
    await rig.write(**{f"k{key}": f"text {key}" for key in keys})
    for _ in range(5):
        found = await asyncio.gather(*(look(rig.queue, *keys[:: 1 - 2 * (n % 2)]) for n in range(4)))
        embedding = [verdicts.count(CLAIM) for verdicts in found]
        assert sum(embedding) == len(keys), "each by exactly one"
        await rig.connection.execute("DELETE FROM sidecar.claims")


async def test_documents_of_others_take_nothing_from_the_budget(rig: Rig) -> None:
    await rig.write(k1="a" * 50, k2="b" * 50, k3="c" * 50)
    await look(rig.queue, 1)
    rows = await rig.database.call(
        "SELECT verdict FROM sidecar.read_documents('docs', $1, '{1,2,3}', 1000, 1, 'second', 60::float)", MODEL
    )
    assert [row["verdict"] for row in rows] == ["claimed", "embed", "later"]


async def test_a_detached_pipeline_leaves_no_claims(rig: Rig) -> None:
    await rig.write(k1="one")
    await look(rig.queue, 1)
    await rig.connection.execute("CREATE TABLE more (id bigint PRIMARY KEY, body text)")
    await rig.connection.execute("INSERT INTO more VALUES (7, 'seven')")
    await rig.connection.execute(
        "SELECT sidecar.attach('more', ARRAY['body'], p_model => 'deterministic', p_model_id => $1, "
        "p_dimensions => 16, p_index => false)",
        MODEL,
    )
    await look(PostgresQueue(rig.database, PipelineName("more"), MODEL, max_document_bytes=MAX_BYTES), 7)
    await rig.connection.execute("SELECT sidecar.detach('docs')")
    assert await claims(rig) == ["7"]


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    """Inference threads of a worker."""
    with ThreadPoolExecutor(2) as executor:
        yield executor


@pytest.mark.parametrize("crashes", [False, True])
async def test_a_worker_waits_for_the_text_of_another_replica(
    rig: Rig, threads: ThreadPoolExecutor, *, crashes: bool
) -> None:
    await rig.write(k1="one")
    other, told, embedder = rig.queue, Told(), FaultyEmbedder(PLAIN)
    lease = await rig.lease_one()
    await look(other, 1)
    await send(rig, 1, times=40)
    async with running(build_worker(await rig.pipeline(), rig.queue, embedder, told, threads)):
        await eventually(lambda: told.documents(Outcome.RELEASED) >= 3, what="a worker that finds the claim")
        assert embedder.runs == []
        await (lapse(rig) if crashes else other.settle([rig.settlement(1, "one", lease)]))
        await eventually(lambda: _answered(rig, lease), what="the other messages")
    assert embedder.runs == ([["one"]] if crashes else [])
    assert await claims(rig) == []
    await rig.assert_true()


async def _answered(rig: Rig, lease: Lease) -> bool:
    return {message["msg_id"] for message in await rig.messages()} <= {lease.msg_id}
