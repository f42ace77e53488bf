"""The sweep: finds what no message speaks of, and leaves alone what needs nothing."""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING, Any

import pytest

from sidecar_daemon.domain.errors import Poison, Refused
from sidecar_daemon.domain.messages import DocumentKey, Lane
from tests.rig import MODEL, Rig, attach, md5, second_session

if TYPE_CHECKING:
    from sidecar_daemon.domain.messages import SweepWindow


async def sweep(rig: Rig, rows: int = 1000, interval: float = 0.0) -> SweepWindow:
    return await rig.queue.sweep(rows=rows, interval=interval)


async def bulk(rig: Rig) -> dict[str, str]:
    """What lies in the bulk lane: key to action."""
    return {m["message"]["document_id"]: m["message"]["action"] for m in await rig.messages(Lane.BULK)}


async def quietly(rig: Rig, **bodies: str) -> None:
    """Write while the triggers are off."""
    await rig.connection.execute("ALTER TABLE docs DISABLE TRIGGER USER")
    await rig.write(**bodies)
    await rig.connection.execute("ALTER TABLE docs ENABLE TRIGGER USER")


async def test_it_finds_missing_outdated_wrong_model_and_surplus(rig: Rig) -> None:
    await quietly(rig, k1="missing", k2="old", k3="model", k4="text", k5="fine", k6=" ")
    await rig.settle(*[rig.settlement(key, text) for key, text in ((2, "old"), (3, "model"), (4, "text"), (5, "fine"))])
    await quietly(rig, k2="new", k4=" \n")
    await rig.connection.execute("UPDATE docs_embeddings SET model = 'other@1' WHERE id = 3")
    window = await sweep(rig)
    assert (window.state, window.scanned, window.enqueued) == ("finished", 6, 4)
    assert (window.missing, window.outdated, window.wrong_model, window.surplus) == (1, 1, 1, 1)
    assert await bulk(rig) == {"1": "missing", "2": "outdated", "3": "wrong_model", "4": "surplus"}
    assert await rig.messages() == []


async def test_it_wakes_the_bulk_lane(rig: Rig) -> None:
    await quietly(rig, k1="missing")
    async with second_session(rig.url) as listener:
        heard: list[object] = []

        def hear(_: object, __: int, ___: str, payload: object) -> None:
            heard.append(payload)

        await listener.add_listener("sidecar", hear)
        await sweep(rig)
        await sweep(rig)
        await listener.execute("SELECT 1")
    assert heard == ["bulk:docs"]


async def test_what_is_queued_already_is_skipped(rig: Rig) -> None:
    """R15."""
    await rig.write(k1="live", k2="leased")
    await rig.lease(limit=1)
    await quietly(rig, k3="bulk")
    assert (await sweep(rig)).enqueued == 1
    assert (await sweep(rig)).enqueued == 0
    assert await bulk(rig) == {"3": "missing"}


async def test_a_dead_letter_is_left_alone_until_its_content_changes(rig: Rig) -> None:
    """R15: poison must not come back for ever."""
    await rig.write(k1="poison")
    await rig.queue.dead_letter([await rig.lease_one()], reason="x", detail="y", content_hash=md5("poison"))
    assert (await sweep(rig)).enqueued == 0
    await quietly(rig, k1="mended")
    assert (await sweep(rig)).missing == 1
    assert await bulk(rig) == {"1": "missing"}


async def test_a_dead_letter_whose_content_was_embedded_since_stops_no_later_sweep(rig: Rig) -> None:
    """R15: resolved, it says nothing of the next model."""
    await rig.write(k1="poison")
    first = await rig.lease_one()
    await rig.write(k1="mended")
    await rig.queue.dead_letter([first], reason="attempts_exhausted", detail="", content_hash=None)
    await rig.settle(rig.settlement(1, "mended", await rig.lease_one()))
    await switch_model(rig)
    assert (await sweep(rig)).wrong_model == 1
    assert await bulk(rig) == {"1": "wrong_model"}


async def test_a_dead_letter_of_a_text_that_has_its_vector_tells_of_no_text(rig: Rig) -> None:
    """The same, buried after the mended text was embedded: its last text was never read."""
    await rig.write(k1="poison")
    first = await rig.lease_one()
    await rig.write(k1="mended")
    await rig.settle(rig.settlement(1, "mended", await rig.lease_one()))
    await rig.queue.dead_letter([first], reason="attempts_exhausted", detail="", content_hash=None)
    assert [(row["content_hash"], row["resolved"]) for row in await rig.dead()] == [(None, True)]
    await switch_model(rig)
    assert (await sweep(rig)).wrong_model == 1


