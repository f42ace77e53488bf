"""The index on the vectors: put off at attach, built and dropped beside writers, interrupted, lost."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import asyncpg
import numpy as np
import pytest
from pgvector import Vector

from sidecar_daemon.adapters.postgres.indexing import PipelineIndex, index_session
from sidecar_daemon.cli import run_command_line
from sidecar_daemon.domain.errors import Fatal
from sidecar_daemon.domain.indexing import graph_bytes
from tests.command_line import MODELS, Finished, ended, sidecar, start
from tests.conftest import SQL, admin, migrate_at
from tests.daemon import Daemon
from tests.integration.attaching import attach, refusal
from tests.rig import second_session
from tests.terminal import terminal
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine
    from pathlib import Path

    from sidecar_daemon.adapters.postgres.pool import Database

    Shell = Callable[..., Coroutine[Any, Any, Finished]]

DIMENSIONS = 32
ROWS = 300
FILL = """
INSERT INTO notes_embeddings (id, source_text, source_text_hash, embedding, model)
SELECT id, body, md5(body), (SELECT array_agg(sin(id * g)) FROM generate_series(1, 32) AS g)::vector, 'tiny@1'
FROM notes
"""
CREATE = "CREATE INDEX ON notes_embeddings USING hnsw (embedding vector_cosine_ops)"
INTERRUPT = "UPDATE pg_index SET indisvalid = false WHERE indrelid = 'notes_embeddings'::regclass AND NOT indisunique"
MADE = "SELECT count(*) FROM pg_indexes WHERE indexdef LIKE '%hnsw%'"
SEARCH = "SELECT key FROM sidecar.search('notes', $1, 10)"
QUIET = "UPDATE sidecar.sweeps SET started_at = now(), finished_at = now(), backfill = false"
BUILDERS = "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE 'CREATE INDEX CONCURRENTLY%'"

QUEUES_COUNTED = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%queue_depths%' AND pid <> pg_backend_pid()"


@pytest.fixture
async def notes(connection: asyncpg.Connection) -> asyncpg.Connection:
    """Table ``notes`` with a vector beside every row, backfilled, its index put off."""
    await make(connection, ROWS)
    await attach(connection, index=True, defer_index="always")
    await connection.execute(FILL)
    await connection.execute(QUIET)
    return connection


async def make(connection: asyncpg.Connection, rows: int) -> None:
    await connection.execute("CREATE TABLE notes (id int PRIMARY KEY, body text)")
    await connection.execute("INSERT INTO notes SELECT n, 'body ' || n FROM generate_series(1, $1::int) AS n", rows)


@pytest.fixture
def shell(database_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    """Runs a command in this process, which spares each its start."""
    monkeypatch.setenv("SIDECAR_DATABASE_URL", database_url)
    monkeypatch.setenv("SIDECAR_MODELS_DIR", str(MODELS))

    async def run(*arguments: str, **settings: str) -> Finished:
        with monkeypatch.context() as patch:
            for name, value in settings.items():
                patch.setenv(f"SIDECAR_{name}", value)
            code = await asyncio.to_thread(run_command_line, arguments)
        out, err = capsys.readouterr()
        return Finished(code, out, err)

    return run


async def index(connection: asyncpg.Connection) -> asyncpg.Record:
    """The row of ``notes`` in ``sidecar.list_indexes``."""
    row = await connection.fetchrow("SELECT * FROM sidecar.list_indexes() WHERE pipeline = 'notes'")
    assert row is not None
    return row


async def state(connection: asyncpg.Connection) -> str:
    return str((await index(connection))["state"])


async def found(connection: asyncpg.Connection) -> list[list[str]]:
    """What searches in a few directions find, in order."""
    queries = [Vector(np.sin(np.arange(1, DIMENSIONS + 1, dtype=np.float32) * key)) for key in (1.5, 40.2, 77.7)]
    return [[row["key"] for row in await connection.fetch(SEARCH, query)] for query in queries]


@asynccontextmanager
async def open_writer(url: str) -> AsyncIterator[asyncpg.Connection]:
    """A writer whose transaction stays open: a build that makes no writer wait has to wait for it."""
    async with second_session(url) as writer:
        transaction = writer.transaction()
        await transaction.start()
        await writer.execute("UPDATE notes_embeddings SET updated_at = now() WHERE id = 1")
        try:
            yield writer
        finally:
            await transaction.rollback()


# At attach


@pytest.mark.parametrize(
    ("rows", "options", "expected"),
    [
        (10_000, {}, "live"),
        (10_001, {}, "deferred"),
        (10_001, {"defer_index": "never"}, "live"),
        (0, {"defer_index": "always"}, "deferred"),
        (10_001, {"index": False}, "none"),
        (10_001, {"dimensions": 2100}, "none"),
    ],
)
async def test_attach_puts_the_index_off_where_the_source_is_large(
    connection: asyncpg.Connection, rows: int, options: dict[str, Any], expected: str
) -> None:
    await make(connection, rows)
    assert await attach(connection, **{"index": True, **options}) == "created"
    assert await state(connection) == expected
    made = await connection.fetchval(MADE)
    assert made == (expected == "live")


async def test_attach_again_leaves_the_index_as_it_is(notes: asyncpg.Connection) -> None:
    assert await attach(notes, index=True) == "unchanged"
    assert await attach(notes, index=True, model="other") == "changed: model"
    assert await state(notes) == "deferred"
    for wish, command in (("never", "build"), ("always", "defer")):
        line = await refusal(notes, index=True, defer_index=wish)
        assert line.endswith(f"already; change that with: sidecar-daemon index {command} notes")
        await notes.execute(CREATE)
        assert await attach(notes, index=True, model="other") == "unchanged"
        assert await state(notes) == "live"


async def test_a_wish_that_is_none_of_the_three_is_refused(connection: asyncpg.Connection) -> None:
    await make(connection, 0)
    assert await refusal(connection, defer_index="maybe") == "defer_index is 'maybe'; allowed are auto, always, never"


async def test_the_command_says_that_the_index_is_put_off_and_how_that_ends(
    shell: Shell, connection: asyncpg.Connection
) -> None:
    await make(connection, 0)
    command = ("attach", "notes", "body", "--model", "tiny", "--defer-index", "always")
    made = await shell(*command)
    assert (
        "notes: the index is deferred; searches are exact and slow until: sidecar-daemon index build notes" in made.out
    )
    assert (await shell("attach", "notes", "body", "--model", "tiny", "--json")).json["index"] == "deferred"
    contradiction = await shell(*command, "--no-index")
    assert (contradiction.code, "--no-index makes no index" in contradiction.err) == (2, True)


# As the catalogue has it


async def test_the_states_are_what_the_catalogue_says(notes: asyncpg.Connection) -> None:
    assert await state(notes) == "deferred"
    await notes.execute("CREATE INDEX by_hand ON notes_embeddings USING hnsw (embedding vector_cosine_ops)")
    seen = await index(notes)
    assert (seen["state"], seen["bytes"] > 0) == ("live", True), "whoever built it, it serves"
    await notes.execute("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'by_hand'::regclass")
    assert await state(notes) == "invalid"
    await notes.execute("DROP INDEX by_hand; SELECT sidecar.record_index('notes', 'live')")
    assert await state(notes) == "missing"
    await notes.execute("CREATE INDEX ON notes_embeddings USING hnsw (embedding vector_l2_ops)")
    await notes.execute("CREATE INDEX ON notes_embeddings USING hnsw (embedding vector_cosine_ops) WHERE id > 5")
    await notes.execute("CREATE INDEX ON notes_embeddings (model)")
    assert await state(notes) == "missing", "none of these serves the search"
    await notes.execute("DROP TABLE notes_embeddings")
    assert await state(notes) == "none"


async def test_a_search_finds_the_same_with_and_without(shell: Shell, notes: asyncpg.Connection) -> None:
    exact = await found(notes)
    assert (await shell("index", "build", "notes")).code == 0
    await notes.execute("SET enable_sort = off")  # the index is the only ordered way
    assert await found(notes) == exact
    await notes.execute("RESET enable_sort")
    assert (await shell("index", "defer", "notes")).code == 0
    assert await found(notes) == exact


# Built and dropped


async def test_build_says_what_it_takes_and_what_came_of_it(shell: Shell, notes: asyncpg.Connection) -> None:
    admin_setting = "SELECT format('ALTER DATABASE %I SET maintenance_work_mem = ''1MB''', current_database())"
    await notes.execute(await notes.fetchval(admin_setting))
    built = await shell("index", "build", "notes", "--workers", "1", "--json")
    needed = graph_bytes(ROWS, DIMENSIONS)
    assert built.json | {"seconds": 0, "bytes": 0} == {
        "pipeline": "notes",
        "state": "live",
        "built": True,
        "rows": ROWS,
        "needed_bytes": needed,
        "memory_bytes": needed,
        "workers": 1,
        "seconds": 0,
        "bytes": 0,
    }
    assert built.json["bytes"] == (await index(notes))["bytes"]
    assert "notes: 300 vectors of 32 dimensions: the graph needs 12 MB, maintenance_work_mem is 12 MB, " in built.err
    assert await state(notes) == "live"
    assert (await shell("index", "build", "notes", "--json")).json["built"] is False
    assert await notes.fetchval(MADE) == 1


async def test_a_bound_on_memory_is_kept_and_told(shell: Shell, notes: asyncpg.Connection) -> None:
    admin_setting = "SELECT format('ALTER DATABASE %I SET maintenance_work_mem = ''1MB''', current_database())"
    await notes.execute(await notes.fetchval(admin_setting))
    built = await shell("index", "build", "notes", "--memory", "2MB", "--json")
    assert built.json["memory_bytes"] == 2 << 20
    assert "much slower: allow more with --memory" in built.err


@pytest.mark.parametrize("memory", ["", "1", "much", "0MB", "2048GB", "-1GB", "1.5GB"])
async def test_memory_that_makes_no_sense_is_refused(shell: Shell, memory: str) -> None:
    refused = await shell("index", "build", "notes", f"--memory={memory}")
    assert refused.code == 2
    assert refused.err.startswith(f"error: --memory is {memory!r}: must be a number of MB or GB up to 2047GB")


async def test_the_memory_that_a_build_needs_is_what_pgvector_takes(notes: asyncpg.Connection) -> None:
    """Its notice says after how many rows a graph no longer fits: into 2 MB, where its blocks add up to just that."""
    told: list[str] = []
    notes.add_log_listener(lambda _, message: told.append(str(message)))
    await notes.execute("INSERT INTO notes SELECT n, 'b' FROM generate_series(301, 2700) AS n")
    await notes.execute("DELETE FROM notes_embeddings")
    await notes.execute(FILL)
    await notes.execute("SET maintenance_work_mem = '2MB'")
    await notes.execute(CREATE)
    notice = re.search(r"no longer fits into maintenance_work_mem after (\d+) tuples", "".join(told))
    assert notice
    reckoned = graph_bytes(int(notice[1]), DIMENSIONS) - graph_bytes(0, DIMENSIONS)
    assert 1.0 <= reckoned / (2 << 20) <= 1.15, "never too little, and not much too much"


async def test_no_writer_waits_for_a_build(shell: Shell, notes: asyncpg.Connection, database_url: str) -> None:
    """The build waits for a writer; everybody else goes on writing, also through the foreign key."""
    await notes.execute("SET lock_timeout = '2s'")
    async with open_writer(database_url):
        building = asyncio.create_task(shell("index", "build", "notes"))
        await eventually(lambda: waits(notes), 60, "the phase")
        await notes.execute("DELETE FROM notes WHERE id = 7")
        await notes.execute("UPDATE notes_embeddings SET source_text = 'x' WHERE id = 8")
        await notes.execute("INSERT INTO notes VALUES (1000, 'new')")
        assert await state(notes) == "building"
    assert (await building).code == 0
    assert await state(notes) == "live"


async def waits(connection: asyncpg.Connection) -> bool:
    """Whether a build waits for a writer."""
    return bool((await index(connection))["phase"] == "waiting for writers before build")


async def test_no_writer_waits_for_a_drop(shell: Shell, notes: asyncpg.Connection, database_url: str) -> None:
    assert (await shell("index", "build", "notes")).code == 0
    await notes.execute("SET lock_timeout = '2s'")
    async with open_writer(database_url):
        dropping = asyncio.create_task(shell("index", "defer", "notes", "--json"))
        waiting = BUILDERS.replace("CREATE", "DROP")
        await eventually(lambda: notes.fetchval(waiting), 60, "the drop")
        await notes.execute("DELETE FROM notes WHERE id = 7")
        assert await state(notes) == "deferred", "a drop under way is no fault"
    dropped = (await dropping).json
    assert (dropped["pipeline"], dropped["state"]) == ("notes", "deferred")
    assert "USING hnsw" in dropped["dropped"][0]
    assert await state(notes) == "deferred"
    assert not await notes.fetchval(MADE)


@pytest.mark.usefixtures("notes")
async def test_progress_is_seen_by_the_daemons_role_and_told_by_the_line(database_url: str, runtime_url: str) -> None:
    async with open_writer(database_url), second_session(runtime_url) as runtime:
        building = await start("index", "build", "notes", database_url=database_url)
        await eventually(lambda: waits(runtime), 60)
        assert building.stderr is not None
        async with asyncio.timeout(60):
            while b"waiting for writers before build: 0 of 1 transaction ended" not in await building.stderr.readline():
                assert building.returncode is None
    assert (await within_a_minute(building)).code == 0


async def within_a_minute(process: asyncio.subprocess.Process) -> Finished:
    """Wait for the end of a command; one that does not end is killed, and fails the test."""
    try:
        async with asyncio.timeout(60):
            return await ended(process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_two_at_once_build_one(notes: asyncpg.Connection, database_url: str) -> None:
    both = await asyncio.gather(
        *(sidecar("index", "build", "notes", "--json", database_url=database_url) for _ in range(2))
    )
    assert sorted(each.json["built"] for each in both) == [False, True]
    assert await notes.fetchval(MADE) == 1


async def test_ctrl_c_ends_the_build_and_the_next_one_mends_it(
    shell: Shell, notes: asyncpg.Connection, database_url: str
) -> None:
    async with open_writer(database_url):
        building = await start("index", "build", "notes", database_url=database_url)
        await eventually(lambda: waits(notes), 60)
        building.send_signal(signal.SIGINT)
        stopped = await within_a_minute(building)
        assert stopped.code == 128 + signal.SIGINT
        assert stopped.err.splitlines()[-1].startswith("interrupted: sidecar-daemon index build notes begins again")
        await eventually(lambda: left_alone(notes), what="the end of the statement on the server")
        assert await state(notes) == "invalid"
    again = await shell("index", "build", "notes")
    assert (again.code, await state(notes)) == (0, "live")
    assert "dropping what an interrupted build left: public.notes_embeddings_embedding_idx" in again.err
    assert await notes.fetchval(MADE) == 1


async def left_alone(connection: asyncpg.Connection) -> bool:
    return not await connection.fetchval(BUILDERS)


async def test_a_build_whose_client_was_killed_is_waited_for(
    shell: Shell, notes: asyncpg.Connection, database_url: str
) -> None:
    """The server goes on without it; a second build beside it would be a second index."""
    async with open_writer(database_url):
        building = await start("index", "build", "notes", database_url=database_url)
        await eventually(lambda: waits(notes), 60)
        building.kill()
        await within_a_minute(building)
        assert await state(notes) == "building"
        again = asyncio.create_task(shell("index", "build", "notes", "--json"))
        tries = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'sidecar_daemon index'"
        await eventually(lambda: two(notes, tries), 60)
    assert (await again).json["built"] is False
    assert await state(notes) == "live"
    assert await notes.fetchval(MADE) == 1


async def two(connection: asyncpg.Connection, count: str) -> bool:
    return bool(await connection.fetchval(count) == 2)


async def test_an_index_that_somebody_builds_by_hand_is_waited_for(
    shell: Shell, notes: asyncpg.Connection, database_url: str
) -> None:
    """While it is built it looks like what an interrupted build leaves."""
    async with second_session(database_url) as other:
        async with open_writer(database_url):
            by_hand = asyncio.create_task(other.execute(CREATE.replace("INDEX", "INDEX CONCURRENTLY")))
            await eventually(lambda: waits(notes), 60)
            building = asyncio.create_task(shell("index", "build", "notes", "--json"))
            asked = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'sidecar_daemon index'"
            looked = f"{asked} AND (query LIKE '%pg_locks%' OR query LIKE 'DROP INDEX%')"
            await eventually(lambda: notes.fetchval(looked), 60)
        await by_hand
    built = await building
    assert built.json["built"] is False
    assert "dropping" not in built.err
    assert (await state(notes), await notes.fetchval(MADE)) == ("live", 1)


async def test_a_build_has_no_limit_of_time(notes: asyncpg.Connection, database_url: str) -> None:
    wanted = ["statement_timeout", "lock_timeout", "idle_session_timeout", "transaction_timeout"]
    alter = "SELECT format('ALTER DATABASE %I SET %I = 60000', current_database(), name) FROM pg_settings"
    for row in await notes.fetch(f"{alter} WHERE name = ANY ($1)", wanted):
        await notes.execute(row[0])
    limits = "SELECT array_agg(setting) FROM pg_settings WHERE name = ANY ($1)"
    async with second_session(database_url) as limited:
        assert set(await limited.fetchval(limits, wanted)) == {"60000"}
    async with index_session(database_url) as session:
        left = f"EXISTS (SELECT FROM pg_settings WHERE name = ANY ('{{{','.join(wanted)}}}') AND setting <> '0')"
        await session.run(f"DO $do$ BEGIN ASSERT NOT {left}, 'a limit is left'; END $do$")


async def test_an_interrupted_build_can_be_put_off_as_well(shell: Shell, notes: asyncpg.Connection) -> None:
    await notes.execute(CREATE)
    await notes.execute(INTERRUPT)
    assert (await shell("index", "defer", "notes")).code == 0
    assert await state(notes) == "deferred"


async def test_build_waits_for_the_backfill(notes: asyncpg.Connection, database_url: str) -> None:
    await notes.execute("SELECT sidecar.request_sweep('notes')")
    assert (await index(notes))["backfilling"], "the walk is to come"
    await notes.execute("SELECT pgmq.send('notes_bulk', '{}')")
    waiting = await start("index", "build", "notes", "--wait", database_url=database_url)
    assert waiting.stderr is not None
    async with asyncio.timeout(60):
        while b"notes: waiting for the backfill: 1 message queued" not in (line := await waiting.stderr.readline()):
            assert line
    await notes.execute(QUIET)
    assert (await index(notes))["backfilling"], "the walk is over, its message is not"
    assert waiting.returncode is None
    await notes.execute("SELECT pgmq.purge_queue('notes_bulk')")
    assert not (await index(notes))["backfilling"]
    assert (await within_a_minute(waiting)).code == 0
    assert await state(notes) == "live"


async def test_the_wait_outlasts_a_database_that_fails_for_a_moment(
    notes: asyncpg.Connection, database_url: str
) -> None:
    await notes.execute("SELECT sidecar.request_sweep('notes')")
    waiting = await start("index", "build", "notes", "--wait", database_url=database_url)
    assert waiting.stderr is not None
    await eventually(lambda: notes.fetchval(QUEUES_COUNTED), 60)
    await notes.execute("ALTER FUNCTION sidecar.list_indexes() RENAME TO away")
    async with asyncio.timeout(60):
        while b"waiting for the database: " not in (line := await waiting.stderr.readline()):
            assert line
    await notes.execute("ALTER FUNCTION sidecar.away() RENAME TO list_indexes")
    await notes.execute(QUIET)
    assert (await within_a_minute(waiting)).code == 0
    assert await state(notes) == "live"


async def test_a_pipeline_that_is_detached_meanwhile_ends_the_wait(shell: Shell, notes: asyncpg.Connection) -> None:
    await notes.execute("SELECT sidecar.request_sweep('notes')")
    waiting = asyncio.create_task(shell("index", "build", "notes", "--wait"))
    await eventually(lambda: notes.fetchval(QUEUES_COUNTED), 60)
    await notes.execute("SELECT sidecar.detach('notes')")
    done = await waiting
    assert (done.code, done.err.splitlines()[-1]) == (
        1,
        "error: pipeline 'notes' does not exist: it was detached meanwhile",
    )


async def test_nothing_is_queued_for_a_pipeline_that_is_not_there(database: Database) -> None:
    assert await PipelineIndex(database, "nobody").queued() == 0


async def test_a_load_through_the_live_lane_is_waited_for_as_well(shell: Shell, notes: asyncpg.Connection) -> None:
    load = "INSERT INTO notes SELECT n, 'loaded' FROM generate_series($1::int, $2::int) AS n"
    await notes.execute("SELECT pgmq.purge_queue('notes')")
    await notes.execute(load, ROWS + 1, ROWS + 999)
    assert not (await index(notes))["backfilling"], "some edits are no load"
    await notes.execute(load, ROWS + 1000, ROWS + 1000)
    assert (await index(notes))["backfilling"]
    waiting = asyncio.create_task(shell("index", "build", "notes", "--wait"))
    await eventually(lambda: notes.fetchval(QUEUES_COUNTED), 60)
    await notes.execute("SELECT pgmq.purge_queue('notes')")
    done = await waiting
    assert (done.code, "notes: waiting for the backfill: 1,000 messages queued" in done.err) == (0, True)
    assert await state(notes) == "live"


async def test_a_routine_walk_is_no_backfill(notes: asyncpg.Connection) -> None:
    await notes.execute("UPDATE sidecar.sweeps SET started_at = now(), finished_at = NULL, backfill = false")
    assert not (await index(notes))["backfilling"]


# Refusals


async def test_only_the_owner_of_the_table_may(shell: Shell, notes: asyncpg.Connection, database_url: str) -> None:
    await notes.execute("CREATE ROLE deputy LOGIN IN ROLE sidecar_owner")
    try:
        as_deputy = database_url.replace("postgresql://postgres@", "postgresql://deputy@")
        refused = await shell("index", "build", "notes", DATABASE_URL=as_deputy)
        assert (refused.code, refused.err) == (
            1,
            "error: table public.notes_embeddings belongs to postgres: only its owner may build or drop its index\n",
        )
        await notes.execute("ALTER TABLE notes_embeddings OWNER TO deputy; GRANT CREATE ON SCHEMA public TO deputy")
        assert (await shell("index", "build", "notes", DATABASE_URL=as_deputy)).code == 0
        assert (await shell("index", "defer", "notes", DATABASE_URL=as_deputy)).code == 0
    finally:
        await notes.execute("ALTER TABLE notes_embeddings OWNER TO postgres; DROP OWNED BY deputy; DROP ROLE deputy")


async def test_what_cannot_be_is_refused_in_one_line(shell: Shell, connection: asyncpg.Connection) -> None:
    await make(connection, 0)
    await attach(connection, index=True, dimensions=2100)
    for command in ("build", "defer"):
        refused = await shell("index", command, "notes")
        assert refused.code == 1
        assert refused.err == (
            "error: pgvector has no index for vectors of more than 2000 dimensions, and pipeline notes has 2100: its "
            "searches stay exact\n"
        )
        unknown = await shell("index", command, "nobody")
        assert unknown.err == "error: pipeline 'nobody' does not exist; known pipelines: notes\n"
    assert (await shell("index", "show", "nobody")).code == 1


async def test_behind_a_transaction_pooler_a_direct_url_is_asked_for(
    shell: Shell, notes: asyncpg.Connection, database_url: str
) -> None:
    refused = await shell("index", "build", "notes", POOLER="transaction")
    assert (refused.code, "set SIDECAR_LISTEN_URL to a direct URL" in refused.err) == (1, True)
    direct = await shell("index", "build", "notes", POOLER="transaction", LISTEN_URL=database_url)
    assert (direct.code, await state(notes)) == (0, "live")


async def test_shared_memory_that_runs_out_names_the_ways_out(database_url: str) -> None:
    said = 'could not resize shared memory segment "/PostgreSQL.1" to 1 bytes: No space left on device'
    statement = f"DO $do$ BEGIN RAISE EXCEPTION USING ERRCODE = '53100', MESSAGE = '{said}'; END $do$"
    async with index_session(database_url) as session:
        with pytest.raises(Fatal, match=r"No space left on device.*--shm-size.*--memory.*--workers 0"):
            await session.run(statement)


# Seen


async def test_show_and_status_tell_the_state(shell: Shell, notes: asyncpg.Connection) -> None:
    shown = (await shell("index", "show", "--json")).json
    assert [(each["pipeline"], each["state"], each["backfilling"]) for each in shown] == [("notes", "deferred", False)]
    assert "searches are exact and slow until: sidecar-daemon index build notes" in (await shell("index", "show")).out
    status = await shell("status", "--json")
    assert status.json["pipelines"][0]["index"] == "deferred"
    assert "notes: its index is deferred, see sidecar-daemon index show notes" in (await shell("status")).out
    assert (await shell("index", "build", "notes")).code == 0
    assert (await shell("index", "show", "notes", "--json")).json["state"] == "live"
    assert "index" not in (await shell("status")).out
    assert await notes.fetchval("SELECT index_state FROM sidecar.status") == "live"


async def test_the_progress_is_drawn_on_a_terminal(notes: asyncpg.Connection, database_url: str) -> None:
    async with terminal("index", "build", "notes", settings={"DATABASE_URL": database_url}, columns=150) as screen:
        async with open_writer(database_url):
            await eventually(lambda: "waiting for writers before build" in screen.raw, 60)
        assert await screen.process.wait() == 0
        await eventually(lambda: "notes: the index is live (300 vectors" in screen.raw)
    assert await state(notes) == "live"


DOCTOR = {
    "deferred, and the load is over": ("SELECT", "warn", "still deferred though the backfill is through"),
    "deferred, while the load lasts": ("SELECT sidecar.request_sweep('notes')", "ok", "deferred until"),
    "lost": ("SELECT sidecar.record_index('notes', 'live')", "fail", "wanted, and not there"),
    "interrupted": (f"{CREATE}; {INTERRUPT}", "fail", "interrupted"),
    "not wanted": ("UPDATE sidecar.pipelines SET index_mode = 'none'", "ok", "none is wanted"),
    "live": (CREATE, "ok", "live"),
}


@pytest.mark.parametrize("fault", DOCTOR)
async def test_doctor_says_how_to_mend_it(
    shell: Shell, notes: asyncpg.Connection, runtime_url: str, fault: str
) -> None:
    done, expected, words = DOCTOR[fault]
    await notes.execute(done)
    report = await shell("doctor", "--json", DATABASE_URL=runtime_url)
    (check,) = [each for each in json.loads(report.out)["checks"] if each["name"] == "index of notes"]
    assert (check["state"], words in check["found"]) == (expected, True), check
    assert check["mend"] == (None if expected == "ok" else "sidecar-daemon index build notes")


async def test_the_daemon_tells_of_it_once_the_backfill_is_through(
    connection: asyncpg.Connection, database_url: str, tiny_models: Path
) -> None:
    await make(connection, 5)
    await attach(connection, index=True, defer_index="always")
    async with Daemon(database_url, tiny_models) as daemon:
        told = await eventually(lambda: [e for e in daemon.events if e["event"] == "index_deferred"], 60)
        assert await connection.fetchval("SELECT count(*) FROM notes_embeddings") == 5
    assert [(each["level"], each["pipeline"]) for each in told] == [("warning", "notes")]
    assert "sidecar-daemon index build notes" in told[0]["remedy"]


# Upgraded, undone


async def test_a_pipeline_of_an_older_release_wants_the_index_that_it_has(empty_url: str, tmp_path: Path) -> None:
    older = tmp_path / "older"
    shutil.copytree(SQL, older)
    (older / "migrations/0004_index.sql").unlink()
    await migrate_at(empty_url, older)
    columns = (
        "name, queue, source, embeddings, embeddings_key, key_column, key_type, key_equals, key_follows, "
        "content_columns, model, dimensions, long_documents, store_text"
    )
    for name, index_on in (("indexed", True), ("bare", False)):
        admin(
            empty_url,
            f"CREATE TABLE {name} (id int PRIMARY KEY)",
            f"CREATE TABLE {name}_embeddings (id int, embedding vector(3))",
            f"SELECT pgmq.create('{name}_bulk')",
            f"GRANT SELECT ON pgmq.q_{name}_bulk TO sidecar_owner",
            f"INSERT INTO sidecar.pipelines ({columns}) VALUES "
            f"('{name}', '{name}', '{name}', '{name}_embeddings', 'id', 'id', 'integer', "
            "'OPERATOR(pg_catalog.=)', 'OPERATOR(pg_catalog.>)', '{id}', 'tiny', 3, 'mean', true)",
        )
        if index_on:
            admin(empty_url, f"CREATE INDEX ON {name}_embeddings USING hnsw (embedding vector_cosine_ops)")
    await migrate_at(empty_url)
    connection = await asyncpg.connect(empty_url)
    try:
        assert await states(connection) == {"indexed": "live", "bare": "none"}
        await connection.execute("DROP INDEX indexed_embeddings_embedding_idx")
        assert await states(connection) == {"indexed": "missing", "bare": "none"}
    finally:
        await connection.close()


async def states(connection: asyncpg.Connection) -> dict[str, str]:
    rows = await connection.fetch("SELECT pipeline, state FROM sidecar.list_indexes()")
    return {row["pipeline"]: row["state"] for row in rows}


async def test_an_upgraded_schema_is_a_fresh_one(
    empty_url: str, connection: asyncpg.Connection, tmp_path: Path
) -> None:
    older = tmp_path / "older"
    shutil.copytree(SQL, older)
    (older / "migrations/0004_index.sql").unlink()
    await migrate_at(empty_url, older)
    await migrate_at(empty_url)
    catalogue = """
        SELECT c.relname, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, pg_get_expr(d.adbin, d.adrelid)
        FROM pg_class AS c JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0
        LEFT JOIN pg_attrdef AS d ON d.adrelid = c.oid AND d.adnum = a.attnum
        WHERE c.relnamespace = 'sidecar'::regnamespace
        UNION ALL SELECT conname, pg_get_constraintdef(oid), NULL, NULL, NULL FROM pg_constraint
        WHERE connamespace = 'sidecar'::regnamespace
        UNION ALL SELECT oid::regprocedure::text, prosrc, prorettype::regtype::text, prosecdef, proacl::text
        FROM pg_proc WHERE pronamespace = 'sidecar'::regnamespace
        ORDER BY 1, 2
    """
    upgraded = await asyncpg.connect(empty_url)
    try:
        assert await upgraded.fetch(catalogue) == await connection.fetch(catalogue)
    finally:
        await upgraded.close()


@pytest.mark.parametrize("interrupted", [False, True])
async def test_detach_leaves_nothing(notes: asyncpg.Connection, *, interrupted: bool) -> None:
    if interrupted:
        await notes.execute(CREATE)
        await notes.execute(INTERRUPT)
    await notes.execute("SELECT sidecar.detach('notes')")
    assert not await notes.fetch("SELECT * FROM sidecar.list_indexes()")
    assert await notes.fetchval("SELECT count(*) FROM pg_class WHERE relname LIKE 'notes_embeddings%'") == 0


async def test_detach_is_refused_while_the_index_is_built(
    shell: Shell, notes: asyncpg.Connection, database_url: str
) -> None:
    async with open_writer(database_url):
        building = asyncio.create_task(shell("index", "build", "notes"))
        await eventually(lambda: waits(notes), 60)
        async with second_session(database_url) as writer, writer.transaction():
            await writer.execute(
                "UPDATE notes SET body = 'open' WHERE id = 2"
            )  # a lock on the source would wait for it
            with pytest.raises(
                asyncpg.PostgresError, match="the index of pipeline notes is being built or dropped: wait"
            ):
                await notes.execute("SELECT sidecar.detach('notes')")
    assert (await building).code == 0
    await notes.execute("SELECT sidecar.detach('notes')")
