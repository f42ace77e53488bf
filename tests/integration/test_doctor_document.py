"""``doctor document`` on real documents: each state is made for real, and told through the real command line."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from sidecar_daemon.app.operations import explain_document
from sidecar_daemon.cli.tracing import explanation_document, explanation_lines
from sidecar_daemon.domain.errors import Transient
from sidecar_daemon.domain.messages import Lane
from sidecar_daemon.settings import Settings
from tests.command_line import called
from tests.conftest import RUNTIME_ROLE, admin
from tests.rig import MODEL, Rig, attach, md5

if TYPE_CHECKING:
    import asyncpg

CANARY = "canary of the text"


async def trace(rig: Rig, key: int | str = 1, *, role: str | None = None, **settings: str) -> dict[str, Any]:
    """What is told of a document; the lines for people must say the same, and neither may hold the text."""
    url = rig.url if role is None else rig.url.replace("postgres@", f"{role}@", 1)
    overrides = {name.lower(): value for name, value in settings.items()}
    facts, explanation = await explain_document(Settings.read(database_url=url, **overrides), "docs", str(key))
    told, lines = explanation_document(facts, explanation), explanation_lines(facts, explanation)
    assert lines[0] == f"{facts.key}: {explanation.summary}"
    assert lines[-len(explanation.next) - 1 :] == ["next:", *(f"  {sentence}" for sentence in explanation.next)]
    assert CANARY not in "".join([*lines, json.dumps(told)])
    return told


async def command(rig: Rig, key: int | str = 1, **settings: str) -> dict[str, Any]:
    """The same through the real command line."""
    told: dict[str, Any] = (
        await called("doctor", "document", "docs", str(key), "--json", database_url=rig.url, **settings)
    ).json
    return told


async def test_embedded(rig: Rig) -> None:
    await rig.write(k1=CANARY)
    await rig.settle(rig.settlement(1, CANARY, await rig.lease_one(), chunks=2))
    told = await command(rig)
    assert told["state"] == "embedded"
    assert f"2 vectors of the current text by {MODEL}" in told["summary"]
    assert told["document"] == {"hash": md5(CANARY), "bytes": len(CANARY), "blank": False}
    assert (told["messages"], told["dead_letter"]) == ([], None)
    await rig.connection.execute("UPDATE sidecar.pipelines SET model_id = 'deterministic@other'")
    assert (await trace(rig))["state"] == "stale"


async def test_waiting_behind_others_and_after_an_unclean_end(rig: Rig) -> None:
    await rig.write(k7="before", k8="before, too", k1=CANARY)
    told = await command(rig)
    assert (told["state"], told["messages"][0]["ahead"]) == ("waiting", 2)
    assert "2 visible messages before it" in told["summary"]
    assert (told["messages"][0]["lane"], told["messages"][0]["action"]) == ("live", "insert")
    assert "attempt 1 of 5" in told["next"][0]
    assert "too_large" in (await trace(rig, MAX_DOCUMENT_BYTES="5"))["next"][0]
    for _ in range(2):
        await rig.queue.begin(await rig.lease())
        await rig.expire()
    told = await trace(rig, MAX_ATTEMPTS="2")
    assert (told["state"], told["messages"][0]["attempt"]) == ("waiting", 2)
    assert "attempts_exhausted" in told["next"][0]


async def test_what_is_told_of_the_next_attempt_is_what_the_lease_counts(rig: Rig) -> None:
    await rig.write(k1=CANARY)
    for step in ("expire", "expire", "expire", "release", "begin", "defer", "expire"):
        promised = (await trace(rig))["messages"][0]["next_attempt"]
        lease = await rig.lease_one()
        held = (await trace(rig))["messages"][0]
        assert (held["attempt"], held["held"]) == (lease.attempt, True)
        assert lease.attempt == promised, step
        if step == "release":
            await rig.queue.release([lease])
        elif step == "begin":
            await rig.queue.begin([lease])
            await rig.expire()
        elif step == "defer":
            await rig.queue.defer({lease: 0.0}, code="why")
        else:
            await rig.expire()


async def test_in_flight(rig: Rig) -> None:
    await rig.write(k1=CANARY)
    await rig.lease(seconds=600)
    told = await command(rig)
    assert told["state"] == "in_flight"
    assert "attempt 1 of 5" in told["summary"]
    message = told["messages"][0]
    assert 0 < message["hidden_seconds"] <= 600
    assert datetime.fromisoformat(message["until"]).utcoffset() == timedelta(0)
    assert message["until"] in told["next"][1]


async def test_deferred_until(rig: Rig) -> None:
    await rig.write(k1=CANARY)
    await rig.queue.defer({await rig.lease_one(): 600.0}, code="inference_failed")
    told = await command(rig, MAX_ATTEMPTS="3")
    assert told["state"] == "deferred"
    assert "after inference_failed, attempt 1 of 3" in told["summary"]
    assert told["messages"][0]["until"] in told["summary"]
    assert "attempt 2 of 3" in told["next"][0]
    await rig.write(k1="edited since")
    assert (await trace(rig))["state"] == "waiting"


async def test_released_for_a_while_is_waiting(rig: Rig) -> None:
    await rig.write(k1=CANARY)
    await rig.queue.release([await rig.lease_one()], delay=600)
    told = await trace(rig)
    assert (told["state"], told["messages"][0]["visible"]) == ("waiting", False)
    assert "attempt 1 of 5" in told["next"][0]


async def test_dead_lettered_and_then_mended(rig: Rig) -> None:
    await rig.write(k1=CANARY)
    lease = await rig.lease_one()
    await rig.queue.dead_letter([lease], reason="bad_vector", detail="not a number", content_hash=md5(CANARY))
    told = await command(rig)
    (letter,) = await rig.dead()
    assert told["state"] == "dead_lettered"
    assert "after 1 attempt: bad_vector" in told["summary"]
    assert (told["dead_letter"]["detail"], told["dead_letter"]["resolved"]) == ("not a number", False)
    assert f"dead-letters replay docs {letter['id']}" in told["next"][1]
    await rig.write(k1="better text")
    told = await trace(rig)
    assert (told["state"], told["dead_letter"]["resolved"]) == ("waiting", True)


@pytest.mark.parametrize("how", ["insert", "update"])
async def test_never_enqueued_and_stale_while_a_trigger_is_off(rig: Rig, how: str) -> None:
    if how == "update":
        await rig.write(k1="before")
        await rig.settle(rig.settlement(1, "before", await rig.lease_one()))
    await rig.connection.execute(f"ALTER TABLE docs DISABLE TRIGGER sidecar_docs_{how}")
    if how == "insert":
        await rig.connection.execute("INSERT INTO docs VALUES (1, $1)", CANARY)
    else:
        await rig.connection.execute("UPDATE docs SET body = $1", CANARY)
    told = await command(rig)
    assert told["state"] == ("never_enqueued" if how == "insert" else "stale")
    assert told["triggers"] == {"insert": "on", "update": "on"} | {how: "disabled"}
    assert f"ENABLE TRIGGER sidecar_docs_{how}" in told["next"][0]
    assert "The next one starts in about 5 min" in told["next"][1]
    assert "The next one is due now" in (await trace(rig, SWEEP_INTERVAL="0.001"))["next"][1]
    await rig.connection.execute(f"ALTER TABLE docs ENABLE TRIGGER sidecar_docs_{how}")
    assert "written before attach" in (await trace(rig))["next"][0]
    await rig.connection.execute("DROP TRIGGER sidecar_docs_update ON docs")
    assert (await trace(rig))["triggers"] == {"insert": "on", "update": "missing"}


async def test_the_walk_that_will_find_it(rig: Rig) -> None:
    await rig.connection.execute("ALTER TABLE docs DISABLE TRIGGER sidecar_docs_insert")
    await rig.write(k1="one", k2="two", k10="ten")
    await rig.connection.execute("SELECT sidecar.request_sweep('docs')")
    assert "A sweep was asked for" in (await trace(rig))["next"][1]
    await rig.connection.execute("SELECT sidecar.sweep('docs', 2)")
    assert "has yet to reach this key" in (await trace(rig, 10))["next"][1]
    await rig.drain_queue()
    assert "is beyond this key" in (await trace(rig, 2))["next"][1]
    await rig.connection.execute("SELECT sidecar.sweep('docs', 2)")
    told = await trace(rig, 10)
    assert (told["state"], told["messages"][0]["lane"]) == ("waiting", "bulk")
    await rig.connection.execute("SELECT sidecar.set_enabled('docs', false)")
    assert "docs is paused" in (await trace(rig, 10))["next"][0]
    assert "sweeps rest, too" in (await trace(rig, 2))["next"][1]


async def test_blank(rig: Rig) -> None:
    await rig.write(k1=" \n")
    assert (await trace(rig))["state"] == "blank"
    await rig.drain_queue()
    assert (await trace(rig))["next"] == ["Nothing, until there is text."]


async def test_unknown(rig: Rig) -> None:
    told = await command(rig, 7)
    again = json.loads(json.dumps(await trace(rig, 7)))
    assert told == {**again, "sweep": told["sweep"]}
    people = await called("doctor", "document", "docs", "--", "-3", database_url=rig.url)
    assert people.out.startswith("-3: unknown: table public.docs has no row with this key\n")
    assert (told["state"], told["document"]) == ("unknown", None)
    assert "table public.docs has no row with this key" in told["summary"]
    await rig.write(k1=CANARY)
    await rig.connection.execute("DELETE FROM docs")
    told = await trace(rig)
    assert told["state"] == "unknown"
    assert "finds the row gone" in told["next"][0]


@pytest.mark.parametrize(
    ("kind", "spelling"), [("numeric", "1"), ("uuid", "{0BADCAFE-0BAD-CAFE-0BAD-0BADCAFE0BAD}"), ("date", "20250301")]
)
async def test_a_key_in_another_spelling(
    connection: asyncpg.Connection, database_url: str, kind: str, spelling: str
) -> None:
    await attach(connection, key=kind)
    await connection.execute(f"INSERT INTO docs VALUES ('{spelling}{'.00' if kind == 'numeric' else ''}', 'text')")
    told = (await called("doctor", "document", "docs", spelling, "--json", database_url=database_url)).json
    assert (told["state"], len(told["messages"])) == ("waiting", 1)


async def test_a_key_cannot_command_the_terminal(connection: asyncpg.Connection, database_url: str) -> None:
    await attach(connection, key="text")
    finished = await called("doctor", "document", "docs", "a\x1b[2J\nb", database_url=database_url)
    assert finished.out.startswith("a\ufffd[2J\ufffdb: unknown")
    assert "\x1b" not in finished.out


async def test_the_roles_that_may_ask(rig: Rig) -> None:
    await rig.write(k1=CANARY)
    assert (await trace(rig, role=RUNTIME_ROLE))["state"] == "waiting"
    admin(rig.url, "CREATE ROLE curious LOGIN IN ROLE sidecar_reader", "CREATE ROLE stranger LOGIN")
    try:
        for role in ("curious", "stranger"):  # a reader sees what the source's policies allow, and hashes tell more
            with pytest.raises(Transient, match="permission denied"):
                await trace(rig, role=role)
    finally:
        admin(rig.url, "DROP ROLE curious", "DROP ROLE stranger")


async def test_hashes_do_not_depend_on_the_role(connection: asyncpg.Connection, rig: Rig) -> None:
    """What the sessions of the daemon and of an operator render must be the same text."""
    await connection.execute("CREATE TABLE dated (id int PRIMARY KEY, day date)")
    await connection.execute(
        "SELECT sidecar.attach('dated', ARRAY['day'], p_model => 'deterministic', p_dimensions => 16, p_index => false)"
    )
    await connection.execute("INSERT INTO dated VALUES (1, '2025-03-01')")
    admin(rig.url, f"ALTER ROLE {RUNTIME_ROLE} SET datestyle = 'German'")
    try:
        url = rig.url.replace("postgres@", f"{RUNTIME_ROLE}@", 1)
        told = (await called("doctor", "document", "dated", "1", "--json", database_url=url)).json
    finally:
        admin(rig.url, f"ALTER ROLE {RUNTIME_ROLE} RESET datestyle")
    assert told["document"]["hash"] == md5("2025-03-01")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("docs", "abc"), 1, ("key 'abc' is no value of type bigint", "column id of table public.docs")),
        (("docs", ""), 1, ("key '' is no value of type bigint",)),
        (("docs", "9" * 400), 1, ("is no value of type bigint",)),
        (("docs", "1\udcff"), 1, ("the key is not valid UTF-8 text",)),
        (("nope", "1"), 1, ("pipeline 'nope' does not exist; known pipelines: docs",)),
        (("docs",), 2, ("KEY",)),
        (("docs", "1", "2"), 2, ("2",)),
    ],
)
async def test_a_question_that_cannot_be_answered(
    rig: Rig, arguments: tuple[str, ...], code: int, words: tuple[str, ...]
) -> None:
    finished = await called("doctor", "document", *arguments, database_url=rig.url)
    assert (finished.code, finished.out) == (code, "")
    (line,) = finished.err.splitlines()
    assert line.startswith("error: ")
    assert [word for word in words if word not in line] == []


async def test_a_source_that_was_dropped(rig: Rig) -> None:
    await rig.connection.execute("DROP TABLE docs CASCADE")
    finished = await called("doctor", "document", "docs", "1", database_url=rig.url)
    assert (finished.code, finished.err) == (
        1,
        "error: the source of pipeline docs was dropped: detach the pipeline\n",
    )


async def test_the_flag_may_stand_before_the_subcommand(rig: Rig) -> None:
    await rig.write(k1=CANARY)
    finished = await called("doctor", "--json", "document", "docs", "1", database_url=rig.url)
    assert finished.json["state"] == "waiting"
    assert [message["lane"] for message in finished.json["messages"]] == [str(Lane.LIVE)]