async def test_poison_of_the_next_model_is_left_alone_too(rig: Rig) -> None:
    await rig.write(k1="text")
    await rig.settle(rig.settlement(1, "text", await rig.lease_one()))
    await switch_model(rig)
    assert (await sweep(rig)).wrong_model == 1
    await rig.queue.dead_letter([await rig.lease_one(Lane.BULK)], reason="x", detail="", content_hash=md5("text"))
    assert (await sweep(rig)).enqueued == 0


async def switch_model(rig: Rig) -> None:
    """Vectors that are there become those of another model."""
    await rig.connection.execute("UPDATE docs_embeddings SET model = 'an earlier one'")


@pytest.mark.parametrize("rows", [1, 3, 1000])
async def test_a_row_that_cannot_be_rendered_is_passed_over_and_told_by_a_dead_letter(rig: Rig, rows: int) -> None:
    """Its content is of an enum whose label is no longer in the catalogue."""
    await rig.connection.execute(
        """
        SELECT sidecar.detach('docs');
        DROP TABLE docs;
        CREATE TYPE mood AS ENUM ('glad', 'lost');
        CREATE TABLE docs (id bigint PRIMARY KEY, body mood);
        INSERT INTO docs SELECT n, CASE WHEN n = 4 THEN 'lost' ELSE 'glad' END::mood FROM generate_series(1, 7) AS n;
        """
    )
    await rig.connection.execute(
        "SELECT sidecar.attach('docs', ARRAY['body'], p_model => 'deterministic', p_model_id => $1, "
        "p_dimensions => 16, p_index => false)",
        MODEL,
    )
    await rig.connection.execute("DELETE FROM pg_enum WHERE enumlabel = 'lost'")
    assert await walk(rig, rows) == (7, 7)
    bad = next(lease for lease in await rig.lease(Lane.BULK) if lease.key == "4")
    with pytest.raises(Poison):
        await rig.queue.read([DocumentKey("4")])
    assert await rig.queue.dead_letter([bad], reason="22P03", detail="", content_hash=None) == 1
    await rig.connection.execute("DELETE FROM pgmq.q_docs_bulk")
    assert await walk(rig, rows) == (7, 6), "the dead letter is not sent again"


async def walk(rig: Rig, rows: int) -> tuple[int, int]:
    """One walk to its end: rows scanned and enqueued."""
    windows: list[SweepWindow] = []
    while not windows or windows[-1].state == "walked":
        windows.append(await sweep(rig, rows=rows))
        assert len(windows) < 30
    assert windows[-1].state == "finished"
    return sum(window.scanned for window in windows), sum(window.enqueued for window in windows)


@pytest.mark.parametrize("key", ["bigint", "uuid", "text"])
async def test_it_walks_window_by_window_with_any_key(rig: Rig, key: str) -> None:
    await rig.connection.execute("SELECT sidecar.detach('docs'); DROP TABLE docs")
    by_type: dict[str, list[Any]] = {
        "bigint": [-(2**63), -5, -1, 0, 3, 20, 100, 2**63 - 1],
        "uuid": [uuid.UUID(int=n**9) for n in range(1, 9)],
        "text": ["", " ", "A", "a", "B", "it's", 'quo"te', "ü"],
    }
    values = by_type[key]
    await rig.connection.execute(f"CREATE TABLE docs (id {key} PRIMARY KEY, body text)")
    await rig.connection.execute(f"INSERT INTO docs SELECT k, 'text' FROM unnest($1::{key}[]) AS k", values)
    await rig.connection.execute("ALTER TABLE docs RENAME TO before")
    await attach(rig.connection, key=key)
    await rig.connection.execute("ALTER TABLE docs DISABLE TRIGGER USER; INSERT INTO docs SELECT * FROM before")
    windows = [await sweep(rig, rows=3) for _ in range(3)]
    assert [(w.state, w.scanned, w.enqueued, w.backfill) for w in windows] == [
        ("walked", 3, 3, True),
        ("walked", 3, 3, True),
        ("finished", 2, 2, True),
    ]
    assert sorted(await bulk(rig)) == sorted(str(value) for value in values)
    assert not (await sweep(rig, rows=3)).backfill, "a backfill is over once it came to the end"


async def test_rows_before_the_cursor_wait_for_the_next_walk(rig: Rig) -> None:
    await quietly(rig, k10="a", k20="b", k30="c")
    assert (await sweep(rig, rows=2)).state == "walked"
    await quietly(rig, k5="behind", k25="ahead")
    assert (await sweep(rig, rows=3)).state == "finished"
    assert set(await bulk(rig)) == {"10", "20", "25", "30"}
    assert (await sweep(rig, rows=9)).missing == 1
    assert set(await bulk(rig)) == {"5", "10", "20", "25", "30"}


