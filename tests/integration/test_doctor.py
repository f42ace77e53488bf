"""``doctor`` names what is wrong and how to mend it; each fault is made for real."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.command_line import called
from tests.conftest import admin
from tests.daemon import free_port

if TYPE_CHECKING:
    from pathlib import Path


async def examine(database_url: str, **settings: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit code and checks by name."""
    finished = await called("doctor", "--json", database_url=database_url, **settings)
    assert finished.err == ""
    report = json.loads(finished.out)
    assert report["ok"] is (finished.code == 0)
    return finished.code, {check["name"]: check for check in report["checks"]}


async def test_all_is_well(notes: str) -> None:
    code, checks = await examine(notes)
    assert code == 0
    assert {check["state"] for name, check in checks.items() if name != "threads"} == {"ok"}
    wanted = {"settings", "threads", "database", "server", "vector", "pgmq", "schema", "grants", "listen"}
    assert wanted | {"model tiny", "pipeline notes", "model of notes"} <= set(checks)
    people = await called("doctor", database_url=notes)
    assert people.code == 0
    assert "ok    pipeline notes" in people.out


@pytest.mark.usefixtures("notes")
async def test_the_runtime_role_is_enough(runtime_url: str) -> None:
    code, checks = await examine(runtime_url)
    assert (code, checks["grants"]["state"], checks["pipeline notes"]["state"]) == (0, "ok", "ok")


FAULTS = {
    "missing grant": (
        ["REVOKE EXECUTE ON FUNCTION sidecar.lease FROM sidecar_runtime"],
        ("grants", "sidecar.lease", "GRANT sidecar_runtime"),
    ),
    "trigger disabled": (
        ["ALTER TABLE notes DISABLE TRIGGER sidecar_notes_update"],
        ("pipeline notes", "disabled", "ENABLE TRIGGER"),
    ),
    "trigger dropped": (["DROP TRIGGER sidecar_notes_insert ON notes"], ("pipeline notes", "trigger", "attach again")),
    "source dropped": (["DROP TABLE notes CASCADE"], ("pipeline notes", "source table is gone", "detach notes")),
    "vectors dropped": (["DROP TABLE notes_embeddings"], ("pipeline notes", "table of vectors", "attach again")),
    "queue dropped": (["SELECT pgmq.drop_queue('notes_bulk')"], ("pipeline notes", "1 of its three", "attach again")),
    "other model version": (
        ["UPDATE sidecar.pipelines SET model_id = 'tiny@000000000000'"],
        ("model of notes", "tiny@000000000000", "attach again"),
    ),
    "unknown model": (
        ["UPDATE sidecar.pipelines SET model = 'gpt-9', model_id = NULL"],
        ("model of notes", "gpt-9 has no manifest", "gpt-9.toml"),
    ),
    "schema too new": (
        ["INSERT INTO sidecar.schema_migrations VALUES (9999, 'from_the_future', 'x')"],
        ("schema", "schema version 9999", "newer release"),
    ),
    "old vector": (
        ["UPDATE pg_extension SET extversion = '0.6.2' WHERE extname = 'vector'"],
        ("vector", "0.6.2", "ALTER EXTENSION vector UPDATE"),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_fault_is_named_with_its_cure(notes: str, runtime_url: str, fault: str) -> None:
    statements, (name, found, mend) = FAULTS[fault]
    admin(notes, *statements)
    code, checks = await examine(runtime_url)
    assert code == 1
    assert checks[name]["state"] == "fail"
    assert found in checks[name]["found"]
    assert mend in checks[name]["mend"]


async def test_a_paused_pipeline_is_only_a_warning(notes: str) -> None:
    await called("pause", "notes", database_url=notes)
    code, checks = await examine(notes)
    assert (code, checks["pipeline notes"]["state"]) == (0, "warn")
    assert "resume notes" in checks["pipeline notes"]["mend"]


async def test_a_database_without_anything(empty_url: str, tmp_path: Path) -> None:
    code, checks = await examine(empty_url, MODELS_DIR=str(tmp_path))
    assert code == 1
    for name in ("vector", "pgmq", "schema"):
        assert (checks[name]["state"], checks[name]["mend"]) == ("fail", "sidecar-daemon migrate")
    assert checks["models"]["state"] == "warn"
    assert "models pull" in checks["models"]["mend"]


async def test_an_unreachable_database_ends_nothing_else() -> None:
    code, checks = await examine(f"postgresql://me:s3cret-canary@127.0.0.1:{free_port()}/shop")
    assert (code, checks["database"]["state"], checks["settings"]["state"]) == (1, "fail", "ok")
    assert "connection refused" in checks["database"]["found"]
    assert "s3cret-canary" not in str(checks)


async def test_settings_that_cannot_work(notes: str) -> None:
    code, checks = await examine(notes, PIPELINES="notes,nots", THREADS="256", POOLER="transaction")
    assert code == 1
    assert "nots" in checks["pipelines"]["found"]
    assert "SIDECAR_THREADS" in checks["threads"]["mend"]
    assert checks["listen"]["state"] == "warn"
    assert "SIDECAR_LISTEN_URL" in checks["listen"]["mend"]
