"""What once went wrong: each test was red before the guard that it names."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

import asyncpg
import pytest

from sidecar_daemon.adapters.postgres.operations import PostgresOperations
from sidecar_daemon.adapters.postgres.pool import Database, Limits
from sidecar_daemon.adapters.postgres.queue import PostgresQueue
from sidecar_daemon.domain.errors import Poison, Refused, Transient
from sidecar_daemon.domain.messages import DocumentKey, Lane, PipelineName
from sidecar_daemon.domain.outcomes import Outcome
from sidecar_daemon.domain.pulse import Pulse
from sidecar_daemon.sweeper import Sweeper, SweepLimits
from tests.faulty import FaultyEmbedder, FaultyQueue
from tests.integration.attaching import attach, refusal
from tests.rig import MAX_BYTES, MODEL, NAME, PLAIN, Rig, Told, blocked, build_worker, running, second_session, table
from tests.waiting import eventually


@pytest.mark.parametrize("pooler_mode", [False, True])
async def test_a_stricter_default_isolation_of_the_database_keeps_nothing_stale(rig: Rig, pooler_mode: bool) -> None:
    """With one snapshot for all of settle, its hash check would see the text from before the wait for the lock."""
    name = rig.url.split("/")[3].partition("?")[0]
    await rig.connection.execute(f"ALTER DATABASE {name} SET default_transaction_isolation = 'repeatable read'")
    replica = await Database.open(rig.url, pooler_mode=pooler_mode)
    try:
        queue = PostgresQueue(replica, NAME, MODEL, max_document_bytes=MAX_BYTES)
        await rig.write(k1="v1")
        old = await rig.lease_one()
        async with second_session(rig.url) as other:
            transaction = other.transaction(isolation="read_committed")
            await transaction.start()
            await other.execute("SELECT sidecar._lock_documents('docs', ARRAY['1'])")
            late = asyncio.create_task(queue.settle([rig.settlement(1, "v1", old)]))
            await eventually(lambda: blocked(rig.connection, "sidecar.settle"), what="settle to wait")
            await rig.write(k1="")
            await transaction.commit()
            (settled,) = await late
    finally:
        await replica.close()
    assert settled.outcome is Outcome.SUPERSEDED
    assert await rig.embedded() == {}


@pytest.mark.parametrize(("what", "drop"), [("source", "docs CASCADE"), ("table of vectors", "docs_embeddings")])
async def test_a_dropped_table_is_an_outage_of_its_pipeline_not_a_crash(rig: Rig, what: str, drop: str) -> None:
    """Its name in a statement would be a bare number: a syntax error, which ends the process and all pipelines."""
    await rig.write(k1="one")
    held = await rig.lease_one()
    await rig.connection.execute(f"DROP TABLE {drop}")
    hasty = await Database.open(rig.url, limits=Limits(retry=0.0))
    try:
        queue = PostgresQueue(hasty, NAME, MODEL, max_document_bytes=MAX_BYTES)
        operations = PostgresOperations(hasty)
        for call in (
            queue.lease(Lane.LIVE, seconds=60, limit=1),
            queue.read([held.key or DocumentKey("")]),
            queue.settle([rig.settlement(1, "one", held)]),
            queue.dead_letter([held], reason="planted", detail="", content_hash=None),
            queue.sweep(rows=10, interval=0),
            operations.status(),
            operations.dead_letters(NAME),
            operations.search(NAME, rig.settlement(1, "one").chunks[0].vector, 1),
        ):
            with pytest.raises(Transient, match=f"^the {what} of pipeline docs was dropped: detach the pipeline$"):
                await call
        assert await queue.release([held]) == 1
        await operations.detach(NAME, keep_embeddings=False)
    finally:
        await hasty.close()
    assert await rig.catalog.pipelines() == []


async def test_a_pipeline_that_is_detached_under_a_waiting_settlement_is_no_crash(rig: Rig) -> None:
    """It looked while all was there, waited for detach, and then named a table by what is left of it: a number."""
    await rig.write(k1="one")
    held = await rig.lease_one()
    settle = await rig.connection.fetchval(
        "SELECT oid::regprocedure::text FROM pg_proc WHERE oid::regproc::text = 'sidecar.settle'"
    )
    await rig.connection.execute(f"ALTER FUNCTION {settle} SET lock_timeout = '30s'")
    hasty = await Database.open(rig.url, limits=Limits(retry=0.0))
    try:
        queue = PostgresQueue(hasty, NAME, MODEL, max_document_bytes=MAX_BYTES)
        async with second_session(rig.url) as operator, operator.transaction():
            await operator.execute("SELECT sidecar.detach('docs')")
            late = asyncio.create_task(queue.settle([rig.settlement(1, "one", held)]))
            await eventually(lambda: blocked(rig.connection, "sidecar.settle"), what="settle to wait")
        with pytest.raises(Transient, match=r"^a table of pipeline docs was dropped meanwhile$"):
            await late
    finally:
        await hasty.close()


async def test_a_document_that_fails_after_its_lease_was_lost_is_left_to_its_new_owner(rig: Rig) -> None:
    """It has no messages any more, hence no attempt to count: that ended the process."""
    embedder, told = FaultyEmbedder(PLAIN), Told()
    embedder.poison("bad")
    embedder.gate.clear()
    await rig.write(k1="bad")
    with ThreadPoolExecutor(2) as executor:
        worker = build_worker(await rig.pipeline(), rig.queue, embedder, told, executor, lease_seconds=1.5)
        try:
            async with running(worker):
                await asyncio.to_thread(embedder.entered.acquire, timeout=30)
                await rig.connection.execute(f"UPDATE {table(Lane.LIVE)} SET read_ct = read_ct + 1")
                await eventually(lambda: told.events("leases_lost"), what="the lease to be lost")
                embedder.gate.set()
                await rig.write(k2="good")
                await eventually(rig.embedded, what="the worker to go on")
        finally:
            embedder.gate.set()
    (left,) = await rig.messages()
    assert (left["read_ct"], left["message"].get("sidecar")) == (2, None)
    assert await rig.dead() == []


async def test_one_suspect_at_a_time_is_under_way(rig: Rig) -> None:
    """Two at once, in the same order after every crash: the neighbour of the culprit was dead-lettered with it."""
    embedder, told = FaultyEmbedder(PLAIN), Told()
    await rig.write(k1="innocent", k2="culprit " + "long " * 200, k3="another")
    await rig.lease()
    await rig.expire()
    queue = FaultyQueue(rig.queue)
    with ThreadPoolExecutor(2) as executor:
        worker = build_worker(await rig.pipeline(), queue, embedder, told, executor)
        async with running(worker):
            await eventually(lambda: told.documents("embedded") == 3, what="all suspects to be settled")
    assert [name for name, _ in queue.calls if name in {"begin", "settle"}] == ["begin", "settle"] * 3
    await rig.assert_true()


async def test_two_texts_of_one_key_are_settled_together(rig: Rig) -> None:
    """1.0 and 1.00 are one row: written twice in one statement they ended the process."""
    await rig.connection.execute("CREATE TABLE sums (id numeric PRIMARY KEY, body text)")
    await rig.connection.execute(
        "SELECT sidecar.attach('sums', ARRAY['body'], p_model => 'deterministic', p_model_id => $1, "
        "p_dimensions => 16, p_index => false)",
        MODEL,
    )
    queue = PostgresQueue(rig.database, PipelineName("sums"), MODEL, max_document_bytes=MAX_BYTES)
    await rig.connection.execute("INSERT INTO sums VALUES (1.0, 'one')")
    await rig.connection.execute("UPDATE sums SET id = 1.00")
    held = await queue.lease(Lane.LIVE, seconds=60, limit=10)
    assert [lease.key for lease in held] == ["1.0", "1.00"]
    settled = await queue.settle([rig.settlement(lease.key or "", "one", lease) for lease in held])
    assert [(s.outcome, s.acknowledged) for s in settled] == [(Outcome.EMBEDDED, 1)] * 2
    assert await rig.connection.fetchval("SELECT count(*) FROM sums_embeddings") == 1


async def test_a_model_that_is_switched_while_settle_waits_is_not_overwritten(rig: Rig) -> None:
    await rig.write(k1="one")
    held = await rig.lease_one()
    async with second_session(rig.url) as other:
        transaction = other.transaction()
        await transaction.start()
        await other.execute("SELECT sidecar._lock_documents('docs', ARRAY['1'])")
        late = asyncio.create_task(rig.settle(rig.settlement(1, "one", held)))
        await eventually(lambda: blocked(rig.connection, "sidecar.settle"), what="settle to wait")
        await rig.connection.execute("UPDATE sidecar.pipelines SET model_id = 'deterministic@newer'")
        await transaction.commit()
        with pytest.raises(Refused):
            await late
    assert await rig.embedded() == {}


async def test_a_renamed_column_hurts_no_writer(rig: Rig) -> None:
    """The trigger names the columns: its error would be the writer's. A sweep finds what was written meanwhile."""
    await rig.write(k1="one")
    await rig.drain_queue()
    await rig.connection.execute("ALTER TABLE docs RENAME body TO content")
    await rig.connection.execute("UPDATE docs SET content = 'two'")
    await rig.connection.execute("ALTER TABLE docs RENAME id TO number")
    await rig.connection.execute("INSERT INTO docs VALUES (2, 'three')")
    await rig.connection.execute("ALTER TABLE docs RENAME number TO id")
    await rig.connection.execute(
        "SELECT sidecar.attach('docs', ARRAY['content'], p_model => 'deterministic', p_model_id => $1, "
        "p_dimensions => 16)",
        MODEL,
    )
    await rig.queue.sweep(rows=100, interval=0)
    assert {lease.key for lease in await rig.lease(Lane.BULK)} == {"1", "2"}


