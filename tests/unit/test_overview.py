"""What ``/overview`` answers, and how often it asks the database for that."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from sidecar_daemon.adapters.postgres.operations import NewestDeadLetter
from sidecar_daemon.app import overview as module
from sidecar_daemon.app.overview import ASK_SECONDS, NEWEST, OLD_SECONDS, Letters, Overviews
from sidecar_daemon.domain.errors import Transient
from sidecar_daemon.domain.messages import (
    LaneDepth,
    LongDocuments,
    ModelId,
    Observation,
    Pipeline,
    PipelineName,
    PipelineObservation,
)
from sidecar_daemon.domain.outcomes import Outcome
from sidecar_daemon.supervisor import Staffed
from sidecar_daemon.telemetry.recent import Recent
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

DOCS, TITLES = PipelineName("docs"), PipelineName("titles")
OBSERVED = PipelineObservation(
    pipeline=DOCS,
    enabled=True,
    live=LaneDepth(5, 2, 1.5),
    bulk=LaneDepth(100, 3, 60),
    dead=7,
    documents=1000,
    wanting=500,
    walking=True,
    scanned=40,
    sweep_age_seconds=9.5,
)
AWAY = Transient("connection_lost", "the database is away")


@dataclass
class Post:
    """Answers as the database would, and counts."""

    answer: list[NewestDeadLetter] = field(default_factory=lambda: [NewestDeadLetter("7", "too_large", 10.0, 1)])
    error: Exception | None = None
    sealed: set[str] = field(default_factory=set)
    """Pipelines whose dead letters cannot be read."""
    asked: list[tuple[str, int]] = field(default_factory=list)
    open: asyncio.Event = field(default_factory=asyncio.Event)
    seconds: float = 100.0
    letters: Letters = field(init=False)

    def __post_init__(self) -> None:
        self.open.set()
        self.letters = Letters(self.ask, clock=lambda: self.seconds)

    async def ask(self, pipeline: str, limit: int) -> list[NewestDeadLetter]:
        self.asked.append((pipeline, limit))
        await self.open.wait()
        if self.error is not None or pipeline in self.sealed:
            raise self.error or AWAY
        return self.answer

    async def look(self, *names: PipelineName) -> None:
        """Look, and wait for what that has set going."""
        await self.letters.look(names or (DOCS,))
        if self.letters._asking is not None and self.open.is_set():
            await asyncio.wait([self.letters._asking])


@pytest.fixture
async def post() -> AsyncIterator[Post]:
    made = Post()
    yield made
    made.letters.close()


async def test_the_first_look_has_an_answer(post: Post) -> None:
    assert post.letters.of(DOCS) == []
    await post.letters.look([DOCS])
    (letter,) = post.letters.of(DOCS)
    assert (letter.key, letter.reason, letter.age_seconds, letter.attempts) == ("7", "too_large", 10.0, 1)
    assert post.asked == [("docs", NEWEST)]


async def test_the_database_is_asked_every_few_seconds_at_most_and_ages_go_on(post: Post) -> None:
    for _ in range(64):
        await post.look()
        post.seconds += ASK_SECONDS / 64
    assert len(post.asked) == 1
    assert post.letters.of(DOCS)[0].age_seconds == pytest.approx(10 + ASK_SECONDS)
    await post.look()
    assert len(post.asked) == 2
    assert post.letters.of(DOCS)[0].age_seconds == 10


async def test_nobody_is_asked_while_nobody_looks_or_nothing_is_dead(post: Post) -> None:
    await post.letters.look([])
    post.seconds += 3600
    await asyncio.sleep(0)
    assert post.asked == []


async def test_a_pipeline_that_has_none_any_more_is_forgotten_and_a_new_one_asked_for_at_once(post: Post) -> None:
    await post.look(DOCS)
    await post.look(TITLES)
    assert post.asked == [("docs", NEWEST), ("titles", NEWEST)]
    assert post.letters.of(DOCS) == []
    assert post.letters.of(TITLES) != []


async def test_with_the_database_away_the_old_list_stays_and_ages(post: Post) -> None:
    await post.look()
    post.error = AWAY
    for _ in range(3):
        post.seconds += ASK_SECONDS
        await post.look()
        assert post.letters._asking is not None
        assert post.letters._asking.exception() is None, "an outage is no bug"
    assert len(post.asked) == 4
    assert [letter.age_seconds for letter in post.letters.of(DOCS)] == [10 + 3 * ASK_SECONDS]


async def test_letters_that_cannot_be_read_hide_nobody_elses(post: Post) -> None:
    post.sealed = {"docs"}
    await post.look(DOCS, TITLES)
    assert post.letters.of(DOCS) == []
    assert [letter.key for letter in post.letters.of(TITLES)] == ["7"]


async def test_letters_that_cannot_be_read_are_asked_for_no_more_often(
    post: Post, monkeypatch: pytest.MonkeyPatch
) -> None:
    post.sealed = {"docs"}
    await post.look(DOCS, TITLES)
    monkeypatch.setattr(module, "PATIENT_SECONDS", 3600)
    post.open.clear()
    for _ in range(64):
        await asyncio.wait_for(post.look(DOCS, TITLES), 20)
        post.seconds += ASK_SECONDS / 64
    assert post.asked == [("docs", NEWEST), ("titles", NEWEST)]
    await asyncio.wait_for(post.look(DOCS, TITLES), 20)
    assert post.asked == [("docs", NEWEST), ("titles", NEWEST), ("docs", NEWEST)], "again, and not waited for"
    post.sealed.clear()
    post.open.set()
    await eventually(lambda: post.letters.of(DOCS) != [])


@pytest.mark.parametrize("seen_before", [False, True])
async def test_a_database_that_does_not_answer_holds_nobody_up(
    post: Post, monkeypatch: pytest.MonkeyPatch, *, seen_before: bool
) -> None:
    monkeypatch.setattr(module, "PATIENT_SECONDS", 0.01)
    if seen_before:
        await post.look()
    post.open.clear()
    for _ in range(3):
        post.seconds += OLD_SECONDS
        await asyncio.wait_for(post.letters.look([DOCS]), 20)
    assert len(post.asked) == 1 + seen_before, "one question at a time"
    assert bool(post.letters.of(DOCS)) is seen_before
    post.open.set()
    await eventually(lambda: [letter.age_seconds for letter in post.letters.of(DOCS)] == [10])


async def test_a_list_that_is_a_little_old_is_shown_without_waiting(
    post: Post, monkeypatch: pytest.MonkeyPatch
) -> None:
    await post.look()
    monkeypatch.setattr(module, "PATIENT_SECONDS", 3600)
    post.open.clear()
    post.seconds += ASK_SECONDS
    await asyncio.wait_for(post.letters.look([DOCS]), 20)
    assert post.letters.of(DOCS)[0].age_seconds == 10 + ASK_SECONDS


async def test_a_close_ends_the_question(post: Post, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENT_SECONDS", 0.01)
    post.open.clear()
    await post.letters.look([DOCS])
    asking = post.letters._asking
    assert asking is not None
    post.letters.close()
    await asyncio.wait([asking], timeout=20)
    assert asking.cancelled()


def pipeline(name: PipelineName, *, model_id: str | None = None) -> Pipeline:
    return Pipeline(
        name=name,
        source=f"public.{name}",
        embeddings=f"public.{name}_embeddings",
        queue=name,
        model="tiny",
        model_id=None if model_id is None else ModelId(model_id),
        dimensions=32,
        long_documents=LongDocuments.MEAN,
        enabled=True,
    )


async def test_the_parts_are_put_together(post: Post) -> None:
    recent = Recent(lambda: post.seconds)
    staffed = [
        Staffed(pipeline(DOCS, model_id="tiny@1"), "waiting", "the database is away"),
        Staffed(pipeline(TITLES), "paused", None),
    ]
    overviews = Overviews(
        version="1.2.3",
        database="app@db:5432/shop",
        ready=lambda: (False, ["the database is away"]),
        staffed=lambda: staffed,
        recent=recent,
        letters=post.letters,
        clock=lambda: post.seconds,
    )
    recent.observed(Observation((OBSERVED,), None, None))
    recent.documents(DOCS, Outcome.EMBEDDED, 30)
    recent.documents(DOCS, Outcome.GONE, 1)
    recent.freshness(DOCS, 0.2)
    recent.circuit("docs", "open")
    post.seconds += 10
    found = (await overviews()).model_dump()
    assert {name: found[name] for name in ("version", "database", "uptime_seconds", "ready", "reasons")} == {
        "version": "1.2.3",
        "database": "app@db:5432/shop",
        "uptime_seconds": 10,
        "ready": False,
        "reasons": ["the database is away"],
    }
    assert found["observed_seconds_ago"] == 10
    docs, titles = found["pipelines"]
    assert (docs["name"], docs["source"], docs["model"]) == ("docs", "public.docs", "tiny@1")
    assert (docs["state"], docs["reason"], docs["circuit"]) == ("waiting", "the database is away", "open")
    assert docs["queue"] == {
        "live": {"depth": 5, "in_flight": 2, "oldest_seconds": 1.5},
        "bulk": {"depth": 100, "in_flight": 3, "oldest_seconds": 60},
        "dead": 7,
    }
    assert (docs["documents"], docs["coverage"]) == (1000, 1 - 112 / 1000)
    assert docs["sweep"] == {"walking": True, "scanned": 40, "age_seconds": 9.5}
    assert (docs["rate"], docs["outcomes"]) == (3, {"embedded": 30, "gone": 1})
    assert docs["freshness"]["count"] == 1
    assert docs["freshness"]["p50"] == docs["freshness"]["p99"] == pytest.approx(0.2, rel=0.05)
    assert [letter["key"] for letter in docs["dead_letters"]] == ["7"]
    assert (titles["model"], titles["state"], titles["dead_letters"]) == ("tiny", "paused", [])
    assert titles["queue"]["live"] == {"depth": 0, "in_flight": 0, "oldest_seconds": None}
    assert (titles["documents"], titles["coverage"], titles["sweep"]["walking"]) == (None, None, False)
    assert found["history"]["step_seconds"] == 5
    assert found["history"]["series"]["docs"]["embedded"] == [30, 0, 0]
    assert found["history"]["series"]["docs"]["depth"] == [105, 105, 105]
    assert found["history"]["series"]["titles"]["depth"] == [None, None, None]
    assert post.asked == [("docs", NEWEST)], "only of the pipeline that has dead letters"
