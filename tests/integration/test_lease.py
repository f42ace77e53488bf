"""Leases and their fence: who holds a message, what counts as an attempt, who is excused."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sidecar_daemon.adapters.postgres.pool import Database
from sidecar_daemon.adapters.postgres.queue import READ_BUDGET_BYTES, PostgresQueue
from sidecar_daemon.domain.errors import Refused
from sidecar_daemon.domain.messages import DocumentKey, Lane, ModelId, PipelineName
from sidecar_daemon.domain.outcomes import Verdict
from tests.rig import MAX_BYTES, MODEL, NAME, Rig, attach, md5, second_session, write

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sidecar_daemon.domain.messages import Lease

UNCLEAN, BEGUN, DEFERRED, RELEASED = "unclean", "begun", "deferred", "released"
ENDS = (UNCLEAN, BEGUN, DEFERRED, RELEASED)


async def end(rig: Rig, lease: Lease, how: str) -> None:
    """End one lease: by expiry, by expiry after its run was announced, or by the worker's word."""
    if how == BEGUN:
        await rig.queue.begin([lease])
    elif how == DEFERRED:
        await rig.queue.defer({lease: 0.0}, code="inference_failed")
    elif how == RELEASED:
        await rig.queue.release([lease])
    await rig.expire()


async def attempts(rig: Rig, history: Sequence[str]) -> list[int]:
    """Attempt numbers of a fresh message's leases, one more than the history has ends."""
    await rig.drain_queue()
    await rig.connection.execute("SELECT pgmq.send('docs', '{\"document_id\": 1}')")
    found = []
    for how in history:
        lease = await rig.lease_one()
        found.append(lease.attempt)
        await end(rig, lease, how)
    return [*found, (await rig.lease_one()).attempt]


def expected(history: Sequence[str]) -> list[int]:
    """The rules in Python: a first unclean end counts; a suspect's only when its run had begun."""
    attempt, numbers = 1, [1]
    for how in history:
        excused = how == RELEASED or (how == UNCLEAN and attempt >= 2)
        attempt += not excused
        numbers.append(attempt)
    return numbers


@pytest.mark.parametrize(
    ("history", "numbers"),
    [
        ((), [1]),
        ((UNCLEAN,), [1, 2]),
        ((BEGUN,), [1, 2]),
        ((DEFERRED,), [1, 2]),
        ((RELEASED,), [1, 1]),
        ((UNCLEAN, UNCLEAN, UNCLEAN), [1, 2, 2, 2]),
        ((UNCLEAN, BEGUN, BEGUN), [1, 2, 3, 4]),
        ((UNCLEAN, BEGUN, UNCLEAN, BEGUN), [1, 2, 3, 3, 4]),
        ((DEFERRED, UNCLEAN, DEFERRED), [1, 2, 2, 3]),
        ((RELEASED, RELEASED, UNCLEAN, RELEASED, UNCLEAN), [1, 1, 1, 2, 2, 2]),
    ],
)
async def test_what_counts_as_an_attempt(rig: Rig, history: Sequence[str], numbers: list[int]) -> None:
    assert await attempts(rig, history) == numbers == expected(history)


def test_random_histories_agree_with_the_rules(event_rig: tuple[asyncio.Runner, Rig]) -> None:
    runner, rig = event_rig

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.lists(st.sampled_from(ENDS), max_size=7))
    def agree(history: list[str]) -> None:
        assert runner.run(attempts(rig, history)) == expected(history)

    agree()


@pytest.fixture
def event_rig(database_url: str) -> Iterator[tuple[asyncio.Runner, Rig]]:
    """A rig on a loop of the test's own: hypothesis calls plain functions."""

    async def build() -> Rig:
        plain = await asyncpg.connect(database_url)
        await attach(plain)
        return Rig(plain, await Database.open(database_url), database_url)

    with asyncio.Runner() as runner:
        rig = runner.run(build())
        yield runner, rig
        runner.run(rig.database.close())
        runner.run(rig.connection.close())


async def test_an_excused_lease_leaves_the_count_as_it_was(rig: Rig) -> None:
    await rig.write(k1="text")
    lease = await rig.lease_one()
    assert await rig.queue.release([lease]) == 1
    (message,) = await rig.messages()
    assert message["read_ct"] == message["message"]["sidecar"]["excused"] == 1
    assert message["hidden"] <= 0
    assert (await rig.lease_one()).last_error == "released"


