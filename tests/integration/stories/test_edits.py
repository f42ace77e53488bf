"""Inserts, edits and deletions, each followed from the writer's commit to the vector."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.integration.stories.story import World

pytestmark = pytest.mark.asyncio(loop_scope="package")


async def test_an_inserted_document_gets_its_vector(world: World) -> None:
    await world.sql("CREATE TABLE inserted (id bigint PRIMARY KEY, body text)")
    story = await world.attach("inserted", "body")
    await world.sql("INSERT INTO inserted VALUES (1, 'the harbour at dawn'), (2, 'a list of tools')")
    await story.holds(1, "the harbour at dawn")
    await story.holds(2, "a list of tools")
    await story.quiet()
    assert await story.outcomes("embedded") == 2
    await story.dead(0)


async def test_an_edited_document_gets_the_vector_of_its_new_text(world: World) -> None:
    await world.sql("CREATE TABLE edited (id bigint PRIMARY KEY, body text, other int)")
    story = await world.attach("edited", "body")
    await world.sql("INSERT INTO edited VALUES (1, 'first text', 0), (2, 'a neighbour', 0)")
    await story.holds(1, "first text")
    await world.sql("UPDATE edited SET body = 'second text' WHERE id = 1")
    await story.holds(1, "second text")
    await story.holds(2, "a neighbour")
    await story.quiet()
    await world.sql("UPDATE edited SET other = 7, body = body")
    await story.quiet()
    assert await story.metric("sidecar_leased_messages_total") == 3, "the same rendered content sends nothing"


async def test_a_document_edited_to_blank_loses_its_vector(world: World) -> None:
    await world.sql("CREATE TABLE blanked (id bigint PRIMARY KEY, body text)")
    story = await world.attach("blanked", "body")
    await world.sql("INSERT INTO blanked VALUES (1, 'something'), (2, 'something else'), (3, 'third')")
    await story.holds(1, "something")
    await story.holds(2, "something else")
    await story.holds(3, "third")
    await world.sql(
        "UPDATE blanked SET body = '' WHERE id = 1",
        "UPDATE blanked SET body = NULL WHERE id = 2",
        "UPDATE blanked SET body = E' \\n\\t\\u00a0\\u3000' WHERE id = 3",
    )
    for key in (1, 2, 3):
        await story.forgets(key)
    assert await story.outcomes("blank") == 3
    await world.sql("UPDATE blanked SET body = 'back again' WHERE id = 2")
    await story.holds(2, "back again")
    await story.dead(0)


async def test_a_document_deleted_while_its_vector_waits_for_the_lock_leaves_nothing(world: World) -> None:
    await world.sql("CREATE TABLE deleted (id bigint PRIMARY KEY, body text)")
    story = await world.attach("deleted", "body")
    async with story.held("1"):
        await world.sql("INSERT INTO deleted VALUES (1, 'soon gone')")
        await story.settling()
        await world.sql("DELETE FROM deleted WHERE id = 1")
    await story.forgets(1)
    assert await story.outcomes("gone") == 1
    assert await story.outcomes("embedded") == 0
    await story.dead(0)


async def test_a_document_deleted_under_the_write_itself_leaves_nothing(world: World) -> None:
    await world.sql("CREATE TABLE snatched (id bigint PRIMARY KEY, body text)")
    story = await world.attach("snatched", "body")
    async with world.pool.acquire() as writer:
        async with story.held("1"):
            await world.sql("INSERT INTO snatched VALUES (1, 'soon gone')")
            await story.settling()
            deletion = writer.transaction()
            await deletion.start()
            await writer.execute("DELETE FROM snatched WHERE id = 1")
        await story.settling()  # the hash is still there; now the foreign key waits for the deletion
        assert await story.rows(1) == []
        await deletion.commit()
    await story.forgets(1)
    assert await story.outcomes("gone") == 1
    await story.dead(0)


async def test_five_edits_of_one_transaction_are_embedded_once(world: World) -> None:
    await world.sql("CREATE TABLE five (id bigint PRIMARY KEY, body text)")
    story = await world.attach("five", "body")
    await world.sql("INSERT INTO five VALUES (1, 'version 0')")
    await story.holds(1, "version 0")
    leased = await story.metric("sidecar_leased_messages_total")
    async with world.pool.acquire() as writer, writer.transaction():
        for version in range(1, 6):
            await writer.execute("UPDATE five SET body = $1 WHERE id = 1", f"version {version}")
    await story.holds(1, "version 5")
    await story.quiet()
    assert await story.metric("sidecar_leased_messages_total") == leased + 5
    assert await story.embeds() == 2, "one for the insert, one for all five edits"


async def test_five_edits_in_a_row_end_with_the_last_text(world: World) -> None:
    await world.sql("CREATE TABLE hasty (id bigint PRIMARY KEY, body text)")
    story = await world.attach("hasty", "body")
    await world.sql("INSERT INTO hasty VALUES (1, 'version 0')")
    async with story.held("1"):
        await story.settling()
        await world.sql(*[f"UPDATE hasty SET body = 'version {version}' WHERE id = 1" for version in range(1, 6)])
    await story.holds(1, "version 5")
    await story.quiet()
    await story.holds(1, "version 5")
    assert await story.outcomes("superseded") >= 1, "the text that waited for the lock was never written"
    assert await story.outcomes("embedded") < 6
    await story.dead(0)


async def test_rows_that_were_rolled_back_never_reach_the_daemon(world: World) -> None:
    await world.sql("CREATE TABLE regretted (id bigint PRIMARY KEY, body text)")
    story = await world.attach("regretted", "body")
    async with world.pool.acquire() as writer:
        transaction = writer.transaction()
        await transaction.start()
        await writer.execute("INSERT INTO regretted VALUES (1, 'never said')")
        await transaction.rollback()
    await world.sql("INSERT INTO regretted VALUES (2, 'said')")
    await story.holds(2, "said")
    await story.quiet()
    assert await story.metric("sidecar_leased_messages_total") == 1
    assert await story.embeds() == 1


async def test_a_vector_follows_its_document_to_a_new_key(world: World) -> None:
    await world.sql("CREATE TABLE renamed (id text PRIMARY KEY, body text)")
    story = await world.attach("renamed", "body")
    await world.sql("INSERT INTO renamed VALUES ('old', 'the same text')")
    await story.holds("old", "the same text")
    await story.quiet()
    await world.sql("UPDATE renamed SET id = 'new' WHERE id = 'old'")
    await story.holds("new", "the same text")
    await story.forgets("old")
    assert await story.embeds() == 1, "the vector moved with its key, nothing was embedded again"
    assert await story.outcomes("unchanged") == 1


async def test_truncate_takes_the_vectors_along(world: World) -> None:
    await world.sql("CREATE TABLE truncated (id bigint PRIMARY KEY, body text)")
    story = await world.attach("truncated", "body")
    await world.sql("INSERT INTO truncated SELECT i, 'row ' || i FROM generate_series(1, 20) AS i")
    await story.holds(20, "row 20")
    await world.sql("TRUNCATE truncated CASCADE")
    await story.quiet()
    assert await world.pool.fetchval(f"SELECT count(*) FROM {story.embeddings}") == 0
    await world.sql("INSERT INTO truncated VALUES (1, 'a new beginning')")
    await story.holds(1, "a new beginning")
    await story.dead(0)


async def test_a_copy_is_embedded_row_by_row(world: World) -> None:
    await world.sql("CREATE TABLE copied (id bigint PRIMARY KEY, body text)")
    story = await world.attach("copied", "body")
    async with world.pool.acquire() as writer:
        await writer.copy_records_to_table("copied", records=[(n, f"document number {n}") for n in range(300)])
    await story.quiet()
    assert await world.pool.fetchval(f"SELECT count(*) FROM {story.embeddings}") == 300
    for key in (0, 150, 299):
        await story.holds(key, f"document number {key}")
    assert await story.outcomes("embedded") == 300
    assert await story.embeds() == 300


async def test_text_is_not_kept_where_the_pipeline_keeps_none(world: World) -> None:
    await world.sql("CREATE TABLE discreet (id bigint PRIMARY KEY, body text)")
    story = await world.attach("discreet", "body", store_text=False)
    await world.sql("INSERT INTO discreet VALUES (1, 'between us')")
    await story.holds(1, "between us")
    found = await world.pool.fetchrow(
        "SELECT * FROM sidecar.search($1, $2)", story.name, (await story.rows(1))[0]["embedding"]
    )
    assert found is not None
    assert found["source_text"] == "between us", "search shows the document's own text instead"