async def test_a_walk_rests_for_its_interval_and_a_request_ends_the_rest(rig: Rig) -> None:
    await quietly(rig, k1="text")
    assert (await sweep(rig, interval=0)).state == "finished"
    resting = await sweep(rig, interval=3600)
    assert (resting.state, resting.scanned) == ("resting", 0)
    await rig.connection.execute("SELECT sidecar.request_sweep('docs', false)")
    asked = await sweep(rig, interval=3600)
    assert (asked.state, asked.scanned, asked.backfill) == ("finished", 1, False)
    await rig.connection.execute("SELECT sidecar.request_sweep('docs')")
    assert (await sweep(rig, interval=3600)).backfill


async def test_a_walk_under_way_does_not_rest(rig: Rig) -> None:
    await quietly(rig, k1="a", k2="b", k3="c")
    assert [(await sweep(rig, rows=1, interval=0)).state] == ["walked"]
    assert [(await sweep(rig, rows=1, interval=3600)).state for _ in range(4)] == [
        "walked",
        "walked",
        "finished",
        "resting",
    ]


async def test_one_replica_walks_at_a_time(rig: Rig) -> None:
    await quietly(rig, k1="text")
    async with second_session(rig.url) as other:
        transaction = other.transaction()
        await transaction.start()
        assert await other.fetchval("SELECT state FROM sidecar.sweep('docs', 10, 0)") == "finished"
        busy = await sweep(rig)
        await transaction.rollback()
    assert (busy.state, busy.enqueued) == ("busy", 0)
    assert (await sweep(rig)).enqueued == 1


@pytest.mark.parametrize("queue", ["docs", "docs_bulk"])
async def test_it_waits_while_a_lane_is_deep(rig: Rig, queue: str) -> None:
    await quietly(rig, k1="text")
    await rig.connection.execute(
        'SELECT pgmq.send_batch($1, array_agg(\'{"document_id": "77"}\'::jsonb)) FROM generate_series(1, 20)', queue
    )
    ask = "SELECT state FROM sidecar.sweep('docs', 10, 0, $1)"
    assert await rig.connection.fetchval(ask, 20) == "waiting"
    assert await rig.connection.fetchval(ask, 21) == "finished"


async def test_a_pause_refuses_it(rig: Rig) -> None:
    await rig.connection.execute("SELECT sidecar.set_enabled('docs', false)")
    with pytest.raises(Refused) as caught:
        await sweep(rig)
    assert caught.value.code == "paused"


async def test_progress_is_kept_beside_the_pipeline(rig: Rig) -> None:
    await quietly(rig, k1="a", k2="b", k3="c")
    await sweep(rig, rows=2)
    row = await rig.connection.fetchrow("SELECT * FROM sidecar.sweeps")
    assert row is not None
    assert (row["position"], row["scanned"], row["missing"], row["finished_at"]) == ("2", 2, 2, None)
    await sweep(rig, rows=2)
    row = await rig.connection.fetchrow("SELECT * FROM sidecar.sweeps")
    assert row is not None
    assert (row["scanned"], row["enqueued"]) == (3, 3)
    assert row["finished_at"] is not None


async def test_what_it_enqueued_is_leased_on_the_bulk_lane(rig: Rig) -> None:
    await quietly(rig, k1="text")
    await sweep(rig)
    assert await rig.lease() == []
    lease = await rig.lease_one(Lane.BULK)
    assert lease.key == DocumentKey("1")
    (settled,) = await rig.settle(rig.settlement(1, "text", lease))
    assert settled.acknowledged == 1
    assert (await sweep(rig)).enqueued == 0


@pytest.mark.parametrize(
    ("content", "blank"),
    [
        ("''", True),
        ("E' \\t\\u00a0\\ufeff\\n'", True),
        ("repeat(' ', 1001)", True),
        ("repeat(' ', 1001) || 'x'", False),
        ("'x' || repeat(' ', 1001)", False),
        ("repeat(' ', 140000000)", False),
    ],
)
async def test_what_is_blank(rig: Rig, content: str, blank: bool) -> None:
    """Also where trimming would be refused by the server: beyond 128 MiB."""
    assert await rig.connection.fetchval(f"SELECT sidecar._blank({content})") is blank


async def test_a_window_is_not_held_up_by_trimming_a_huge_document(rig: Rig) -> None:
    """A window hashes 100 MB once; whether they are blank is seen at their beginning. Trimming takes six hashes."""
    await rig.connection.execute("CREATE TEMP TABLE huge AS SELECT repeat('x', 100 * 1024 * 1024) AS body")

    async def seconds(expression: str) -> float:
        begun = time.perf_counter()
        await rig.connection.fetchval(f"SELECT {expression} FROM huge")
        return time.perf_counter() - begun

    hashing = min([await seconds("md5(body)") for _ in range(3)])
    assert min([await seconds("sidecar._blank(body)") for _ in range(3)]) < hashing / 2