async def test_a_key_whose_only_index_orders_otherwise_is_refused(connection: asyncpg.Connection) -> None:
    """The walk orders by the type's own operator and went on by the index's: it skipped rows, or never ended."""
    await connection.execute("CREATE TABLE notes (id int NOT NULL, body text)")
    await connection.execute(
        "CREATE OPERATOR CLASS backwards FOR TYPE int USING btree AS OPERATOR 1 >, OPERATOR 2 >=, OPERATOR 3 =, "
        "OPERATOR 4 <=, OPERATOR 5 <, FUNCTION 1 btint4cmp(int, int)"
    )
    await connection.execute("CREATE UNIQUE INDEX ON notes (id backwards)")
    assert "column id of table public.notes is no key" in await refusal(connection, key="id")


async def test_virtual_content_is_refused(connection: asyncpg.Connection) -> None:
    """Triggers see null in it: an edit would wait for the sweep."""
    await connection.execute(
        "CREATE TABLE notes (id int PRIMARY KEY, raw text, body text GENERATED ALWAYS AS (upper(raw)) VIRTUAL)"
    )
    assert "column body of table public.notes is a virtual generated column" in await refusal(connection)


async def test_a_row_that_cannot_be_rendered_stops_a_walk_not_the_process(rig: Rig) -> None:
    told, queue = Told(), FaultyQueue(rig.queue)
    queue.fail("sweep", Poison("division_by_zero", "planted"))
    sweeper = Sweeper(
        NAME,
        queue=queue,
        limits=SweepLimits(interval=0.1, rows=100, duty=1.0),
        telemetry=told.telemetry,
        patience=told.patience(),
        uniform=max,
        pulse=Pulse(time.monotonic),
    )
    running_on = asyncio.create_task(sweeper.run())
    await eventually(lambda: queue.count("sweep") > 1 or running_on.done(), what="the next walk")
    assert not running_on.done()
    running_on.cancel()
    await asyncio.gather(running_on, return_exceptions=True)
    assert [line["code"] for line in told.events("fault")] == ["division_by_zero"]


