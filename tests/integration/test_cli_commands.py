"""Every command on a real database, through the real command line."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import signal
import sys
from typing import TYPE_CHECKING, Any

import pytest

from sidecar_daemon.cli import run_command_line
from tests.command_line import MODELS, ROOT, Finished, called, ended, launch, sidecar, start
from tests.conftest import admin
from tests.daemon import Daemon
from tests.terminal import terminal
from tests.waiting import eventually

if TYPE_CHECKING:
    from pathlib import Path

    import asyncpg

LANE = {"depth": 0, "in_flight": 0, "oldest_seconds": 0.0}


async def plant_dead_letters(url: str, connection: asyncpg.Connection, count: int) -> list[int]:
    """Put messages of a foreign shape through a daemon; the ids of the dead letters."""
    for number in range(count):
        await connection.execute("SELECT pgmq.send('notes', $1::jsonb)", json.dumps({"foreign": number}))
    async with Daemon(url, MODELS):
        await eventually(lambda: connection.fetchval("SELECT count(*) = $1 FROM sidecar.dead_letters", count), 60)
    return [row[0] for row in await connection.fetch("SELECT id FROM sidecar.dead_letters ORDER BY id")]


async def test_migrate_says_what_it_did_and_then_that_there_is_nothing_to_do(empty_url: str) -> None:
    first = await sidecar("migrate", database_url=empty_url)
    assert first.code == 0
    assert "applied 0001_pipelines" in first.out
    again = (await sidecar("migrate", "--json", database_url=empty_url)).json
    assert again["version"] >= 1
    assert f"schema version {again['version']}: nothing to do" in again["lines"]


async def test_attach_pins_the_model_and_says_what_comes_next(database_url: str, tmp_path: Path) -> None:
    admin(database_url, "CREATE TABLE notes (id int PRIMARY KEY, body text)")
    first = await called(
        "attach", "notes", "body", "--model", "tiny", database_url=database_url, MODELS_DIR=str(tmp_path)
    )
    assert first.code == 0
    assert "notes: created" in first.out
    for step in ("models pull tiny", "sidecar-daemon run", "sidecar-daemon status", "sidecar-daemon search notes"):
        assert step in first.out
    again = await called("attach", "notes", "body", "--model", "tiny", "--json", database_url=database_url)
    models = {model["name"]: model["model_id"] for model in (await called("models", "list", "--json")).json}
    assert again.json == {
        "name": "notes",
        "source": "public.notes",
        "embeddings": "public.notes_embeddings",
        "queue": "notes",
        "model": models["tiny"],
        "change": "unchanged",
        "index": "live",
    }


async def test_attach_options_and_quoted_names(database_url: str, connection: asyncpg.Connection) -> None:
    admin(database_url, 'CREATE TABLE "My Docs" ("Doc Id" text NOT NULL UNIQUE, "Title" text, "Body" text)')
    options = ("--key", "Doc Id", "--name", "docs", "--embeddings", "vectors", "--queue", "docs_queue")
    flags = ("--long-documents", "chunks", "--no-store-text", "--no-index", "--model", "tiny")
    made = await called(
        "attach", 'public."My Docs"', "Title", "Body", *options, *flags, "--json", database_url=database_url
    )
    assert made.json["name"] == "docs"
    assert made.json["source"] == 'public."My Docs"'
    row = await connection.fetchrow("SELECT * FROM sidecar.pipelines WHERE name = 'docs'")
    assert row is not None
    assert (row["key_column"], row["content_columns"], row["queue"]) == ("Doc Id", ["Title", "Body"], "docs_queue")
    assert (row["long_documents"], row["store_text"], row["dimensions"]) == ("chunks", False, 32)
    assert await connection.fetchval("SELECT to_regclass('public.vectors') IS NOT NULL")
    assert not await connection.fetchval("SELECT count(*) FROM pg_indexes WHERE indexdef LIKE '%hnsw%'")


async def test_attach_create_makes_the_standard_table(database_url: str, connection: asyncpg.Connection) -> None:
    made = (await called("attach", "--create", "--model", "tiny", "--json", database_url=database_url)).json
    assert made["name"] == "source_documents"
    assert made["embeddings"] == "public.document_embeddings"
    assert made["queue"] == "embedding_queue"
    assert made["change"] == "created"
    columns = "SELECT attname FROM pg_attribute WHERE attrelid = $1::text::regclass AND attnum = 1"
    assert await connection.fetchval(columns, "public.document_embeddings") == "document_id"


async def test_status_has_the_documented_shape(notes: str) -> None:
    shown = (await called("status", "--json", database_url=notes)).json
    (pipeline,) = shown["pipelines"]
    assert pipeline.pop("model").startswith("tiny@")
    assert shown == {
        "pipelines": [
            {
                "name": "notes",
                "source": "public.notes",
                "embeddings": "public.notes_embeddings",
                "enabled": True,
                "queue": {"live": LANE, "bulk": LANE, "dead": 0},
                "documents": 2,
                "embedded": 0,
                "stale": 0,
                "missing": 2,
                "coverage": 0.0,
                "index": "live",
            }
        ]
    }
    table = await called("status", database_url=notes)
    assert "public.notes" in table.out


async def test_status_shows_how_long_each_lane_has_waited(notes: str) -> None:
    """An edit that waits for an hour must not hide behind a backfill that may."""
    admin(
        notes,
        "UPDATE notes SET body = body || ' edited'",
        "UPDATE pgmq.q_notes SET enqueued_at = enqueued_at - interval '59 minutes'",
    )
    heads, row, *_ = (await called("status", database_url=notes)).out.splitlines()
    ends = {head: heads.index(head) + len(head) for head in ("live", "live age", "bulk", "bulk age", "dead")}
    cells = {head: row[:end].rpartition("  ")[2].strip() for head, end in ends.items()}
    assert cells == {"live": "3", "live age": "59 min", "bulk": "0", "bulk age": "0 ms", "dead": "0"}


@pytest.mark.parametrize(("columns", "shed"), [(130, []), (80, ["source", "model"]), (50, ["documents", "stale"])])
async def test_status_on_a_narrow_terminal_does_without_columns(notes: str, columns: int, shed: list[str]) -> None:
    async with terminal("status", settings={"DATABASE_URL": notes}, columns=columns) as screen:
        assert await screen.process.wait() == 0
        lines = await eventually(lambda: screen.since("\0").split("\r\n"))
    heads = lines[0].split()
    assert max(len(line) for line in lines) <= columns
    assert [head for head in shed if head in heads] == []
    assert {"pipeline", "state", "live", "bulk", "dead", "coverage"} <= set(heads)
    assert lines[1].split()[0] == "notes"


async def test_status_without_a_pipeline(database_url: str) -> None:
    assert (await called("status", "--json", database_url=database_url)).json == {"pipelines": []}
    assert "attach a table" in (await called("status", database_url=database_url)).out


async def test_sweep_finds_what_is_missing(notes: str) -> None:
    swept = (await called("sweep", "notes", "--json", database_url=notes, SWEEP_ROWS="1")).json
    assert swept == {
        "pipeline": "notes",
        "finished": True,
        "scanned": 3,
        "missing": 2,
        "outdated": 0,
        "wrong_model": 0,
        "surplus": 0,
        "enqueued": 2,
    }
    again = await called("sweep", "notes", database_url=notes)
    assert "3 rows scanned, 0 enqueued" in again.out  # what waits in a lane is not sent again
    depth = (await called("status", "--json", database_url=notes)).json["pipelines"][0]["queue"]["bulk"]["depth"]
    assert depth == 2


async def test_sweep_now_begins_the_walk_and_leaves_the_rest_to_daemons(
    notes: str, connection: asyncpg.Connection
) -> None:
    begun = (await called("sweep", "notes", "--now", "--json", database_url=notes, SWEEP_ROWS="1")).json
    assert (begun["pipeline"], begun["finished"], begun["scanned"]) == ("notes", False, 1)
    told = await called("sweep", "notes", "--now", database_url=notes, SWEEP_ROWS="1")
    assert (told.code, told.err) == (0, "")
    assert "notes: 1 row scanned" in told.out
    assert "so far; running daemons walk the rest" in told.out
    async with Daemon(notes, MODELS, {"POLL_MAX": "0.2"}):
        await eventually(lambda: connection.fetchval("SELECT finished FROM sidecar.sweep_progress('notes')"), 60)


async def test_sweep_without_a_name_walks_every_pipeline_that_is_not_paused(notes: str) -> None:
    admin(notes, "CREATE TABLE letters (id int PRIMARY KEY, body text)")
    assert (await called("attach", "letters", "body", "--model", "tiny", database_url=notes)).code == 0
    assert [each["pipeline"] for each in (await called("sweep", "--json", database_url=notes)).json] == [
        "letters",
        "notes",
    ]
    assert (await called("pause", "letters", database_url=notes)).code == 0
    swept = await called("sweep", "--now", database_url=notes)
    assert (swept.code, swept.err) == (0, "letters is paused: not swept\n")
    assert swept.out.startswith("notes: 3 rows scanned")
    assert len(swept.out.splitlines()) == 1


async def test_sweep_without_a_pipeline(database_url: str) -> None:
    nothing = await called("sweep", "--json", database_url=database_url)
    assert (nothing.json, "attach a table" in nothing.err) == ([], True)


async def test_sweep_beside_a_running_daemon_tells_the_whole_walk(notes: str) -> None:
    async with Daemon(notes, MODELS, {"POLL_MAX": "0.2"}):
        swept = (await called("sweep", "notes", "--json", database_url=notes)).json
        assert swept["finished"]
        assert swept["scanned"] == 3


async def test_sweep_waits_for_the_replica_that_walks(notes: str, connection: asyncpg.Connection) -> None:
    lock = "hashtextextended('sweep' || chr(31) || 'notes', 8088)"
    await connection.execute(f"SELECT pg_advisory_lock({lock})")
    process = await start("sweep", "notes", "--json", database_url=notes)
    assert process.stderr is not None
    assert await process.stderr.readline() == b"notes: another replica walks it; waiting for it\n"
    await connection.execute(f"SELECT pg_advisory_unlock({lock})")
    finished = await ended(process)
    assert finished.json["scanned"] == 3
    assert finished.err == ""


async def test_pause_and_resume(notes: str) -> None:
    paused = await called("pause", "notes", "--json", database_url=notes)
    assert paused.json == {"pipeline": "notes", "enabled": False, "changed": True}
    assert "was already paused" in (await called("pause", "notes", database_url=notes)).out
    shown = (await called("status", database_url=notes)).out.splitlines()
    assert "paused" in shown[1]
    assert shown[2] == ("notes is paused: edits are queued, nothing is embedded until sidecar-daemon resume notes")
    assert (await called("status", "--json", database_url=notes)).json["pipelines"][0]["enabled"] is False
    swept = await called("sweep", "notes", database_url=notes)
    assert (swept.code, swept.err) == (1, "error: pipeline notes is paused\n")
    assert (await called("resume", "notes", "--json", database_url=notes)).json["changed"] is True


async def test_search_finds_the_nearest(notes: str, connection: asyncpg.Connection) -> None:
    async with Daemon(notes, MODELS):
        await eventually(lambda: connection.fetchval("SELECT count(*) = 2 FROM notes_embeddings"), 60)
    found = (await called("search", "notes", "two fish", "-k", "1", "--json", database_url=notes)).json
    assert found == [{"key": "2", "chunk_no": 0, "similarity": pytest.approx(1.0), "source_text": "two fish"}]
    assert "two fish" in (await called("search", "notes", "two fish", database_url=notes)).out
    long = "fish and chips " * 200
    assert len((await called("search", "notes", long, "--json", database_url=notes)).json) == 2


async def test_dead_letters_are_listed_shown_replayed_and_purged(notes: str, connection: asyncpg.Connection) -> None:
    assert (await called("dead-letters", "list", "notes", "--json", database_url=notes)).json == []
    first, second, third = await plant_dead_letters(notes, connection, 3)
    listed = (await called("dead-letters", "list", "notes", "--json", database_url=notes)).json
    assert [letter["id"] for letter in listed] == [first, second, third]
    assert {letter["reason"] for letter in listed} == {"malformed"}
    table = await called("dead-letters", "list", "notes", database_url=notes)
    assert len(table.out.splitlines()) == 4
    assert re.search(r"malformed +1 +[0-9.]+ (ms|s|min) +no *$", table.out.splitlines()[1])

    shown = (await called("dead-letters", "show", "notes", str(second), "--json", database_url=notes)).json
    assert shown.pop("age_seconds") >= listed[1].pop("age_seconds") >= 0
    assert shown == listed[1]
    assert json.loads(shown["message"])["foreign"] == 1
    assert '"foreign": 1' in (await called("dead-letters", "show", "notes", str(second), database_url=notes)).out

    replayed = await called("dead-letters", "replay", "notes", str(first), "--json", database_url=notes)
    assert replayed.json == {"pipeline": "notes", "replayed": 1}
    purged = await called("dead-letters", "purge", "notes", "--all", "--json", database_url=notes)
    assert purged.json == {"pipeline": "notes", "purged": 2}
    queue = (await called("status", "--json", database_url=notes)).json["pipelines"][0]["queue"]
    assert (queue["live"]["depth"], queue["dead"]) == (1, 0)


@pytest.mark.parametrize("keep", [True, False])
async def test_detach_drops_the_vectors_unless_told_otherwise(
    notes: str, connection: asyncpg.Connection, keep: bool
) -> None:
    flags = ["--keep-embeddings"] if keep else []
    done = await called("detach", "notes", "--yes", *flags, "--json", database_url=notes)
    assert done.json == {"pipeline": "notes", "embeddings": "public.notes_embeddings", "kept": keep}
    assert await connection.fetchval("SELECT to_regclass('public.notes_embeddings') IS NOT NULL") is keep
    assert await connection.fetchval("SELECT count(*) FROM notes") == 3
    assert (await called("status", "--json", database_url=notes)).json == {"pipelines": []}


@pytest.mark.parametrize(("answer", "code", "left"), [("y\n", 0, 0), ("n\n", 130, 1)])
async def test_detach_asks_on_a_terminal(notes: str, answer: str, code: int, left: int) -> None:
    ours, theirs = pty.openpty()
    try:
        process = await launch(["detach", "notes"], {"DATABASE_URL": notes}, stdin=theirs)
        os.write(ours, answer.encode())
        finished = await ended(process)
    finally:
        os.close(ours)
        os.close(theirs)
    assert finished.code == code, finished
    assert "the vectors in public.notes_embeddings" in finished.err
    assert len((await called("status", "--json", database_url=notes)).json["pipelines"]) == left


async def test_models_are_listed_pulled_and_verified(tmp_path: Path) -> None:
    here = str(tmp_path / "models")

    async def states() -> dict[str, Any]:
        return {
            each["name"]: each["state"] for each in (await called("models", "list", "--json", MODELS_DIR=here)).json
        }

    assert await states() == dict.fromkeys(("all-minilm-l6-v2", "gte-small", "tiny"), "model_missing")
    assert "no model is pulled" in (await called("models", "verify", MODELS_DIR=here)).out
    pulled = await called("models", "pull", "tiny", "--json", MODELS_DIR=here)
    assert pulled.json["source"] == "seed"
    assert "exporting" in pulled.err
    assert (await called("models", "pull", "tiny", "--json", MODELS_DIR=here)).json["source"] == "present"
    assert (await states())["tiny"] == "pulled"
    (verified,) = (await called("models", "verify", "--json", MODELS_DIR=here)).json
    assert (verified["name"], verified["state"]) == ("tiny", "pulled")
    missing = await called("models", "verify", "gte-small", MODELS_DIR=here)
    assert missing.code == 1


async def test_without_a_command_the_daemon_runs(notes: str) -> None:
    async with Daemon(notes, MODELS) as daemon:
        assert await daemon.terminate() == 0


@pytest.mark.parametrize(
    "command",
    [
        *(
            "run",
            "migrate",
            "attach",
            "detach",
            "status",
            "search",
            "sweep",
            "pause",
            "resume",
            "doctor",
            "doctor document",
            "demo",
        ),
        *("dead-letters list", "dead-letters show", "dead-letters replay", "dead-letters purge"),
        *("models list", "models pull", "models verify"),
    ],
)
def test_every_command_helps_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line([*command.split(), "--help"]) == 0
    epilog = capsys.readouterr().out.split("Example")[1]
    assert f"sidecar-daemon {command}" in " ".join(epilog.split())


async def test_ctrl_c_is_quiet(notes: str, connection: asyncpg.Connection) -> None:
    waits = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'sidecar.schema_migrations'::regclass"
    async with connection.transaction():
        await connection.execute("LOCK TABLE sidecar.schema_migrations IN ACCESS EXCLUSIVE MODE")
        process = await start("status", database_url=notes)
        await eventually(lambda: connection.fetchval(waits), 60)
        process.send_signal(signal.SIGINT)
        assert await ended(process) == Finished(130, "", "")


async def test_a_reader_that_stops_reading_is_no_error(notes: str) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SIDECAR_")}
    process = await asyncio.create_subprocess_shell(
        f'"{sys.executable}" -m sidecar_daemon --help | true',
        stderr=asyncio.subprocess.PIPE,
        env=kept | {"SIDECAR_DATABASE_URL": notes, "PYTHONPATH": str(ROOT)},
    )
    _, err = await process.communicate()
    assert err == b""


async def test_sweep_tells_what_it_found_before_a_pipeline_refuses(notes: str) -> None:
    admin(notes, "CREATE TABLE letters (id int PRIMARY KEY, body text)")
    assert (await sidecar("attach", "letters", "body", "--model", "tiny", database_url=notes)).code == 0
    admin(notes, "DROP TABLE notes_embeddings")
    told = await sidecar("sweep", database_url=notes)
    assert (told.code, told.out.splitlines()[0][:16]) == (1, "letters: 0 rows ")
    assert told.err.startswith("error: ")
    parsed = await sidecar("sweep", "--json", database_url=notes)
    assert (parsed.code, parsed.err) == (1, told.err)
    assert [(each["pipeline"], each["finished"]) for each in json.loads(parsed.out)] == [("letters", True)]
    alone = await sidecar("sweep", "notes", "--json", database_url=notes)
    assert (alone.code, alone.out, alone.err) == (1, "", told.err)
