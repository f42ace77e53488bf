"""Bad input through the real command line: one clear line, exit code 1 or 2, no traceback, no password."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from typing import TYPE_CHECKING

import pytest

from tests.command_line import MODELS, Finished, called, sidecar
from tests.conftest import admin
from tests.daemon import Daemon, free_port

if TYPE_CHECKING:
    from pathlib import Path

    from sidecar_daemon.adapters.postgres.embedded import EmbeddedServer

PASSWORD = "s3cret-canary"  # noqa: S105  a canary: it must never be seen
MISUNDERSTOOD = f"postgresql://me:{PASSWORD}@127.0.0.1/x?sslmode=no"


def refused(finished: Finished, code: int, *words: str) -> None:
    """The command ended with a code and one line that has these words."""
    assert finished.code == code, finished
    lines = finished.err.splitlines()
    assert len(lines) == 1, finished.err
    assert lines[0].startswith("error: ")
    assert [word for word in words if word not in lines[0]] == [], lines[0]
    for text in (finished.out, finished.err):
        assert "Traceback" not in text
        assert PASSWORD not in text
    assert finished.out == ""


@pytest.mark.parametrize(
    "command",
    [(), ("migrate",), ("attach", "t", "c")],
)
async def test_no_database_is_named(command: tuple[str, ...], tmp_path: Path) -> None:
    refused(await sidecar(*command, cwd=tmp_path), 2, "SIDECAR_DATABASE_URL is not set")


@pytest.mark.parametrize("command", [("migrate",), ("status",), ("attach", "t", "c")])
async def test_an_unreachable_database(command: tuple[str, ...]) -> None:
    place = f"127.0.0.1:{free_port()}/shop"
    url = f"postgresql://me:{PASSWORD}@{place}"
    refused(await called(*command, database_url=url), 1, f"me@{place}", "connection refused")


async def test_a_wrong_password_and_an_unknown_database(server: EmbeddedServer) -> None:
    hba = server.data_dir / "strict_hba.conf"
    hba.write_text("local all all trust\nhost all all 127.0.0.1/32 scram-sha-256\n")
    hba.chmod(0o644)
    await asyncio.to_thread(server.stop)
    strict = type(server)(server.data_dir, settings={"hba_file": str(hba), "fsync": "off"}, tcp_port=free_port())
    with strict:
        admin(strict.dsn(), "CREATE ROLE shopkeeper LOGIN PASSWORD 'r1ght'")
        wrong = strict.dsn("postgres", "shopkeeper", PASSWORD)
        refused(await called("status", database_url=wrong), 1, "password authentication failed", "shopkeeper@")
        absent = strict.dsn("absent", "shopkeeper", "r1ght")
        refused(await called("status", database_url=absent), 1, '"absent" does not exist')


async def test_a_missing_extension(empty_url: str) -> None:
    admin(empty_url, "CREATE ROLE plain_owner LOGIN", "GRANT ALL ON SCHEMA public TO plain_owner")
    try:
        url = empty_url.replace("postgres@", "plain_owner@", 1)
        refused(await called("migrate", database_url=url), 1, "extension vector", "CREATE EXTENSION vector")
    finally:
        admin(empty_url, "DROP OWNED BY plain_owner", "DROP ROLE plain_owner")


async def test_a_schema_that_is_missing(empty_url: str) -> None:
    refused(await called("status", database_url=empty_url), 1, "no schema sidecar", "sidecar-daemon migrate")


async def test_a_schema_that_is_too_old(database_url: str) -> None:
    admin(database_url, "UPDATE sidecar.schema_migrations SET version = version - 1")
    refused(await called("status", database_url=database_url), 1, "this release needs", "sidecar-daemon migrate")


@pytest.mark.parametrize("command", ["status", "migrate"])
async def test_a_schema_that_is_too_new(database_url: str, command: str) -> None:
    admin(database_url, "INSERT INTO sidecar.schema_migrations VALUES (9999, 'from_the_future', 'x')")
    refused(await called(command, database_url=database_url), 1, "schema version 9999", "upgrade the daemon")


@pytest.mark.parametrize(
    "command",
    [
        ("attach", "t", "c", "--model", "gpt-9"),
        ("models", "pull", "gpt-9"),
        ("models", "verify", "gpt-9"),
    ],
)
async def test_an_unknown_model(database_url: str, command: tuple[str, ...]) -> None:
    finished = await called(*command, database_url=database_url)
    refused(finished, 1, "'gpt-9'", "all-minilm-l6-v2", "gte-small", "tiny")


async def test_a_model_that_is_not_pulled_and_one_that_is_damaged(database_url: str, tmp_path: Path) -> None:
    admin(database_url, "CREATE TABLE notes (id int PRIMARY KEY, body text)")
    assert (await called("attach", "notes", "body", "--model", "tiny", database_url=database_url)).code == 0

    async def elsewhere(*arguments: str, **settings: str) -> Finished:
        return await called(*arguments, database_url=database_url, MODELS_DIR=str(tmp_path), **settings)

    refused(await elsewhere("search", "notes", "x"), 1, "'tiny'", "models pull tiny")
    await called("models", "pull", "tiny")
    shutil.copytree(MODELS / "tiny", tmp_path / "tiny")
    graph = tmp_path / "tiny" / "model.onnx"
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)
    refused(await elsewhere("search", "notes", "x"), 1, "model.onnx", "damaged", "models pull tiny")
    daemon = Daemon(database_url, tmp_path, {"THREADS": "1"})
    await daemon.start(ready=False)
    try:  # it may have other pipelines, and the damage may be mended: it says so and goes on
        await daemon.wait_for(lambda: any(each["event"] == "pipeline_refused" for each in daemon.events))
        (said,) = [each["reason"] for each in daemon.events if each["event"] == "pipeline_refused"]
        assert all(words in said for words in ("model.onnx", "damaged", "models pull tiny"))
    finally:
        await daemon.stop()
    verified = await elsewhere("models", "verify")
    assert verified.code == 1
    assert "model_corrupt" in verified.out


@pytest.mark.parametrize(
    ("command", "name", "value", "words"),
    [
        ("run", "THREADS", "many", ("SIDECAR_THREADS is 'many'", "a whole number from 1 to 256")),
        ("status", "LEASE_SECONDS", "1", ("SIDECAR_LEASE_SECONDS is '1'", "from 5")),
        ("demo", "TREADS", "2", ("SIDECAR_TREADS is not a setting", "SIDECAR_THREADS")),
        ("doctor", "DATABASE_URL", f"mysql://me:{PASSWORD}@db/x", ("SIDECAR_DATABASE_URL", "postgresql://")),
    ],
)
async def test_a_bad_setting(command: str, name: str, value: str, words: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(f"SIDECAR_{name}={value}\n")
    refused(await called(command, cwd=tmp_path), 2, *words)
    assert os.listdir(tmp_path) == [".env"]  # noqa: PTH208  a demo that refuses leaves nothing behind


@pytest.mark.parametrize(
    "command",
    [
        ("search", "nope", "words"),
        ("sweep", "nope"),
        ("pause", "nope"),
        ("resume", "nope"),
        ("detach", "nope", "--yes"),
        ("dead-letters", "list", "nope"),
        ("dead-letters", "show", "nope", "1"),
        ("dead-letters", "replay", "nope", "--all"),
        ("dead-letters", "purge", "nope", "1"),
    ],
)
async def test_an_unknown_pipeline(database_url: str, command: tuple[str, ...]) -> None:
    refused(await called(*command, database_url=database_url), 1, "pipeline 'nope' does not exist", "known pipelines")


async def test_an_unknown_pipeline_lists_the_known_ones(database_url: str) -> None:
    admin(database_url, "CREATE TABLE notes (id int PRIMARY KEY, body text)")
    await called("attach", "notes", "body", "--model", "tiny", database_url=database_url)
    refused(await called("sweep", "note", database_url=database_url), 1, "known pipelines: notes")
    refused(await called("search", "note", "x", database_url=database_url), 1, "known pipelines: notes")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("keyless", "body"), ("public.keyless has no primary key of one column",)),
        (("absent", "body"), ("table 'absent' does not exist",)),
        (("not a name", "body"), ("table 'not a name' does not exist",)),
        (("other.public.notes", "body"), ("table 'other.public.notes' does not exist",)),
        (("a.b.c.d", "body"), ("table 'a.b.c.d' does not exist",)),
        (("my docs", "body"), ("did you mean", '"My Docs"')),
        (("notes", "boddy"), ("public.notes has no column boddy", "id, body")),
        (("notes", "body", "--key", "body"), ("column body of table public.notes is no key",)),
        (("notes", "body", "--name", "Bad Name"), ("pipeline name 'Bad Name' is not allowed",)),
        (("notes", "body", "--queue", "Bad-Queue"), ("queue name 'Bad-Queue' is not allowed",)),
        (("notes_view", "body"), ("notes_view is no permanent table",)),
    ],
)
async def test_a_table_that_cannot_be_attached(
    database_url: str, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    admin(
        database_url,
        "CREATE TABLE keyless (body text)",
        "CREATE TABLE notes (id int PRIMARY KEY, body text)",
        "CREATE VIEW notes_view AS SELECT * FROM notes",
        'CREATE TABLE "My Docs" (id int PRIMARY KEY, body text)',
    )
    refused(await called("attach", *arguments, "--model", "tiny", database_url=database_url), 1, *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("attach",), ("name a TABLE",)),
        (("attach", "notes"), ("name at least one column of notes",)),
        (("attach", "notes", "body", "--create"), ("--create alone",)),
        (("attach", "notes", "body", "--long-documents", "cut"), ("'cut'", "mean", "chunks", "truncate")),
        (("detach", "notes"), ("--yes",)),
        (("search", "notes", "x", "-k", "0"), ("-k",)),
        (("dead-letters",), ("Missing command",)),
        (("dead-letters", "replay", "notes"), ("--all",)),
        (("dead-letters", "purge", "notes", "1", "--all"), ("--all",)),
        (("dead-letters", "show", "notes", "first"), ("ID", "integer")),
        (("walk",), ("'walk'",)),
        (("status", "--verbose"), ("--verbose",)),
        (("demo", "--documents", "0"), ("--documents",)),
    ],
)
async def test_bad_usage(arguments: tuple[str, ...], words: tuple[str, ...], tmp_path: Path) -> None:
    url = f"postgresql://me:{PASSWORD}@127.0.0.1:1/shop"
    refused(await called(*arguments, database_url=url, cwd=tmp_path), 2, *words)


async def test_an_empty_query(database_url: str) -> None:
    admin(database_url, "CREATE TABLE notes (id int PRIMARY KEY, body text)")
    await called("models", "pull", "tiny")
    await called("attach", "notes", "body", "--model", "tiny", database_url=database_url)
    refused(await called("search", "notes", " \n", database_url=database_url), 2, "the query is empty")
    refused(await called("search", "notes", "a\udcff", database_url=database_url), 2, "not valid UTF-8")


async def test_a_pipeline_of_another_model_version_is_not_searched(database_url: str) -> None:
    admin(database_url, "CREATE TABLE notes (id int PRIMARY KEY, body text)")
    await called("attach", "notes", "body", "--model", "tiny", database_url=database_url)
    admin(database_url, "UPDATE sidecar.pipelines SET model_id = 'tiny@000000000000'")
    refused(await called("search", "notes", "x", database_url=database_url), 1, "tiny@000000000000", "attach again")


async def test_unknown_dead_letters_are_not_passed_over(database_url: str) -> None:
    admin(database_url, "CREATE TABLE notes (id int PRIMARY KEY, body text)")
    await called("attach", "notes", "body", "--model", "tiny", database_url=database_url)
    for command in ("show", "replay", "purge"):
        finished = await called("dead-letters", command, "notes", "77", database_url=database_url)
        refused(finished, 1, "pipeline notes has no dead letter 77")


@pytest.mark.parametrize(
    ("arguments", "settings", "code", "cause"),
    [
        (("run",), {"THREADS": "many"}, "bad_setting", "SIDECAR_THREADS is 'many': must be "),
        ((), {"LOG_LEVEL": "critical"}, "bad_setting", "SIDECAR_DATABASE_URL is not set: must be "),
        (("run",), {"DATABASE_URL": MISUNDERSTOOD, "HTTP_PORT": "0"}, "bad_database_url", "SIDECAR_DATABASE_URL is "),
    ],
)
async def test_a_daemon_whose_log_is_json_ends_with_a_json_line(
    arguments: tuple[str, ...], settings: dict[str, str], code: str, cause: str, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text("SIDECAR_LOG_FORMAT=json\n")
    finished = await sidecar(*arguments, cwd=tmp_path, **settings)
    assert (finished.code, finished.out) == (2, "")
    last = json.loads(finished.err.splitlines()[-1])
    assert (last["event"], last["level"], last["code"]) == ("fatal", "critical", code)
    assert last["cause"].startswith(cause)
    assert last["remedy"].startswith("correct the ")
    assert [json.loads(line)["event"] for line in finished.err.splitlines()].count("fatal") == 1
    assert PASSWORD not in finished.err


async def test_a_bad_log_format_and_a_command_for_people_are_told_in_words(tmp_path: Path) -> None:
    refused(await sidecar("run", cwd=tmp_path, LOG_FORMAT="jsn"), 2, "SIDECAR_LOG_FORMAT is 'jsn'", "json")
    refused(await sidecar("status", cwd=tmp_path, LOG_FORMAT="json"), 2, "SIDECAR_DATABASE_URL is not set")
