"""The daemon behind PgBouncer in transaction mode: it keeps no state in the session."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.daemon import Daemon
from tests.system.pgbouncer import pgbouncer
from tests.waiting import eventually

if TYPE_CHECKING:
    from pathlib import Path

    import asyncpg

    from sidecar_daemon.adapters.postgres.embedded import EmbeddedServer


@pytest.mark.parametrize("listens", [False, True])
async def test_two_replicas_embed_and_heal_through_it(
    cluster: EmbeddedServer, connection: asyncpg.Connection, runtime_url: str, tiny_models: Path, *, listens: bool
) -> None:
    await connection.execute("CREATE TABLE notes (id bigint PRIMARY KEY, body text)")
    await connection.execute("INSERT INTO notes SELECT n, 'note number ' || n FROM generate_series(1, 200) AS n")
    await connection.execute("SELECT sidecar.attach('notes', '{body}', p_model => 'tiny', p_dimensions => 32)")
    settings = {"POOLER": "transaction", "POLL_MAX": "0.2", "THREADS": "1"}
    if listens:
        settings["LISTEN_URL"] = runtime_url
    with pgbouncer(cluster.dsn()) as through:
        url = through(runtime_url)
        async with Daemon(url, tiny_models, settings), Daemon(url, tiny_models, settings):

            async def settled(text: str) -> bool:
                good = await connection.fetchval(
                    "SELECT count(*) FROM notes AS n JOIN notes_embeddings AS e USING (id) "
                    "WHERE e.source_text_hash = md5(n.body) AND n.body LIKE $1 || '%'",
                    text,
                )
                return bool(good == 200)

            await eventually(lambda: settled("note"), 30)
            await connection.execute("UPDATE notes SET body = 'edited ' || id")
            await eventually(lambda: settled("edited"), 30)
    depths = await connection.fetch("SELECT lane, depth FROM sidecar.queue_depths()")
    assert {row["lane"]: row["depth"] for row in depths} == {"live": 0, "bulk": 0, "dead": 0}
