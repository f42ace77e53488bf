"""Attach, detach, pause, resume and switches of the model, all under a running daemon."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from sidecar_daemon.domain.messages import LongDocuments

if TYPE_CHECKING:
    from tests.integration.stories.story import Story, World

pytestmark = pytest.mark.asyncio(loop_scope="package")


def told(world: World, event: str, name: str) -> list[dict[str, Any]]:
    """The daemon's log lines of an event of one pipeline."""
    return [line for line in world.daemon.events if line.get("event") == event and line.get("pipeline") == name]


async def count(story: Story) -> int:
    return int(await story.world.pool.fetchval(f"SELECT count(*) FROM {story.embeddings}"))


async def test_a_thousand_rows_that_were_there_before_are_backfilled(world: World) -> None:
    await world.sql(
        "CREATE TABLE old_rows (id bigint PRIMARY KEY, body text)",
        "INSERT INTO old_rows SELECT i, 'row ' || i FROM generate_series(1, 1000) AS i",
    )
    pid = world.daemon.pid
    story = await world.attach("old_rows", "body")
    assert await count(story) == 1000
    for key in (1, 500, 1000):
        await story.holds(key, f"row {key}")
    assert await story.outcomes("embedded") == 1000
    assert await story.metric("sidecar_leased_messages_total", lane="live") == 0
    assert world.daemon.pid == pid
    status = (await world.daemon.get("/status")).json()
    (mine,) = [pipeline for pipeline in status["pipelines"] if pipeline["name"] == "old_rows"]
    assert (mine["documents"], mine["embedded"], mine["missing"], mine["coverage"]) == (1000, 1000, 0, 1.0)


async def test_a_paused_pipeline_keeps_its_messages_until_it_is_resumed(world: World) -> None:
    await world.sql("CREATE TABLE paused (id bigint PRIMARY KEY, body text)")
    story = await world.attach("paused", "body")
    await world.pool.execute("SELECT sidecar.set_enabled('paused', false)")
    await world.daemon.wait_for(lambda: told(world, "pipeline_stopped", "paused"), what="the pause")
    await world.sql("INSERT INTO paused VALUES (1, 'waiting')", "UPDATE paused SET body = 'still waiting'")
    assert await story.depth() == 2
    assert await world.pool.fetchval("SELECT max(read_ct) FROM pgmq.q_paused") == 0
    assert await world.daemon.is_ready(), "a pause is no fault"
    await world.pool.execute("SELECT sidecar.set_enabled('paused', true)")
    await story.holds(1, "still waiting")
    await story.quiet()
    assert await story.embeds() == 1
    assert told(world, "pipeline_stopped", "paused")[0]["reason"] == "paused"


async def test_a_table_is_detached_while_its_documents_are_in_flight_and_attached_again(world: World) -> None:
    await world.sql("CREATE TABLE detached (id bigint PRIMARY KEY, body text)")
    story = await world.attach("detached", "body")
    async with world.pool.acquire() as operator:
        await world.sql("INSERT INTO detached SELECT i, 'row ' || i FROM generate_series(1, 400) AS i")
        await operator.execute("SELECT sidecar.detach('detached')")
    await world.daemon.wait_for(lambda: told(world, "pipeline_stopped", "detached"), what="the detachment")
    assert await world.pool.fetchval("SELECT to_regclass($1)", story.embeddings) is None
    assert await world.pool.fetchval("SELECT count(*) FROM pg_class WHERE relname LIKE 'q\\_detached%'") == 0
    await world.sql("INSERT INTO detached VALUES (401, 'row 401')")  # no trigger is left to fail
    await world.daemon.wait_for(world.daemon.is_ready, what="readiness after the detachment")
    again = await world.attach("detached", "body")
    assert await count(again) == 401
    await world.sql("UPDATE detached SET body = 'new' WHERE id = 7")
    await again.holds(7, "new")


async def test_a_switch_of_the_policy_embeds_everything_anew(world: World) -> None:
    await world.sql("CREATE TABLE switched (id bigint PRIMARY KEY, body text)")
    text = "words and more words to fill the window " * 12
    await world.pool.execute("INSERT INTO switched SELECT i, $1 || i FROM generate_series(1, 40) AS i", text)
    before = await world.attach("switched", "body")
    await before.holds(1, f"{text}1")
    after = await world.declare("switched", "body", long_documents="truncate")
    for key in (1, 20, 40):
        await after.holds(key, f"{text}{key}")
    await after.quiet()
    models = await world.pool.fetch(f"SELECT DISTINCT model FROM {after.embeddings}")
    assert [row["model"] for row in models] == [world.embedder.model_id(LongDocuments.TRUNCATE)]
    assert await world.pool.fetchval("SELECT model_id FROM sidecar.pipelines WHERE name = 'switched'") == models[0][0]
    await after.dead(0)


async def test_a_change_of_the_content_columns_embeds_everything_anew(world: World) -> None:
    await world.sql(
        "CREATE TABLE widened (id bigint PRIMARY KEY, title text, body text)",
        "INSERT INTO widened VALUES (1, 'a title', 'a body')",
    )
    story = await world.attach("widened", "body")
    await story.holds(1, "a body")
    await world.declare("widened", "title", "body")
    await story.holds(1, "a title\n\na body")
    await world.sql("UPDATE widened SET title = 'another title'")
    await story.holds(1, "another title\n\na body")
    await story.dead(0)


async def test_a_pipeline_whose_model_nobody_has_is_refused_and_the_others_go_on(world: World) -> None:
    await world.sql(
        "CREATE TABLE unserved (id bigint PRIMARY KEY, body text)",
        "CREATE TABLE served (id bigint PRIMARY KEY, body text)",
    )
    served = await world.attach("served", "body")
    await world.declare("unserved", "body", model="no-such-model")
    await world.daemon.wait_for(lambda: told(world, "pipeline_refused", "unserved"), what="the refusal")
    assert not await world.daemon.is_ready()
    assert "no-such-model" in (await world.daemon.get("/readyz")).text
    await world.sql("INSERT INTO served VALUES (1, 'served nevertheless')")
    await served.holds(1, "served nevertheless")
    mended = await world.declare("unserved", "body")
    await world.daemon.wait_for(world.daemon.is_ready, what="readiness after the mending")
    await world.sql("INSERT INTO unserved VALUES (1, 'served at last')")
    await mended.holds(1, "served at last")