async def test_an_owner_of_an_attached_table_cannot_run_code_as_ours(connection: asyncpg.Connection) -> None:
    """Neither by a trigger on the table of vectors, nor by a cast of a content type: both would run as our owner."""
    role = "mallory"
    await connection.execute(f"DROP ROLE IF EXISTS {role}")
    await connection.execute(f"CREATE ROLE {role}")
    try:
        await connection.execute(
            f"CREATE SCHEMA theirs AUTHORIZATION {role}; SET ROLE {role}; SET search_path = theirs"
        )
        await connection.execute("CREATE TYPE mood AS (word text)")
        await connection.execute(
            """CREATE FUNCTION spy(mood) RETURNS text LANGUAGE sql AS $$ SELECT current_user::text $$"""
        )
        await connection.execute("CREATE CAST (mood AS text) WITH FUNCTION spy(mood)")
        await connection.execute("CREATE TABLE notes (id bigint PRIMARY KEY, body mood)")
        await connection.execute("INSERT INTO notes VALUES (1, ROW('glad')::mood)")
        await connection.execute("RESET ROLE; RESET search_path")
        await attach(connection, "theirs.notes", model_id="m@1")
        await connection.execute(f"SET ROLE {role}")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute(
                "CREATE TRIGGER t BEFORE INSERT ON theirs.notes_embeddings "
                "FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()"
            )
        await connection.execute("RESET ROLE")
        text = await connection.fetchval(
            "SELECT content FROM sidecar.read_documents('notes', 'm@1', '{1}', 1000, 1000)"
        )
        assert text == "(glad)"
    finally:
        await connection.execute("RESET ROLE")
        await connection.execute("DROP SCHEMA theirs CASCADE; DROP OWNED BY mallory; DROP ROLE mallory")


async def test_tables_that_others_inherit_from_are_refused(connection: asyncpg.Connection) -> None:
    await connection.execute("CREATE TABLE notes (id bigint PRIMARY KEY, body text)")
    await connection.execute("CREATE TABLE more (extra text) INHERITS (notes)")
    assert await refusal(connection) == (
        "table public.notes has tables that inherit from it, whose rows no foreign key can name; attach each of them"
    )


async def test_a_renamed_key_is_told_at_the_next_attach(connection: asyncpg.Connection) -> None:
    await connection.execute("CREATE TABLE notes (id bigint PRIMARY KEY, body text)")
    await attach(connection)
    await connection.execute("ALTER TABLE notes RENAME id TO number")
    assert await refusal(connection) == (
        "key column id of pipeline notes is gone from table public.notes; detach the pipeline and attach it again"
    )


async def test_a_dead_letter_that_the_users_own_rules_forbid_is_deferred(rig: Rig) -> None:
    """It must not end the process."""
    told, queue, embedder = Told(), FaultyQueue(rig.queue), FaultyEmbedder(PLAIN)
    embedder.poison("poison", Poison("bad_vector", "NaN"))
    queue.fail("dead_letter", Poison("restrict_violation", "planted"))
    await rig.write(k1="poison", k2="good")
    with ThreadPoolExecutor(2) as executor:
        async with running(build_worker(await rig.pipeline(), queue, embedder, told, executor)):
            await eventually(lambda: told.documents("dead_lettered") == 1, what="the dead letter, the second time")
            await eventually(lambda: told.documents("embedded") == 1, what="the vector of its mate")
    assert [line["reason"] for line in told.events("deferred")] == ["restrict_violation"]