async def test_a_repeated_release_excuses_once(rig: Rig) -> None:
    """An answer that was lost makes the call come twice (R10)."""
    await rig.write(k1="text")
    lease = await rig.lease_one()
    assert [await rig.queue.release([lease]) for _ in range(3)] == [1, 0, 0]
    assert (await rig.lease_one()).attempt == 1


async def test_a_late_extension_does_not_hide_what_was_made_visible(rig: Rig) -> None:
    """The keeper's call may be under way, or repeated, while the worker defers or releases."""
    await rig.write(k1="one", k2="two")
    released, deferred = await rig.lease()
    await rig.queue.release([released])
    await rig.queue.defer({deferred: 30.0}, code="inference_failed")
    assert await rig.queue.extend([released, deferred], seconds=600) == set()
    assert [message["hidden"] <= 30 for message in await rig.messages()] == [True, True]
    again = await rig.lease_one()
    assert await rig.queue.extend([again], seconds=600) == {again}


async def test_the_fence_of_every_step_holds_once_the_lease_moved_on(rig: Rig) -> None:
    await rig.write(k1="text")
    lost = await rig.lease_one()
    await rig.expire()
    held = await rig.lease_one()
    before = await rig.messages()
    queue = rig.queue
    await queue.begin([lost])
    assert await queue.extend([lost], seconds=600) == set()
    assert await queue.defer({lost: 0.0}, code="x") == 0
    assert await queue.release([lost]) == 0
    assert await queue.acknowledge([lost]) == 0
    assert await queue.dead_letter([lost], reason="x", detail="y", content_hash=None) == 0
    (settled,) = await rig.settle(rig.settlement(1, "text", lost))
    assert settled.acknowledged == 0
    (after,) = await rig.messages()
    assert after["message"] == before[0]["message"]
    assert abs(after["hidden"] - before[0]["hidden"]) < 30
    assert await rig.dead() == []
    assert await queue.extend([lost, held], seconds=60) == {held}
    assert await queue.acknowledge([held]) == 1


async def test_a_lease_is_by_lane_and_oldest_first(rig: Rig) -> None:
    await rig.write(k3="three", k1="one", k2="two")
    await rig.connection.execute("SELECT pgmq.send('docs_bulk', '{\"document_id\": 9}')")
    first = await rig.lease(limit=2)
    assert [lease.key for lease in first] == ["3", "1"]
    assert [lease.key for lease in await rig.lease()] == ["2"]
    assert await rig.lease() == []
    assert (await rig.lease_one(Lane.BULK)).key == "9"


async def test_keys_come_in_canonical_form_and_foreign_shapes_without(rig: Rig) -> None:
    shapes = ['{"document_id": "007"}', '{"document_id": 7}', '{"document_id": "seven"}', '{"id": 7}', '"7"', "[7]"]
    for shape in (*shapes, '{"document_id": null}', '{"document_id": "1e400"}'):
        await rig.connection.execute("SELECT pgmq.send('docs', $1::jsonb)", shape)
    assert [lease.key for lease in await rig.lease()] == ["7", "7", None, None, None, None, None, None]


async def test_bookkeeping_of_a_foreign_shape_breaks_nothing(rig: Rig) -> None:
    for shape in ("5", '{"excused": "many", "accounted": -1}', '{"excused": 99999999999}', "null"):
        await rig.connection.execute(
            "SELECT pgmq.send('docs', jsonb_build_object('document_id', 1, 'sidecar', $1::jsonb))", shape
        )
    leases = await rig.lease()
    assert [lease.attempt for lease in leases] == [1, 1, 1, 1]
    assert await rig.queue.release(leases) == 4
    assert [lease.attempt for lease in await rig.lease()] == [1, 1, 1, 1]


async def test_a_foreign_message_cannot_claim_attempts_away(rig: Rig) -> None:
    await rig.connection.execute("""SELECT pgmq.send('docs', '{"document_id": 1, "sidecar": {"excused": 999999}}')""")
    assert (await rig.lease_one()).attempt == 1


async def test_a_paused_pipeline_refuses_before_a_read_count_is_burned(rig: Rig) -> None:
    await rig.write(k1="text")
    await rig.connection.execute("SELECT sidecar.set_enabled('docs', false)")
    with pytest.raises(Refused, match="docs is paused"):
        await rig.lease()
    with pytest.raises(Refused, match="docs is paused"):
        await rig.queue.read([DocumentKey("1")])
    await rig.connection.execute("SELECT sidecar.set_enabled('docs', true)")
    assert (await rig.lease_one()).read_ct == 1


