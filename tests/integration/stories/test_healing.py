"""What no trigger told anybody: the sweep finds it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from tests.conftest import RUNTIME_ROLE, admin
from tests.daemon import Daemon
from tests.integration.stories.conftest import SETTINGS, opened

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from sidecar_daemon.adapters.onnx.session import OnnxEmbedder
    from sidecar_daemon.adapters.postgres.embedded import EmbeddedServer
    from tests.integration.stories.story import World

pytestmark = pytest.mark.asyncio(loop_scope="package")

DATABASE = "healing"


@pytest_asyncio.fixture(scope="module", loop_scope="package")
async def sweeping(
    cluster: EmbeddedServer, template: str, tiny_models: Path, embedder: OnnxEmbedder
) -> AsyncIterator[World]:
    """A daemon that walks every half second, on a database of its own, so that the others are not swept."""
    admin(cluster.dsn(), f"CREATE DATABASE {DATABASE} TEMPLATE {template}")
    daemon = Daemon(cluster.dsn(DATABASE, RUNTIME_ROLE), tiny_models, {**SETTINGS, "SWEEP_INTERVAL": "0.5"})
    async with opened(cluster.dsn(DATABASE), daemon, embedder) as running:
        yield running
    admin(cluster.dsn(), f"DROP DATABASE {DATABASE} WITH (FORCE)")


async def test_an_edit_that_no_trigger_saw_is_healed(sweeping: World) -> None:
    world = sweeping
    await world.sql("CREATE TABLE unseen (id bigint PRIMARY KEY, body text)")
    story = await world.attach("unseen", "body")
    await world.sql("INSERT INTO unseen VALUES (1, 'edited'), (2, 'blanked'), (3, 'left alone')")
    for key, text in ((1, "edited"), (2, "blanked"), (3, "left alone")):
        await story.holds(key, text)
    await story.quiet()
    async with world.pool.acquire() as writer, writer.transaction():
        await writer.execute("SET LOCAL session_replication_role = 'replica'")
        await writer.execute("UPDATE unseen SET body = 'edited behind our back' WHERE id = 1")
        await writer.execute("UPDATE unseen SET body = ' ' WHERE id = 2")
        await writer.execute("INSERT INTO unseen VALUES (4, 'inserted behind our back')")
    await story.holds(1, "edited behind our back")
    await story.forgets(2)
    await story.holds(4, "inserted behind our back")
    await story.holds(3, "left alone")
    assert await story.metric("sidecar_sweep_found_total", kind="outdated") == 1
    assert await story.metric("sidecar_sweep_found_total", kind="surplus") == 1
    assert await story.embeds() == 5, "what is fine is not embedded again"
    await story.dead(0)


async def test_vectors_that_were_lost_or_spoiled_are_made_again(sweeping: World) -> None:
    world = sweeping
    await world.sql("CREATE TABLE lost (id bigint PRIMARY KEY, body text)")
    story = await world.attach("lost", "body")
    await world.sql("INSERT INTO lost SELECT i, 'row ' || i FROM generate_series(1, 30) AS i")
    await story.quiet()
    await world.sql(
        f"DELETE FROM {story.embeddings} WHERE id <= 10",
        f"UPDATE {story.embeddings} SET model = 'another@0' WHERE id BETWEEN 11 AND 20",
    )
    for key in range(1, 31):
        await story.holds(key, f"row {key}")
    await story.dead(0)


async def test_the_sweep_leaves_a_dead_letter_alone_until_its_document_changes(sweeping: World) -> None:
    world = sweeping
    await world.sql("CREATE TABLE hopeless (id bigint PRIMARY KEY, body text)")
    story = await world.attach("hopeless", "body")
    await world.pool.execute("INSERT INTO hopeless VALUES (1, $1)", "too much " * int(SETTINGS["MAX_DOCUMENT_BYTES"]))
    (letter,) = await story.dead(1)
    walk = "SELECT started_at FROM sidecar.sweeps WHERE pipeline = 'hopeless' AND finished_at IS NOT NULL"
    for _ in range(2):  # two whole walks from now on
        before = await world.pool.fetchval("SELECT clock_timestamp()")
        await world.daemon.wait_for(partial(_after, world, walk, before), what="another walk")
    assert [each["id"] for each in await story.dead(1)] == [letter["id"]]
    assert await story.metric("sidecar_dead_lettered_total") == 1
    assert await story.metric("sidecar_sweep_enqueued_total") == 0
    async with world.pool.acquire() as writer, writer.transaction():
        await writer.execute("SET LOCAL session_replication_role = 'replica'")
        await writer.execute("UPDATE hopeless SET body = 'mended' WHERE id = 1")
    await story.holds(1, "mended")
    (letter,) = await story.dead(1)
    assert letter["resolved"]


async def _after(world: World, query: str, since: object) -> bool:
    found = await world.pool.fetchval(query)
    return found is not None and found > since
