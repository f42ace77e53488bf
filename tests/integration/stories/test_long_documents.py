"""Documents longer than one window of the model, under each policy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from tests.integration.stories.story import World

pytestmark = pytest.mark.asyncio(loop_scope="package")

LONG = "\n\n".join(f"Paragraph {n} tells of {n * 7} ships and of the wind that day." for n in range(160))


async def test_the_last_paragraph_of_a_long_document_counts(world: World) -> None:
    last = LONG + "\n\nAll of them came home."
    assert sum(window.content_tokens for window in world.embedder.tokenize(LONG)) >= 3000
    await world.sql("CREATE TABLE sagas (id bigint PRIMARY KEY, body text)")
    story = await world.attach("sagas", "body")
    await world.pool.execute("INSERT INTO sagas VALUES (1, $1), (2, $2)", LONG, last)
    await story.holds(1, LONG)
    await story.holds(2, last)
    one, two = [(await story.rows(key))[0]["embedding"].to_numpy() for key in (1, 2)]
    assert np.abs(one - two).max() > 1e-4
    await world.pool.execute("UPDATE sagas SET body = $1 WHERE id = 1", last)
    await story.holds(1, last)


async def test_a_document_in_chunks_shrinks_and_grows(world: World) -> None:
    await world.sql("CREATE TABLE chunked (id bigint PRIMARY KEY, body text)")
    story = await world.attach("chunked", "body", long_documents="chunks")
    await world.pool.execute("INSERT INTO chunked VALUES (1, $1), (2, 'a short neighbour')", LONG)
    await story.holds(1, LONG)
    assert len(await story.rows(1)) > 40
    shorter = LONG[:1000]
    await world.pool.execute("UPDATE chunked SET body = $1 WHERE id = 1", shorter)
    await story.holds(1, shorter)
    assert 2 <= len(await story.rows(1)) < 10
    await world.pool.execute("UPDATE chunked SET body = 'one chunk' WHERE id = 1")
    await story.holds(1, "one chunk")
    await world.pool.execute("UPDATE chunked SET body = $1 WHERE id = 1", LONG[:2000])
    await story.holds(1, LONG[:2000])
    await story.holds(2, "a short neighbour")
    await world.sql("UPDATE chunked SET body = ' ' WHERE id = 1")
    await story.forgets(1)


async def test_a_truncated_document_is_its_first_window(world: World) -> None:
    await world.sql("CREATE TABLE cut_off (id bigint PRIMARY KEY, body text)")
    story = await world.attach("cut_off", "body", long_documents="truncate")
    await world.pool.execute("INSERT INTO cut_off VALUES (1, $1)", LONG)
    await story.holds(1, LONG)
    assert await story.metric("sidecar_batch_windows_sum") == 1, "what is cut off is never computed"