async def test_another_model_and_an_unknown_pipeline_are_refused(rig: Rig) -> None:
    await rig.write(k1="text")
    other = PostgresQueue(rig.database, NAME, ModelId("other@1"), max_document_bytes=1)
    with pytest.raises(Refused, match="this replica has other@1") as caught:
        await other.lease(Lane.LIVE, seconds=60, limit=1)
    assert caught.value.code == "model_mismatch"
    with pytest.raises(Refused):
        await other.settle([rig.settlement(1, "text")])
    unknown = PostgresQueue(rig.database, PipelineName("absent"), MODEL, max_document_bytes=1)
    with pytest.raises(Refused, match="known pipelines: docs") as caught:
        await unknown.lease(Lane.LIVE, seconds=60, limit=1)
    assert caught.value.code == "unknown_pipeline"
    assert (await rig.messages())[0]["read_ct"] == 0


async def test_an_edit_always_sends_though_a_message_waits(rig: Rig) -> None:
    """R3: the waiting message may have been read already."""
    await rig.write(k1="one")
    await rig.write(k1="two")
    await rig.write(k1="two")  # the same text again is no edit
    async with second_session(rig.url) as writer:
        lease = (await rig.lease())[0]
        await write(writer, {"k1": "three"})
    assert [m["message"]["action"] for m in await rig.messages()] == ["insert", "update", "update"]
    assert lease.key == "1"


async def test_what_is_read_after_the_lease_is_the_newest_text(rig: Rig) -> None:
    await rig.write(k1="one")
    await rig.lease()
    await rig.write(k1="two")
    (reading,) = await rig.queue.read([DocumentKey("1")])
    assert (reading.content, reading.content_hash) == ("two", md5("two"))


@dataclass(frozen=True)
class Case:
    body: str | None
    verdict: Verdict
    content: str | None = None


async def test_verdicts(rig: Rig) -> None:
    cases = {
        1: Case("text", Verdict.EMBED, "text"),
        2: Case(None, Verdict.BLANK),
        3: Case(" \n\u00a0\u3000", Verdict.BLANK),
        4: Case("x" * (MAX_BYTES + 1), Verdict.TOO_LARGE),
        5: Case("known", Verdict.UNCHANGED),
        6: Case("ä" * (MAX_BYTES // 2), Verdict.EMBED, "ä" * (MAX_BYTES // 2)),
        7: Case("ä" * (MAX_BYTES // 2) + "!", Verdict.TOO_LARGE),
    }
    await rig.write(**{f"k{key}": case.body for key, case in cases.items()})
    await rig.settle(rig.settlement(5, "known"))
    readings = await rig.queue.read([DocumentKey(str(key)) for key in (*cases, 99)])
    found = {int(r.key): Case(cases[int(r.key)].body, r.verdict, r.content) for r in readings[:-1]}
    assert found == cases
    assert readings[-1].verdict is Verdict.GONE
    assert readings[3].content_bytes == MAX_BYTES + 1


async def test_a_large_text_is_never_fetched(rig: Rig) -> None:
    """Its length is asked for; the text itself is not in the answer, nor is its hash computed."""
    await rig.write(k1="x" * (MAX_BYTES * 3))
    (row,) = await rig.database.call(
        "SELECT * FROM sidecar.read_documents('docs', $1, ARRAY['1'], $2, $3)", MODEL, MAX_BYTES, READ_BUDGET_BYTES
    )
    assert (row["content"], row["content_hash"], row["content_bytes"]) == (None, None, MAX_BYTES * 3)


async def test_a_read_stops_at_its_budget_but_always_brings_one(rig: Rig) -> None:
    await rig.write(k1="a" * 50, k2="b" * 50, k3="c" * 50, k4=" ", k5="d")

    async def verdicts(budget: int) -> list[str]:
        rows = await rig.database.call(
            "SELECT verdict, content FROM sidecar.read_documents('docs', $1, ARRAY['1','2','3','4','5','9'], 1000, $2)",
            MODEL,
            budget,
        )
        assert all((row["content"] is not None) == (row["verdict"] == "embed") for row in rows)
        return [row["verdict"] for row in rows]

    assert await verdicts(1) == ["embed", "later", "later", "blank", "later", "gone"]
    assert await verdicts(100) == ["embed", "embed", "later", "blank", "later", "gone"]
    assert await verdicts(151) == ["embed", "embed", "embed", "blank", "embed", "gone"]


async def test_a_suspect_is_known_by_its_attempt(rig: Rig) -> None:
    await rig.write(k1="text")
    lease = await rig.lease_one()
    await rig.expire()
    again = await rig.lease_one()
    assert again == replace(lease, read_ct=2, attempt=2, age_seconds=again.age_seconds)
