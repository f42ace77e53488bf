"""Messages and documents that cannot be embedded: each ends as one dead letter that says why, and nobody else."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.daemon import Daemon
from tests.integration.stories.conftest import SETTINGS, opened
from tests.integration.stories.tap import Tap

if TYPE_CHECKING:
    from pathlib import Path

    from sidecar_daemon.adapters.onnx.session import OnnxEmbedder
    from tests.integration.stories.story import World

pytestmark = pytest.mark.asyncio(loop_scope="package")

LIMIT = int(SETTINGS["MAX_DOCUMENT_BYTES"])
FOREIGN = [
    "7",
    "null",
    '"hello"',
    "[1, 2]",
    "{}",
    '{"id": 1}',
    '{"document_id": null}',
    '{"document_id": {"id": 1}}',
    '{"document_id": [1]}',
    '{"document_id": true}',
    '{"document_id": "one"}',
    '{"document_id": ""}',
    '{"document_id": 1.5}',
    '{"document_id": 9223372036854775808}',
    '{"document_id": "1; DROP TABLE mixed"}',
]
HOSTILE = [
    '{"document_id": 1, "sidecar": {"excused": "x"}}',
    '{"document_id": "1", "sidecar": {"excused": -5, "accounted": 1e300, "error": ["a"]}}',
    '{"document_id": 1, "sidecar": {"excused": 99999999999999999999, "accounted": {}}}',
    '{"document_id": 1, "sidecar": 7, "action": {"a": 1}}',
    '{"document_id": " 1 ", "sidecar": [], "detail": ""}',
]


async def test_messages_of_a_foreign_shape_are_dead_lettered_and_hurt_nobody(world: World) -> None:
    await world.sql("CREATE TABLE mixed (id bigint PRIMARY KEY, body text)")
    story = await world.attach("mixed", "body")
    await story.send(*FOREIGN)
    await world.sql("INSERT INTO mixed VALUES (1, 'an honest document')")
    await story.holds(1, "an honest document")
    letters = await story.dead(len(FOREIGN))
    assert {letter["reason"] for letter in letters} == {"malformed"}
    assert sorted(letter["message"] for letter in letters) == sorted(
        [await world.pool.fetchval("SELECT $1::text::jsonb::text", message) for message in FOREIGN]
    )
    assert await world.daemon.is_ready()
    await story.quiet()
    assert await story.metric("sidecar_dead_lettered_total", reason="malformed") == len(FOREIGN)


async def test_hostile_bookkeeping_changes_nothing(world: World) -> None:
    await world.sql("CREATE TABLE bookkept (id bigint PRIMARY KEY, body text)")
    story = await world.attach("bookkept", "body")
    await world.sql(
        "ALTER TABLE bookkept DISABLE TRIGGER USER",
        "INSERT INTO bookkept VALUES (1, 'an honest document')",
        "ALTER TABLE bookkept ENABLE TRIGGER USER",
    )
    await story.send(*HOSTILE)
    await story.holds(1, "an honest document")
    await story.quiet()
    await story.dead(0)


async def test_a_document_above_the_limit_is_dead_lettered_and_never_fetched(
    database_url: str, runtime_url: str, tiny_models: Path, embedder: OnnxEmbedder
) -> None:
    async with Tap(runtime_url) as tap:
        daemon = Daemon(tap.url, tiny_models, SETTINGS)
        async with opened(database_url, daemon, embedder) as world:
            await world.sql("CREATE TABLE weighed (id bigint PRIMARY KEY, body text)")
            story = await world.attach("weighed", "body")
            canary = "far too heavy "
            await world.pool.execute("INSERT INTO weighed VALUES (1, $1)", canary * (LIMIT // len(canary) + 1))
            (letter,) = await story.dead(1)
            assert (letter["document_id"], letter["reason"]) == ("1", "too_large")
            assert str(LIMIT // len(canary) * len(canary) + len(canary)) in letter["detail"]
            assert canary.encode() not in tap.received
            exact = "light enough " * LIMIT
            await world.pool.execute("INSERT INTO weighed VALUES (2, $1)", exact[:LIMIT])
            await story.holds(2, exact[:LIMIT])
            assert b"light enough " in tap.received, "the tap hears what is fetched"
            assert not [line for line in daemon.log if canary in line or "light enough" in line]


async def test_a_document_that_outgrows_the_limit_loses_its_stale_vector(world: World) -> None:
    await world.sql("CREATE TABLE grown (id bigint PRIMARY KEY, body text)")
    story = await world.attach("grown", "body")
    await world.sql("INSERT INTO grown VALUES (1, 'small'), (2, 'a neighbour')")
    await story.holds(1, "small")
    await world.pool.execute("UPDATE grown SET body = $1 WHERE id = 1", "much larger " * LIMIT)
    (letter,) = await story.dead(1)
    assert letter["reason"] == "too_large"
    await story.forgets(1)
    await story.holds(2, "a neighbour")
    await world.sql("UPDATE grown SET body = 'small again' WHERE id = 1")
    await story.holds(1, "small again")
    (letter,) = await story.dead(1)
    assert letter["resolved"]


async def test_a_dead_letter_is_replayed_once_its_document_was_mended(world: World) -> None:
    await world.sql("CREATE TABLE mended (id bigint PRIMARY KEY, body text)")
    story = await world.attach("mended", "body")
    await world.pool.execute("INSERT INTO mended VALUES (1, $1), (2, $1)", "too much " * LIMIT)
    first, _ = await story.dead(2)
    await world.sql(
        "ALTER TABLE mended DISABLE TRIGGER USER",
        "UPDATE mended SET body = 'just right'",
        "ALTER TABLE mended ENABLE TRIGGER USER",
    )
    assert await world.pool.fetchval("SELECT sidecar.replay($1, $2)", story.name, [first["id"]]) == 1
    await story.holds(first["document_id"], "just right")
    (left,) = await story.dead(1)
    assert left["document_id"] != first["document_id"]
    assert await story.rows(left["document_id"]) == []
    assert await world.pool.fetchval("SELECT sidecar.replay($1)", story.name) == 1
    await story.holds(left["document_id"], "just right")
    await story.dead(0)


async def test_a_document_that_cannot_be_stored_fails_alone_and_is_replayed_with_a_clean_count(world: World) -> None:
    await world.sql("CREATE TABLE picky (id bigint PRIMARY KEY, body text)")
    story = await world.attach("picky", "body")
    await world.sql(f"ALTER TABLE {story.embeddings} ADD CONSTRAINT no_nonsense CHECK (source_text <> 'nonsense')")
    await world.sql(
        "INSERT INTO picky SELECT i, CASE i WHEN 5 THEN 'nonsense' ELSE 'sense ' || i END "
        "FROM generate_series(1, 9) AS i"
    )
    for key in (1, 2, 3, 4, 6, 7, 8, 9):
        await story.holds(key, f"sense {key}")
    (letter,) = await story.dead(1)
    assert (letter["document_id"], letter["reason"], letter["attempts"]) == ("5", "check_violation", 2)
    assert "no_nonsense" in letter["detail"]
    assert "nonsense'" not in letter["detail"], "the detail names the constraint, never the text"
    assert json.loads(letter["message"])["document_id"] == "5"
    await world.sql(f"ALTER TABLE {story.embeddings} DROP CONSTRAINT no_nonsense")
    await world.pool.execute("SELECT sidecar.set_enabled('picky', false)")
    await world.daemon.wait_for(lambda: any(stopped(event) for event in world.daemon.events), what="the pause")
    await world.pool.execute("SELECT sidecar.replay($1)", story.name)
    replayed = await world.pool.fetchrow("SELECT read_ct, message FROM pgmq.q_picky")
    assert replayed is not None
    assert (replayed["read_ct"], json.loads(replayed["message"]).keys()) == (0, {"document_id", "action"})
    await world.pool.execute("SELECT sidecar.set_enabled('picky', true)")
    await story.holds(5, "nonsense")
    await story.dead(0)


def stopped(event: dict[str, Any]) -> bool:
    return (event.get("event"), event.get("pipeline")) == ("pipeline_stopped", "picky")
