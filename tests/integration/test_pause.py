"""Pausing and resuming two replicas at work: by the database's clock, with and without a word from NOTIFY."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest

from tests.command_line import sidecar
from tests.daemon import Daemon
from tests.rig import attach
from tests.waiting import eventually

if TYPE_CHECKING:
    from pathlib import Path

    import asyncpg

pytestmark = pytest.mark.long

DOCUMENTS = 500
SOME = 100
BUSY = {"THREADS": "1", "BATCH_WINDOWS": "1", "BATCH_TOKENS": "32", "LEASE_MESSAGES": "8"}
REPLICA = "tests.torture.replica"
SLOW = {"TORTURE_STEADY": "1", "TORTURE_SLOWEST": "0.02"}
"""Fifty documents a second and replica, leased in small portions and not far ahead: leases come all the time."""
RECORD_LEASES = """
CREATE TABLE leases (began timestamptz NOT NULL DEFAULT now(), at timestamptz NOT NULL DEFAULT clock_timestamp());
CREATE FUNCTION record_lease() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS
    $$ BEGIN INSERT INTO public.leases DEFAULT VALUES; RETURN NULL; END $$;
CREATE TRIGGER record_lease AFTER UPDATE ON pgmq.q_docs FOR EACH ROW WHEN (new.read_ct > old.read_ct)
    EXECUTE FUNCTION record_lease();
CREATE TRIGGER record_lease AFTER UPDATE ON pgmq.q_docs_bulk FOR EACH ROW WHEN (new.read_ct > old.read_ct)
    EXECUTE FUNCTION record_lease();
"""


LATE = "SELECT count(*) FROM leases WHERE began > $1 OR at > $1 + interval '1 s'"
"""Leases that began after the pause had returned, and those that ended more than a second later."""


def works(daemon: Daemon) -> bool:
    """Whether a replica has settled documents."""
    return any(event["event"] == "batch_settled" for event in daemon.events)


def stopped(daemon: Daemon) -> bool:
    """Whether a replica stopped working on the pipeline, and said why."""
    return [event["reason"] for event in daemon.events if event["event"] == "pipeline_stopped"] == ["paused"]


async def shows_pause(daemon: Daemon) -> bool:
    """Whether the metrics say that the pipeline is paused."""
    return 'sidecar_pipeline_paused{pipeline="docs"} 1.0' in (await daemon.get("/metrics")).text.splitlines()


async def shows_work(daemon: Daemon) -> bool:
    """Whether the metrics say that the pipeline is not paused."""
    return 'sidecar_pipeline_paused{pipeline="docs"} 0.0' in (await daemon.get("/metrics")).text.splitlines()


async def all_true(connection: asyncpg.Connection) -> bool:
    """Whether every document has a vector of its current text."""
    wanting = await connection.fetchval(
        "SELECT count(*) FROM docs LEFT JOIN docs_embeddings AS e USING (id) "
        "WHERE e.source_text_hash IS DISTINCT FROM md5(body)"
    )
    return bool(wanting == 0)


async def pending(connection: asyncpg.Connection, *, in_flight: bool = False) -> int:
    """Messages in both lanes, or those under a lease."""
    rows = await connection.fetch("SELECT depth, in_flight FROM sidecar.queue_depths() WHERE lane <> 'dead'")
    return sum(row["in_flight" if in_flight else "depth"] for row in rows)


async def prepare(connection: asyncpg.Connection) -> None:
    await attach(connection, model="tiny", model_id=None)
    await connection.execute(RECORD_LEASES)


async def write(connection: asyncpg.Connection) -> None:
    """Work for five seconds of both replicas."""
    await connection.execute(
        "INSERT INTO docs SELECT n, 'text number ' || n FROM generate_series(1, $1) AS n", DOCUMENTS
    )


@pytest.mark.parametrize("pooler", ["session", "transaction"])
async def test_a_pause_stops_the_leasing_of_two_busy_replicas(
    connection: asyncpg.Connection, runtime_url: str, tiny_models: Path, pooler: str
) -> None:
    await prepare(connection)
    one, two = (
        Daemon(runtime_url, tiny_models, {**BUSY, "POOLER": pooler}, module=REPLICA, variables=SLOW) for _ in range(2)
    )
    async with one, two:
        await write(connection)
        for daemon in (one, two):
            await daemon.wait_for(partial(works, daemon), what="work")
        assert await connection.fetchval("SELECT sidecar.set_enabled('docs', false)"), "what the command calls"
        at = await connection.fetchval("SELECT clock_timestamp()")
        for daemon in (one, two):
            await daemon.wait_for(partial(stopped, daemon), what="pipeline_stopped")
            await daemon.wait_for(partial(shows_pause, daemon), what="sidecar_pipeline_paused")
            assert await daemon.is_ready(), "a pause on purpose is no fault"
        assert await pending(connection) > 0, "the pause came too late"
        assert await pending(connection, in_flight=True) == 0, (
            "what was held is given back, not kept until its lease ends"
        )
        assert await connection.fetchval(LATE, at) == 0

        held = await connection.fetchval("SELECT count(*) FROM docs_embeddings")
        assert await one.terminate() == 0
        await one.start()
        await one.wait_for(partial(shows_pause, one), what="sidecar_pipeline_paused after a restart")
        await connection.execute("UPDATE docs SET body = 'edited ' || id")
        assert await one.is_ready()
        assert await connection.fetchval(LATE, at) == 0
        assert stopped(two), "once: nobody is hired to be refused"
        assert await connection.fetchval("SELECT count(*) FROM docs_embeddings") == held

        await connection.execute("DELETE FROM docs WHERE id > $1", SOME)  # enough for what follows
        resumed = await sidecar("resume", "docs", "--json", database_url=runtime_url)
        assert resumed.json == {"pipeline": "docs", "enabled": True, "changed": True}
        await eventually(lambda: all_true(connection), 180, what="every document to be embedded after the resume")
        assert await connection.fetchval("SELECT count(*) FROM docs_embeddings") == SOME
        for daemon in (one, two):
            await daemon.wait_for(partial(shows_work, daemon), what="sidecar_pipeline_paused to be 0 again")
    assert await connection.fetchval("SELECT count(*) FROM sidecar.list_dead_letters('docs')") == 0
